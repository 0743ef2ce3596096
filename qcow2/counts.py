"""A count for each host cluster of an image: one byte each, whatever the image's refcount width.

The memory is mapped, not allocated: what is never touched costs nothing, so a sparse file as long
as its claims does not cost what it claims.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

from .refcount_codec import codec_for

__all__ = ["MANY", "ClusterCounts", "decode_block", "encode_block"]

MANY = 255
"""The byte for every count from this one on; the exact one stands beside."""

_CHUNK = 1 << 20
"""Clusters looked at in one piece."""


def _zeroes(size: int) -> mmap:
    # Private: a page of zeroes that was only read takes no memory then.
    return mmap(-1, max(size, 1), flags=MAP_PRIVATE | MAP_ANONYMOUS)


class ClusterCounts:
    """Counts of clusters 0 to ``size`` - 1, all 0 at first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = _zeroes(size)
        """The counts, up to MANY."""
        self.many: dict[int, int] = {}
        """The counts of MANY and more, and those of clusters from ``size`` on."""

    def close(self) -> None:
        """Give the memory back."""
        self.bytes.close()

    def __getitem__(self, cluster: int) -> int:
        exact = self.many.get(cluster)
        if exact is not None:
            return exact
        return self.bytes[cluster] if cluster < self.size else 0

    def __setitem__(self, cluster: int, count: int) -> None:
        if count >= MANY or cluster >= self.size:
            self.many[cluster] = count
        else:
            self.many.pop(cluster, None)
        if cluster < self.size:
            self.bytes[cluster] = min(count, MANY)

    def grow(self, size: int) -> None:
        """Count ``size`` clusters from now on."""
        old, self.bytes = self.bytes, _zeroes(size)
        for start in range(0, self.size, _CHUNK):
            end = min(start + _CHUNK, self.size)
            self.bytes[start:end] = old[start:end]
        old.close()
        first, self.size = self.size, size
        for cluster in [c for c in self.many if first <= c < size]:
            self[cluster] = self.many[cluster]

    @property
    def end(self) -> int:
        """The number of clusters that have a count: ``size``, or more."""
        return max(self.size, max(self.many, default=-1) + 1)

    @property
    def used_end(self) -> int:
        """The cluster after the last one whose count is not 0."""
        beyond = max((c for c, n in self.many.items() if n), default=-1) + 1
        end = self.size
        while end > 0:
            start = max(0, end - _CHUNK)
            found = len(self.bytes[start:end].rstrip(b"\0"))
            if found:
                return max(start + found, beyond)
            end = start
        return beyond

    # -- counting ------------------------------------------------------------------------------

    def add_each(self, clusters: Iterable[int], times: int) -> list[int]:
        """Add ``times`` to the count of each; returns those that lie behind the end."""
        outside: list[int] = []
        cluster = -1
        counts, remaining = self.bytes, iter(clusters)
        while True:
            try:
                for cluster in remaining:  # the one that failed
                    counts[cluster] += times
                return outside
            except ValueError:
                self[cluster] = self[cluster] + times
            except IndexError:
                outside.append(cluster)

    def add_run(self, first: int, count: int, times: int) -> None:
        """Add ``times`` to the counts of a run; one from ``size`` on is counted, too."""
        while count > 0:
            part = min(count, _CHUNK)
            self._add_run(first, part, times)
            first, count = first + part, count - part

    def _add_run(self, first: int, count: int, times: int) -> None:
        inside = max(0, min(count, self.size - first))
        if inside:
            piece = self.bytes[first : first + inside]
            if times < MANY and piece.count(0) == inside:
                self.bytes[first : first + inside] = bytes([times]) * inside
            else:
                self.add_each(range(first, first + inside), times)
        for cluster in range(first + inside, first + count):
            self[cluster] = self[cluster] + times

    def clip(self, limit: int) -> list[tuple[int, int]]:
        """Make ``limit`` the largest count; (cluster, how much that took away) where it did."""
        excess: list[tuple[int, int]] = []
        if limit < MANY:
            table = bytes(min(value, limit) for value in range(256))
            for start in range(0, self.size, _CHUNK):
                end = min(start + _CHUNK, self.size)
                piece = self.bytes[start:end]
                clipped = piece.translate(table)
                if clipped != piece:
                    pairs = enumerate(zip(piece, clipped, strict=True), start)
                    excess += [(c, x - y) for c, (x, y) in pairs if limit < x < MANY]
                    self.bytes[start:end] = clipped
        for cluster, value in list(self.many.items()):
            if value > limit:
                excess.append((cluster, value - limit))
                self[cluster] = limit
        return sorted(excess)

    # -- looking -------------------------------------------------------------------------------

    def piece(self, first: int, end: int) -> bytes:
        """The counts of clusters from ``first`` on and before ``end``, up to MANY."""
        inside = self.bytes[first : min(end, self.size)] if first < self.size else b""
        if len(inside) == end - first:
            return inside
        rest = range(first + len(inside), end)
        return inside + bytes(min(self.many.get(c, 0), MANY) for c in rest)

    def differences(self, other: ClusterCounts) -> Iterator[tuple[int, int, int]]:
        """(cluster, own count, the other's) wherever they are not the same."""
        end = max(self.end, other.end)
        size = 1 << 12
        for start in range(0, end, _CHUNK):
            stop = min(start + _CHUNK, end)
            mine, others = self.piece(start, stop), other.piece(start, stop)
            if mine == others and not self.many and not other.many:
                continue
            for at in range(0, stop - start, size):
                a, b = mine[at : at + size], others[at : at + size]
                if a == b and MANY not in a:
                    continue
                for cluster, (x, y) in enumerate(zip(a, b, strict=True), start + at):
                    if x != y or x == MANY:
                        one, two = self[cluster], other[cluster]
                        if one != two:
                            yield cluster, one, two

    def find_unused(self, start: int) -> int:
        """The first cluster from ``start`` on whose count is 0."""
        if start < self.size:
            found = self.bytes.find(b"\0", start)
            if 0 <= found < self.size:
                return found
        start = max(start, self.size)
        while self.many.get(start):
            start += 1
        return start

    @property
    def above_one(self) -> bool:
        """True if some count is larger than 1."""
        if any(value > 1 for value in self.many.values()):
            return True
        for start in range(0, self.size, _CHUNK):
            piece = self.bytes[start : min(start + _CHUNK, self.size)]
            if piece.strip(b"\0\1") and piece.translate(None, b"\0\1"):
                return True
        return False


