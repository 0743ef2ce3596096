"""VIRTIO_F_ACCESS_PLATFORM: every address is translated by the emulator (BF-90, BF-91)."""

from __future__ import annotations

from typing import Any

import pytest

from pyvirtio import GuestError, GuestMemory
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Arena, BlockDriver, Buffer, DriverError
from pyvirtio.virtio.iommu import TranslatedMemory

PAGE = 4096
VIRTUAL = 0x10_0000_0000
PHYSICAL = 0x8000_0000
PAGES = 512


class Iommu:
    """Maps a range of I/O virtual pages to RAM, in reverse order of pages."""

    def __init__(self) -> None:
        self.pages = {VIRTUAL // PAGE + n: PHYSICAL + (PAGES - 1 - n) * PAGE for n in range(PAGES)}
        self.read_only: set[int] = set()

    def translate(self, address: int, length: int, write: bool) -> list[tuple[int, int]]:
        pieces = []
        while length:
            page = address // PAGE
            if page not in self.pages or (write and page in self.read_only):
                raise GuestError(f"no access at {address:#x}")
            size = min(length, PAGE - address % PAGE)
            pieces.append((self.pages[page] + address % PAGE, size))
            address += size
            length -= size
        return pieces


@pytest.fixture
def iommu() -> Iommu:
    return Iommu()


def behind(make_machine: Any, iommu: Iommu, **options: Any) -> Any:
    """A machine whose driver has I/O virtual addresses only."""
    machine = make_machine(iommu=iommu.translate, **options)
    memory = TranslatedMemory(machine.memory, iommu.translate)
    machine.driver = BlockDriver(
        machine.registers, memory, Arena(VIRTUAL, PAGES * PAGE), queue_size=16
    )
    return machine


@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
@pytest.mark.parametrize("packed", [False, True])
def test_rings_and_data_are_translated(
    make_machine: Any, iommu: Iommu, memory: str, packed: bool
) -> None:
    machine = behind(make_machine, iommu, memory=memory, packed=packed)
    machine.driver.start()
    data = bytes(range(256)) * 64  # over several pages, which are no neighbours
    machine.driver.write(3, data)
    assert machine.disk.content[3 * 512 : 3 * 512 + len(data)] == data
    assert machine.driver.read(3, 32) == data
    completion = machine.driver.request(at.VIRTIO_BLK_T_IN, 3, incoming=1024, indirect=0)
    assert completion.data == data[:1024]


def test_without_an_iommu_it_is_offered_only_where_asked_for(make_machine: Any) -> None:
    bit = at.VIRTIO_F_ACCESS_PLATFORM
    assert not make_machine().device.offered_features >> bit & 1
    machine = make_machine(access_platform=True)
    assert machine.device.offered_features >> bit & 1
    machine.driver.start()
    machine.driver.flush()


def test_a_driver_that_would_go_around_it_is_refused_bf_91(make_machine: Any, iommu: Iommu) -> None:
    machine = behind(make_machine, iommu)
    machine.driver.features &= ~(1 << at.VIRTIO_F_ACCESS_PLATFORM)
    with pytest.raises(DriverError, match="refuses"):
        machine.driver.start()


def test_no_access_is_the_drivers_error(make_machine: Any, iommu: Iommu) -> None:
    machine = behind(make_machine, iommu)
    machine.driver.start()
    address = machine.driver.arena.take(PAGE, PAGE)
    iommu.read_only.add(address // PAGE)
    header = machine.driver.arena.take(32, 32)
    machine.driver.memory.write(header, at.LITTLE.blk_request.pack(0, 0, 0) + b"\xff")
    ring = machine.driver.ring
    ring.add([Buffer(header, 16), Buffer(address, 512, True), Buffer(header + 16, 1, True)])
    ring.publish()
    machine.registers.notify(0)
    assert ring.collect() == [(0, 1)]
    assert machine.driver.memory.read(header + 16, 1) == b"\1"
    iommu.pages.clear()  # now the ring itself
    machine.registers.notify(0)
    assert machine.registers.status & at.STATUS_NEEDS_RESET


def test_a_status_that_may_not_be_written_needs_a_reset(make_machine: Any, iommu: Iommu) -> None:
    machine = behind(make_machine, iommu)
    machine.driver.start()
    header = machine.driver.arena.take(PAGE, PAGE)
    machine.driver.memory.write(header, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_FLUSH, 0, 0))
    iommu.read_only.add(header // PAGE)
    ring = machine.driver.ring
    ring.add([Buffer(header, 16), Buffer(header + 16, 1, True)])
    ring.publish()
    machine.registers.notify(0)
    assert machine.registers.status & at.STATUS_NEEDS_RESET
    assert machine.driver.memory.read(header + 16, 1) == b"\0"


@pytest.mark.parametrize("pieces", [[], [(PHYSICAL, 7)], [(PHYSICAL, 9), (PHYSICAL, -1)]])
def test_a_translation_of_another_length_is_refused(pieces: list[tuple[int, int]]) -> None:
    memory = GuestMemory.from_buffer(bytearray(PAGE), PHYSICAL)
    with pytest.raises(GuestError, match="translated"):
        TranslatedMemory(memory, lambda address, length, write: pieces).read(0, 8)


def test_a_piece_may_lie_in_two_regions(make_machine: Any) -> None:
    """Regions that are neighbours are one memory, whoever listens to writes."""
    heard: list[tuple[int, int]] = []
    halves = (bytearray(PAGE // 2), bytearray(PAGE // 2))
    below = GuestMemory.from_regions(
        [(PHYSICAL, halves[0]), (PHYSICAL + PAGE // 2, halves[1])],
        on_write=lambda pa, length: heard.append((pa, length)),
    )
    memory = TranslatedMemory(below, lambda address, length, write: [(address, length)])
    segments = [(PHYSICAL + PAGE // 2 - 8, 16)]
    views = memory.map(segments, True)
    for view in views:
        view[:] = b"8" * len(view)
    memory.commit(segments, views)
    assert bytes(halves[0][-8:] + halves[1][:8]) == b"8" * 16
    assert heard == segments


@pytest.mark.parametrize("kind", ["buffer", "callbacks"])
def test_a_translation_that_changes_under_a_request_is_as_it_was(kind: str) -> None:
    """Also for who listens to writes: the data are where they were mapped."""
    ram, heard = bytearray(PAGE), list[tuple[int, int]]()
    below: Any = GuestMemory.from_buffer(ram, on_write=lambda *piece: heard.append(piece))
    if kind == "callbacks":

        def store(pa: int, data: bytes) -> None:
            heard.append((pa, len(data)))
            ram[pa : pa + len(data)] = data

        below = GuestMemory.from_callbacks(lambda pa, length: ram[pa : pa + length], store)
    pieces = [(64, 16)]
    memory = TranslatedMemory(below, lambda address, length, write: pieces)
    views = memory.map([(0, 16)], True)
    views[0][:] = b"d" * 16
    pieces[:] = [(128, 8), (0, 8)]
    memory.commit([(0, 16)], views)
    assert (heard, ram.find(b"d" * 16)) == ([(64, 16)], 64)
