"""The bits of a dirty bitmap in memory: sparse, in chunks of bytes, changed by whole ranges."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["DirtyBits"]

_CHUNK = 4096
_CHUNK_BITS = 8 * _CHUNK
_FULL = b"\xff" * _CHUNK
"""Stands for every chunk whose bits are all set."""
_EMPTY = bytes(_CHUNK)

_SPANS = re.compile(rb"\xff+|[^\x00\xff]")


def _runs_of(byte: int) -> tuple[tuple[int, int], ...]:
    """The runs (first, count) of set bits in a byte, the least significant bit first."""
    bits = f"{byte:08b}"[::-1]
    return tuple((m.start(), m.end() - m.start()) for m in re.finditer("1+", bits))


_BYTE_RUNS = tuple(_runs_of(byte) for byte in range(256))


class DirtyBits:
    """``length`` bits, all clear at first. Memory grows with the stretches that have set bits.

    Bit n is bit n % 8 of byte n // 8, as in the file. Not safe for threads.
    """

    __slots__ = ("_chunks", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self._chunks: dict[int, bytearray | bytes] = {}

    # -- changing ------------------------------------------------------------------------------

    def set(self, first: int, count: int) -> None:
        """Set a range of bits; what lies past the end is left out."""
        end = min(first + count, self.length)
        while first < end:
            index, within = divmod(first, _CHUNK_BITS)
            part = min(_CHUNK_BITS - within, end - first)
            if part == _CHUNK_BITS:
                self._chunks[index] = _FULL
            else:
                chunk = self._chunks.get(index)
                if chunk is None:
                    chunk = self._chunks[index] = bytearray(_CHUNK)
                if isinstance(chunk, bytearray):  # else all are set
                    _set(chunk, within, within + part)
            first += part

    def clear(self) -> None:
        """Clear every bit."""
        self._chunks.clear()

    def merge(self, other: DirtyBits) -> None:
        """Set every bit that is set in ``other``, which has as many."""
        for index, chunk in list(other._chunks.items()):
            mine = self._chunks.get(index)
            if mine is None:
                self._chunks[index] = chunk if isinstance(chunk, bytes) else chunk[:]
            elif isinstance(mine, bytearray):
                both = int.from_bytes(mine) | int.from_bytes(chunk)
                self._chunks[index] = bytearray(both.to_bytes(_CHUNK))

    def resize(self, length: int) -> None:
        """Have ``length`` bits; new ones are clear."""
        if length < self.length:
            last, within = divmod(length, _CHUNK_BITS)
            for index in [i for i in self._chunks if i > last or (i == last and not within)]:
                del self._chunks[index]
            if last in self._chunks:
                keep = int.from_bytes(self._chunks[last], "little") & ((1 << within) - 1)
                self._chunks[last] = bytearray(keep.to_bytes(_CHUNK, "little"))
        self.length = length

    def load(self, position: int, data: bytes) -> None:
        """Take over the bytes of the bitmap from byte ``position`` on, where all bits are clear."""
        done = 0
        while done < len(data):
            index, within = divmod(position + done, _CHUNK)
            part = data[done : done + _CHUNK - within]
            if len(part) == _CHUNK and part == _FULL:
                self._chunks[index] = _FULL
            elif part.count(0) != len(part):
                chunk = self._chunks.get(index)
                if not isinstance(chunk, bytearray):
                    chunk = self._chunks[index] = bytearray(chunk or _EMPTY)
                chunk[within : within + len(part)] = part
            done += len(part)
        if 8 * (position + len(data)) > self.length:
            length = self.length
            self.length = 8 * (position + len(data))
            self.resize(length)

    # -- asking --------------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Stretches that have set bits: what the memory goes by."""
        return len(self._chunks)

    def count(self) -> int:
        """How many bits are set."""
        return sum(int.from_bytes(chunk).bit_count() for chunk in list(self._chunks.values()))

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first, count) of every run of set bits, in order."""
        first = end = 0
        for index, chunk in sorted(self._chunks.items()):
            for start, count in _chunk_runs(bytes(chunk)):
                start += index * _CHUNK_BITS
                if start != end:
                    if end > first:
                        yield first, end - first
                    first = start
                end = start + count
        if end > first:
            yield first, end - first

    def pieces(self, size: int) -> Iterator[tuple[int, bytes]]:
        """(number, contents) of every piece of ``size`` bytes that has set bits, in order.

        ``size`` is a power of two; the last piece is filled up with zeroes.
        """
        if size <= _CHUNK:
            per_chunk = _CHUNK // size
            for index, chunk in sorted(self._chunks.items()):
                for i in range(per_chunk):
                    piece = bytes(chunk[i * size : (i + 1) * size])
                    if piece.count(0) != size:
                        yield index * per_chunk + i, piece
            return
        per_piece = size // _CHUNK
        for number in sorted({index // per_piece for index in self._chunks}):
            chunks = range(number * per_piece, (number + 1) * per_piece)
            piece = b"".join([self._chunks.get(index, _EMPTY) for index in chunks])
            if piece.count(0) != size:
                yield number, piece


def _set(chunk: bytearray, first: int, end: int) -> None:
    """Set bits [first, end) of a chunk."""
    start_byte, end_byte = (first + 7) >> 3, end >> 3
    if start_byte > end_byte:  # inside one byte
        chunk[end_byte] |= (1 << (end & 7)) - (1 << (first & 7))
        return
    if first & 7:
        chunk[start_byte - 1] |= 0x100 - (1 << (first & 7))
    if end & 7:
        chunk[end_byte] |= (1 << (end & 7)) - 1
    chunk[start_byte:end_byte] = _FULL[: end_byte - start_byte]


def _chunk_runs(chunk: bytes) -> Iterator[tuple[int, int]]:
    """The runs of set bits in a chunk; one that goes on over a byte's end may come in parts."""
    for span in _SPANS.finditer(chunk):
        at = span.start()
        if chunk[at] == 0xFF:
            yield 8 * at, 8 * (span.end() - at)
        else:
            for first, count in _BYTE_RUNS[chunk[at]]:
                yield 8 * at + first, count
