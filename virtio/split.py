"""The split virtqueue (virtio 1.4 §2.7), with indirect descriptors and event index.

    descriptor area   16-byte descriptors: addr, len, flags, next
    driver area       flags, idx, ring[size] of heads, used_event
    device area       flags, idx, ring[size] of (id, len), avail_event

Each field of guest memory is read once. ``idx`` and the events are read and written as single
16-bit units, for drivers that run at the same time (``struct`` reads so, but it clears the place
before it writes: hence the words).
"""

from __future__ import annotations

from ..errors import GuestError
from .fence import make_fence
from .layout import (
    LITTLE,
    QUEUE_SIZE_MAX,
    VIRTQ_AVAIL_ALIGN,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_ALIGN,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_DESC_SIZE,
    VIRTQ_USED_ALIGN,
    VIRTQ_USED_ELEM_SIZE,
    VIRTQ_USED_F_NO_NOTIFY,
    Structs,
)
from .memory import GuestMemory, Segment
from .ring import MAX_INDIRECT, Chain, QueueState, Ring

__all__ = ["SplitRing", "legacy_layout"]

_NEXT_WRITE = VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE


def legacy_layout(address: int, size: int, align: int) -> tuple[int, int, int]:
    """Where the three parts of a legacy queue at ``address`` lie (§2.7.2; VQ-S-04, VQ-S-05)."""
    driver = address + VIRTQ_DESC_SIZE * size
    device = -(-(driver + 6 + 2 * size) // align) * align
    return address, driver, device


class SplitRing(Ring):
    """A live split virtqueue.

    Making one checks size, alignment and addresses of ``state`` and raises GuestError for what is
    wrong (VQ-S-01).
    """

    def __init__(
        self,
        state: QueueState,
        memory: GuestMemory,
        *,
        indirect: bool = False,
        event_idx: bool = False,
        in_order: bool = False,
        notify_on_empty: bool = False,
        structs: Structs = LITTLE,
    ) -> None:
        size = state.size
        if not 0 < size <= min(state.max_size, QUEUE_SIZE_MAX) or size & (size - 1):
            raise GuestError(f"{size} is no size for a queue (of at most {state.max_size})")
        for address, align, name in (
            (state.descriptor_area, VIRTQ_DESC_ALIGN, "descriptor area"),
            (state.driver_area, VIRTQ_AVAIL_ALIGN, "driver area"),
            (state.device_area, VIRTQ_USED_ALIGN, "device area"),
        ):
            if address % align:
                raise GuestError(f"{name} at {address:#x} is not aligned to {align}")
        self.state = state
        self.indirect = indirect
        self.event_idx = event_idx
        self.in_order = in_order
        self.notify_on_empty = notify_on_empty
        """Legacy: interrupt when all that was available is taken, wanted or not (BF-100)."""
        self.structs = structs
        self._memory = memory
        self._mask = size - 1
        self._steps = range(size)
        self._max_indirect = max(MAX_INDIRECT, state.max_size)
        self.read_desc, self.desc_origin = memory.reader(
            structs.desc, state.descriptor_area, VIRTQ_DESC_SIZE * size
        )
        avail_bytes = 6 + 2 * size if event_idx else 4 + 2 * size
        self.read_avail, self.avail_origin = memory.reader(
            structs.word, state.driver_area, avail_bytes
        )
        used_bytes = 4 + VIRTQ_USED_ELEM_SIZE * size + (2 if event_idx else 0)
        self.write_used, self.used_origin = memory.writer(
            structs.used_elem, state.device_area, used_bytes
        )
        self._open_used, self._used_first = memory.words(
            state.device_area, used_bytes, structs.order
        )
        self.published = state.used_index
        """What the driver was last shown of ``state.used_index``."""
        self._batch: tuple[int, int] = (-1, -1)
        """In order: index of the used element that stands for a batch, and where it ends; what is
        used there next may join it."""
        self.fence = make_fence()

    def ready(self) -> int:
        (index,) = self.read_avail(self.avail_origin + 2)
        count: int = (index - self.state.next_avail) & 0xFFFF
        if count > self._mask + 1:
            raise self.jumped(count)
        return count

    def begin_batch(self) -> None:
        """In order: what is used next joins nothing that was used before."""
        self._batch = (-1, -1)

    def jumped(self, count: int) -> GuestError:
        """The error of an available index that says ``count`` chains, more than there can be."""
        return GuestError(f"available index jumped by {count}, the size is {self._mask + 1}")

    def lies_in(self, start: int, end: int) -> bool:
        """Whether all of the ring lies between these two addresses."""
        state = self.state
        events = 2 if self.event_idx else 0
        return all(
            start <= area and area + length <= end
            for area, length in (
                (state.descriptor_area, VIRTQ_DESC_SIZE * state.size),
                (state.driver_area, 4 + 2 * state.size + events),
                (state.device_area, 4 + VIRTQ_USED_ELEM_SIZE * state.size + events),
            )
        )

    def pop(self) -> Chain:
        state = self.state
        position = state.next_avail
        (head,) = self.read_avail(self.avail_origin + 4 + 2 * (position & self._mask))
        state.next_avail = (position + 1) & 0xFFFF
        return self.chain_at(head)

    def chain_at(self, head: int) -> Chain:
        """The chain that starts at descriptor ``head``. Raises GuestError for a broken one."""
        index = head
        mask = self._mask
        readable: list[Segment] = []
        writable: list[Segment] = []
        read = self.read_desc
        origin = self.desc_origin
        for _ in self._steps:
            if index > mask:
                raise GuestError(f"descriptor {index} of a queue of {mask + 1}")
            address, length, flags, index = read(origin + 16 * index)
            # The three usual ones first.
            if flags == _NEXT_WRITE:
                writable.append((address, length))
            elif flags == VIRTQ_DESC_F_WRITE:
                writable.append((address, length))
                break
            elif flags == VIRTQ_DESC_F_NEXT and not writable:
                readable.append((address, length))
            elif flags & VIRTQ_DESC_F_INDIRECT:
                if flags & VIRTQ_DESC_F_NEXT:
                    raise GuestError("an indirect descriptor with a next one")  # VQ-S-21
                self._follow(address, length, readable, writable)
                break
            else:
                if flags & VIRTQ_DESC_F_WRITE:
                    writable.append((address, length))
                elif writable:
                    raise GuestError("a device-readable descriptor after a device-writable one")
                else:
                    readable.append((address, length))
                if not flags & VIRTQ_DESC_F_NEXT:
                    break
        else:
            raise GuestError("a chain of more descriptors than the queue has")
        return tuple.__new__(Chain, (head, readable, writable, 1))  # what Chain() would end in

    def _follow(
        self, address: int, length: int, readable: list[Segment], writable: list[Segment]
    ) -> None:
        """Take the descriptors of an indirect table (§2.7.5.3); VQ-S-18 to VQ-S-24."""
        if not self.indirect:
            raise GuestError("an indirect descriptor, which was not negotiated")
        if not length or length % VIRTQ_DESC_SIZE:
            raise GuestError(f"an indirect table of {length} bytes")
        # One copy of what a chain can use of it: the table may be huge, the chain may not.
        count = min(length // VIRTQ_DESC_SIZE, self._max_indirect)
        table = self._memory.read(address, VIRTQ_DESC_SIZE * count)
        unpack = self.structs.desc.unpack_from
        index = 0
        for _ in range(count):
            if index >= count:
                raise GuestError(f"descriptor {index} of an indirect table of {count}")
            address, length, flags, index = unpack(table, 16 * index)
            if flags == _NEXT_WRITE:
                writable.append((address, length))
                continue
            if flags & VIRTQ_DESC_F_INDIRECT:
                raise GuestError("an indirect table inside an indirect table")
            if flags & VIRTQ_DESC_F_WRITE:
                writable.append((address, length))
            elif writable:
                raise GuestError("a device-readable descriptor after a device-writable one")
            else:
                readable.append((address, length))
            if not flags & VIRTQ_DESC_F_NEXT:
                return
        raise GuestError("a chain of more descriptors than its indirect table has")

    def push(self, chain: Chain, written: int) -> None:
        state = self.state
        index = place = state.used_index
        end = state.used_index = (index + 1) & 0xFFFF
        if self.in_order:
            # One element for a batch: the last chain's, in the place of the first (VQ-S-56). The
            # driver takes the others for written in full, so only such may have one after them.
            if self._batch[1] == index != self.published:
                place = self._batch[0]
            full = written == sum(length for _, length in chain.writable)
            self._batch = (place, end) if full else (-1, -1)
        self.write_used(self.used_origin + 4 + 8 * (place & self._mask), chain.head, written)

    def publish(self) -> bool:
        state = self.state
        old = self.published
        new = state.used_index
        first = self._used_first
        used = self._open_used()
        if new != old:
            used[first + 1] = self.published = new
        if self.event_idx:
            # Kick us for the very next chain: avail_event (§2.7.10.1).
            used[first + 2 + 4 * (self._mask + 1)] = state.next_avail
        elif self.suppressed:
            used[first] = 0
        used.release()
        self.suppressed = False
        # What was written is out before either of the driver's fields is looked at: here, and in
        # the ready() that follows.
        self.fence()
        if new == old:
            return False
        if self.notify_on_empty and self.read_avail(self.avail_origin + 2)[0] == state.next_avail:
            return True
        if self.event_idx:
            (event,) = self.read_avail(self.avail_origin + 6 + 2 * self._mask)
            return bool((new - event - 1) & 0xFFFF < (new - old) & 0xFFFF)
        (flags,) = self.read_avail(self.avail_origin)
        return not flags & VIRTQ_AVAIL_F_NO_INTERRUPT

    def suppress(self) -> None:
        # With an event index nothing needs doing: avail_event stays behind.
        if not self.event_idx and not self.suppressed:
            used = self._open_used()
            used[self._used_first] = VIRTQ_USED_F_NO_NOTIFY
            used.release()
        self.suppressed = True
