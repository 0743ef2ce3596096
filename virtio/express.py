"""The usual request in one function: what the long way does in seven, for speed and nothing else.

The long way is :meth:`SplitRing.pop`, the request's parser, :meth:`VirtioBlk.process` and
:meth:`SplitRing.push`, and it is the rule. This does the same for the one shape that nearly all
requests have: a read or write of whole sectors inside the disk, with header, data and status in
three descriptors, direct or in one indirect table, all in the largest piece of RAM. Whatever is not
exactly that is left to the long way before anything has been changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
from .split import SplitRing

if TYPE_CHECKING:
    from .blk import VirtioBlk
    from .device import Queue

__all__ = ["make_express"]

_NEXT_WRITE = VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE


def make_express(
    blk: VirtioBlk, queue: Queue, ring: SplitRing, memory: GuestMemory
) -> Callable[[], bool] | None:
    """A function that does the next available request of ``queue`` if it is a usual one.

    It gives False, and has done nothing, if it is not; the caller has seen that there is one. None
    if guest memory is of a kind for which there is no short way.
    """
    plain = memory.plain_region()
    if plain is None:
        return None
    base, end, buffer = plain
    state = ring.state
    structs = ring.structs
    unpack_desc = structs.desc.unpack_from
    unpack_header = structs.blk_request.unpack_from
    read_avail, heads = ring.read_avail, ring.avail_origin + 4
    read_desc, table = ring.read_desc, ring.desc_origin
    write_used, elements = ring.write_used, ring.used_origin + 4
    mask = state.size - 1
    indirect = ring.indirect
    last_header = end - 16
    last_table = end - 48
    disk = blk.disk

    def express() -> bool:
        position = state.next_avail
        (head,) = read_avail(heads + 2 * (position & mask))
        if head > mask:
            return False
        header, size, flags, index = read_desc(table + 16 * head)
        if flags == VIRTQ_DESC_F_NEXT:
            if index > mask:
                return False
            data, length, flags, index = read_desc(table + 16 * index)
            if index > mask:
                return False
            status_byte, one, last, _ = read_desc(table + 16 * index)
        elif (
            flags == VIRTQ_DESC_F_INDIRECT
            and indirect
            and size == 48
            and base <= header <= last_table
        ):
            at = header - base
            header, size, first, index = unpack_desc(buffer, at)
            data, length, flags, following = unpack_desc(buffer, at + 16)
            status_byte, one, last, _ = unpack_desc(buffer, at + 32)
            if first != VIRTQ_DESC_F_NEXT or index != 1 or following != 2:
                return False
        else:
            return False
        if (
            size != 16
            or one != 1
            or last != VIRTQ_DESC_F_WRITE
            or length & (SECTOR_SIZE - 1)
            or not base <= header <= last_header
            or not base <= status_byte < end
            or data < base
            or data + length > end
        ):
            return False
        kind, _, sector = unpack_header(buffer, header - base)
        if sector + length // SECTOR_SIZE > blk.capacity:
            return False
        start = data - base
        written = 1
        status = VIRTIO_BLK_S_OK
        if kind == VIRTIO_BLK_T_IN and flags == _NEXT_WRITE:
            state.next_avail = (position + 1) & 0xFFFF
            view = memoryview(buffer)[start : start + length]
            try:
                disk.readv(sector * SECTOR_SIZE, (view,))
                written += length
            except Exception as error:
                status = blk.status_of(error, sector)
            finally:
                view.release()
        elif kind == VIRTIO_BLK_T_OUT and flags == VIRTQ_DESC_F_NEXT and not blk.read_only:
            state.next_avail = (position + 1) & 0xFFFF
            view = memoryview(buffer)[start : start + length]
            try:
                disk.writev(sector * SECTOR_SIZE, (view,), fua=not blk.writeback)
            except Exception as error:
                status = blk.status_of(error, sector)
            finally:
                view.release()
        else:
            return False
        if queue.ring is ring:  # not reset from inside
            buffer[status_byte - base] = status
            used = state.used_index
            write_used(elements + 8 * (used & mask), head, written)
            state.used_index = (used + 1) & 0xFFFF
        return True

    return express
