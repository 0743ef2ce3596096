"""A virtio disk: a request is done before a snapshot is taken, or pending in the ring after."""

from __future__ import annotations

from typing import Any

import pytest

import pyvirtio
from pyvirtio import DirtyPages, GuestMemory, Machine, MachineSnapshots, MemoryDisk
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Arena, BlockDriver, Registers

BASE = 0x8000_0000
RAM = 1 << 20


class Board:
    """RAM, a device, its driver, and snapshots of all; ``marks``: stores are noted."""

    def __init__(self, marks: bool) -> None:
        self.ram = bytearray(RAM)
        dirty = DirtyPages(RAM)
        memory = GuestMemory.from_buffer(
            self.ram, BASE, on_write=lambda pa, length: dirty.mark(pa - BASE, length)
        )
        self.disk: Any = pyvirtio.create_disk(MemoryDisk(growable=True), RAM, cluster_size=4096)
        device = pyvirtio.VirtioBlk(self.disk)
        self.mmio = pyvirtio.VirtioMmio(device, memory, lambda level: None, notify="deferred")
        registers = Registers(self.mmio.read, self.mmio.write)
        arena = Arena(BASE + 4096, RAM - 4096)
        self.driver = BlockDriver(registers, memory, arena, wait=self.mmio.poll)
        self.driver.start()
        self.snapshots = MachineSnapshots(
            Machine({"disk": self.mmio}, {"main": self.ram}),
            [self.disk],
            dirty={"main": dirty} if marks else {},
        )

    def write(self, sector: int, value: int) -> int:
        head = self.driver.submit(at.VIRTIO_BLK_T_OUT, sector, bytes([value]) * 512)
        self.driver.kick()
        return head

    def sector(self, number: int) -> int:
        return int(self.disk.read(512 * number, 1)[0])


@pytest.mark.parametrize("marks", [True, False])
def test_a_request_is_done_before_or_pending_after(marks: bool) -> None:
    board = Board(marks)
    board.snapshots.savevm("idle")
    board.driver.write(1, b"\1" * 512)
    head = board.write(2, 2)  # in the ring, not served yet
    board.snapshots.savevm("in flight")
    pending = bytes(board.ram)
    board.mmio.poll()
    board.disk.write(512, b"\xff" * 512)  # after the snapshot
    assert (board.sector(1), board.sector(2)) == (255, 2)
    board.ram[-1] = 7
    board.driver.memory.write(BASE + RAM - 1, b"\7")

    board.snapshots.loadvm("in flight")
    assert board.ram == pending
    assert (board.sector(1), board.sector(2)) == (1, 0)
    assert board.mmio.poll()
    assert board.driver.collect()[head].status == 0
    assert board.sector(2) == 2
    board.driver.write(3, b"\3" * 512)
    assert board.sector(3) == 3
    assert board.disk.check().clean
