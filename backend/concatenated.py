"""Several disks one after the other, to read (``qemu-img convert A B TARGET``)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from .buffers import split
from .disk import Disk, Extent

__all__ = ["ConcatenatedDisk"]


class ConcatenatedDisk(Disk):
    """The contents of ``parts``, which stay their owner's, in a row. Read-only."""

    format_name = "concatenated"

    def __init__(self, parts: Sequence[Disk]) -> None:
        self._parts = list(parts)
        self._starts = [0]
        for part in self._parts:
            self._starts.append(self._starts[-1] + part.size)
        super().__init__(self._starts[-1], read_only=True)

    def _at(self, offset: int, length: int) -> tuple[Disk, int, int]:
        """The part that holds a byte, the byte's offset there, and how much of ``length`` it
        holds."""
        index = bisect_right(self._starts, offset) - 1
        part, start = self._parts[index], self._starts[index]
        return part, offset - start, min(length, start + part.size - offset)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        done = 0
        while done < length:
            part, start, count = self._at(offset + done, length - done)
            part.readv(start, split(views, done, count))
            done += count

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._refuse(offset, length, writing=True)

    def _block_status(self, offset: int, length: int) -> Extent:
        part, start, count = self._at(offset, length)
        return part.block_status(start, count)
