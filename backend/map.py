"""Where a disk's data are (``qemu-img map``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .disk import Disk, Extent

__all__ = ["MapEntry", "map_extents"]


@dataclass(frozen=True, slots=True)
class MapEntry:
    """A run of bytes in one state; the names are those of ``qemu-img map --output=json``."""

    start: int
    length: int
    depth: int
    """The layer of the backing chain that it comes from; 0 is the disk itself."""
    present: bool
    """That layer says what it is; else it is zeroes because nothing is there."""
    zero: bool
    data: bool
    compressed: bool
    offset: int | None
    """Where it starts in the file ``filename``, if it stands there as it is read."""
    filename: str | None = None

    def fields(self, *, compressed: bool = False) -> dict[str, int | bool]:
        """What ``qemu-img map --output=json`` prints: as in QEMU 7.2, or with ``compressed``,
        which came later."""
        shown: dict[str, int | bool] = {
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
        }
        if compressed:
            shown["compressed"] = self.compressed
        if self.offset is not None:
            shown["offset"] = self.offset
        return shown


def map_extents(disk: Disk, start: int = 0, length: int | None = None) -> Iterator[MapEntry]:
    """Every run from byte ``start`` on: in one state and contiguous in its file, and as long as
    it is."""
    end = disk.size if length is None else min(disk.size, start + length)
    if start >= end:
        return
    at = first = start
    previous = None
    names: dict[Disk | None, str | None] = {None: None}
    for extent in disk.extents(start, end - start):
        host = extent.host_offset
        if (
            previous is None
            or extent.data is not previous.data
            or extent.zero is not previous.zero
            or extent.allocated is not previous.allocated
            or extent.compressed is not previous.compressed
            or extent.depth != previous.depth
            or extent.file is not previous.file
            or (host is None) is not (previous.host_offset is None)
            or (
                host is not None
                and previous.host_offset is not None
                and host - at != previous.host_offset - first
            )
        ):
            if previous is not None:
                yield _entry(previous, first, at, names)
            previous, first = extent, at
        at += extent.length
    if previous is not None:
        yield _entry(previous, first, at, names)


def _entry(extent: Extent, first: int, end: int, names: dict[Disk | None, str | None]) -> MapEntry:
    file = extent.file
    if file not in names:
        names[file] = None if file is None else file.filename
    return MapEntry(
        first,
        end - first,
        extent.depth,
        extent.allocated,
        extent.zero,
        extent.data,
        extent.compressed,
        extent.host_offset,
        names[file],
    )
