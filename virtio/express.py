"""The usual request in one function: what the long way does in seven, for speed and nothing else.

The long way is :meth:`SplitRing.pop`, the request's parser, :meth:`VirtioBlk.process` and
:meth:`SplitRing.push`, and it is the rule. This does the same for the one shape that nearly all
requests have: a read or write of whole sectors inside the disk, with header, data and status in
three descriptors, direct or in one indirect table, all in the largest piece of RAM. Whatever is not
exactly that is left to the long way before anything has been changed.
"""

from __future__ import annotations

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
    Structs,
)
from .memory import GuestMemory
from .split import SplitRing

if TYPE_CHECKING:
    from .blk import VirtioBlk
    from .device import Queue

__all__ = ["make_express"]

_NEXT_WRITE = VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE


def _table_reader(
    base: int, end: int, buffer: Any, structs: Structs
) -> Callable[[int], tuple[int, ...] | None]:
    """A function that reads an indirect table of three descriptors, one behind the other.

    It gives (addr, len) of the first, (addr, len, flags) of the second and third; None for others.
    """
    unpack = structs.desc.unpack_from
    last_table = end - 48

    def read_table(address: int) -> tuple[int, ...] | None:
        if not base <= address <= last_table:
            return None
        at = address - base
        header, size, first, index = unpack(buffer, at)
        data, length, flags, following = unpack(buffer, at + 16)
        status_byte, one, last, _ = unpack(buffer, at + 32)
        if first != VIRTQ_DESC_F_NEXT or index != 1 or following != 2:
            return None
        return header, size, data, length, flags, status_byte, one, last

    return read_table


def make_express(
    blk: VirtioBlk, queue: Queue, ring: SplitRing, memory: GuestMemory
) -> Callable[[], bool] | None:
    """A function that does the next request of ``queue``, or gives False and has done nothing.

    The caller has seen that there is one. None: in this kind of memory there is no short way.
    """
    if (plain := memory.plain_region()) is None:
        return None
    base, end, buffer = plain
    state = ring.state
    read_table = _table_reader(base, end, buffer, ring.structs)
    unpack_header = ring.structs.blk_request.unpack_from
    read_avail, heads = ring.read_avail, ring.avail_origin + 4
    read_desc, table = ring.read_desc, ring.desc_origin
    write_used, elements = ring.write_used, ring.used_origin + 4
    mask, indirect = state.size - 1, ring.indirect
    disk, last_header = blk.disk, end - 16

    def express() -> bool:
        position = state.next_avail
        (head,) = read_avail(heads + 2 * (position & mask))
        if head > mask:
            return False
        header, size, flags, index = read_desc(table + 16 * head)
        if flags == VIRTQ_DESC_F_NEXT:
            if index > mask:
                return False
            data, length, flags, following = read_desc(table + 16 * index)
            if following > mask:
                return False
            status_byte, one, last, _ = read_desc(table + 16 * following)
        elif flags == VIRTQ_DESC_F_INDIRECT and size == 48 and indirect:
            entries = read_table(header)
            if entries is None:
                return False
            header, size, data, length, flags, status_byte, one, last = entries
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
        reading = kind == VIRTIO_BLK_T_IN
        if reading:
            if flags != _NEXT_WRITE:
                return False
        elif kind != VIRTIO_BLK_T_OUT or flags != VIRTQ_DESC_F_NEXT or blk.read_only:
            return False
        state.next_avail = (position + 1) & 0xFFFF
        view = memoryview(buffer)[data - base : data - base + length]
        written, status = 1, VIRTIO_BLK_S_OK
        try:
            if reading:
                disk.readv(sector * SECTOR_SIZE, [view])
                written += length
            else:
                disk.writev(sector * SECTOR_SIZE, [view], fua=not blk.writeback)
        except Exception as error:
            status = blk.status_of(error, sector)
        finally:
            view.release()
        if queue.ring is ring:  # not reset from inside
            buffer[status_byte - base] = status
            used = state.used_index
            write_used(elements + 8 * (used & mask), head, written)
            state.used_index = (used + 1) & 0xFFFF
        return True

    return express
