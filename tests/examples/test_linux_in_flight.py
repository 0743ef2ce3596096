"""Linux's own requests are in the ring when the machine is saved: each is done before, or after.

The disk is served by a thread of its own, and slow: requests wait while the guest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from threading import Event, get_ident
from typing import Any

import pytest

import pyvirtio
from pyvirtio.backend.filter import FilterDisk
from pyvirtio.machine.dirty import PAGE
from pyvirtio.virtio import layout as at

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.board import Board
from examples.emulator.cpu import Stop
from examples.emulator.guest import LinuxGuest
from examples.emulator.linux import find_linux
from examples.emulator.packages import PackageError
from examples.emulator.rootfs import find_root, make_overlay
from examples.emulator.saving import machine_of
from support.peers import find_program
from support.qemu import qemu_img

WRITERS = 4
"""Processes of the guest that write a file each, request by request, and wait for every one."""
WRITE = "{{ dd if=/root/source of=/root/file{0} bs=4k oflag=direct 2>/tmp/said{0} & }}"
REQUESTS = 128


class StoppingDisk(FilterDisk):
    """Has writes wait while it is not ``going``."""

    def __init__(self, below: pyvirtio.Disk) -> None:
        super().__init__(below)
        self.going = Event()
        self.going.set()

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        assert self.going.wait(60)
        super()._writev(offset, views, length)


class ThreadedBoard(Board):
    """A board whose disks work while the guest does: what they raise in their own threads is told
    between two slices, and a guest that has nothing to do really waits for them."""

    def _plug_in(self, *how: Any) -> None:
        self._raised = SimpleQueue[tuple[int, bool]]()
        self._thread = get_ident()
        plic, self.plic = self.plic, self  # type: ignore[assignment]
        try:
            super()._plug_in(*how)
        finally:
            self.plic = plic

    def set(self, source: int, level: bool) -> None:
        """A device raises or lowers its line: what it called the PLIC for."""
        self._raised.put((source, level))
        if get_ident() == self._thread:
            self.deliver()

    def deliver(self) -> None:
        """Tell the PLIC what was raised meanwhile."""
        while True:
            try:
                self.plic.set(*self._raised.get_nowait())
            except Empty:
                return

    def _begin_slice(self) -> int:
        self.deliver()
        return super()._begin_slice()

    def _end_slice(self, count: int, stop: Stop) -> bool:
        self.deliver()
        return super()._end_slice(count, stop)

    def sleep(self, until: int | None = None) -> None:
        if any(is_busy(block) for block in self._blocks):
            time.sleep(0.0005)
        self.deliver()
        if not any(is_busy(block) for block in self._blocks):
            super().sleep(until)


def is_busy(block: pyvirtio.VirtioBlk) -> bool:
    """Whether a thread of the device has something to do, or is at it."""
    return not block.service.idle() or any(queue.pending for queue in block.queues)


def pending(block: pyvirtio.VirtioBlk) -> list[tuple[int, bytes]]:
    """The writes that are in the ring of a device that is paused, and not begun: (sector, data).
    Flushes and reads have no data."""
    memory = block._memory

    def number(address: int, length: int) -> int:
        return int.from_bytes(memory.read(address, length), "little")

    def chain(index: int, table: int) -> Iterator[tuple[int, int]]:
        while True:
            place = table + 16 * index
            address, length = number(place, 8), number(place + 8, 4)
            flags, index = number(place + 12, 2), number(place + 14, 2)
            if flags & at.VIRTQ_DESC_F_INDIRECT:
                yield from chain(0, address)
                return
            if not flags & at.VIRTQ_DESC_F_WRITE:
                yield address, length
            if not flags & at.VIRTQ_DESC_F_NEXT:
                return

    state = block.queues[0].state
    found = []
    for place in range(number(state.driver_area + 2, 2) - state.next_avail & 0xFFFF):
        slot = (state.next_avail + place) % state.size
        head = number(state.driver_area + 4 + 2 * slot, 2)
        (header, _), *parts = chain(head, state.descriptor_area)
        if number(header, 4) == at.VIRTIO_BLK_T_OUT:
            data = b"".join(memory.read(address, length) for address, length in parts)
            found.append((number(header + 8, 8), data))
    return found


def is_there(disk: pyvirtio.Disk, sector: int, data: bytes) -> bool:
    return disk.read(sector * 512, len(data)) == data


def run(board: Board, slices: int) -> None:
    for _ in range(slices):
        if board.step():
            board.sleep()


def test_requests_in_flight_are_done_before_a_snapshot_or_after_it(tmp_path):
    try:
        find_linux()
        find_root()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    overlay, ram_image = make_overlay(tmp_path / "overlay.qcow2"), tmp_path / "ram.qcow2"
    with (
        pyvirtio.open_disk(overlay) as disk,
        pyvirtio.create_disk(ram_image, 512, cluster_size=PAGE) as ram,
    ):
        slow = StoppingDisk(disk)
        block = pyvirtio.VirtioBlk(slow, io_threads=1)
        guest = LinuxGuest([block], make_board=ThreadedBoard)
        board = guest.board
        snapshots = pyvirtio.MachineSnapshots(machine_of(board), [disk, ram], state_disk=ram)

        def stop_device() -> None:
            block.service.pause()
            slow.going.set()
            block.pause()
            board.deliver()  # an interrupt on its way is the guest's state, too

        guest.run(f"dd if=/dev/urandom of=/root/source bs=4k count={REQUESTS} 2>/dev/null; sync")
        slow.going.clear()
        for writer in range(WRITERS):
            guest.run(WRITE.format(writer))
        wanted: dict[str, list[tuple[int, bytes]]] = {}
        for number in range(2):
            slow.going.clear()
            for _ in range(3000):
                run(board, 1)
                if len(pending(block)) > 1:
                    break
            stop_device()
            waiting = pending(block)
            assert len(waiting) > 1
            name = f"number {number}, {len(waiting)} in flight"
            snapshots.savevm(name)
            wanted[name] = waiting
            block.resume()
            run(board, 2)

        def finish() -> None:
            """The guest ends its work, and finds all of its files whole on the disk."""
            guest.run("wait; sync; echo 3 > /proc/sys/vm/drop_caches")
            guest.run(
                'for n in 0 1 2 3; do cmp /root/source /root/file$n || bad=1; done; [ -z "$bad" ]'
            )
            assert guest.run("cat /tmp/said*").count(f"{REQUESTS}+0 records out") == WRITERS
            assert not guest.warnings()
            assert disk.check().clean

        finish()
        for name, waiting in wanted.items():
            stop_device()
            snapshots.loadvm(name)
            assert pending(block) == waiting
            assert not any(is_there(disk, *each) for each in waiting)
            block.resume()
            while is_busy(block):
                time.sleep(0.001)
            # The guest has not run: so these are they.
            assert all(is_there(disk, *each) for each in waiting)
            finish()
        guest.power_off()
    for path in (overlay, ram_image):
        if find_program("qemu-img"):
            qemu_img("check", "-q", path)
