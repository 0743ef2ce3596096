"""The AIA's interrupt controllers, and Debian's Linux with its disks on MSI-X by them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pyvirtio

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.aplic import Aplic
from examples.emulator.board import Board
from examples.emulator.guest import LinuxGuest
from examples.emulator.imsic import Imsic
from examples.emulator.linux import RAM, find_linux
from examples.emulator.packages import PackageError
from examples.emulator.rootfs import find_root, make_overlay
from examples.emulator.saving import machine_of
from support.peers import requires
from support.qemu import qemu_check

MIB = 1 << 20
SISELECT, SIREG, STOPEI, STOPI = 0x150, 0x151, 0x15C, 0xDB0
DELIVERY, THRESHOLD, PENDING, ENABLE = 0x70, 0x72, 0x80, 0xC0


# -- IMSIC ---------------------------------------------------------------------------------------


class Hart:
    """An IMSIC with delivery on, as software sees it."""

    def __init__(self) -> None:
        self.line = False
        self.imsic = Imsic(self._set)
        self.state: Any = SimpleNamespace(mip=0, mie=0, mideleg=0x222)
        self.set(DELIVERY, 1)

    def _set(self, level: bool) -> None:
        self.line = level

    def set(self, register: int, value: int) -> None:
        assert self.imsic.write_csr(SISELECT, register)
        assert self.imsic.write_csr(SIREG, value)

    def get(self, register: int) -> int | None:
        self.imsic.write_csr(SISELECT, register)
        return self.imsic.read_csr(self.state, SIREG)

    def top(self) -> int | None:
        return self.imsic.read_csr(self.state, STOPEI)


@pytest.fixture
def hart() -> Hart:
    return Hart()


def test_a_message_interrupts_when_its_number_is_enabled(hart: Hart) -> None:
    hart.imsic.write(0, 4, 70)
    assert not hart.line
    assert hart.get(PENDING + 2) == 1 << 6
    hart.set(ENABLE + 2, 1 << 6)
    assert hart.line
    assert hart.top() == 70 << 16 | 70


def test_the_lowest_number_comes_first_and_each_once(hart: Hart) -> None:
    hart.set(ENABLE, 0xFF << 1)
    hart.set(ENABLE + 6, 1 << 63)
    for identity in (255, 3, 8, 3):
        hart.imsic.write(0, 4, identity)
    found = []
    while top := hart.top():
        found.append(top >> 16)
        hart.imsic.write_csr(STOPEI, 0)
    assert found == [3, 8, 255]
    assert not hart.line


def test_delivery_and_threshold_hold_back(hart: Hart) -> None:
    hart.set(ENABLE, 1 << 5)
    hart.imsic.write(0, 4, 5)
    hart.set(THRESHOLD, 5)
    assert not hart.line
    assert hart.top() == 0
    hart.set(THRESHOLD, 6)
    assert hart.line
    hart.set(DELIVERY, 0)
    assert not hart.line
    assert hart.top() == 5 << 16 | 5


def test_messages_may_be_big_endian_and_must_be_whole_and_known(hart: Hart) -> None:
    hart.set(ENABLE, (1 << 64) - 2)
    for size, offset, value in ((4, 0, 0), (4, 0, 256), (4, 0, 0xFFFF_FFFF), (1, 0, 7), (4, 8, 7)):
        hart.imsic.write(offset, size, value)
    assert not hart.line
    assert hart.imsic.read(0, 4) == 0
    hart.imsic.write(4, 4, 7 << 24)
    assert hart.top() == 7 << 16 | 7


def test_pending_bits_can_be_written_and_number_0_does_not_exist(hart: Hart) -> None:
    hart.set(PENDING, (1 << 64) - 1)
    assert hart.get(PENDING) == (1 << 64) - 2
    hart.set(ENABLE, (1 << 64) - 1)
    assert hart.get(ENABLE) == (1 << 64) - 2
    assert hart.get(PENDING + 1) is None  # odd ones are for harts of 32 bits
    assert hart.get(0x30) is None


def test_stopi_tells_the_most_urgent_that_is_enabled(hart: Hart) -> None:
    hart.state.mip = 1 << 9 | 1 << 5 | 1 << 1 | 1 << 7
    for enabled, major in ((0x2A2, 9), (0xA2, 1), (0xA0, 5), (0x80, 0), (0, 0)):
        hart.state.mie = enabled
        found = hart.imsic.read_csr(hart.state, STOPI)
        assert found is not None
        assert found >> 16 == major
        assert bool(found) == bool(major)


# -- APLIC ---------------------------------------------------------------------------------------

EDGE_RISE, EDGE_FALL, LEVEL_HIGH, LEVEL_LOW = 4, 5, 6, 7


class Wires:
    """An APLIC that is on, with sources 10 and 40 going to numbers 20 and 50."""

    def __init__(self, mode: int) -> None:
        self.sent: list[int] = []
        self.aplic = Aplic(self.sent.append, 40)
        write = self.aplic.write
        write(0, 4, 0x100)
        for source in (10, 40):
            write(4 * source, 4, mode)
            write(0x3000 + 4 * source, 4, source + 10)
            write(0x1EDC, 4, source)
        self.sent.clear()


def test_aplic_sends_messages_and_no_more(request: pytest.FixtureRequest) -> None:
    wires = Wires(LEVEL_HIGH)
    assert wires.aplic.read(0, 4) == 0x8000_0104
    assert wires.aplic.read(4 * 10, 4) == LEVEL_HIGH
    assert wires.aplic.read(0x3000 + 4 * 40, 4) == 50
    assert wires.aplic.read(0x1E04, 4) == 1 << 8


def test_a_level_is_sent_when_it_rises_and_again_on_demand() -> None:
    wires = Wires(LEVEL_HIGH)
    wires.aplic.set(10, True)
    wires.aplic.set(10, True)
    assert wires.sent == [20]
    assert wires.aplic.read(0x1D00, 4) == 1 << 10
    wires.aplic.write(0x2000, 4, 10)  # the driver is done, the wire is still high
    assert wires.sent == [20, 20]
    wires.aplic.set(10, False)
    wires.aplic.write(0x2000, 4, 10)
    assert wires.sent == [20, 20]


def test_a_level_that_falls_before_it_is_sent_is_not_sent() -> None:
    wires = Wires(LEVEL_HIGH)
    wires.aplic.write(0x1FDC, 4, 10)
    wires.aplic.set(10, True)
    assert wires.aplic.read(0x1C00, 4) == 1 << 10
    wires.aplic.set(10, False)
    wires.aplic.write(0x1EDC, 4, 10)
    assert wires.sent == []


@pytest.mark.parametrize("mode", [EDGE_RISE, EDGE_FALL, LEVEL_LOW])
def test_other_modes(mode: int) -> None:
    wires = Wires(mode)
    wires.aplic.set(40, True)
    rising = list(wires.sent)
    wires.aplic.set(40, False)
    assert (rising, wires.sent) == (([50], [50]) if mode == EDGE_RISE else ([], [50]))


def test_an_event_waits_to_be_enabled_and_can_be_taken_back() -> None:
    wires = Wires(LEVEL_HIGH)
    wires.aplic.write(0, 4, 0)
    for on in (True, False, True):
        wires.aplic.pulse(10, on)
    wires.aplic.write(0, 4, 0x100)
    assert wires.sent == [20]
    wires.aplic.write(0x2000, 4, 10)  # it was told of once
    assert wires.sent == [20]


def test_what_is_not_there_or_not_used_cannot_be_enabled() -> None:
    wires = Wires(LEVEL_HIGH)
    wires.aplic.write(4 * 10, 4, 0)
    for number in (0, 9, 10, 41, 5000):
        wires.aplic.write(0x1EDC, 4, number)
        wires.aplic.write(0x1CDC, 4, number)
    wires.aplic.set(10, True)
    assert wires.aplic.read(0x1E00, 4) == 0
    assert wires.aplic.read(4 * 41, 4) == 0
    wires.aplic.write(0x3000, 4, 33)
    assert wires.sent == [33]


# -- Linux ---------------------------------------------------------------------------------------


@dataclass
class Rig:
    """A guest and the disks that it has: vda, vdb, vdc."""

    guest: LinuxGuest
    overlay: Path
    disks: list[pyvirtio.Disk]


def make_board(send: Any, *, ram: int, disks: Any) -> Board:
    board = Board(send, ram=ram, disks=disks[:1], pci=True, aia=True)
    board.plug_into_pci(pyvirtio.VirtioBlk(disks[1], packed=True))
    board.plug_into_pci(disks[2], transitional=True)
    return board


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    try:
        find_linux()
        find_root()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    overlay = make_overlay(tmp_path_factory.mktemp("aia") / "root.qcow2")
    disks = [pyvirtio.open_disk(overlay), *(pyvirtio.MemoryDisk(8 * MIB) for _ in range(2))]
    arguments = "virtio_pci.force_legacy=1"
    yield Rig(LinuxGuest(disks, make_board=make_board, arguments=arguments), overlay, disks)
    disks[0].close()


def messages(rig: Rig) -> dict[str, int]:
    """How often each of a disk's messages has come."""
    table = rig.guest.run("cat /proc/interrupts")
    found = re.findall(r"^ *\d+: +(\d+) +PCI-MSIX-\S+ +\d+ Edge +(virtio\S+)", table, re.MULTILINE)
    return {name: int(count) for count, name in found}


