"""Writing compressed clusters, several to a host cluster.

Compressed data may start at any byte. New data follow the last ones where the host cluster's
refcount allows one reference more, and run on into the next host cluster if it is the next one
free; else they start a new host cluster. Every host cluster that is touched counts one reference
per L2 entry.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from dataclasses import dataclass

from ..backend.buffers import gather, split
from ..errors import BackendError, PyvirtioError, UnsupportedError
from . import layout
from .cache import CacheFull
from .compression import compress
from .layout import CryptMethod, Incompatible
from .metadata import Metadata
from .quarantine import DiscardKind
from .requests import Allocation
from .writing import MAX_DROPPED, Writer

__all__ = ["CompressedWriter"]


@dataclass(slots=True)
class _Place:
    """Host bytes that are being filled for one guest cluster."""

    host: int
    first: int
    """The first host cluster touched."""
    count: int
    position: int
    """Of the L2 entry, pinned."""
    old: int
    """The L2 entry that is being replaced."""
    allocation: Allocation


class CompressedWriter:
    """Serves compressed writes to one image."""

    def __init__(self, metadata: Metadata, writer: Writer) -> None:
        self._metadata = metadata
        self._writer = writer
        self._next = 0
        """Host byte after the last compressed data, if its host cluster has room left, else 0."""
        metadata.before_freeing(self._leave_freed)

    def write(self, offset: int, views: list[memoryview], length: int) -> None:
        """Write whole clusters; the last one of the disk may be cut short by the disk's end.

        What does not become smaller is written plain. Raises ValueError for a range that is not
        aligned to clusters, UnsupportedError for an image that cannot have compressed clusters.
        """
        metadata = self._metadata
        self._check_supported()
        size = metadata.cluster_size
        disk_size = metadata.header.size // layout.SECTOR * layout.SECTOR
        if offset % size or (length % size and offset + length != disk_size):
            raise ValueError("qcow2: compressed writes must be aligned to clusters")
        done = 0
        while done < length:
            part = min(size, length - done)
            data = gather(split(views, done, part))  # a copy: the guest may change its own
            packed = compress(metadata.header.compression_type, data.ljust(size, b"\0"))
            if packed is None:
                self._writer.write(offset + done, [memoryview(data)], part)
            else:
                self._write_cluster((offset + done) >> metadata.cluster_bits, packed)
            done += part

    def _check_supported(self) -> None:
        header = self._metadata.header
        if header.incompatible_features & Incompatible.DATA_FILE:
            raise UnsupportedError(
                "Compressed clusters cannot be in an external data file", feature="compression"
            )
        if header.crypt_method is not CryptMethod.NONE:
            raise UnsupportedError(
                "Compression and encryption not supported at the same time", feature="compression"
            )

    def _write_cluster(self, cluster: int, packed: bytes) -> None:
        metadata = self._metadata
        gate, lock = metadata.gate, metadata.lock
        try:
            with lock:
                metadata.health.check()
                gate.enter()
            place = self._plan(cluster, len(packed))
            try:
                metadata.overlap.check(place.host, len(packed))
                metadata.file.debug_event("write_compressed")
                metadata.file.write(place.host, packed)
            except BaseException:
                with lock:
                    self._give_up(place)
                raise
            with lock, metadata.health.step("Mapping a compressed cluster"):
                self._map(place, len(packed))
            if len(metadata.dropped.runs) > MAX_DROPPED:
                metadata.flush_inside()
        finally:
            gate.leave()

    # -- planning --------------------------------------------------------------------------------

    def _plan(self, cluster: int, length: int) -> _Place:
        while True:
            try:
                with self._metadata.lock:
                    return self._plan_locked(cluster, length)
            except CacheFull:
                self._metadata.flush_inside()

    def _plan_locked(self, cluster: int, length: int) -> _Place:
        metadata = self._metadata
        metadata.gate.wait_for_allocations(cluster, 1)
        position = metadata.prepare(cluster)
        try:
            old = metadata.tables.entry_at(position)
            metadata.tables.check_entry(old, cluster)
            host, first, count = self._take(length)
        except BaseException:
            metadata.unpin(position)
            raise
        allocation = metadata.gate.begin_allocation(cluster, 1)
        return _Place(host, first, count, position, old, allocation)

    def _take(self, length: int) -> tuple[int, int, int]:
        """Take ``length`` (less than a cluster) host bytes: (host byte, first cluster, count)."""
        metadata = self._metadata
        refcounts, size, bits = metadata.refcounts, metadata.cluster_size, metadata.cluster_bits
        start = self._next
        last = start >> bits
        if start and refcounts.get(last) >= metadata.geometry.refcount_max:
            start = 0
        if start and length <= size - start % size:
            refcounts.add(last, 1, 1)
            first, count = last, 1
        else:
            first, count = refcounts.allocate(1, "compressed cluster")[0], 1
            if start and first == last + 1:
                try:
                    refcounts.add(last, 1, 1)
                except BaseException:
                    refcounts.add(first, 1, -1)
                    raise
                first, count = last, 2
            else:
                start = first << bits
        if (start + length) >> metadata.geometry.compressed_offset_bits:
            self._lower(first, count)
            raise BackendError(
                errno.EFBIG, "The image file would exceed what a compressed cluster can refer to"
            )
        self._next = start + length if (start + length) % size else 0
        return start, first, count

    def _leave_freed(self, first: int, count: int, times: int) -> None:
        """Host clusters lose references (lock held): a free one may become somebody else's."""
        cluster = self._next >> self._metadata.cluster_bits
        if first <= cluster < first + count and self._metadata.refcounts.get(cluster) <= times:
            self._next = 0

    def _lower(self, first: int, count: int) -> None:
        self._next = 0
        self._metadata.refcounts.add(first, count, -1)

    # -- mapping ---------------------------------------------------------------------------------

    def _map(self, place: _Place, length: int) -> None:
        metadata = self._metadata
        bits = metadata.geometry.compressed_offset_bits
        sectors = (place.host % layout.SECTOR + length - 1) // layout.SECTOR
        metadata.tables.set_entries(
            place.position, [layout.COMPRESSED | sectors << bits | place.host]
        )
        if place.old:
            metadata.drop_entry(place.old, DiscardKind.OTHER)
        metadata.unpin(place.position)
        metadata.gate.end_allocation(place.allocation)

    def _give_up(self, place: _Place) -> None:
        metadata = self._metadata
        metadata.unpin(place.position)
        metadata.gate.end_allocation(place.allocation)
        # No entry refers to this data. Should it fail too, they leak.
        with suppress(PyvirtioError):
            self._lower(place.first, place.count)
