"""A disk in memory."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from ..errors import BackendError, UnsupportedError
from .disk import Disk, DiskInfo, Extent

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["MemoryDisk"]


class MemoryDisk(Disk):
    """A disk in memory of its own (given a size in bytes) or in a caller's writable buffer.

    The disk is the buffer: what is written to one is in the other. Only memory of its own can
    change its size, and be ``growable`` (see :attr:`Disk.growable`).
    """

    format_name = "memory"

    def __init__(
        self,
        source: int | WriteableBuffer = 0,
        *,
        read_only: bool = False,
        growable: bool = False,
    ) -> None:
        if isinstance(source, int):
            if source < 0:
                raise ValueError(f"memory: a disk cannot have {source} bytes")
            self._data = memoryview(_allocate(source))
        else:
            self._data = memoryview(source).cast("B")
            if self._data.readonly and not read_only:
                raise ValueError("memory: the buffer is not writable")
            if growable:
                raise ValueError("memory: a caller's buffer cannot grow")
        self._owned = isinstance(source, int)
        self.growable = growable
        self._lock = threading.Lock()
        super().__init__(len(self._data), read_only=read_only)

    def getvalue(self) -> bytes:
        """A copy of the contents."""
        return bytes(self._data[: self.size])

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        data = self._data
        for view in views:
            end = offset + len(view)
            view[:] = data[offset:end]
            offset = end

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        if not self._owned:  # never moves
            self._store(offset, views)
            return
        with self._lock:
            self._make_room(offset + length)
            self._store(offset, views)
            if offset + length > self.size:
                self._set_size(offset + length)

    def _store(self, offset: int, views: list[memoryview]) -> None:
        data = self._data
        for view in views:
            end = offset + len(view)
            data[offset:end] = view
            offset = end

    def _block_status(self, offset: int, length: int) -> Extent:
        return Extent(length, data=True, zero=False, allocated=True, host_offset=offset, file=self)

    @property
    def has_zero_init(self) -> bool:
        """True: new memory is zero."""
        return True

    def info(self) -> DiskInfo:
        """Facts about the disk."""
        return DiskInfo(self.format_name, virtual_size=self.size, actual_size=len(self._data))

    def _truncate(self, size: int, preallocation: str) -> None:
        if preallocation != "off":
            raise UnsupportedError(
                f"Unsupported preallocation mode: {preallocation}", feature="preallocation"
            )
        if not self._owned:
            raise UnsupportedError("memory: a caller's buffer keeps its size", feature="truncate")
        with self._lock:
            if size < self.size:  # what comes back when it grows again is zeroes
                self._data[size : self.size] = bytes(self.size - size)
            else:
                self._make_room(size)
            self._set_size(size)

    def _close(self) -> None:
        if not self._owned:
            self._data.release()  # or the caller could not close an mmap

    def _make_room(self, end: int) -> None:
        """Have memory up to ``end``. Readers under way go on with the old memory, whole."""
        if end > len(self._data):
            grown = _allocate(max(end, min(2 * len(self._data), end + (64 << 20))))
            grown[: len(self._data)] = self._data
            self._data = memoryview(grown)


def _allocate(size: int) -> bytearray:
    try:
        return bytearray(size)
    except (MemoryError, OverflowError) as error:
        raise BackendError(errno.ENOSPC, f"No memory for a disk of {size} bytes") from error
