"""What a virtqueue is to a device: chains come out, used chains go back.

The state of a queue is plain data (:class:`QueueState`), so that it can be saved, restored and
printed; a :class:`Ring` is the code that works on it together with the ring in guest memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

from ..backend.state import StateReader, StateWriter
from .memory import Segment

__all__ = ["MAX_INDIRECT", "Chain", "QueueState", "Ring"]

MAX_INDIRECT = 1024
"""Descriptors of an indirect table that are followed even where the queue is smaller than that.

§2.7.5.3.1 forbids drivers more than the queue size, but Linux goes by ``seg_max`` alone
when it has made the queue smaller; QEMU's limit is the same.
"""


@dataclass(slots=True)
class QueueState:
    """Everything there is to know of one virtqueue outside guest memory."""

    max_size: int
    """Entries that the device allows."""
    size: int
    """Entries that the driver chose."""
    ready: bool = False
    """The driver has enabled the queue."""
    descriptor_area: int = 0
    """Guest physical address, as the next two."""
    driver_area: int = 0
    """The available ring of a split queue, the driver's event suppression of a packed one."""
    device_area: int = 0
    """The used ring of a split queue, the device's event suppression of a packed one."""
    next_avail: int = 0
    """Free-running number of the next chain to take (16 bits); packed: its place in the ring."""
    used_index: int = 0
    """Free-running number of the next used element (16 bits), published or not; packed: its place
    in the ring."""
    avail_wrap: bool = True
    """Packed: the wrap counter that goes with ``next_avail``."""
    used_wrap: bool = True
    """Packed: the wrap counter that goes with ``used_index``."""

    def rewind(self) -> None:
        """Nothing has been taken or used."""
        self.next_avail = self.used_index = 0
        self.avail_wrap = self.used_wrap = True

    def save(self, stream: StateWriter) -> None:
        """Write all of it."""
        stream.u32(self.max_size)
        stream.u32(self.size)
        stream.flag(self.ready)
        stream.u64(self.descriptor_area)
        stream.u64(self.driver_area)
        stream.u64(self.device_area)
        stream.u16(self.next_avail)
        stream.u16(self.used_index)
        stream.flag(self.avail_wrap)
        stream.flag(self.used_wrap)

    @classmethod
    def load(cls, stream: StateReader, max_size: int) -> Self:
        """What was saved, of a queue that allows ``max_size`` entries; else ImageError."""
        state = cls(
            max_size=stream.u32(),
            size=stream.u32(),
            ready=stream.flag(),
            descriptor_area=stream.u64(),
            driver_area=stream.u64(),
            device_area=stream.u64(),
            next_avail=stream.u16(),
            used_index=stream.u16(),
            avail_wrap=stream.flag(),
            used_wrap=stream.flag(),
        )
        if state.max_size != max_size:
            raise stream.malformed(f"has a queue of {state.max_size} entries, not {max_size}")
        return state


class Chain(NamedTuple):
    """A chain of descriptors: a request's memory, as addresses. Nothing is mapped yet."""

    head: int
    """What names the chain to the driver."""
    readable: list[Segment]
    """What the device may read, in order."""
    writable: list[Segment]
    """What it may write, in order."""
    slots: int = 1
    """Places of a packed ring that it takes."""

    def save(self, stream: StateWriter) -> None:
        """Write all of it."""
        stream.u16(self.head)
        stream.u16(self.slots)
        for segments in (self.readable, self.writable):
            stream.u32(len(segments))
            for address, length in segments:
                stream.u64(address)
                stream.u32(length)

    @classmethod
    def load(cls, stream: StateReader, max_size: int) -> Self:
        """What was saved, of a queue that allows ``max_size`` entries; else ImageError."""
        head, slots = stream.u16(), stream.u16()
        if not 0 < slots <= max_size:
            raise stream.malformed(f"has a request of {slots} descriptors")

        def segments() -> list[Segment]:
            count = stream.u32()
            if count > max(MAX_INDIRECT, max_size) + max_size:
                raise stream.malformed(f"has a request of {count} segments")
            return [(stream.u64(), stream.u32()) for _ in range(count)]

        return cls(head, segments(), segments(), slots)


class Ring(ABC):
    """A live virtqueue. One round of service is::

        while count := ring.ready():
            for _ in range(count):
                chain = ring.pop()
                ring.push(chain, bytes_written)
            interrupt |= ring.publish()

    Nothing of guest memory stays referred to between two calls.
    """

    state: QueueState

    in_order: bool = False
    """Chains are used in the order that they were made available in."""
    suppressed: bool = False
    """Kicks are suppressed: the next round of service has to end with :meth:`publish`."""

    @abstractmethod
    def ready(self) -> int:
        """How many chains the driver has made available that were not taken yet.

        Raises GuestError for a number that cannot be.
        """

    @abstractmethod
    def pop(self) -> Chain:
        """Take the next chain; :meth:`ready` has said that there is one.

        Raises GuestError for a broken one.
        """

    @abstractmethod
    def push(self, chain: Chain, written: int) -> None:
        """Stage ``chain`` as used, with the number of bytes that the device wrote into it."""

    @abstractmethod
    def publish(self) -> bool:
        """Show the driver what was pushed, and have it kick for what comes next.

        True if the driver wants an interrupt for it. :meth:`ready` must be asked once more after
        this: the driver may not have kicked for what it added before.
        """

    @abstractmethod
    def suppress(self) -> None:
        """Ask the driver not to kick until the next :meth:`publish` (a hint)."""
