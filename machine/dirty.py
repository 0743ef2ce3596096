"""Which pages of RAM have changed since the last snapshot.

Three ways to know: the emulator notes its writes (:class:`DirtyPages`, the quickest), RAM is
compared with a copy of what was saved (takes as much memory again), or each page's hash with the
one it had (takes no memory, and several times as long). All give one byte per page: 1 is changed.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Protocol

__all__ = ["PAGE", "ByComparison", "ByHash", "DirtyPages", "Tracker"]

PAGE = 4096
_CHUNK = 16 * PAGE
"""Bytes that are compared at a time."""
_DIGEST = 16
"""Bytes: pages that differ have the same hash once in 2**128."""


def pages_of(size: int) -> int:
    """Pages in so many bytes; the last may be short."""
    return -(-size // PAGE)


class Tracker(Protocol):
    """Knows the pages that changed since :meth:`settle`."""

    def changed(self, ram: memoryview, /) -> bytes | bytearray:
        """One byte per page; 1: it may differ from what it was."""

    def settle(self, ram: memoryview, changed: bytes | bytearray | None, /) -> None:
        """What ``ram`` is now is what it will be compared with; ``changed`` are the pages that
        are different from the last time (None: perhaps all)."""


class DirtyPages:
    """A note of every page that is written, kept by the emulator.

    ``pages[address >> 12] = 1`` is all that a store has to do; :meth:`mark` is for longer ones. A
    page that is written and not noted is lost in the next snapshot.
    """

    def __init__(self, size: int) -> None:
        self.pages = bytearray(b"\1") * pages_of(size)
        """One byte for each page of ``size`` bytes of RAM: not 0 if it was written."""

    def mark(self, offset: int, length: int) -> None:
        """Note a write to ``length`` bytes at byte ``offset`` of the RAM."""
        first, end = offset // PAGE, -(-(offset + length) // PAGE)
        self.pages[first:end] = b"\1" * (min(end, len(self.pages)) - first)

    def changed(self, ram: memoryview) -> bytearray:
        """See :class:`Tracker`."""
        if len(self.pages) != pages_of(len(ram)):
            raise ValueError(f"{len(self.pages)} dirty pages for {len(ram)} bytes of RAM")
        return self.pages

    def settle(self, ram: memoryview, changed: bytes | bytearray | None) -> None:
        """See :class:`Tracker`."""
        self.pages[:] = bytes(len(self.pages))


class ByComparison:
    """Compares RAM with a copy of it."""

    def __init__(self) -> None:
        self._copy: list[bytes] = []

    def changed(self, ram: memoryview) -> bytearray:
        """See :class:`Tracker`."""
        pages = bytearray(b"\1") * pages_of(len(ram))
        if len(self._copy) != -(-len(ram) // _CHUNK):
            return pages
        for number, old in enumerate(self._copy):
            start = number * _CHUNK
            new = ram[start : start + _CHUNK].tobytes()
            first = start // PAGE
            if new == old:
                pages[first : first + _CHUNK // PAGE] = bytes(pages_of(len(new)))
                continue
            for page, at in enumerate(range(0, len(new), PAGE), first):
                pages[page] = new[at : at + PAGE] != old[at : at + PAGE]
        return pages

    def settle(self, ram: memoryview, changed: bytes | bytearray | None) -> None:
        """See :class:`Tracker`."""
        count = -(-len(ram) // _CHUNK)
        everything = changed is None or len(self._copy) != count
        if everything:
            self._copy = [b""] * count
        per_chunk = _CHUNK // PAGE
        for number in range(count):
            if changed is None or everything or any(changed[number * per_chunk :][:per_chunk]):
                self._copy[number] = ram[number * _CHUNK :][:_CHUNK].tobytes()


class ByHash:
    """Compares the hash of each page with the one it had."""

    def __init__(self) -> None:
        self._hashes: list[bytes] = []
        self._seen: list[bytes] = []
        """Those that :meth:`changed` has found, so that nothing is hashed twice."""

    def changed(self, ram: memoryview) -> bytearray:
        """See :class:`Tracker`."""
        self._seen = _hashes(ram)
        if len(self._hashes) != len(self._seen):
            return bytearray(b"\1") * len(self._seen)
        return bytearray(map(bytes.__ne__, self._seen, self._hashes))

    def settle(self, ram: memoryview, changed: bytes | bytearray | None) -> None:
        """See :class:`Tracker`."""
        self._hashes = _hashes(ram) if changed is None else self._seen


def _hashes(ram: memoryview) -> list[bytes]:
    return [
        blake2b(ram[at : at + PAGE], digest_size=_DIGEST).digest()
        for at in range(0, len(ram), PAGE)
    ]
