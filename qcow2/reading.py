"""Reading every kind of cluster."""

from __future__ import annotations

from threading import get_ident

from ..backend.buffers import clear, copy_in, split
from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from .cache import CacheFull
from .compression import CompressedDataError, decompress
from .holes import HostHoles
from .layout import ClusterKind
from .metadata import Metadata

__all__ = ["Reader"]

_NORMAL = ClusterKind.NORMAL
_UNALLOCATED = ClusterKind.UNALLOCATED


class Reader:
    """Serves reads of one image: from its clusters, its backing file, or as zeroes."""

    def __init__(
        self, metadata: Metadata, backing: Disk | None, missing_backing: str | None
    ) -> None:
        self._metadata = self.metadata = metadata
        self._file = metadata.data
        self._event = metadata.event
        self._gate = metadata.gate
        self._lock = metadata.lock
        self._map = metadata.tables.map
        self.holes = HostHoles(metadata)
        self.encryption = metadata.encryption
        """How stored data is encrypted, if it is."""
        self._map_stored = metadata.tables.map_stored
        self.backing = backing
        self.below = _reader_of(backing)
        """The reader of a backing file that is a qcow2 image, too: a chain of them is walked in a
        loop, whatever its length."""
        self._missing = missing_backing
        """The name of a backing file that was not opened."""

    @property
    def file(self) -> Disk:
        """The file that has the guest's data: the image's, or its data file."""
        return self._file

    @property
    def size(self) -> int:
        """Bytes of the image's disk."""
        return self._metadata.header.size

    @property
    def backing_known(self) -> bool:
        """False if there is a backing file that was not opened."""
        return self._missing is None

    def replace_backing(self, backing: Disk | None, name: str | None) -> Disk | None:
        """Read from another backing file (in an exclusive operation); returns the former one.

        ``name`` is that of the backing file in the image, missing now if ``backing`` is None.
        """
        former, self.backing = self.backing, backing
        self.below = _reader_of(backing)
        self._missing = name if backing is None else None
        return former

    def read_stored(self, offset: int, views: list[memoryview], length: int) -> bool:
        """Read guest bytes if they are one run of stored data; False if not, with nothing done."""
        if self.encryption is not None:
            return False
        gate, me = self._gate, get_ident()
        try:
            with self._lock:
                gate.enter(me)
                host = self._map_stored(offset, length)
            if host >= 0:
                if self._event is not None:
                    self._event("read_aio")
                self._file.readv(host, views)
                return True
        except CacheFull:
            pass
        finally:
            gate.leave(me)
        return False

    def read(self, offset: int, views: list[memoryview], length: int) -> None:
        """Read guest bytes from ``offset`` on into ``views``."""
        run, below = self._read_first_run(offset, views, length)
        # What is left to read: each part from the layer that it may be in.
        todo: list[tuple[Reader, int, list[memoryview], int]] = []
        reader = self
        while True:
            if run < length:
                todo.append((reader, offset + run, split(views, run, length - run), length - run))
            if below is not None:
                todo.append((below, offset, split(views, 0, run), run))
            if not todo:
                return
            reader, offset, views, length = todo.pop()
            inside = min(max(reader.size - offset, 0), length)
            clear(split(views, inside, length - inside))
            views, length = split(views, 0, inside), inside
            run, below = reader._read_first_run(offset, views, length) if length else (0, None)

    def _read_first_run(
        self, offset: int, views: list[memoryview], length: int
    ) -> tuple[int, Reader | None]:
        """Read the run that starts at ``offset``; returns its length and, if it has to be read
        from another qcow2 image below instead, that one's reader."""
        gate, lock = self._gate, self._lock
        try:
            with lock:
                gate.enter()
                kind, host, run = self._map(offset, length)
            if kind is _UNALLOCATED and self.below is not None:
                return run, self.below
            elif run == length:
                self.read_run(kind, host, offset, views, length)
            else:
                self.read_run(kind, host, offset, split(views, 0, run), run)
            return run, None
        except CacheFull:
            self._metadata.flush_inside()
            return 0, None
        finally:
            gate.leave()

    def map_chain(self, offset: int, length: int) -> tuple[Reader, int, ClusterKind, int, int]:
        """The layer that has the run which starts at ``offset``, and :meth:`Tables.map` of it.

        Returns (reader, depth, kind, host, run). The layer is the last one looked at if the run is
        unallocated in all of them.
        """
        reader, depth = self, 0
        while True:
            kind, host, length = reader._map_first_run(offset, length)
            below = reader.below
            if kind is not _UNALLOCATED or below is None or offset >= below.size:
                return reader, depth, kind, host, length
            length = min(length, below.size - offset)
            reader, depth = below, depth + 1

    def _map_first_run(self, offset: int, length: int) -> tuple[ClusterKind, int, int]:
        try:
            with self._lock:
                self._gate.enter()
            while True:
                try:
                    with self._lock:
                        return self._map(offset, length)
                except CacheFull:
                    self._metadata.flush_inside()
        finally:
            self._gate.leave()

    # Of this layer alone: for VM state, of which a backing file has no part.

    def map_own_run(self, offset: int, length: int) -> tuple[ClusterKind, int, int]:
        """:meth:`Tables.map` of the run that starts at ``offset``."""
        return self._map_first_run(offset, length)

    def read_own_run(self, offset: int, views: list[memoryview], length: int) -> int:
        """Read the run that starts at ``offset``, zeroes if it is unallocated; its length."""
        try:
            with self._lock:
                self._gate.enter()
            while True:
                try:
                    with self._lock:
                        kind, host, run = self._map(offset, length)
                    break
                except CacheFull:
                    self._metadata.flush_inside()
            part = split(views, 0, run)
            if kind is _UNALLOCATED:
                clear(part)
            else:
                self.read_run(kind, host, offset, part, run)
            return run
        finally:
            self._gate.leave()

    def read_inside(self, offset: int, views: list[memoryview], length: int) -> None:
        """Read a part of one cluster (of one subcluster), for a request that is inside the gate."""
        while True:
            try:
                with self._lock:
                    kind, host, _ = self._map(offset, length)
                break
            except CacheFull:
                self._metadata.flush_inside()
        self.read_run(kind, host, offset, views, length)

    def read_run(
        self, kind: ClusterKind, host: int, offset: int, views: list[memoryview], length: int
    ) -> None:
        """Read a run as :meth:`Tables.map` describes it (its kind and host)."""
        if kind is _NORMAL:
            self._file.debug_event("read_aio")
            if self.encryption is not None:
                self.encryption.readv(self._file, host, offset, views, length)
            else:
                self._file.readv(host, views)
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
        """The whole guest cluster that a compressed L2 entry stands for (inside the gate)."""
        metadata = self._metadata
        contents = metadata.decompressed.get(entry)
        if contents is not None:
            return contents
        offset, length = metadata.geometry.compressed_extent(entry)
        metadata.file.debug_event("read_compressed")
        data = metadata.file.read(offset, length)
        try:
            contents = decompress(metadata.header.compression_type, data, metadata.cluster_size)
        except CompressedDataError as error:
            raise _damaged(metadata, entry, str(error)) from error
        metadata.decompressed.put(entry, contents)
        return contents

    def is_zero(self, kind: ClusterKind, offset: int, length: int) -> bool:
        """True if it costs nothing to know that these guest bytes, of this kind, are zeroes."""
        if kind is ClusterKind.ZERO_PLAIN or kind is ClusterKind.ZERO_ALLOCATED:
            return True
        if kind is not ClusterKind.UNALLOCATED or self._missing is not None:
            return False
        if self.backing is None or offset >= self.backing.size:
            return True
        end = min(self.backing.size, offset + length)
        try:
            while offset < end:
                extent = self.backing.block_status(offset, end - offset)
                if not extent.zero:
                    return False
                offset += extent.length
        except BackendError:
            return False
        return True


def _reader_of(disk: Disk | None) -> Reader | None:
    reader = getattr(disk, "reader", None)
    return reader if isinstance(reader, Reader) else None


def _damaged(metadata: Metadata, entry: int, reason: str) -> ImageError:
    offset, _ = metadata.geometry.compressed_extent(entry)
    return ImageError(
        f"The compressed cluster at host offset {offset:#x} cannot be decompressed: {reason}",
        field="compressed cluster",
        value=entry,
    )
