"""A virtio disk: a request is done before a snapshot is taken, or pending in the ring after."""

from __future__ import annotations

import time
from threading import Event, Semaphore
from typing import Any

import pytest

import pyvirtio
from pyvirtio import DirtyPages, GuestMemory, Machine, MachineSnapshots, MemoryDisk
from pyvirtio.backend.filter import FilterDisk
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Arena, BlockDriver, Registers

BASE = 0x8000_0000
RAM = 1 << 20


class StoppingDisk(FilterDisk):
    """Has writes wait while it is not ``going``."""

    def __init__(self, below: pyvirtio.Disk) -> None:
        super().__init__(below)
        self.going = Event()
        self.going.set()
        self.entered = Semaphore(0)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self.entered.release()
        assert self.going.wait(60)
        super()._writev(offset, views, length)


class Board:
    """RAM, a device, its driver, and snapshots of all; ``marks``: stores are noted."""

    def __init__(self, marks: bool, io_threads: int = 0) -> None:
        self.ram = bytearray(RAM)
        dirty = DirtyPages(RAM)
        memory = GuestMemory.from_buffer(
            self.ram, BASE, on_write=lambda pa, length: dirty.mark(pa - BASE, length)
        )
        self.disk: Any = pyvirtio.create_disk(MemoryDisk(growable=True), RAM, cluster_size=4096)
        self.slow = StoppingDisk(self.disk)
        self.device = pyvirtio.VirtioBlk(self.slow, io_threads=io_threads)
        self.mmio = pyvirtio.VirtioMmio(self.device, memory, lambda level: None, notify="deferred")
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


def test_what_threads_were_at_is_done_before_and_the_rest_is_pending_after() -> None:
    board = Board(marks=True, io_threads=1)
    board.slow.going.clear()
    heads = [board.write(sector, sector) for sector in range(1, 6)]
    assert board.slow.entered.acquire(timeout=60)  # the first is under way
    board.device.service.pause()
    board.slow.going.set()
    board.device.pause()
    board.snapshots.savevm("in flight")
    pending = bytes(board.ram)
    answers = [board.driver._pending[head].status - BASE for head in heads]
    for back in (False, True):
        if back:
            board.disk.write(512, b"\xff" * 2560)  # after the snapshot
            board.device.pause()
            board.snapshots.loadvm("in flight")
        assert board.ram == pending
        assert [board.sector(number) for number in range(1, 6)] == [1, 0, 0, 0, 0]
        board.device.resume()
        deadline = time.monotonic() + 60
        while board.driver.ring.used_index < 5:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert [board.ram[at] for at in answers] == [0] * 5
        assert [board.sector(number) for number in range(1, 6)] == [1, 2, 3, 4, 5]
    board.device.detach()
    assert board.disk.check().clean
