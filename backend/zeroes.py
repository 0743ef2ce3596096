"""Finding zeroes in data."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["first_nonzero", "units", "zero_runs"]


def first_nonzero(data: bytes) -> int:
    """Index of the first byte that is not zero, -1 if there is none."""
    rest = len(data.lstrip(b"\0"))
    return len(data) - rest if rest else -1


def units(offset: int, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """``length`` bytes at byte ``offset`` of a disk, cut at the disk's multiples of ``unit`` bytes:
    (start, end) of each piece, counted from ``offset``."""
    at = 0
    while at < length:
        end = min(length, at + unit - (offset + at) % unit)
        yield at, end
        at = end


def zero_runs(data: bytes, offset: int, unit: int) -> Iterator[tuple[int, int, bool]]:
    """``data``, which stand at byte ``offset`` of a disk, as runs (start, end, zero).

    A run of zeroes is made of whole ``unit`` bytes of the disk, aligned to them; shorter ones count
    as data, but for a part of a unit at an end of ``data``. Positions are in ``data``.
    """
    zeroes = bytes(unit)
    if not (offset % unit or len(data) % unit) and zeroes not in data:
        if data:
            yield 0, len(data), False
        return
    start, kind = 0, None
    for at, end in units(offset, len(data), unit):
        zero = data[at:end] == (zeroes if end - at == unit else zeroes[: end - at])
        if kind is not None and zero is not kind:
            yield start, at, kind
            start = at
        kind = zero
    if kind is not None:
        yield start, len(data), kind
