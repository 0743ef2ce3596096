"""Reading every kind of cluster."""

from __future__ import annotations

import zlib
from threading import Lock

from ..backend.buffers import clear, copy_in, split
from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from .cache import CacheFull
from .layout import ClusterKind
from .metadata import Metadata

__all__ = ["Reader"]


class Reader:
    """Serves reads of one image: from its clusters, its backing file, or as zeroes."""

    def __init__(
        self, metadata: Metadata, backing: Disk | None, missing_backing: str | None
    ) -> None:
        self._metadata = metadata
        self.backing = backing
        self._missing = missing_backing
        """The name of a backing file that was not opened."""
        self._decompressed: tuple[int, bytes] = (0, b"")
        """The last compressed cluster read: its L2 entry, its contents."""
        self._decompressing = Lock()

    def read(self, offset: int, views: list[memoryview], length: int) -> None:
        """Read guest bytes from ``offset`` on into ``views``."""
        metadata = self._metadata
        gate, lock = metadata.gate, metadata.lock
        with lock:
            epoch = gate.enter()
        try:
            while True:
                kind, host, run = self._map(offset, length)
                if run == length:
                    self.read_run(kind, host, offset, views, length)
                    return
                self.read_run(kind, host, offset, split(views, 0, run), run)
                views = split(views, run, length - run)
                offset += run
                length -= run
        finally:
            with lock:
                gate.leave(epoch)

    def _map(self, offset: int, length: int) -> tuple[ClusterKind, int, int]:
        metadata = self._metadata
        while True:
            try:
                with metadata.lock:
                    return metadata.tables.map(offset, length)
            except CacheFull:
                metadata.flush_inside()

    def read_run(
        self, kind: ClusterKind, host: int, offset: int, views: list[memoryview], length: int
    ) -> None:
        """Read a run as :meth:`Tables.map` describes it (its kind and host)."""
        if kind is ClusterKind.NORMAL:
            self._metadata.file.debug_event("read_aio")
            self._metadata.file.readv(host, views)
        elif kind is ClusterKind.UNALLOCATED:
            self._read_backing(offset, views, length)
        elif kind is ClusterKind.COMPRESSED:
            start = offset & (self._metadata.cluster_size - 1)
            copy_in(views, memoryview(self.decompress(host))[start : start + length])
        else:
            clear(views)

    def _read_backing(self, offset: int, views: list[memoryview], length: int) -> None:
        """From the backing file; zeroes past its end, or where there is none."""
        backing = self.backing
        if backing is None:
            if self._missing is not None:
                raise ImageError(
                    f"The data is in the backing file '{self._missing}', which was not opened",
                    field="backing_file",
                    value=self._missing,
                )
            clear(views)
            return
        there = min(max(backing.size - offset, 0), length)
        if there:
            self._metadata.file.debug_event("read_backing_aio")
            backing.readv(offset, split(views, 0, there))
        if there < length:
            clear(split(views, there, length - there))

    def decompress(self, entry: int) -> bytes:
        """The whole guest cluster that a compressed L2 entry stands for."""
        with self._decompressing:
            known, contents = self._decompressed
            if known == entry:
                return contents
            metadata = self._metadata
            size = metadata.cluster_size
            offset, length = metadata.geometry.compressed_extent(entry)
            metadata.file.debug_event("read_compressed")
            data = metadata.file.read(offset, length)
            try:
                contents = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
            except zlib.error as error:
                raise _damaged(metadata, entry, str(error)) from error
            if len(contents) != size:
                raise _damaged(metadata, entry, f"{len(contents)} bytes instead of {size}")
            self._decompressed = (entry, contents)
            return contents

    def forget(self) -> None:
        """Forget decompressed data: host clusters may have changed."""
        with self._decompressing:
            self._decompressed = (0, b"")

    def is_zero(self, kind: ClusterKind, offset: int, length: int) -> bool:
        """True if it costs nothing to know that these guest bytes, of this kind, are zeroes."""
        if kind is ClusterKind.ZERO_PLAIN or kind is ClusterKind.ZERO_ALLOCATED:
            return True
        if kind is not ClusterKind.UNALLOCATED or self._missing is not None:
            return False
        if self.backing is None or offset >= self.backing.size:
            return True
        there = min(self.backing.size - offset, length)
        try:
            extent = self.backing.block_status(offset, there)
        except BackendError:
            return False
        return extent.zero and extent.length == there


def _damaged(metadata: Metadata, entry: int, reason: str) -> ImageError:
    offset, _ = metadata.geometry.compressed_extent(entry)
    return ImageError(
        f"The compressed cluster at host offset {offset:#x} cannot be decompressed: {reason}",
        field="compressed cluster",
        value=entry,
    )
