"""The filter ``copy-on-read``: what is read from a backing file is kept in the image above it."""

from __future__ import annotations

import errno

from ..errors import BackendError
from .buffers import is_zero
from .chain import layers
from .direct import SharedLock
from .disk import Disk, Extent
from .filter import FilterDisk
from .node import Node, Role
from .registry import Driver

__all__ = ["DRIVER", "CopyOnReadDisk"]


class CopyOnReadDisk(FilterDisk):
    """Writes what is read into the disk below, unless it is there or deeper than ``bottom``.

    Copies and writes exclude each other where they overlap: an old copy never replaces new data.
    """

    format_name = "copy-on-read"

    def __init__(self, below: Disk, *, bottom: Disk | None = None) -> None:
        super().__init__(below)
        self._bottom_depth = _depth_below(below, bottom)
        self._lock = SharedLock()

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        super()._readv(offset, views, length)
        if not self.read_only:
            self._keep(offset, length)

    def _keep(self, offset: int, length: int) -> None:
        """Have a range in the image itself, in whole clusters."""
        unit = max(1, self.below.info().cluster_size or 1)
        start = offset // unit * unit
        end = min(-(-(offset + length) // unit) * unit, self.size)
        while start < end:
            extent = self.below.block_status(start, end - start)
            if self._is_below(extent):
                with self._lock.alone():
                    self._copy(start, start + extent.length)
            start += extent.length

    def _is_below(self, extent: Extent) -> bool:
        if extent.depth == 0:
            return not extent.allocated
        return self._bottom_depth is None or extent.depth <= self._bottom_depth

    def _copy(self, start: int, end: int) -> None:
        """Copy a range that was below a moment ago; others may have written it since."""
        while start < end:
            extent = self.below.block_status(start, end - start)
            stop = start + extent.length
            if self._is_below(extent):
                if extent.zero:
                    self.below.write_zeroes(start, extent.length)
                else:
                    self.below.debug_event("cor_write")
                    for at in range(start, stop, 1 << 20):
                        part = min(1 << 20, stop - at)
                        data = self.below.read(at, part)
                        if is_zero([memoryview(data)]):
                            self.below.write_zeroes(at, part)
                        else:
                            self.below.write(at, data)
            start = stop

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        with self._lock.shared():
            super()._writev(offset, views, length)

    def _write_compressed(self, offset: int, views: list[memoryview], length: int) -> None:
        with self._lock.shared():
            super()._write_compressed(offset, views, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        with self._lock.shared():
            super()._write_zeroes(offset, length, unmap)

    def _discard(self, offset: int, length: int) -> None:
        with self._lock.shared():
            super()._discard(offset, length)


def _depth_below(disk: Disk, bottom: Disk | None) -> int | None:
    """How deep the layers are that are copied from; None: all."""
    if bottom is None:
        return None
    for depth, layer in enumerate(layers(disk)):
        if layer is bottom:
            return depth
    raise ValueError("Bottom node is not in the chain of the file")


def _open(node: Node) -> Disk:
    if node.context.read_only:
        raise BackendError(errno.EACCES, "Block node is read-only")
    bottom_name = node.options.text("bottom")
    below = node.required("file", Role.FILTERED, filename=node.filename)
    bottom = None
    if bottom_name is not None:
        bottom = node.context.graph.nodes.get(bottom_name)
        if bottom is None:
            below.close()
            raise ValueError(f"Bottom node '{bottom_name}' not found")
    return CopyOnReadDisk(below, bottom=bottom)


DRIVER = Driver("copy-on-read", _open, filtering=True)
