"""Which ranges differ between two disks."""

from __future__ import annotations

from collections.abc import Iterator

from .disk import Disk, Extent
from .progress import Progress, silent

__all__ = ["differences"]

_CHUNK = 2 << 20
_BEYOND = Extent(1 << 63, data=False, zero=True, allocated=False)


def differences(
    first: Disk, second: Disk, *, unit: int = 512, progress: Progress = silent
) -> Iterator[tuple[int, int]]:
    """(offset, length) of every range in which they differ, in pieces of ``unit`` bytes.

    What one has more at its end is compared with zeroes. What both say is zeroes is not read.
    """
    total = max(first.size, second.size)
    chunk = max(unit, _CHUNK // unit * unit)
    start: int | None = None
    offset = 0
    while offset < total:
        one, two = _status(first, offset), _status(second, offset)
        length = min(one.length, two.length, total - offset)
        same_place = one.file is two.file is not None and one.host_offset == two.host_offset
        if (one.zero and two.zero) or (same_place and one.host_offset is not None):
            if start is not None:
                yield start, offset - start
                start = None
        else:
            length = min(length, chunk)
            if offset % unit:  # up to where whole pieces begin again
                length = min(length, unit - offset % unit)
            left, right = _read(first, offset, length), _read(second, offset, length)
            for at in range(0, length, unit):
                differs = left[at : at + unit] != right[at : at + unit]
                if differs and start is None:
                    start = offset + at
                elif not differs and start is not None:
                    yield start, offset + at - start
                    start = None
        offset += length
        progress(offset, total)
    if start is not None:
        yield start, total - start


def _status(disk: Disk, offset: int) -> Extent:
    return _BEYOND if offset >= disk.size else disk.block_status(offset, disk.size - offset)


def _read(disk: Disk, offset: int, length: int) -> bytes:
    there = max(0, min(length, disk.size - offset))
    return (disk.read(offset, there) if there else b"").ljust(length, b"\0")
