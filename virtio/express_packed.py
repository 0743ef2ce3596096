"""The usual requests of a packed queue in one function: the twin of :mod:`.express`.

Where ring and requests lie in the largest piece of RAM, a read or write of whole sectors inside the
disk, with header, data and status in three neighbouring descriptors or in one indirect table, is
recognised and done without a chain being made of it. Anything else is left to the long way before
anything has been changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .layout import (
    LITTLE,
    SECTOR_SIZE,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTQ_DESC_F_AVAIL,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_USED,
    VIRTQ_DESC_F_WRITE,
)
from .memory import GuestMemory
from .packed import PackedRing
from .ring import Chain, QueueState
from .service import HELD

if TYPE_CHECKING:
    from .blk import VirtioBlk
    from .queue import Queue

__all__ = ["make_packed_express"]

_NEXT_WRITE = VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE

_Usual = tuple[bool, int, int, int, int, int, int]
"""A usual request: is it a read, sector, where its data is in RAM, how long, where its status;
buffer id, places of the ring."""


def make_packed_express(
    blk: VirtioBlk, queue: Queue, ring: PackedRing, memory: GuestMemory, budget: int
) -> Callable[[], None] | None:
    """A function that serves ``queue`` as :class:`.service.Service` does itself.

    None: there is no short way for a ring that lies there, or with these features.
    """
    plain = memory.plain_region()
    if plain is None or sys.byteorder != "little" or ring.in_order:
        return None
    base, end, buffer = plain
    if not ring.lies_in(base, end):
        return None
    usual = _make_recogniser(blk, ring, plain)
    disk, process_next, publish = blk.disk, blk.service.process_next, ring.publish
    nothing: list[Any] = []

    def express() -> None:
        left = budget
        # Not kept from kick to kick: an open view keeps a mmap from being closed.
        ram = memoryview(buffer)
        try:
            while count := ring.ready():
                left -= count
                while count:
                    count -= 1
                    if (request := usual()) is None:
                        process_next(queue, ring)
                        if queue.ring is not ring:  # reset or paused from inside
                            if queue.parked is not ring:
                                return
                            count = left = 0
                        continue
                    reading, sector, start, length, status_byte, ident, slots = request
                    view = ram[start : start + length]
                    written, status = 1, VIRTIO_BLK_S_OK
                    try:
                        if reading:
                            disk.readv(sector * SECTOR_SIZE, [view])
                            written += length
                        else:
                            disk.writev(sector * SECTOR_SIZE, [view], fua=not blk.writeback)
                    except Exception as error:
                        status = blk.status_of(error, sector, reading)
                        if status == HELD:
                            queue.held.append(ring.pop())
                            count = left = 0
                            continue
                        if status == VIRTIO_BLK_S_OK and reading:  # the error is ignored
                            written += length
                    finally:
                        view.release()
                    if queue.ring is not ring:  # reset or paused from inside
                        if queue.parked is not ring:
                            return
                        count = left = 0
                    ram[status_byte] = status
                    ring.skip(slots)
                    ring.push(tuple.__new__(Chain, (ident, nothing, nothing, slots)), written)
                if publish():
                    queue.interrupt = True
                if left <= 0:
                    break
            queue.pending = left <= 0
        finally:
            ram.release()

    return express


def _make_recogniser(
    blk: VirtioBlk, ring: PackedRing, plain: tuple[int, int, Any]
) -> Callable[[], _Usual | None]:
    """A function that gives the next request of the ring, or None if it is no usual one."""
    base, end, buffer = plain
    state: QueueState = ring.state
    three = LITTLE.three_desc.unpack_from
    unpack_header = LITTLE.blk_request.unpack_from
    table, indirect = state.descriptor_area - base, ring.indirect
    last_slot, last_header, last_table = state.size - 3, end - 16, end - 48

    def usual() -> _Usual | None:
        slot = state.next_avail
        if slot > last_slot:
            return None
        available = VIRTQ_DESC_F_AVAIL if state.avail_wrap else VIRTQ_DESC_F_USED
        header, size, ident, flags, data, length, _, kind, status_byte, single, last_ident, last = (
            three(buffer, table + 16 * slot)
        )
        slots = 3
        if flags == available | VIRTQ_DESC_F_NEXT:
            ident = last_ident
            kind ^= available
            last ^= available
        elif flags == available | VIRTQ_DESC_F_INDIRECT and size == 48 and indirect:
            if not base <= header <= last_table:
                return None
            header, size, _, flags, data, length, _, kind, status_byte, single, _, last = three(
                buffer, header - base
            )
            if flags & VIRTQ_DESC_F_WRITE:
                return None
            # Of a table only WRITE means something (PKD-36).
            kind = kind & VIRTQ_DESC_F_WRITE | VIRTQ_DESC_F_NEXT
            last &= VIRTQ_DESC_F_WRITE
            slots = 1
        else:
            return None
        if (
            size != 16
            or single != 1
            or last != VIRTQ_DESC_F_WRITE
            or length & (SECTOR_SIZE - 1)
            or not base <= header <= last_header
            or not base <= status_byte < end
            or data < base
            or data + length > end
        ):
            return None
        what, _, sector = unpack_header(buffer, header - base)
        if sector + length // SECTOR_SIZE > blk.capacity:
            return None
        if what == VIRTIO_BLK_T_IN:
            if kind != _NEXT_WRITE:
                return None
            return True, sector, data - base, length, status_byte - base, ident, slots
        if what != VIRTIO_BLK_T_OUT or kind != VIRTQ_DESC_F_NEXT or blk.read_only:
            return None
        return False, sector, data - base, length, status_byte - base, ident, slots

    return usual
