"""Disks on PCI, and other people's drivers for them: one boot of U-Boot, one of Debian's Linux."""

from __future__ import annotations

import re
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pyvirtio

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.board import Board
from examples.emulator.firmware import find_u_boot
from examples.emulator.guest import LinuxGuest
from examples.emulator.linux import find_linux
from examples.emulator.packages import PackageError
from examples.emulator.rootfs import find_root, find_tool, make_overlay
from examples.emulator.saving import machine_of
from examples.emulator.script import Session
from support.peers import requires
from support.qemu import qemu_check

MIB = 1 << 20
PROMPT = "\n=> "
LOADED_AT = 0x8400_0000
BOOK = b"".join(b"line %d\n" % n for n in range(10_000))


# -- U-Boot: a modern device, and a transitional one that it uses as a legacy device ---------------


@dataclass
class Prompt:
    """U-Boot at its prompt, and the disks that it has found."""

    board: Board
    session: Session
    disks: list[pyvirtio.Disk]

    def say(self, command: str) -> str:
        return self.session.command(command, PROMPT)


@pytest.fixture(scope="module")
def u_boot(tmp_path_factory: pytest.TempPathFactory) -> Prompt:
    try:
        program, mke2fs = find_u_boot(), find_tool("mke2fs")
    except PackageError as error:
        pytest.skip(f"no U-Boot, or no file system for it: {error}")
    folder = tmp_path_factory.mktemp("u-boot")
    (folder / "tree").mkdir()
    (folder / "tree" / "book.txt").write_bytes(BOOK)
    image = folder / "disk.raw"
    command = [mke2fs, "-q", "-t", "ext2", "-d", folder / "tree", image, "1M"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    session = Session()
    disks = [pyvirtio.MemoryDisk(bytearray(image.read_bytes())) for _ in range(2)]
    board = Board(session.send_out, disks=disks[:1], pci=True)
    board.plug_into_pci(disks[1], transitional=True)
    session.connect(board)
    board.start(board.load(program))
    session.expect("stop autoboot")
    session.send("\r")
    session.expect(PROMPT)
    prompt = Prompt(board, session, disks)
    prompt.say("virtio scan")
    return prompt


def test_u_boot_has_its_drivers_for_both(u_boot: Prompt) -> None:
    tree = u_boot.say("dm tree")
    assert re.search(r"virtio +\d+ +\[ \+ \] +virtio-pci\.m ", tree)
    assert re.search(r"virtio +\d+ +\[ \+ \] +virtio-pci\.l ", tree)


@pytest.mark.parametrize("number", [0, 1], ids=["modern", "transitional"])
def test_u_boot_reads_a_file(u_boot: Prompt, number: int) -> None:
    said = u_boot.say(f"load virtio {number}:0 {LOADED_AT:x} /book.txt")
    assert f"{len(BOOK)} bytes read" in said
    said = u_boot.say(f"crc32 {LOADED_AT:x} {len(BOOK):x}")
    assert f"==> {zlib.crc32(BOOK):08x}" in said


@pytest.mark.parametrize("number", [0, 1], ids=["modern", "transitional"])
def test_u_boot_writes(u_boot: Prompt, number: int) -> None:
    u_boot.say(f"virtio dev {number}")
    u_boot.say(f"mw.l {LOADED_AT:x} {0x2A2A2A00 + number:x} 80")
    assert "1 blocks written: OK" in u_boot.say(f"virtio write {LOADED_AT:x} 7d0 1")
    assert u_boot.disks[number].read(2000 * 512, 512) == bytes((number, 0x2A, 0x2A, 0x2A)) * 128


def test_another_board_goes_on_with_disks_on_pci(u_boot: Prompt) -> None:
    state = pyvirtio.MemoryDisk(0, growable=True)
    machine_of(u_boot.board).save(state)
    u_boot.board.close()
    session = Session()
    board = Board(session.send_out, disks=u_boot.disks[:1], pci=True)
    board.plug_into_pci(u_boot.disks[1], transitional=True)
    machine_of(board).load(state)
    session.connect(board)
    prompt = Prompt(board, session, u_boot.disks)
    for number, disk in enumerate(u_boot.disks):
        disk.write(1000 * 512, b"read by board %d" % number)
        prompt.say(f"virtio dev {number}")
        prompt.say(f"virtio read {LOADED_AT:x} 3e8 1")
        assert f"read by board {number}" in prompt.say(f"md.b {LOADED_AT:x} 10")


# -- Linux: modern devices, one with packed rings, and one that it is told to use as legacy -------


@dataclass
class Rig:
    """A guest and the disks that it has: vda, vdb and so on."""

    guest: LinuxGuest
    overlay: Path
    root: pyvirtio.Disk
    legacy: pyvirtio.Disk
    shared: pyvirtio.Disk


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    try:
        find_linux()
        find_root()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    folder = tmp_path_factory.mktemp("pci")
    overlay = make_overlay(folder / "root.qcow2")
    root = pyvirtio.open_disk(overlay)
    legacy = pyvirtio.create_disk(folder / "legacy.qcow2", 16 * MIB)
    packed = pyvirtio.VirtioBlk(pyvirtio.MemoryDisk(8 * MIB), packed=True, num_queues=2)
    shared = pyvirtio.MemoryDisk(8 * MIB)

    def make_board(*arguments: object, **options: object) -> Board:
        board = Board(*arguments, pci=True, **options)  # type: ignore[arg-type]
        board.plug_into_pci(legacy, transitional=True)
        board.plug_into_pci(packed)
        board.plug_into_pci(pyvirtio.MemoryDisk(MIB))
        board.plug_into_pci(shared)
        return board

    guest = LinuxGuest([root], make_board=make_board, arguments="virtio_pci.force_legacy=1")
    yield Rig(guest, overlay, root, legacy, shared)
    root.close()
    legacy.close()


def test_linux_uses_each_interface(linux: Rig) -> None:
    run = linux.guest.run
    assert "virtio-pci-modern" in run("cat /proc/iomem")
    assert "virtio-pci-legacy" in run("cat /proc/ioports")
    version_1 = "cut -c33 /sys/block/{}/device/features"
    assert run(version_1.format("vda")).strip() == "1"
    assert run(version_1.format("vdb")).strip() == "0"
    assert run("cut -c35 /sys/block/vdc/device/features").strip() == "1"  # packed rings


def test_linux_writes_its_root_disk(linux: Rig) -> None:
    linux.guest.run("echo stable from here on >note && sync note")
    offset = 0
    found = False
    for extent in linux.root.extents():
        if extent.data and extent.depth == 0:
            found |= b"stable from here on" in linux.root.read(offset, extent.length)
        offset += extent.length
    assert found


@pytest.mark.parametrize("disk", ["vdb", "vdc", "vde"], ids=["legacy", "packed", "shared line"])
def test_linux_writes_and_reads_files(linux: Rig, disk: str) -> None:
    run = linux.guest.run
    mounted = f"mount /dev/{disk} /mnt"
    run(f"mkfs.ext4 -q /dev/{disk} && {mounted}")
    run("dd if=/dev/urandom of=/mnt/file bs=64k count=4 conv=fsync 2>/dev/null")
    before = run("sha256sum /mnt/file")
    run(f"umount /mnt && {mounted}")
    assert run("sha256sum /mnt/file") == before
    run("umount /mnt")


def test_two_disks_share_a_line(linux: Rig) -> None:
    assert "virtio0, virtio4" in linux.guest.run("cat /proc/interrupts")


def test_fstrim_gives_the_space_back(linux: Rig) -> None:
    run = linux.guest.run

    def data() -> int:
        return sum(extent.length for extent in linux.legacy.extents() if extent.data)

    run("mount /dev/vdb /mnt")
    run("dd if=/dev/vda of=/mnt/litter bs=1M count=4 conv=fsync 2>/dev/null")
    full = data()
    run("rm /mnt/litter && sync && fstrim /mnt && umount /mnt")
    # Not to the byte: the clusters at the edges hold other things, too.
    assert full - data() >= 3 * MIB


def test_disks_grow_while_linux_runs(linux: Rig) -> None:
    linux.legacy.truncate(24 * MIB)
    linux.shared.truncate(9 * MIB)
    linux.guest.run("sleep 1")
    for disk, size in (("vdb", 24 * MIB), ("vde", 9 * MIB)):
        assert linux.guest.run(f"cat /sys/block/{disk}/size").strip() == str(size // 512)
    linux.guest.run("echo beyond | dd of=/dev/vdb bs=1M seek=20 conv=fsync 2>/dev/null")
    assert linux.legacy.read(20 * MIB, 6) == b"beyond"


def test_linux_resets_a_function_and_takes_it_again(linux: Rig) -> None:
    run = linux.guest.run
    run("cd /sys/bus/pci/drivers/virtio-pci && echo 0000:00:01.0 >unbind")
    assert "vdb" not in run("ls /sys/block")
    assert run("cd /sys/bus/pci/devices/0000:00:01.0 && cat reset_method").strip() == "af_flr"
    run("echo 1 >reset && echo 0000:00:01.0 >/sys/bus/pci/drivers/virtio-pci/bind; cd")
    run("mount -o ro /dev/vdb /mnt && ls /mnt/file && umount /mnt")


def test_linux_removes_a_function_and_finds_it_again(linux: Rig) -> None:
    run = linux.guest.run
    run("echo 1 >/sys/bus/pci/devices/0000:00:04.0/remove")
    assert "vde" not in run("ls /sys/block")
    run("echo 1 >/sys/bus/pci/rescan")
    run("mount /dev/vde /mnt && ls /mnt/file && umount /mnt")


def test_linux_has_nothing_to_say_against_the_disks(linux: Rig) -> None:
    assert not linux.guest.warnings()


@requires("qemu-img")
def test_image_is_sound_after_linux_has_shut_down(linux: Rig) -> None:
    linux.guest.power_off()
    linux.root.close()
    qemu_check(linux.overlay)


# -- the board -----------------------------------------------------------------------------------


def test_board_without_pci_has_nothing_to_plug_into() -> None:
    with pytest.raises(ValueError, match="no PCI"):
        Board(lambda byte: None, ram=8 * MIB).plug_into_pci(pyvirtio.MemoryDisk(MIB))


def test_functions_that_are_not_there_read_as_ones(guest) -> None:
    machine = guest(
        """
        li t0, 0x30000000
        lw t1, 0(t0)        # device 0, function 0
        sw t1, 0(s0)
        li t2, 0x1000
        add t2, t0, t2
        lw t1, 0(t2)        # function 1
        sw t1, 4(s0)
        li t2, 0x8000
        add t2, t0, t2
        sw zero, 0(t2)      # device 1: ignored
        lhu t1, 0(t2)
        sd t1, 8(s0)
        li t0, 0x40000000   # memory where no BAR is
        sw zero, 0(t0)
        lbu t1, 3(t0)
        sd t1, 16(s0)
        """,
        disks=[pyvirtio.MemoryDisk(MIB)],
        pci=True,
    )
    assert machine.run()[:3] == [0xFFFF_FFFF_1042_1AF4, 0xFFFF, 0xFF]
