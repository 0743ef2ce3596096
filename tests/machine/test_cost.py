"""What a snapshot costs in an image that has many: as much as in one that has few."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import pyvirtio
from pyvirtio import DirtyPages, Machine, MachineSnapshots, MemoryDisk
from pyvirtio.backend.filter import FilterDisk
from pyvirtio.machine.dirty import PAGE

RAM = 40_000
FEW, MANY = 20, 320


def steps_of(work: Callable[[], object]) -> int:
    """How many instructions of Python the library runs for ``work``."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "call":
            if not frame.f_globals.get("__name__", "").startswith("pyvirtio"):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            count += 1
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


class Guest:
    """A machine with a disk, and an image for its RAM beside it."""

    def __init__(self) -> None:
        self.ram, self.dirty = bytearray(b"x" * RAM), DirtyPages(RAM)
        self.disks: list[Any] = [
            pyvirtio.create_disk(MemoryDisk(growable=True), size) for size in (1 << 20, 512)
        ]
        self.snapshots = MachineSnapshots(
            Machine({}, {"main": self.ram}),
            self.disks,
            state_disk=self.disks[1],
            dirty={"main": self.dirty},
        )

    def run(self, number: int) -> None:
        """A page of RAM changes, and a cluster of the disk; always in the same places."""
        self.ram[5000] = number & 0xFF
        self.dirty.mark(5000, 1)
        self.disks[0].write(65536, bytes([number & 0xFF]) * 100)

    def save_up_to(self, count: int) -> None:
        for number in range(len(self.disks[0].snapshots), count):
            self.run(number)
            self.snapshots.savevm(f"s{number}")


@pytest.fixture(scope="module")
def costs() -> dict[str, list[int]]:
    """By operation: its steps with few snapshots in the images, and with many."""
    guest, costs = Guest(), dict[str, list[int]]()
    for count in (FEW, MANY):
        guest.save_up_to(count)
        for name, work in (
            ("savevm", lambda: guest.snapshots.savevm("another")),
            ("loadvm", lambda: guest.snapshots.loadvm("s3")),
            ("delvm", lambda: guest.snapshots.delvm("another")),
        ):
            guest.run(255)
            costs.setdefault(name, []).append(steps_of(work))
    assert all(disk.check().clean for disk in guest.disks)
    return costs


@pytest.mark.parametrize("operation", ["savevm", "loadvm", "delvm"])
def test_it_takes_no_more_steps_in_an_image_with_many(
    costs: dict[str, list[int]], operation: str
) -> None:
    few, many = costs[operation]
    # The snapshots' own tables are copied in bulk; less than a step for each of the others.
    assert many - few < (MANY - FEW) // 2


class CountingDisk(FilterDisk):
    """Knows how often it was read, and how much of it."""

    reads = 0
    read_bytes = 0

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.reads += 1
        self.read_bytes += length
        super()._readv(offset, views, length)


@pytest.mark.parametrize(("distance", "reads"), [(2, 10), (8, 10), (10, 110)])
def test_pages_that_lie_scattered_are_read_in_rows(distance: int, reads: int) -> None:
    """Of the first snapshot's row of pages the last one has but every ``distance``-th: what lies
    between is read with them, unless that is more than it saves."""
    pages = 100 * distance
    ram = bytearray(random.Random(1).randbytes(pages * PAGE))
    file = CountingDisk(MemoryDisk(growable=True))
    disk = pyvirtio.create_disk(file, 1 << 20, cluster_size=PAGE)
    snapshots = MachineSnapshots(Machine({}, {"main": ram}), [disk])
    snapshots.savevm("one")
    for page in range(pages):
        if page % distance:
            ram[page * PAGE] ^= 1
    snapshots.savevm("two")
    now, ram[:] = bytes(ram), bytes(len(ram))
    with disk.snapshots.open("two") as view:
        state = view.vmstate.size - len(ram)  # the stream, and its room
        file.reads = 0
        assert view.vmstate.read(state, len(ram)) == now
    assert file.reads < reads
    assert (file.reads > 100) == (distance > 8)
    snapshots.loadvm("two")
    assert ram == now


def test_ram_is_read_once() -> None:
    """What has been checked is what is loaded: the file cannot change in between."""
    ram = bytearray(random.Random(1).randbytes(1 << 20))
    file = CountingDisk(MemoryDisk(growable=True))
    disk = pyvirtio.create_disk(file, 1 << 20, cluster_size=PAGE)
    snapshots = MachineSnapshots(Machine({}, {"main": ram}), [disk])
    snapshots.savevm("one")
    file.read_bytes = 0
    snapshots.loadvm("one")
    assert file.read_bytes < len(ram) * 5 // 4
