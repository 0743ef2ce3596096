"""Refcounts of 1 to 64 bits in the bytes of a refcount block (spec, "Host cluster management").

Entries narrower than a byte fill it from the least significant bits up; wider ones are
big-endian. Positions are entry indices into ``view``, which holds (a slice of) a block.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

__all__ = ["RefcountCodec", "codec_for", "uniform"]


def uniform(values: Any) -> bool:
    """True if all values of an array, list or bytes are the same: found out as fast as it goes."""
    return bool(values == values[:1] * len(values))


class RefcountCodec(ABC):
    """Reads and writes runs of refcounts of one width."""

    byte_order: Literal["big", "little"] = "big"
    """How bytes, as one integer, have a whole entry in each digit."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.max = (1 << (1 << order)) - 1

    def add_packed(self, view: memoryview, deltas: bytes, sign: int) -> bytes | None:
        """All entries of ``view`` with ``deltas``, laid out alike, added to them (``sign`` -1:
        taken off); None if one leaves its range."""
        one = int.from_bytes(view, self.byte_order)
        two = int.from_bytes(deltas, self.byte_order)
        total = one + sign * two
        # Of each digit the top bit of what it passes on to the next: carried, or borrowed.
        passed = one & two | (one | two) & ~total
        if sign < 0:
            passed = ~one & two | (~one | two) & total
        if passed & _top_bits(len(deltas), self.order):
            return None
        return total.to_bytes(len(deltas), self.byte_order)

    @abstractmethod
    def load(self, view: memoryview, start: int, count: int) -> Sequence[int]:
        """``count`` refcounts from index ``start`` on."""

    @abstractmethod
    def store(self, view: memoryview, start: int, values: Sequence[int]) -> None:
        """Put ``values`` at index ``start`` on."""

    @abstractmethod
    def find_zero(self, view: memoryview, start: int, end: int) -> int:
        """The first index in [start, end) whose refcount is 0, or -1."""

    @abstractmethod
    def zero_run(self, view: memoryview, start: int, end: int) -> int:
        """How many refcounts in a row are 0, from ``start`` on and before ``end``."""


@lru_cache(maxsize=8)
def _top_bits(size: int, order: int) -> int:
    """The highest bit of every entry in ``size`` bytes."""
    bits = 1 << order
    ones = ((1 << (8 * size)) - 1) // ((1 << bits) - 1)
    return ones << (bits - 1)


class WideCodec(RefcountCodec):
    """8 bits and more."""

    def __init__(self, order: int) -> None:
        super().__init__(order)
        self._width = (1 << order) // 8
        self._typecode = {1: "B", 2: "H", 4: "I", 8: "Q"}[self._width]
        self._swap = self._width > 1 and sys.byteorder == "little"

    def load(self, view: memoryview, start: int, count: int) -> Sequence[int]:
        width = self._width
        values = array(self._typecode, bytes(view[start * width : (start + count) * width]))
        if self._swap:
            values.byteswap()
        return values

    def store(self, view: memoryview, start: int, values: Sequence[int]) -> None:
        width, count = self._width, len(values)
        if uniform(values):
            data = values[0].to_bytes(width) * count if count else b""
        else:
            entries = array(self._typecode, values)
            if self._swap:
                entries.byteswap()
            data = entries.tobytes()
        view[start * width : (start + count) * width] = data

    def find_zero(self, view: memoryview, start: int, end: int) -> int:
        width = self._width
        data, zero = bytes(view[start * width : end * width]), bytes(width)
        place = data.find(zero)
        while place >= 0 and place % width:
            place = data.find(zero, place + 1)
        return -1 if place < 0 else start + place // width

    def zero_run(self, view: memoryview, start: int, end: int) -> int:
        width = self._width
        data = bytes(view[start * width : end * width])
        return (len(data) - len(data.lstrip(b"\0"))) // width


class NarrowCodec(RefcountCodec):
    """1, 2 and 4 bits: a stretch of bytes as one little-endian integer holds entry i at bit i*w."""

    byte_order = "little"

    def __init__(self, order: int) -> None:
        super().__init__(order)
        self._width = 1 << order
        self._per_byte = 8 >> order

    def _integer(self, view: memoryview, start: int, end: int) -> int:
        """The entries [start, end), the first in the lowest bits."""
        first, last = start // self._per_byte, -(-end // self._per_byte)
        value = int.from_bytes(view[first:last], "little")
        value >>= (start % self._per_byte) * self._width
        return value & ((1 << ((end - start) * self._width)) - 1)

    def load(self, view: memoryview, start: int, count: int) -> Sequence[int]:
        width, per_byte, mask = self._width, self._per_byte, self.max
        return [
            (view[i // per_byte] >> (i % per_byte * width)) & mask
            for i in range(start, start + count)
        ]

    def store(self, view: memoryview, start: int, values: Sequence[int]) -> None:
        width, per_byte, mask = self._width, self._per_byte, self.max
        for i, value in enumerate(values, start):
            shift = i % per_byte * width
            view[i // per_byte] = view[i // per_byte] & ~(mask << shift) | (value << shift)

    def _nonzero(self, view: memoryview, start: int, end: int) -> int:
        """Bit i*w is set where entry start+i is not 0."""
        value = self._integer(view, start, end)
        for shift in (2, 1):
            if shift < self._width:
                value |= value >> shift
        count = end - start
        lowest = ((1 << (count * self._width)) - 1) // self.max
        return value & lowest

    def find_zero(self, view: memoryview, start: int, end: int) -> int:
        count = end - start
        lowest = ((1 << (count * self._width)) - 1) // self.max
        zero = lowest & ~self._nonzero(view, start, end)
        if not zero:
            return -1
        return start + ((zero & -zero).bit_length() - 1) // self._width

    def zero_run(self, view: memoryview, start: int, end: int) -> int:
        used = self._nonzero(view, start, end)
        if not used:
            return end - start
        return ((used & -used).bit_length() - 1) // self._width


def codec_for(order: int) -> RefcountCodec:
    """The codec for entries of ``1 << order`` bits."""
    return NarrowCodec(order) if order < 3 else WideCodec(order)
