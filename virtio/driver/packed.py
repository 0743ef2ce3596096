"""The driver's side of a packed virtqueue (virtio 1.4 §2.8), in guest memory."""

from __future__ import annotations

from ..fence import make_fence
from ..layout import (
    LITTLE,
    RING_EVENT_FLAGS_DESC,
    RING_EVENT_FLAGS_DISABLE,
    RING_EVENT_FLAGS_ENABLE,
    VIRTQ_DESC_F_AVAIL,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_USED,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_DESC_SIZE,
    VIRTQ_EVENT_SIZE,
)
from ..memory import GuestMemory
from .ring import Arena, Buffer

__all__ = ["PackedDriverRing"]

_OWNER = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED


class PackedDriverRing:
    """A packed virtqueue as its driver has it; used as :class:`~.ring.DriverRing` is.

    Nothing here checks what is written: descriptors, ids and flags go out as they are given. What
    names a chain is its buffer id.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        descriptors: int,
        available: int,
        used: int,
        *,
        event_idx: bool = False,
        in_order: bool = False,
    ) -> None:
        """``available`` and ``used``: the event suppression structures, driver's and device's."""
        self.memory = memory
        self.size = size
        self.descriptors = descriptors
        self.available = available
        self.used = used
        self.event_idx = event_idx
        self.in_order = in_order
        self.slot = 0
        """Where the next descriptor goes."""
        self.wrap = True
        """The wrap counter that goes with it."""
        self.used_slot = 0
        """Where the next used descriptor is to appear."""
        self.used_wrap = True
        self._free_ids = list(range(size - 1, -1, -1))
        self._slots: dict[int, int] = {}
        self._room: dict[int, int] = {}
        self._taken = 0
        self._added = 0
        self._first: tuple[int, int] | None = None
        self._fence = make_fence()

    @classmethod
    def allocate(
        cls,
        memory: GuestMemory,
        arena: Arena,
        size: int,
        *,
        event_idx: bool = False,
        in_order: bool = False,
    ) -> PackedDriverRing:
        """A ring in zeroed memory of the arena."""
        lengths = (VIRTQ_DESC_SIZE * size, VIRTQ_EVENT_SIZE, VIRTQ_EVENT_SIZE)
        parts = (
            arena.take(lengths[0], 16),
            arena.take(lengths[1], 4),
            arena.take(lengths[2], 4),
        )
        for address, length in zip(parts, lengths, strict=True):
            memory.write(address, bytes(length))
        return cls(memory, size, *parts, event_idx=event_idx, in_order=in_order)

    # -- raw fields --------------------------------------------------------------------------

    def load16(self, address: int) -> int:
        """A 16-bit field of the ring."""
        return int.from_bytes(self.memory.read(address, 2), "little")

    def store16(self, address: int, value: int) -> None:
        """Write a 16-bit field of the ring."""
        self.memory.write(address, (value & 0xFFFF).to_bytes(2, "little"))

    def set_descriptor(
        self, slot: int, address: int, length: int, flags: int = 0, ident: int = 0
    ) -> None:
        """Write one descriptor of the ring, its flags as they are given."""
        self.memory.write(
            self.descriptors + VIRTQ_DESC_SIZE * slot,
            self.descriptor(address, length, flags, ident),
        )

    def descriptor(self, address: int, length: int, flags: int = 0, ident: int = 0) -> bytes:
        """The 16 bytes of a descriptor, for tables elsewhere."""
        return LITTLE.desc.pack(address, length, ident, flags)

    def get_descriptor(self, slot: int) -> tuple[int, int, int, int]:
        """Address, length, flags and id of the descriptor in a place of the ring."""
        data = self.memory.read(self.descriptors + VIRTQ_DESC_SIZE * slot, VIRTQ_DESC_SIZE)
        address, length, ident, flags = LITTLE.desc.unpack(data)
        return address, length, flags, ident

    @property
    def driver_event(self) -> tuple[int, int]:
        """``off_wrap`` and ``flags`` of the driver's event suppression structure."""
        return self.load16(self.available), self.load16(self.available + 2)

    @driver_event.setter
    def driver_event(self, value: tuple[int, int]) -> None:
        self.store16(self.available, value[0])
        self.store16(self.available + 2, value[1])

    @property
    def device_event(self) -> tuple[int, int]:
        """The same of the device's, its flags read first."""
        flags = self.load16(self.used + 2)
        return self.load16(self.used), flags

    def want_interrupts(self, wanted: bool) -> None:
        """Ask for an interrupt for everything, or for none."""
        flags = RING_EVENT_FLAGS_ENABLE if wanted else RING_EVENT_FLAGS_DISABLE
        self.store16(self.available + 2, flags)

    @property
    def next_place(self) -> int:
        """The upper half of notification data: next_off and next_wrap (PKD-11)."""
        return self.slot | self.wrap << 15

    def want_next_interrupt(self) -> None:
        """With event index: ask for an interrupt for what is used next."""
        if self.event_idx:
            event = self.used_slot | self.used_wrap << 15
            self.driver_event = (event, RING_EVENT_FLAGS_DESC)

    # -- chains ------------------------------------------------------------------------------

    def available_flags(self) -> int:
        """What makes a descriptor in the next place an available one."""
        return VIRTQ_DESC_F_AVAIL if self.wrap else VIRTQ_DESC_F_USED

    def put(self, address: int, length: int, flags: int = 0, ident: int = 0) -> None:
        """Write the next descriptor as available (:meth:`publish` shows it) and go on behind it."""
        flags |= self.available_flags()
        if self._first is None:
            # All of what is published together becomes visible by these flags.
            self._first = (self.slot, flags)
            flags ^= _OWNER
        self.set_descriptor(self.slot, address, length, flags, ident)
        self._added += 1
        self.slot += 1
        if self.slot == self.size:
            self.slot = 0
            self.wrap = not self.wrap

    def add(self, buffers: list[Buffer]) -> int:
        """Write a list of direct descriptors (not published); its buffer id."""
        ident = self._take(len(buffers), buffers)
        for position, buffer in enumerate(buffers):
            flags = VIRTQ_DESC_F_WRITE if buffer.writable else 0
            if position + 1 < len(buffers):
                flags |= VIRTQ_DESC_F_NEXT
            self.put(buffer.address, buffer.length, flags, ident)
        return ident

    def add_indirect(self, buffers: list[Buffer], table: int, direct: int = 0) -> int:
        """The same with all but the first ``direct`` buffers in an indirect table at ``table``.

        The specification allows no ``direct`` ones.
        """
        ident = self._take(direct + 1, buffers)
        for buffer in buffers[:direct]:
            flags = VIRTQ_DESC_F_NEXT | (VIRTQ_DESC_F_WRITE if buffer.writable else 0)
            self.put(buffer.address, buffer.length, flags, ident)
        data = b"".join(
            self.descriptor(each.address, each.length, VIRTQ_DESC_F_WRITE if each.writable else 0)
            for each in buffers[direct:]
        )
        self.memory.write(table, data)
        self.put(table, len(data), VIRTQ_DESC_F_INDIRECT, ident)
        return ident

    def _take(self, slots: int, buffers: list[Buffer]) -> int:
        if slots + self._taken > self.size:
            raise MemoryError(f"no {slots} descriptors left of {self.size}")
        ident = self._free_ids.pop()
        self._slots[ident] = slots
        self._taken += slots
        self._room[ident] = sum(buffer.length for buffer in buffers if buffer.writable)
        return ident

    def publish(self) -> bool:
        """Show the device what was added; whether it wants a kick for it."""
        added, self._added = self._added, 0
        if self._first is not None:
            self._fence()  # chains before what makes them available
            slot, flags = self._first
            self.store16(self.descriptors + VIRTQ_DESC_SIZE * slot + 14, flags)
            self._first = None
        self._fence()  # before the device's field is looked at (§2.8.21)
        event, flags = self.device_event
        if flags == RING_EVENT_FLAGS_DESC and self.event_idx:
            around = 2 * self.size
            end = self.slot + (0 if self.wrap else self.size)
            wanted = (event & 0x7FFF) + (0 if event >> 15 else self.size)
            return 0 < (end - wanted) % around <= added
        return flags != RING_EVENT_FLAGS_DISABLE

    @property
    def has_used(self) -> bool:
        """There is something to :meth:`collect`."""
        _, _, flags, _ = self.get_descriptor(self.used_slot)
        return flags & _OWNER == (_OWNER if self.used_wrap else 0)

    def collect(self) -> list[tuple[int, int]]:
        """The (buffer id, used length) of every chain that came back; its places are free."""
        done: list[tuple[int, int]] = []
        while True:
            _, length, flags, ident = self.get_descriptor(self.used_slot)
            if flags & _OWNER != (_OWNER if self.used_wrap else 0):
                return done
            if self.in_order and ident in self._slots:
                while (first := next(iter(self._slots))) != ident:  # used in full, without a word
                    self._go_behind(first)
                    done.append((first, self._room[first]))
            self._go_behind(ident)
            done.append((ident, length if flags & VIRTQ_DESC_F_WRITE else 0))

    def _go_behind(self, ident: int) -> None:
        slots = self._slots.pop(ident, 0)
        self._taken -= slots
        if slots:
            self._free_ids.append(ident)
        self.used_slot += max(slots, 1)
        if self.used_slot >= self.size:
            self.used_slot -= self.size
            self.used_wrap = not self.used_wrap
