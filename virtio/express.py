"""The usual requests in one function: what the long way does in ten, for speed and nothing else.

The long way is a round of :class:`~.ring.Ring` calls with the request's parser and
:meth:`VirtioBlk.process` between, and it is the rule. This does the same where ring and requests
all lie in the largest piece of RAM, and for the one shape that nearly all requests have: a read or
write of whole sectors inside the disk, with header, data and status in three descriptors, direct
or in one indirect table. A chain that is not exactly that is left to the long way before anything
has been changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .layout import (
    SECTOR_SIZE,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
)
from .memory import GuestMemory
from .service import HELD
from .split import SplitRing

if TYPE_CHECKING:
    from .blk import VirtioBlk
    from .queue import Queue

__all__ = ["make_express"]

_NEXT_WRITE = VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE

_Usual = tuple[bool, int, int, int, int]
"""A usual request: is it a read, sector, where its data is in RAM, how long, where its status."""


def make_express(
    blk: VirtioBlk, queue: Queue, ring: SplitRing, memory: GuestMemory, budget: int
) -> Callable[[], None] | None:
    """A function that serves ``queue`` as :class:`.service.Service` does; None where none can."""
    plain = memory.plain_region()
    places = None if plain is None else _places(ring, *plain[:2])
    if plain is None or places is None or ring.notify_on_empty:
        return None
    base, _, buffer = plain
    available, heads, used_event, used, avail_event, elements = places
    state, size, write_used = ring.state, ring.state.size, ring.structs.used_elem.pack_into
    usual = _make_recogniser(blk, ring, state.descriptor_area - base, plain)
    disk, mask, fence, event_idx = blk.disk, size - 1, ring.fence, ring.event_idx
    process_next = blk.service.process_next
    in_order, begin_batch = ring.in_order, ring.begin_batch

    def express() -> None:
        left = budget
        if in_order:
            begin_batch()  # of what is done here the ring hears nothing
        # Not kept from kick to kick: an open view keeps a mmap from being closed.
        ram = memoryview(buffer)
        words = ram.cast("H")
        try:
            while count := words[available] - state.next_avail & 0xFFFF:
                left -= count
                if count > size:
                    raise ring.jumped(count)
                while count:
                    count -= 1
                    position = state.next_avail
                    head = words[heads + (position & mask)]
                    if (request := usual(head)) is None:
                        process_next(queue, ring)
                        if queue.ring is not ring:  # reset or paused from inside
                            if queue.parked is not ring:
                                return
                            count = left = 0
                        continue
                    state.next_avail = position + 1 & 0xFFFF
                    reading, sector, start, length, status_byte = request
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
                        written += length if reading and status == VIRTIO_BLK_S_OK else 0
                        if status == HELD:
                            _hold(queue, ring, position)
                            count = left = 0
                            continue
                    finally:
                        view.release()
                    if queue.ring is not ring:  # reset or paused from inside
                        if queue.parked is not ring:
                            return
                        count = left = 0
                    ram[status_byte] = status
                    index = state.used_index
                    write_used(buffer, elements + 8 * (index & mask), head, written)
                    state.used_index = index + 1 & 0xFFFF
                if event_idx:  # as in SplitRing.publish
                    old, new = ring.published, state.used_index
                    words[used] = ring.published = new
                    words[avail_event] = state.next_avail
                    fence()
                    if new - words[used_event] - 1 & 0xFFFF < new - old & 0xFFFF:
                        queue.interrupt = True
                elif ring.publish():
                    queue.interrupt = True
                if left <= 0:
                    break
            queue.pending = left <= 0
        finally:
            words.release()
            ram.release()

    return express


def _places(ring: SplitRing, base: int, end: int) -> tuple[int, int, int, int, int, int] | None:
    """Where in RAM from ``base`` to ``end`` the ring's fields are; None if they do not lie so.

    As 16-bit words: available index, heads, used_event, used index, avail_event. In bytes: the
    used elements.
    """
    state = ring.state
    driver, device = state.driver_area - base, state.device_area - base
    if (end - base) % 2 or driver % 2 or device % 2 or not ring.lies_in(base, end):
        return None
    if ring.structs.order != sys.byteorder:
        return None
    heads, used = driver // 2 + 2, device // 2 + 1
    return heads - 1, heads, heads + state.size, used, used + 1 + 4 * state.size, device + 4


def _hold(queue: Queue, ring: SplitRing, position: int) -> None:
    """Have the chain that was taken at ``position`` done again later."""
    ring.state.next_avail = position
    queue.held.append(ring.pop())


def _make_recogniser(
    blk: VirtioBlk, ring: SplitRing, table: int, plain: tuple[int, int, Any]
) -> Callable[[int], _Usual | None]:
    """A function that gives the request in the chain at a head, or None if it is no usual one."""
    base, end, buffer = plain
    three, one = ring.structs.three_desc.unpack_from, ring.structs.desc.unpack_from
    unpack_header = ring.structs.blk_request.unpack_from
    mask, indirect = ring.state.size - 1, ring.indirect
    last_head, last_header, last_table = mask - 2, end - 16, end - 48

    def usual(head: int) -> _Usual | None:
        if head > last_head:
            return None
        # Drivers take neighbours while they can; if these are none, nothing has been lost.
        header, size, flags, second, data, length, kind, third, status_byte, single, last, _ = (
            three(buffer, table + 16 * head)
        )
        if flags == VIRTQ_DESC_F_NEXT:
            if second != head + 1 or third != head + 2:
                if second > mask:
                    return None
                data, length, kind, third = one(buffer, table + 16 * second)
                if third > mask:
                    return None
                status_byte, single, last, _ = one(buffer, table + 16 * third)
        elif flags == VIRTQ_DESC_F_INDIRECT and size == 48 and indirect:
            if not base <= header <= last_table:
                return None
            header, size, flags, second, data, length, kind, third, status_byte, single, last, _ = (
                three(buffer, header - base)
            )
            if flags != VIRTQ_DESC_F_NEXT or second != 1 or third != 2:
                return None
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
            return True, sector, data - base, length, status_byte - base
        if what != VIRTIO_BLK_T_OUT or kind != VIRTQ_DESC_F_NEXT or blk.read_only:
            return None
        return False, sector, data - base, length, status_byte - base

    return usual
