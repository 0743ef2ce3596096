"""The packed virtqueue (virtio 1.4 §2.8), with indirect descriptors and event index.

    descriptor area   16-byte descriptors: addr, len, id, flags; used ones overwrite available ones
    driver area       off_wrap, flags: when the driver wants an interrupt
    device area       off_wrap, flags: when the device wants a kick

Both sides go around the ring and keep a wrap counter that starts at 1 and flips at its end. Flags
and events are read and written as single 16-bit units, for drivers that run at the same time; all
else of a descriptor is read once. The flags are read twice: to see what is available, and with the
descriptor, and the second is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import GuestError
from .fence import make_fence
from .layout import (
    LITTLE,
    QUEUE_SIZE_MAX,
    RING_EVENT_FLAGS_DESC,
    RING_EVENT_FLAGS_DISABLE,
    RING_EVENT_FLAGS_ENABLE,
    VIRTQ_DESC_ALIGN,
    VIRTQ_DESC_F_AVAIL,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_USED,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_DESC_SIZE,
    VIRTQ_EVENT_ALIGN,
    VIRTQ_EVENT_SIZE,
)
from .memory import GuestMemory, Segment
from .ring import MAX_INDIRECT, Chain, QueueState, Ring

__all__ = ["PackedRing"]

_OWNER = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED
_FLAGS_AT = 14
"""Where in a descriptor its flags are."""
_EVENT_FLAGS = 3
"""The bits of an event suppression structure's flags that mean something."""


