"""Do two disks hold the same (``qemu-img compare``)?"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from ..errors import BackendError, PyvirtioError, message_of
from .disk import Disk, Extent
from .progress import Progress, silent
from .zeroes import first_nonzero

__all__ = ["CompareError", "Comparison", "compare"]

_CHUNK = 2 << 20
_SECTOR = 512


class CompareError(BackendError):
    """One of the disks could not be read, or asked what it holds."""

    def __init__(self, error: Exception, disk: Disk, offset: int, *, mapping: bool) -> None:
        number = (error.errno if isinstance(error, OSError) else None) or errno.EIO
        super().__init__(number, message_of(error), disk.filename)
        self.disk = disk
        self.offset = offset
        self.mapping = mapping
        """It was its state that could not be had, not its data."""
        self.past_end = False
        """It was behind the end of the shorter disk."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found."""

    identical: bool
    sizes_differ: bool
    """Not a difference by itself, unless it was asked for (``strict``)."""
    offset: int | None = None
    """The first byte that differs, if the contents were compared and do."""
    past_end: bool = False
    """The difference is behind the end of the shorter disk."""
    message: str = "Images are identical."
    """In QEMU's words, which give the sector of a difference rather than the byte."""


def compare(
    first: Disk, second: Disk, *, strict: bool = False, progress: Progress = silent
) -> Comparison:
    """Compare contents; what one disk has more at its end must be zeroes.

    ``strict`` wants equal sizes and equal states (allocated or not, zero, compressed), too.
    """
    sizes_differ = first.size != second.size
    if strict and sizes_differ:
        return Comparison(False, True, message="Strict mode: Image size mismatch!")
    common, total = min(first.size, second.size), max(first.size, second.size)
    offset = 0
    while offset < common:
        one = _status(first, offset, common - offset)
        two = _status(second, offset, common - offset)
        if strict and _state(one) != _state(two):
            message = f"Strict mode: Offset {offset} block status mismatch!"
            return Comparison(False, sizes_differ, message=message)
        length = min(one.length, two.length)
        if not (one.zero and two.zero):
            length = min(length, _CHUNK)
            found = _compare(first, second, one, two, offset, length)
            if found is not None:
                return _mismatch(sizes_differ, found)
        offset += length
        progress(offset, total)
    longer = first if first.size > second.size else second
    try:
        while offset < total:
            extent = _status(longer, offset, total - offset)
            length = extent.length
            if not extent.zero:
                length = min(length, _CHUNK)
                at = first_nonzero(_read(longer, offset, length))
                if at >= 0:
                    return _mismatch(True, offset + at, past_end=True)
            offset += length
            progress(offset, total)
    except CompareError as error:
        error.past_end = True
        raise
    return Comparison(True, sizes_differ)


def _status(disk: Disk, offset: int, length: int) -> Extent:
    try:
        return disk.block_status(offset, length)
    except (PyvirtioError, OSError) as error:
        raise CompareError(error, disk, offset, mapping=True) from error


def _read(disk: Disk, offset: int, length: int) -> bytes:
    try:
        return disk.read(offset, length)
    except (PyvirtioError, OSError) as error:
        raise CompareError(error, disk, offset, mapping=False) from error


def _state(extent: Extent) -> tuple[bool, ...]:
    placed = extent.host_offset is not None
    return extent.data, extent.zero, extent.allocated, extent.compressed, placed


def _mismatch(sizes_differ: bool, offset: int, *, past_end: bool = False) -> Comparison:
    told = offset // _SECTOR * _SECTOR
    message = f"Content mismatch at offset {told}!"
    return Comparison(False, sizes_differ, offset, past_end, message)


def _compare(
    first: Disk, second: Disk, one: Extent, two: Extent, offset: int, length: int
) -> int | None:
    """The first byte that differs; None if all are equal."""
    if one.zero or two.zero:
        at = first_nonzero(_read(second if one.zero else first, offset, length))
        return None if at < 0 else offset + at
    left, right = _read(first, offset, length), _read(second, offset, length)
    return None if left == right else offset + _first_difference(left, right)


def _first_difference(left: bytes, right: bytes) -> int:
    """Index of the first byte that differs; there is one."""
    start, end = 0, len(left)
    while end - start > 1:
        middle = (start + end) // 2
        if left[start:middle] == right[start:middle]:
            start = middle
        else:
            end = middle
    return start
