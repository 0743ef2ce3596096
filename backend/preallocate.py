"""The filter ``preallocate``: a file that grows is made longer in large steps."""

from __future__ import annotations

import threading
from contextlib import suppress

from ..errors import BackendError, UnsupportedError
from .disk import Disk, Extent
from .filter import FilterDisk
from .node import Node, Role
from .registry import Driver

__all__ = ["DRIVER", "PreallocateDisk"]


class PreallocateDisk(FilterDisk):
    """Reserves ``step`` bytes more, and up to a multiple of ``align``, whenever a write passes the
    end of the file below; what is left over is cut off when it is closed."""

    format_name = "preallocate"

    def __init__(self, below: Disk, *, step: int = 128 << 20, align: int = 1 << 20) -> None:
        super().__init__(below)
        self._step = step
        self._align = align
        self._lock = threading.Lock()

    def _follow(self) -> None:
        """The size is that of the data, not of the file below."""

    def _reserve(self, end: int) -> None:
        """A write is to reach ``end``."""
        if end <= self.size:
            return
        with self._lock:
            there = self.below.size
            if end > there:
                wanted = -(-(end + self._step) // self._align) * self._align
                with suppress(UnsupportedError, BackendError):  # it was to be quicker, that is all
                    self.below.write_zeroes(there, wanted - there, fallback=False)

    def _reached(self, end: int) -> None:
        with self._lock:
            if end > self.size:
                self._set_size(end)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._reserve(offset + length)
        super()._writev(offset, views, length)
        self._reached(offset + length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._reserve(offset + length)
        super()._write_zeroes(offset, length, unmap)
        self._reached(offset + length)

    def _block_status(self, offset: int, length: int) -> Extent:
        return super()._block_status(offset, min(length, self.size - offset))

    def _truncate(self, size: int, preallocation: str) -> None:
        with self._lock:
            if preallocation != "off" and size > self.size:
                self.below.truncate(self.size, shrink=True)
            if size > self.below.size or size < self.size or preallocation != "off":
                self.below.truncate(size, preallocation=preallocation, shrink=True)
            elif size > self.size:
                self.below.truncate(self.size, shrink=True)
                self.below.truncate(size)
            self._set_size(size)

    def _close(self) -> None:
        try:
            if not self.read_only and self.below.size > self.size:
                self.below.truncate(self.size, shrink=True)
        finally:
            super()._close()


def _open(node: Node) -> Disk:
    step = node.options.size("prealloc-size")
    align = node.options.size("prealloc-align")
    below = node.required("file", Role.FILE, filename=node.filename)
    align = 1 << 20 if align is None else align
    if not align or align % 512:
        raise ValueError("prealloc-align parameter of preallocate filter is not aligned to 512")
    return PreallocateDisk(below, step=128 << 20 if step is None else step, align=align)


DRIVER = Driver("preallocate", _open, filtering=True)
