"""Other people's firmware on the board, in both privilege modes, besides the demo."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pyvirtio

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.board import Board
from examples.emulator.firmware import find_u_boot, packages
from examples.emulator.layout import KERNEL_OFFSET, RAM_BASE
from examples.emulator.linux import COMMAND_LINE, RAM, find_linux
from examples.emulator.packages import PackageError
from examples.emulator.script import Session

PROMPT = "\n=> "


@pytest.fixture(scope="module")
def u_boot() -> Path:
    try:
        return find_u_boot()
    except PackageError as error:
        pytest.skip(f"no U-Boot: {error}")


@pytest.fixture(scope="module")
def opensbi() -> Path:
    try:
        folder = packages().get("opensbi")
    except PackageError as error:
        pytest.skip(f"no OpenSBI: {error}")
    return folder / "usr/lib/riscv64-linux-gnu/opensbi/generic/fw_jump.bin"


def test_opensbi_starts_u_boot_in_supervisor_mode_which_reads_the_disk(u_boot, opensbi):
    disk = pyvirtio.MemoryDisk(1 << 20)
    disk.write(512, b"found by the guest")
    session = Session()
    board = Board(session.send_out, disks=[disk])
    session.connect(board)
    smode = u_boot.parent.with_name("qemu-riscv64_smode") / "u-boot.bin"
    board.load(smode, RAM_BASE + KERNEL_OFFSET)
    board.start(board.load(opensbi))
    session.expect("Domain0 Next Mode         : S-mode")
    session.expect("stop autoboot")
    session.send("\r")
    session.expect(PROMPT)
    session.command("virtio scan", PROMPT)
    session.command("virtio read 84000000 1 1", PROMPT)
    assert "found by the gue" in session.command("md.b 84000000 10", PROMPT)
    session.send("poweroff\r")
    session.wait_for_power_off()


def test_opensbi_starts_linux_in_supervisor_mode(opensbi):
    try:
        linux = find_linux()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    session = Session()
    board = Board(session.send_out, ram=RAM)
    session.connect(board)
    board.load_linux(linux.kernel)
    arguments = COMMAND_LINE.replace("quiet", "")
    board.start(board.load(opensbi), arguments, linux.initramfs)
    said = session.expect("initramfs# ")
    assert "SBI implementation ID=0x1 " in said
    assert not re.search("WARNING|BUG|Oops|Unable to handle", said)
    session.send("/bin/busybox poweroff -f\r")
    session.wait_for_power_off()


def test_two_runs_of_u_boot_are_the_same_to_the_byte_and_the_tick(u_boot):
    ends = set()
    for _ in range(2):
        session = Session()
        board = Board(session.send_out, disks=[pyvirtio.MemoryDisk(1 << 20)])
        session.connect(board)
        board.start(board.load(u_boot))
        session.expect("stop autoboot")
        session.send("\r")
        session.expect(PROMPT)
        session.command("virtio scan", PROMPT)
        ends.add((bytes(session.transcript), board.clock.now(), hash(board.ram[:])))
    assert len(ends) == 1