class PackedRing(Ring):
    """A live packed virtqueue, of any size up to 32768.

    Making one checks size, alignment and addresses of ``state`` and raises GuestError for what is
    wrong (PKD-01).
    """

    def __init__(
        self,
        state: QueueState,
        memory: GuestMemory,
        *,
        indirect: bool = False,
        event_idx: bool = False,
        in_order: bool = False,
    ) -> None:
        size = state.size
        if not 0 < size <= min(state.max_size, QUEUE_SIZE_MAX):
            raise GuestError(f"{size} is no size for a queue (of at most {state.max_size})")
        for address, align, name in (
            (state.descriptor_area, VIRTQ_DESC_ALIGN, "descriptor area"),
            (state.driver_area, VIRTQ_EVENT_ALIGN, "driver area"),
            (state.device_area, VIRTQ_EVENT_ALIGN, "device area"),
        ):
            if address % align:
                raise GuestError(f"{name} at {address:#x} is not aligned to {align}")
        self.state = state
        self.indirect = indirect
        self.event_idx = event_idx
        self.in_order = in_order
        self._memory = memory
        self._size = size
        if max(state.next_avail, state.used_index) >= size or self._in_flight() > size:
            raise GuestError(
                f"a queue of {size} at {state.next_avail}, used up to {state.used_index}"
            )
        self._max_indirect = max(MAX_INDIRECT, state.max_size)
        area, length = state.descriptor_area, VIRTQ_DESC_SIZE * size
        self._read_desc, self._desc_origin = memory.reader(LITTLE.desc, area, length)
        self._read_flags, origin = memory.reader(LITTLE.word, area, length)
        self._flags_origin = origin + _FLAGS_AT
        self._write_used, origin = memory.writer(LITTLE.packed_used, area, length)
        self._used_origin = origin + 8
        self._open_ring, first = memory.words(area, length, LITTLE.order)
        self._first_flags = first + _FLAGS_AT // 2
        self._read_event, self._event_origin = memory.reader(
            LITTLE.word, state.driver_area, VIRTQ_EVENT_SIZE
        )
        self._open_wish, self._first_wish = memory.words(
            state.device_area, VIRTQ_EVENT_SIZE, LITTLE.order
        )
        self._wish = -1
        """The flags that the device area has: not known yet."""
        self._staged: list[tuple[int, int]] = []
        """What was pushed since the last publish(): slot, and the flags it is to get."""
        self._joins = False
        """In order: what is used next joins the batch of the last staged descriptor."""
        self._fence = make_fence()

    def lies_in(self, start: int, end: int) -> bool:
        """Whether the descriptors lie between these two addresses."""
        area = self.state.descriptor_area
        return start <= area and area + VIRTQ_DESC_SIZE * self._size <= end

    def skip(self, slots: int) -> None:
        """Take the next chain, of so many places (less than the ring has), without looking."""
        state = self.state
        slot = state.next_avail + slots
        if slot >= self._size:
            slot -= self._size
            state.avail_wrap = not state.avail_wrap
        state.next_avail = slot

    # Positions go twice around the ring: the second time with the wrap counter at 0.

    def _position(self, slot: int, wrap: bool) -> int:
        return slot if wrap else slot + self._size

    def _in_flight(self) -> int:
        """Places of the ring that were taken and not given back."""
        state = self.state
        taken = self._position(state.next_avail, state.avail_wrap)
        used = self._position(state.used_index, state.used_wrap)
        return (taken - used) % (2 * self._size)

    def ready(self) -> int:
        state = self.state
        slot = state.next_avail
        size = self._size
        available = VIRTQ_DESC_F_AVAIL if state.avail_wrap else VIRTQ_DESC_F_USED
        read = self._read_flags
        origin = self._flags_origin
        count = 0
        unfinished = 0
        for _ in range(size - self._in_flight()):
            (flags,) = read(origin + 16 * slot)
            if flags & _OWNER != available:  # PKD-07
                break
            unfinished = flags & VIRTQ_DESC_F_NEXT
            if not unfinished:
                count += 1
            slot += 1
            if slot == size:
                slot = 0
                available ^= _OWNER
        # A list without an end counts, for pop() to refuse it.
        return count + 1 if unfinished else count

    def pop(self) -> Chain:
        state = self.state
        slot = state.next_avail
        size = self._size
        available = VIRTQ_DESC_F_AVAIL if state.avail_wrap else VIRTQ_DESC_F_USED
        read = self._read_desc
        origin = self._desc_origin
        readable: list[Segment] = []
        writable: list[Segment] = []
        for slots in range(1, size - self._in_flight() + 1):
            address, length, ident, flags = read(origin + 16 * slot)
            if flags & _OWNER != available:
                # PKD-18: the first of a list becomes available after all others.
                raise GuestError(f"descriptor {slot} of a list is not available")
            slot += 1
            if slot == size:
                slot = 0
                available ^= _OWNER
            if flags & VIRTQ_DESC_F_INDIRECT:
                if slots > 1 or flags & VIRTQ_DESC_F_NEXT:
                    raise GuestError("an indirect descriptor in a list")  # PKD-24
                self._follow(address, length, readable, writable)
                break
            if flags & VIRTQ_DESC_F_WRITE:
                writable.append((address, length))
            elif writable:
                raise GuestError("a device-readable descriptor after a device-writable one")
            else:
                readable.append((address, length))
            if not flags & VIRTQ_DESC_F_NEXT:
                break
        else:
            raise GuestError("a list of more descriptors than the queue has room for")  # PKD-14
        state.next_avail = slot
        state.avail_wrap = available == VIRTQ_DESC_F_AVAIL
        return Chain(ident, readable, writable, slots)  # the last one's id: PKD-35

    def descriptors(self, slot: int, count: int) -> list[tuple[int, int, int, int]]:
        """Address, length, id and flags in ``count`` places from ``slot`` on."""
        read, origin, size = self._read_desc, self._desc_origin, self._size
        return [read(origin + 16 * ((slot + each) % size)) for each in range(count)]

    def chain_of(self, descriptors: Sequence[tuple[int, int, int, int]]) -> Chain:
        """The chain of a list that was taken before: address, length, id, flags of each.

        Raises GuestError for a broken one.
        """
        readable: list[Segment] = []
        writable: list[Segment] = []
        for address, length, _, flags in descriptors:
            if flags & VIRTQ_DESC_F_INDIRECT:
                self._follow(address, length, readable, writable)
            elif flags & VIRTQ_DESC_F_WRITE:
                writable.append((address, length))
            elif writable:
                raise GuestError("a device-readable descriptor after a device-writable one")
            else:
                readable.append((address, length))
        return Chain(descriptors[-1][2], readable, writable, len(descriptors))

    def _follow(
        self, address: int, length: int, readable: list[Segment], writable: list[Segment]
    ) -> None:
        """Take the descriptors of an indirect table; PKD-21, PKD-36, PKD-37."""
        if not self.indirect:
            raise GuestError("an indirect descriptor, which was not negotiated")
        if not length or length % VIRTQ_DESC_SIZE:
            raise GuestError(f"an indirect table of {length} bytes")
        if length // VIRTQ_DESC_SIZE > self._max_indirect:
            raise GuestError(f"an indirect table of {length // VIRTQ_DESC_SIZE} descriptors")
        table = self._memory.read(address, length)
        for address, length, _, flags in LITTLE.desc.iter_unpack(table):
            if flags & VIRTQ_DESC_F_WRITE:
                writable.append((address, length))
            elif writable:
                raise GuestError("a device-readable descriptor after a device-writable one")
            else:
                readable.append((address, length))

    def push(self, chain: Chain, written: int) -> None:
        state = self.state
        slot = place = state.used_index
        flags = _OWNER if state.used_wrap else 0  # PKD-32
        if self.in_order:
            # One descriptor for a batch: the last list's, in the place of the first. The driver
            # takes the others for written in full, so only such may have one after them.
            if self._joins:
                place, flags = self._staged.pop()
                flags &= _OWNER
            self._joins = written == sum(length for _, length in chain.writable)
        self._write_used(self._used_origin + 16 * place, written, chain.head)
        self._staged.append((place, flags | VIRTQ_DESC_F_WRITE if written else flags))  # PKD-34
        slot += chain.slots  # PKD-33
        if slot >= self._size:
            slot -= self._size
            state.used_wrap = not state.used_wrap
        state.used_index = slot

    def publish(self) -> bool:
        staged, self._staged = self._staged, []
        self._joins = False
        if staged:
            self._fence()  # lengths and ids before their flags
            ring = self._open_ring()
            # The first one last: the driver looks at no other before it.
            for slot, flags in reversed(staged):
                ring[self._first_flags + 8 * slot] = flags
            ring.release()
        self._ask_for_kicks()
        self.suppressed = False
        # What was written is out before either of the driver's fields is looked at: here, and in
        # the ready() that follows.
        self._fence()
        return bool(staged) and self._interrupt_wanted(*staged[0])

    def _ask_for_kicks(self) -> None:
        """Have the driver kick for the very next descriptor."""
        wish = RING_EVENT_FLAGS_DESC if self.event_idx else RING_EVENT_FLAGS_ENABLE  # PKD-38
        if self._wish == wish and not self.event_idx:
            return
        words = self._open_wish()
        if self.event_idx:
            state = self.state
            words[self._first_wish] = state.next_avail | state.avail_wrap << 15
        if self._wish != wish:
            self._fence()  # where, before that it counts
            words[self._first_wish + 1] = self._wish = wish
        words.release()

    def _interrupt_wanted(self, slot: int, owner: int) -> bool:
        """Whether the driver wants to hear of what was used, of which this was the first."""
        # The flags first: the driver writes them last.
        (flags,) = self._read_event(self._event_origin + 2)
        flags &= _EVENT_FLAGS
        if flags == RING_EVENT_FLAGS_DESC and self.event_idx:
            (event,) = self._read_event(self._event_origin)
            around = 2 * self._size
            state = self.state
            first = self._position(slot, bool(owner & VIRTQ_DESC_F_USED))
            end = self._position(state.used_index, state.used_wrap)
            wanted = self._position(event & 0x7FFF, bool(event >> 15))
            return (wanted - first) % around < (end - first) % around  # PKD-39
        return bool(flags != RING_EVENT_FLAGS_DISABLE)

    def suppress(self) -> None:
        if not self.suppressed:
            words = self._open_wish()
            words[self._first_wish + 1] = self._wish = RING_EVENT_FLAGS_DISABLE
            words.release()
        self.suppressed = True
