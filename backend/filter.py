"""What all filters have in common: they hand on what the disk below holds."""

from __future__ import annotations

from collections.abc import Mapping

from .buffers import copy_in, gather
from .direct import SharedLock
from .disk import Disk, DiskInfo, Extent, Limits

__all__ = ["AlignedFilter", "FilterDisk"]


class FilterDisk(Disk):
    """Hands every request on to the disk ``below``, which it owns; a filter overrides what it is
    there for."""

    format_name = "filter"
    child_name = "file"
    """What QEMU calls the disk below."""

    def __init__(self, below: Disk, *, limits: Limits | None = None) -> None:
        super().__init__(below.size, read_only=below.read_only, limits=limits or below.limits)
        self.below = below
        self.growable = below.growable

    @property
    def children(self) -> Mapping[str, Disk]:
        """The disk below."""
        return {self.child_name: self.below}

    @property
    def filename(self) -> str | None:
        """That of the disk below."""
        return self.below.filename

    @property
    def has_zero_init(self) -> bool:
        """As the disk below."""
        return self.below.has_zero_init

    def info(self) -> DiskInfo:
        """Facts about the disk: what holds for the one below, but for its format's own."""
        below = self.below.info()
        return DiskInfo(
            self.format_name,
            self.size,
            below.actual_size,
            self.filename,
            cluster_size=below.cluster_size,
            vm_state_offset=below.vm_state_offset,
        )

    def _follow(self) -> None:
        """The disk below may have changed its size."""
        self._set_size(self.below.size)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.below.readv(offset, views)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self.below.writev(offset, views)
        self._follow()

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.below.write_zeroes(offset, length, unmap=unmap, fallback=False)
        self._follow()

    def _write_compressed(self, offset: int, views: list[memoryview], length: int) -> None:
        self.below.write_compressed(offset, views)
        self._follow()

    def _discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)

    def _flush(self) -> None:
        self.below.flush()

    def _block_status(self, offset: int, length: int) -> Extent:
        return self.below.block_status(offset, length)

    def _truncate(self, size: int, preallocation: str) -> None:
        self.below.truncate(size, preallocation=preallocation, shrink=True)
        self._follow()

    def drain(self) -> None:
        """Wait until no request is under way below."""
        self.below.drain()

    def reopen(self, *, read_only: bool) -> None:
        """Reopen the disk below, too."""
        self.below.reopen(read_only=read_only)
        self.read_only = read_only

    def invalidate(self) -> None:
        """Somebody else has changed what lies below."""
        self.below.invalidate()
        self._follow()

    def debug_event(self, name: str) -> None:
        """Passed on."""
        self.below.debug_event(name)

    def _close(self) -> None:
        self.below.close()


class AlignedFilter(FilterDisk):
    """A filter that meets only requests aligned to its limits: what is not is padded first, and
    what a write does not cover is read before."""

    def __init__(self, below: Disk, *, limits: Limits | None = None) -> None:
        super().__init__(below, limits=limits)
        self._align = self.limits.request_alignment
        self._padding = SharedLock()

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        start, end = self._padded(offset, length)
        if (start, end) == (offset, offset + length):
            self._read_aligned(start, views, length)
            return
        data = memoryview(bytearray(end - start))
        self._read_aligned(start, [data], end - start)
        copy_in(views, data[offset - start : offset - start + length])

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        start, end = self._padded(offset, length)
        if (start, end) == (offset, offset + length):
            with self._padding.shared():
                self._write_aligned(start, views, length)
            return
        with self._padding.alone():
            data = memoryview(bytearray(end - start))
            for at in {start, max(start, (end - 1) // self._align * self._align)}:
                inside = max(0, min(self.size, end, at + self._align) - at)
                if inside:
                    self._read_aligned(at, [data[at - start : at - start + inside]], inside)
            data[offset - start : offset - start + length] = gather(views)
            self._write_aligned(start, [data], end - start)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        with self._padding.shared():
            super()._write_zeroes(offset, length, unmap)

    def _discard(self, offset: int, length: int) -> None:
        with self._padding.shared():
            super()._discard(offset, length)

    def _padded(self, offset: int, length: int) -> tuple[int, int]:
        """The range around a request that is aligned; the end of the disk counts as aligned."""
        end = offset + length
        if end != self.size or self.growable:
            end = -(-end // self._align) * self._align
            if not self.growable:
                end = min(end, self.size)
        return offset // self._align * self._align, end

    def _read_aligned(self, offset: int, views: list[memoryview], length: int) -> None:
        self.below.readv(offset, views)

    def _write_aligned(self, offset: int, views: list[memoryview], length: int) -> None:
        self.below.writev(offset, views)
        self._follow()