# -- refcount blocks -------------------------------------------------------------------------------


def _narrow_table(order: int) -> list[bytes]:
    width = 1 << order
    return [
        bytes(byte >> shift & ((1 << width) - 1) for shift in range(0, 8, width))
        for byte in range(256)
    ]


def decode_block(data: bytes, order: int, counts: ClusterCounts, first: int) -> None:
    """Put the refcounts in (a part of) a refcount block of width ``1 << order`` bits into
    ``counts``, from cluster ``first`` on; what lies behind its size is left out."""
    if order < 3:
        small = b"".join(map(_narrow_table(order).__getitem__, data))
    else:
        width = (1 << order) // 8
        small = data[width - 1 :: width]
        high = any(data[i::width].strip(b"\0") for i in range(width - 1))
        if high or MANY in small:
            count = min(len(small), max(counts.size - first, 0))
            values = codec_for(order).load(memoryview(data), 0, count)
            for cluster, value in enumerate(values, first):
                counts[cluster] = value
            return
    end = min(first + len(small), counts.size)
    if first < end:
        counts.bytes[first:end] = small[: end - first]


def encode_block(counts: ClusterCounts, first: int, order: int, size: int) -> bytes:
    """A refcount block of ``size`` bytes with the counts from cluster ``first`` on."""
    entries = (size << 3) >> order
    small = counts.piece(first, first + entries)
    if order < 3:
        width, per_byte = 1 << order, 8 >> order
        value = 0
        for i in range(per_byte):
            value |= int.from_bytes(small[i::per_byte], "little") << (i * width)
        return value.to_bytes(size, "little")
    width = (1 << order) // 8
    block = bytearray(size)
    block[width - 1 :: width] = small
    if MANY in small:
        codec = codec_for(order)
        view = memoryview(block)
        for index in [i for i, value in enumerate(small) if value == MANY]:
            codec.store(view, index, array("Q", [counts[first + index]]))
    return bytes(block)