def test_each_queue_and_each_configuration_has_a_message(linux: Rig) -> None:
    kinds = ("config", "req.0")
    assert set(messages(linux)) == {f"virtio{n}-{kind}" for n in range(3) for kind in kinds}
    version_1 = "cut -c33 /sys/block/{}/device/features"
    assert linux.guest.run(version_1.format("vda")).strip() == "1"
    assert linux.guest.run(version_1.format("vdc")).strip() == "0"  # the legacy interface


def test_work_is_verified(linux: Rig) -> None:
    before = messages(linux)
    linux.guest.run("workload msi 2")
    assert "msi is verified: 2 commits" in linux.guest.run("verify msi 2")
    assert messages(linux)["virtio0-req.0"] > before["virtio0-req.0"] + 20


@pytest.mark.parametrize("disk", ["vdb", "vdc"], ids=["packed", "legacy"])
def test_other_disks_write_and_read_files(linux: Rig, disk: str) -> None:
    run = linux.guest.run
    run(f"mkfs.ext4 -q /dev/{disk} && mount /dev/{disk} /mnt")
    run("dd if=/dev/urandom of=/mnt/file bs=64k count=4 conv=fsync 2>/dev/null")
    before = run("sha256sum /mnt/file")
    run(f"umount /mnt && mount /dev/{disk} /mnt")
    assert run("sha256sum /mnt/file") == before
    run("umount /mnt")


