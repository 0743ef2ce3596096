"""Requests under way, noted in memory that outlives this process ("Inflight I/O tracking").

Each queue has a region; in it an entry for each descriptor. After a crash the front-end hands the
region to the next back-end, which does again, in their old order, what was taken and whose end the
driver was not shown. Nothing that the driver has seen the end of is ever done again: a write of
long ago must not come back.

    split    header 16: features 0, version 8, desc_num 10, last_batch_head 12, used_idx 14
             entries of 16: inflight 0, next 6, counter 8

:mod:`.inflight_packed` has the other kind. Every field is stored as one unit, so that a process
that is killed leaves the old value or the new one (``struct`` would clear the place first).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from ...errors import GuestError
from ..ring import Chain, QueueState, Ring
from ..split import SplitRing
from .channel import VhostUserError
from .layout import INFLIGHT_ALIGN, INFLIGHT_VERSION

__all__ = ["InflightRing", "SplitTracker", "Tracker", "region_size"]

_VERSION, _DESC_NUM = 4, 5
"""Places of both kinds of header, in 16-bit words."""
_BATCH_HEAD, _USED_IDX = 6, 7


def region_size(entries: int, packed: bool) -> int:
    """Bytes of one queue's region."""
    size = 32 + 32 * entries if packed else 16 + 16 * entries
    return -(-size // INFLIGHT_ALIGN) * INFLIGHT_ALIGN


class Tracker(ABC):
    """The region of one queue, and what was taken from that queue."""

    def __init__(self, region: memoryview, entries: int) -> None:
        """``region`` is this one's to release; it has room for ``entries``.

        Raises VhostUserError for a region of another kind.
        """
        self._region = region
        self.entries = entries
        self._bytes = region.cast("B")
        self._words = region.cast("H")
        self._longs = region.cast("Q")
        version, count = self._words[_VERSION], self._words[_DESC_NUM]
        self.fresh = version == 0
        """Nothing was noted in it yet."""
        if not self.fresh and (version != INFLIGHT_VERSION or not 0 < count <= entries):
            self.close()
            raise VhostUserError(f"an inflight region of version {version} with {count} entries")
        self._counter = 0

    @abstractmethod
    def recover(self, state: QueueState, look: Callable[[int], int]) -> None:
        """Find out what is under way, and set the indices of ``state`` by it.

        ``look`` gives a 16-bit word of guest memory. Raises VhostUserError for notes that cannot
        be, GuestError for a ring that is not in memory.
        """

    @abstractmethod
    def unfinished(self, ring: Ring) -> list[Chain]:
        """What is to be done again, in its order. Raises GuestError for broken chains."""

    @abstractmethod
    def taken(self, ring: Ring, slot: int, chain: Chain) -> None:
        """A chain was taken, which starts in place ``slot`` of a packed ring."""

    @abstractmethod
    def used(self, chain: Chain) -> None:
        """It was done: the driver will be shown with the next batch."""

    @abstractmethod
    def publishing(self) -> None:
        """The driver is about to be shown a batch."""

    @abstractmethod
    def published(self, state: QueueState) -> None:
        """It was shown it."""

    def prepare(self, size: int, flags: Iterable[int]) -> bool:
        """Whether the notes are to begin anew, for a queue of ``size``; the bytes at ``flags`` say
        what is under way. Raises VhostUserError if they belong to a queue of another size."""
        if size > self.entries:
            raise VhostUserError(f"an inflight region of {self.entries} entries for {size}")
        if not self.fresh and self._words[_DESC_NUM] != size:
            if any(self._bytes[place] for place in flags):
                raise VhostUserError(f"requests of another queue than one of {size} under way")
            self.forget()
        return self.fresh

    def forget(self) -> None:
        """As if nothing had been noted ever: after a reset."""
        self._words[_VERSION] = 0
        self.fresh = True

    def close(self) -> None:
        """Let go of the region."""
        for view in (self._bytes, self._words, self._longs, self._region):
            view.release()

    def _begin(self, size: int) -> None:
        """Make a fresh region one of ours, after all else of it was written."""
        self._words[_DESC_NUM] = size
        self._words[_VERSION] = INFLIGHT_VERSION
        self.fresh = False

    def _next_counter(self) -> int:
        self._counter += 1
        return self._counter & 0xFFFF_FFFF_FFFF_FFFF

    def _in_order(self, heads: list[tuple[int, int]]) -> list[int]:
        """The second ones, in the order of the first, which are counters."""
        heads.sort()
        self._counter = heads[-1][0] if heads else 0
        return [head for _, head in heads]


class SplitTracker(Tracker):
    """The region of a split queue."""

    def __init__(self, region: memoryview, entries: int) -> None:
        super().__init__(region, entries)
        self._batch: list[int] = []
        self._unfinished: list[int] = []

    def recover(self, state: QueueState, look: Callable[[int], int]) -> None:
        """See :class:`Tracker`."""
        words, size = self._words, state.size
        self._batch = []
        self._unfinished = []
        used = look(state.device_area + 2)
        if self.prepare(size, (16 + 16 * index for index in range(size))):
            for index in range(size):
                self._bytes[16 + 16 * index] = 0
            words[_BATCH_HEAD] = 0
            words[_USED_IDX] = used
            self._begin(size)
            return
        # A batch that the driver was shown, and that was not taken off the notes.
        entry = words[_BATCH_HEAD]
        for _ in range(min(used - words[_USED_IDX] & 0xFFFF, size)):
            if entry >= size:
                raise VhostUserError(f"inflight entry {entry} of {size}")
            self._bytes[16 + 16 * entry] = 0
            entry = words[8 + 8 * entry + 3]
        words[_USED_IDX] = used
        self._unfinished = self._in_order(
            [
                (self._longs[2 + 2 * index + 1], index)
                for index in range(size)
                if self._bytes[16 + 16 * index]
            ]
        )
        state.next_avail = used + len(self._unfinished) & 0xFFFF

    def unfinished(self, ring: Ring) -> list[Chain]:
        """See :class:`Tracker`."""
        heads, self._unfinished = self._unfinished, []
        if not isinstance(ring, SplitRing):
            raise GuestError("an inflight region of a split queue for another")
        return [ring.chain_at(head) for head in heads]

    def taken(self, ring: Ring, slot: int, chain: Chain) -> None:
        """See :class:`Tracker`."""
        self._longs[2 + 2 * chain.head + 1] = self._next_counter()
        self._bytes[16 + 16 * chain.head] = 1

    def used(self, chain: Chain) -> None:
        """See :class:`Tracker`."""
        words, head = self._words, chain.head
        words[8 + 8 * head + 3] = words[_BATCH_HEAD]
        words[_BATCH_HEAD] = head
        self._batch.append(head)

    def publishing(self) -> None:
        """See :class:`Tracker`."""

    def published(self, state: QueueState) -> None:
        """See :class:`Tracker`."""
        for head in self._batch:
            self._bytes[16 + 16 * head] = 0
        self._batch.clear()
        self._words[_USED_IDX] = state.used_index


class InflightRing(Ring):
    """``ring`` with notes of what is taken from it and used in it."""

    def __init__(self, ring: Ring, tracker: Tracker) -> None:
        self.state = ring.state
        self._ring = ring
        self._tracker = tracker

    @property
    def suppressed(self) -> bool:
        """See :class:`Ring`."""
        return self._ring.suppressed

    @suppressed.setter
    def suppressed(self, value: bool) -> None:
        self._ring.suppressed = value

    def unfinished(self) -> list[Chain]:
        """What was taken in an earlier life, to be done again. Raises GuestError."""
        return self._tracker.unfinished(self._ring)

    def ready(self) -> int:
        """See :class:`Ring`."""
        return self._ring.ready()

    def pop(self) -> Chain:
        """See :class:`Ring`."""
        slot = self.state.next_avail
        chain = self._ring.pop()
        self._tracker.taken(self._ring, slot, chain)
        return chain

    def push(self, chain: Chain, written: int) -> None:
        """See :class:`Ring`."""
        self._ring.push(chain, written)
        self._tracker.used(chain)

    def publish(self) -> bool:
        """See :class:`Ring`."""
        self._tracker.publishing()
        wanted = self._ring.publish()
        self._tracker.published(self.state)
        return wanted

    def suppress(self) -> None:
        """See :class:`Ring`."""
        self._ring.suppress()
