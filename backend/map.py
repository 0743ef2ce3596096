"""Where a disk's data are (``qemu-img map``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .disk import Disk

__all__ = ["MapEntry", "json_lines", "map_extents"]


class MapEntry(NamedTuple):
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
    names: dict[Disk | None, str | None] = {None: None}
    runs = disk.runs(start, end - start)
    length, data, zero, present, compressed, depth, host, file = next(runs)
    for size, data2, zero2, present2, compressed2, depth2, host2, file2 in runs:
        if (
            data is data2
            and zero is zero2
            and present is present2
            and depth == depth2
            and file is file2
            and compressed is compressed2
            and (host2 is None if host is None else host2 == host + length)
        ):
            length += size
            continue
        name = names[file] if file in names else names.setdefault(file, _name(file))
        yield MapEntry(start, length, depth, present, zero, data, compressed, host, name)
        start += length
        length, data, zero, present, compressed = size, data2, zero2, present2, compressed2
        depth, host, file = depth2, host2, file2
    yield MapEntry(start, length, depth, present, zero, data, compressed, host, _name(file))


def _name(file: Disk | None) -> str | None:
    return None if file is None else file.filename


def json_lines(entries: Iterable[MapEntry]) -> Iterator[str]:
    """The lines that ``qemu-img map --output=json`` prints (QEMU 7.2), together one JSON text."""
    states: dict[tuple[int, bool, bool, bool], str] = {}
    before = "["
    for start, length, depth, present, zero, data, _, offset, _ in entries:
        key = (depth, present, zero, data)
        state = states.get(key)
        if state is None:
            words = ["true" if word else "false" for word in key[1:]]
            state = f'"depth": {depth}, "present": {{}}, "zero": {{}}, "data": {{}}'.format(*words)
            states[key] = state
        place = "" if offset is None else f', "offset": {offset}'
        yield f'{before}{{ "start": {start}, "length": {length}, {state}{place}}}'
        before = ",\n"
    yield "]\n" if before != "[" else "[]\n"
