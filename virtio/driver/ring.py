"""The driver's side of a split virtqueue (virtio 1.4 §2.7), in guest memory."""

from __future__ import annotations

from typing import NamedTuple

from ..fence import make_fence
from ..layout import (
    BIG,
    LITTLE,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_DESC_SIZE,
    VIRTQ_USED_ELEM_SIZE,
    VIRTQ_USED_F_NO_NOTIFY,
    ByteOrder,
)
from ..memory import GuestMemory

__all__ = ["Arena", "Buffer", "DriverRing"]


class Arena:
    """A piece of guest memory that addresses are handed out of."""

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.end = base + size
        self._next = base

    def take(self, size: int, align: int = 16) -> int:
        """The address of ``size`` bytes of their own. Raises MemoryError when there are no more."""
        address = -(-self._next // align) * align
        if address + size > self.end:
            raise MemoryError(f"no {size} bytes left of guest memory for the driver")
        self._next = address + size
        return address

    def mark(self) -> int:
        """What :meth:`give_back` takes to undo every later :meth:`take`."""
        return self._next

    def give_back(self, mark: int) -> None:
        """Everything taken since ``mark`` is free again."""
        self._next = mark


class Buffer(NamedTuple):
    """One element of a chain."""

    address: int
    length: int
    writable: bool = False
    """The device may write it (and only that)."""


class DriverRing:
    """A split virtqueue as its driver has it.

    Nothing here checks what is written: chains, indices and flags go out as they are given.
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
        order: ByteOrder = "little",
    ) -> None:
        """``in_order``: a used element stands for every chain up to the one that it names."""
        self.memory = memory
        self.size = size
        self.descriptors = descriptors
        self.available = available
        self.used = used
        self.event_idx = event_idx
        self.in_order = in_order
        self._structs = LITTLE if order == "little" else BIG
        self._order: ByteOrder = order
        self._free = list(range(size - 1, -1, -1))
        self._chains: dict[int, list[int]] = {}
        self._room: dict[int, int] = {}
        self._next_avail = 0
        self._published = 0
        self._next_used = 0
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
        order: ByteOrder = "little",
        align: int | None = None,
    ) -> DriverRing:
        """A ring in zeroed memory of the arena; with ``align`` in the legacy layout (§2.7.2)."""
        table = VIRTQ_DESC_SIZE * size
        avail_size = 6 + 2 * size
        used_size = 6 + VIRTQ_USED_ELEM_SIZE * size
        if align is None:
            parts = (arena.take(table, 16), arena.take(avail_size, 2), arena.take(used_size, 4))
        else:
            before_used = -(-(table + avail_size) // align) * align
            start = arena.take(before_used + used_size, align)
            parts = (start, start + table, start + before_used)
        for address, length in zip(parts, (table, avail_size, used_size), strict=True):
            memory.write(address, bytes(length))
        return cls(memory, size, *parts, event_idx=event_idx, in_order=in_order, order=order)

    # -- raw fields --------------------------------------------------------------------------

    def load16(self, address: int) -> int:
        """A 16-bit field of the ring."""
        return int.from_bytes(self.memory.read(address, 2), self._order)

    def store16(self, address: int, value: int) -> None:
        """Write a 16-bit field of the ring."""
        self.memory.write(address, (value & 0xFFFF).to_bytes(2, self._order))

    def set_descriptor(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        """Write one descriptor of the table."""
        self.memory.write(
            self.descriptors + VIRTQ_DESC_SIZE * index,
            self.descriptor(address, length, flags, following),
        )

    def descriptor(self, address: int, length: int, flags: int = 0, following: int = 0) -> bytes:
        """The 16 bytes of a descriptor, for tables elsewhere."""
        return self._structs.desc.pack(address, length, flags, following)

    def set_available(self, slot: int, head: int) -> None:
        """Write entry ``slot`` of the available ring."""
        self.store16(self.available + 4 + 2 * (slot % self.size), head)

    @property
    def available_index(self) -> int:
        """``idx`` of the available ring."""
        return self.load16(self.available + 2)

    @available_index.setter
    def available_index(self, value: int) -> None:
        self.store16(self.available + 2, value)

    @property
    def used_index(self) -> int:
        """``idx`` of the used ring."""
        return self.load16(self.used + 2)

    @property
    def used_flags(self) -> int:
        """``flags`` of the used ring."""
        return self.load16(self.used)

    @property
    def available_event(self) -> int:
        """``avail_event``: the device wants a kick for the chain of this number."""
        return self.load16(self.used + 4 + VIRTQ_USED_ELEM_SIZE * self.size)

    @property
    def used_event(self) -> int:
        """``used_event``: the driver wants an interrupt for the used chain of this number."""
        return self.load16(self.available + 4 + 2 * self.size)

    @used_event.setter
    def used_event(self, value: int) -> None:
        self.store16(self.available + 4 + 2 * self.size, value)

    def want_interrupts(self, wanted: bool) -> None:
        """Set ``flags`` of the available ring (§2.7.7); without event index."""
        self.store16(self.available, 0 if wanted else VIRTQ_AVAIL_F_NO_INTERRUPT)

    @property
    def next_place(self) -> int:
        """The upper half of notification data: the available index."""
        return self._next_avail

    def want_next_interrupt(self) -> None:
        """With event index: ask for an interrupt for what is used next."""
        if self.event_idx:
            self.used_event = self.used_index

    # -- chains ------------------------------------------------------------------------------

    def add(self, buffers: list[Buffer]) -> int:
        """Write a chain of direct descriptors and make it available (not published); its head."""
        indices = self._take(len(buffers), buffers)
        for position, (index, buffer) in enumerate(zip(indices, buffers, strict=True)):
            flags = VIRTQ_DESC_F_WRITE if buffer.writable else 0
            following = 0
            if position + 1 < len(indices):
                flags |= VIRTQ_DESC_F_NEXT
                following = indices[position + 1]
            self.set_descriptor(index, buffer.address, buffer.length, flags, following)
        self.offer(indices[0])
        return indices[0]

    def add_indirect(self, buffers: list[Buffer], table: int, direct: int = 0) -> int:
        """The same with all but the first ``direct`` buffers in an indirect table at ``table``."""
        indices = self._take(direct + 1, buffers)
        for position, buffer in enumerate(buffers[:direct]):
            flags = VIRTQ_DESC_F_NEXT | (VIRTQ_DESC_F_WRITE if buffer.writable else 0)
            self.set_descriptor(
                indices[position], buffer.address, buffer.length, flags, indices[position + 1]
            )
        rest = buffers[direct:]
        entries = []
        for position, buffer in enumerate(rest):
            flags = VIRTQ_DESC_F_WRITE if buffer.writable else 0
            if position + 1 < len(rest):
                flags |= VIRTQ_DESC_F_NEXT
            entries.append(self.descriptor(buffer.address, buffer.length, flags, position + 1))
        data = b"".join(entries)
        self.memory.write(table, data)
        self.set_descriptor(indices[-1], table, len(data), VIRTQ_DESC_F_INDIRECT)
        self.offer(indices[0])
        return indices[0]

    def _take(self, count: int, buffers: list[Buffer]) -> list[int]:
        if count > len(self._free):
            raise MemoryError(f"no {count} descriptors left of {self.size}")
        indices = [self._free.pop() for _ in range(count)]
        self._chains[indices[0]] = indices
        self._room[indices[0]] = sum(buffer.length for buffer in buffers if buffer.writable)
        return indices

    def _give_back(self, head: int) -> None:
        indices = self._chains.pop(head, [])
        if self.in_order:  # one after the other again (VQ-S-17)
            self._free[:0] = reversed(indices)
        else:
            self._free += reversed(indices)

    def offer(self, head: int) -> None:
        """Put ``head`` into the available ring, behind those before; :meth:`publish` shows it."""
        self.set_available(self._next_avail, head)
        self._next_avail = (self._next_avail + 1) & 0xFFFF

    def publish(self) -> bool:
        """Show the device what was added; whether it wants a kick for it."""
        old, new = self._published, self._next_avail
        self._fence()  # chains before what makes them available
        self.available_index = new
        self._published = new
        self._fence()  # before the device's field is looked at (§2.7.13.4.1)
        if self.event_idx:
            return (new - self.available_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self.used_flags & VIRTQ_USED_F_NO_NOTIFY

    @property
    def has_used(self) -> bool:
        """There is something to :meth:`collect`."""
        return self._next_used != self.used_index

    def collect(self) -> list[tuple[int, int]]:
        """The (head, used length) of every chain that came back; their descriptors are free."""
        done: list[tuple[int, int]] = []
        index = self.used_index
        while self._next_used != index:
            slot = self._next_used % self.size
            element = self.used + 4 + VIRTQ_USED_ELEM_SIZE * slot
            data = self.memory.read(element, VIRTQ_USED_ELEM_SIZE)
            head, length = self._structs.used_elem.unpack(data)
            if self.in_order and head in self._chains:
                while (first := next(iter(self._chains))) != head:  # used in full, without a word
                    self._give_back(first)
                    done.append((first, self._room[first]))
                    self._next_used = (self._next_used + 1) & 0xFFFF
            self._give_back(head)
            done.append((head, length))
            self._next_used = (self._next_used + 1) & 0xFFFF
        return done
