"""The notes of a packed queue's requests ("Inflight I/O tracking"); see :mod:`.inflight`.

    header 32: features 0, version 8, desc_num 10, free_head 12, old_free_head 14, used_idx 16,
               old_used_idx 18, used_wrap_counter 20, old_used_wrap_counter 21
    entries of 32: inflight 0, next 2, last 4, num 6, counter 8, id 16, flags 18, len 20, addr 24

A list of descriptors is copied into entries of a free list when it is taken, for the ring's own are
overwritten by used ones. The ``old_`` fields are what holds until the driver was shown a batch.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import GuestError
from ..layout import VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED
from ..packed import PackedRing
from ..ring import Chain, QueueState, Ring
from .channel import VhostUserError
from .inflight import Tracker

__all__ = ["PackedTracker"]

_OWNER = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED
_FREE, _OLD_FREE, _USED, _OLD_USED = 6, 7, 8, 9
"""16-bit words of the header."""
_WRAP, _OLD_WRAP = 20, 21
"""Bytes of it."""


class PackedTracker(Tracker):
    """The region of a packed queue."""

    def __init__(self, region: memoryview, entries: int) -> None:
        super().__init__(region, entries)
        self._lengths = region.cast("I")
        self._size = 0
        self._taken: dict[int, list[int]] = {}
        """First entries of what was taken, by buffer id (which should name but one)."""
        self._batch: list[int] = []
        self._unfinished: list[int] = []

    def close(self) -> None:
        """See :class:`Tracker`."""
        if hasattr(self, "_lengths"):
            self._lengths.release()
        super().close()

    # Entries: places of their fields.

    @staticmethod
    def _word(entry: int, place: int) -> int:
        return 16 + 16 * entry + place

    def _flag(self, entry: int) -> int:
        return 32 + 32 * entry

    def recover(self, state: QueueState, look: Callable[[int], int]) -> None:
        """See :class:`Tracker`."""
        self._size = size = state.size
        self._taken.clear()
        self._batch = []
        self._unfinished = []
        if self.prepare(size, (self._flag(entry) for entry in range(size))):
            self._begin_at(state)
            return
        words, flags = self._words, self._bytes
        for place in (_FREE, _OLD_FREE, _USED, _OLD_USED):
            limit = size if place in (_FREE, _OLD_FREE) else size - 1
            if words[place] > limit:
                raise VhostUserError(f"an inflight region with place {words[place]} of {size}")
        if (words[_USED], flags[_WRAP]) != (words[_OLD_USED], flags[_OLD_WRAP]):
            available = VIRTQ_DESC_F_AVAIL if flags[_OLD_WRAP] else VIRTQ_DESC_F_USED
            if look(state.descriptor_area + 16 * words[_OLD_USED] + 14) & _OWNER != available:
                self._commit()  # the driver was shown it
        words[_FREE], words[_USED] = words[_OLD_FREE], words[_OLD_USED]
        flags[_WRAP] = flags[_OLD_WRAP]
        entry = words[_FREE]
        for _ in range(size):
            if entry >= size:
                break
            flags[self._flag(entry)] = 0
            entry = words[self._word(entry, 1)]
        heads = [entry for entry in range(size) if flags[self._flag(entry)]]
        self._unfinished = self._in_order([(self._longs[4 + 4 * each + 1], each) for each in heads])
        slots = sum(words[self._word(entry, 3)] for entry in heads)
        if slots > size:
            raise VhostUserError(f"{slots} descriptors under way of {size}")
        state.used_index, state.used_wrap = words[_USED], bool(flags[_WRAP])
        turns, state.next_avail = divmod(state.used_index + slots, size)
        state.avail_wrap = state.used_wrap ^ bool(turns)

    def _begin_at(self, state: QueueState) -> None:
        words, flags = self._words, self._bytes
        for entry in range(self._size):
            flags[self._flag(entry)] = 0
            words[self._word(entry, 1)] = entry + 1
        words[_FREE] = words[_OLD_FREE] = 0
        words[_USED] = words[_OLD_USED] = state.used_index
        flags[_WRAP] = flags[_OLD_WRAP] = state.used_wrap
        self._begin(self._size)

    def unfinished(self, ring: Ring) -> list[Chain]:
        """See :class:`Tracker`."""
        entries, self._unfinished = self._unfinished, []
        if not isinstance(ring, PackedRing):
            raise GuestError("an inflight region of a packed queue for another")
        chains = []
        for first in entries:
            chain = ring.chain_of(self._descriptors(first))
            self._taken.setdefault(chain.head, []).append(first)
            chains.append(chain)
        return chains

    def _descriptors(self, first: int) -> list[tuple[int, int, int, int]]:
        found = []
        entry = first
        words = self._words
        for _ in range(words[self._word(first, 3)]):
            if entry >= self._size:
                raise GuestError(f"inflight entry {entry} of {self._size}")
            ident, flags = words[self._word(entry, 8)], words[self._word(entry, 9)]
            address, length = self._longs[4 + 4 * entry + 3], self._lengths[8 + 8 * entry + 5]
            found.append((address, length, ident, flags))
            entry = words[self._word(entry, 1)]
        if not found:
            raise GuestError("a request of no descriptors was under way")
        return found

    def taken(self, ring: Ring, slot: int, chain: Chain) -> None:
        """See :class:`Tracker`."""
        if not isinstance(ring, PackedRing):
            raise GuestError("an inflight region of a packed queue for another")
        words = self._words
        first = entry = last = words[_OLD_FREE]
        for count, descriptor in enumerate(ring.descriptors(slot, chain.slots)):
            if entry >= self._size:
                raise GuestError("the inflight region has no free entry")
            if count == 0:
                words[self._word(first, 3)] = 0
                self._longs[4 + 4 * first + 1] = self._next_counter()
                self._bytes[self._flag(first)] = 1
            words[self._word(first, 3)] = count + 1
            address, length, ident, flags = descriptor
            self._longs[4 + 4 * entry + 3] = address
            self._lengths[8 + 8 * entry + 5] = length
            words[self._word(entry, 8)] = ident
            words[self._word(entry, 9)] = flags
            last, entry = entry, words[self._word(entry, 1)]
        words[self._word(first, 2)] = last
        words[_FREE] = entry
        words[_OLD_FREE] = entry
        self._taken.setdefault(chain.head, []).append(first)

    def used(self, chain: Chain) -> None:
        """See :class:`Tracker`. Noted when the batch is complete: what is taken between would find
        the free list half changed."""
        entries = self._taken.get(chain.head)
        if entries:
            self._batch.append(entries.pop(0))
            if not entries:
                del self._taken[chain.head]

    def publishing(self) -> None:
        """See :class:`Tracker`."""
        words = self._words
        for first in self._batch:
            last = words[self._word(first, 2)]
            if last >= self._size:
                raise GuestError(f"inflight entry {last} of {self._size}")
            words[self._word(last, 1)] = words[_FREE]
            words[_FREE] = first
            used = words[_USED] + words[self._word(first, 3)]
            if used >= self._size:
                used -= self._size
                self._bytes[_WRAP] ^= 1
            words[_USED] = used % self._size

    def published(self, state: QueueState) -> None:
        """See :class:`Tracker`."""
        for first in self._batch:
            self._bytes[self._flag(first)] = 0
        self._batch.clear()
        self._commit()

    def _commit(self) -> None:
        words, flags = self._words, self._bytes
        words[_OLD_FREE], words[_OLD_USED] = words[_FREE], words[_USED]
        flags[_OLD_WRAP] = flags[_WRAP]