@pytest.mark.parametrize("number", [1, 2], ids=["packed", "legacy"])
def test_a_change_of_size_has_a_message_of_its_own(linux: Rig, number: int) -> None:
    before = messages(linux)
    linux.disks[number].truncate(9 * MIB)
    linux.guest.run("sleep 1")
    size = linux.guest.run(f"cat /sys/block/vd{'abc'[number]}/size")
    assert size.strip() == str(9 * MIB // 512)
    name = f"virtio{number}-config"
    assert messages(linux)[name] == before[name] + 1


def test_a_driver_that_goes_and_comes_back_has_messages_again(linux: Rig) -> None:
    run = linux.guest.run
    run("cd /sys/bus/pci/drivers/virtio-pci && echo 0000:00:01.0 >unbind")
    assert len(messages(linux)) == 4
    run("echo 0000:00:01.0 >bind; cd")
    run("mount -o ro /dev/vdb /mnt && ls /mnt/file && umount /mnt")
    assert len(messages(linux)) == 6


def test_another_board_goes_on(linux: Rig) -> None:
    state = pyvirtio.MemoryDisk(0, growable=True)
    machine_of(linux.guest.board).save(state)
    linux.guest.board.close()
    session = linux.guest.session
    linux.guest.board = make_board(session.send_out, ram=RAM, disks=linux.disks)
    machine_of(linux.guest.board).load(state)
    session.connect(linux.guest.board)
    before = messages(linux)
    linux.guest.run("workload again 1")
    assert "again is verified: 1 commits" in linux.guest.run("verify again 1")
    assert messages(linux)["virtio0-req.0"] > before["virtio0-req.0"]


def test_linux_has_nothing_to_say_against_it(linux: Rig) -> None:
    assert not linux.guest.warnings()


@requires("qemu-img")
def test_the_image_is_sound_after_linux_has_shut_down(linux: Rig) -> None:
    linux.guest.power_off()
    linux.disks[0].close()
    qemu_check(linux.overlay)
