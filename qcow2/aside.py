"""VM state that is built aside: a snapshot's RAM, without the active tables ever holding it.

A draft begins as what a base snapshot has, or empty. What is written to it goes to fresh host
clusters, which nothing refers to yet: a cut leaks them. The L2 tables that change are copied, the
others, and every cluster that is not written, will be shared with the base.
``Snapshots.create(…, draft=…)`` makes a snapshot of it.
"""

from __future__ import annotations

import errno
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Self

from ..backend.buffers import split, total
from ..errors import BackendError, PyvirtioError, UnsupportedError
from . import layout
from .compression import compress
from .metadata import Metadata
from .quarantine import DiscardKind
from .reference_vector import ReferenceVector
from .sharing import l2_tables, read_plain
from .table_io import pack_table, unpack_table

if TYPE_CHECKING:
    from .snapshot_table import Snapshot

__all__ = ["Base", "Draft", "locked"]

MAX_SHARING = 8
"""Compressed clusters in one host cluster. Each snapshot counts one reference for each of them, so
with refcounts of 16 bits this many allow 8,191 snapshots to share a host cluster. Where refcounts
are too narrow for as many snapshots as that, each has one to itself."""

_MAX_RUN = 4096
"""Clusters that are taken and written at a time."""


class Base:
    """What is known of a snapshot's VM state: its tables, and all that they refer to."""

    __slots__ = ("l1", "references", "snapshot")

    def __init__(self, snapshot: Snapshot, l1: array[int], references: ReferenceVector) -> None:
        self.snapshot = snapshot
        self.l1 = l1
        """L1 entries of the VM state, without flags."""
        self.references = references
        """To the tables and to what they refer to."""

    @classmethod
    def read(cls, metadata: Metadata, snapshot: Snapshot, l1: array[int]) -> Base:
        """Count the references of VM state that is in the file (lock held)."""
        references = ReferenceVector(metadata)
        for _, offset in l2_tables(metadata, l1):
            references.add_clusters([offset >> metadata.cluster_bits])
            references.add_table(read_plain(metadata, offset))
        return cls(snapshot, l1, references)


class Draft:
    """VM state on its way into a snapshot. Positions are bytes; whole clusters are written.

    For one thread. What is not made a snapshot of has to be given up (:meth:`close`, or a ``with``
    statement): its clusters are in use until then. Deleting the base gives it up, too.
    """

    def __init__(self, metadata: Metadata, base: Base | None) -> None:
        self._metadata = metadata
        self._refcounts = metadata.refcounts
        self.base = None if base is None else base.snapshot
        """The snapshot that this one shares with."""
        self._l1 = array("Q", () if base is None else base.l1)
        self._references = ReferenceVector(metadata) if base is None else base.references.copy()
        self.cluster_size = metadata.cluster_size
        """Bytes; what is written begins at a multiple of it."""
        self._words = metadata.geometry.l2_entry_words
        self._tables: dict[int, array[int]] = {}
        """By L1 index: the tables that change, as they will be."""
        self._fresh: list[tuple[int, int]] = []
        """Runs of host clusters that were taken, with one reference each."""
        self._extra: list[int] = []
        """Host clusters of compressed data, once for each reference after the first."""
        self._room = (0, 0, 0)
        """Host byte for more compressed data, bytes left there, clusters that may join."""
        self.data_written = 0
        """Bytes of VM state that were written to the file, zeroes that fill clusters included."""
        self.closed = False

    # -- changing ------------------------------------------------------------------------------

    def write(self, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Write pieces (position, data), each from the start of a cluster on.

        The last cluster of a piece is filled up with zeroes. Raises BackendError.
        """
        size, bits = self.cluster_size, self._metadata.cluster_bits
        clusters: list[int] = []
        views: list[memoryview] = []
        for position, data in pieces:
            first = self._first_cluster(position)
            done = 0
            while done < len(data):
                part = data[done : done + (_MAX_RUN - len(clusters) << bits)]
                count = -(-len(part) // size)
                clusters += range(first, first + count)
                views.append(part)
                if len(part) % size:
                    views.append(memoryview(bytes(-len(part) % size)))
                first += count
                done += len(part)
                if len(clusters) == _MAX_RUN:
                    self._write_clusters(clusters, views)
                    clusters, views = [], []
        if clusters:
            self._write_clusters(clusters, views)

    def write_compressed(self, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """:meth:`write`, each cluster compressed by the image's method where that saves anything.

        Up to MAX_SHARING of them lie in one host cluster. Raises UnsupportedError for an encrypted
        image.
        """
        if self._metadata.header.crypt_method is not layout.CryptMethod.NONE:
            raise UnsupportedError(
                "Compression and encryption not supported at the same time", feature="compression"
            )
        kind, size = self._metadata.header.compression_type, self.cluster_size
        for position, data in pieces:
            first = self._first_cluster(position)
            for done in range(0, len(data), size):
                part = data[done : done + size]
                packed = compress(kind, bytes(part).ljust(size, b"\0"))
                if packed is None:
                    self.write([(position + done, part)])
                else:
                    self._write_packed(first + done // size, packed)

    def write_zeroes(self, positions: Iterable[int]) -> None:
        """Make the clusters at these positions zeroes, whatever a backing file has there."""
        metadata = self._metadata
        if metadata.geometry.version < 3 and metadata.header.backing_file:
            zeroes = memoryview(bytes(self.cluster_size))
            self.write((position, zeroes) for position in positions)
            return
        entry = (layout.ZERO, 0) if self._words == 1 else (0, layout.ALL_ZEROES)
        if metadata.geometry.version < 3:
            entry = (0, 0)
        for position in positions:
            self._set(self._first_cluster(position), entry)

    def _first_cluster(self, position: int) -> int:
        self._check_usable()
        if position < 0 or position % self.cluster_size:
            raise ValueError(f"{position} is not the start of a cluster")
        return position >> self._metadata.cluster_bits

    def _write_clusters(self, clusters: Sequence[int], views: list[memoryview]) -> None:
        """Put whole clusters into fresh ones."""
        bits, done, length = self._metadata.cluster_bits, 0, total(views)
        while done < len(clusters):
            with self._inside():
                first, count = self._take(len(clusters) - done)
                size = count << bits
                part = views if size == length else split(views, done << bits, size)
                self._store(first << bits, clusters[done : done + count], part)
            self.data_written += size
            for host, cluster in enumerate(clusters[done : done + count], first):
                self._set(cluster, (host << bits, layout.ALL_ALLOCATED))
            done += count

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """As a request: no repair, nor anything else that is alone with the image, comes between
        taking a cluster and writing it."""
        metadata = self._metadata
        try:
            with metadata.lock:
                metadata.health.check()
                metadata.gate.enter()
            self._check_usable()
            yield
        finally:
            metadata.gate.leave()

    def _take(self, count: int) -> tuple[int, int]:
        """Up to so many fresh clusters in a row: (first, count)."""
        with self._metadata.lock:
            first, count, _ = self._metadata.refcounts.allocate(count)
            self._fresh.append((first, count))
        return first, count

    def _store(self, host: int, clusters: Sequence[int], views: list[memoryview]) -> None:
        """Write clusters of VM state to host byte ``host`` on."""
        metadata, bits = self._metadata, self._metadata.cluster_bits
        metadata.overlap.check(host, len(clusters) << bits)
        if metadata.encryption is None:
            metadata.file.writev(host, views)
            return
        for i, cluster in enumerate(clusters):
            guest, part = self._guest_start + (cluster << bits), split(views, i << bits, 1 << bits)
            metadata.encryption.writev(metadata.file, host + (i << bits), guest, part, 1 << bits)

    @property
    def _guest_start(self) -> int:
        geometry = self._metadata.geometry
        return geometry.l1_entries(self._metadata.header.size) * geometry.l2_coverage

    def _write_packed(self, cluster: int, packed: bytes) -> None:
        """Put one compressed cluster behind others, or at the start of a fresh host cluster."""
        metadata, bits = self._metadata, self._metadata.cluster_bits
        offset_bits = metadata.geometry.compressed_offset_bits
        with self._inside():
            host, room, places = self._room
            if places and len(packed) <= room:
                with metadata.lock:
                    metadata.refcounts.add(host >> bits, 1, 1)
                    self._extra.append(host >> bits)
            else:
                first, _ = self._take(1)
                narrow = metadata.geometry.refcount_max < MAX_SHARING**2
                host, room, places = first << bits, 1 << bits, 1 if narrow else MAX_SHARING
            if (host + len(packed)) >> offset_bits:
                raise BackendError(
                    errno.EFBIG,
                    "The image file would exceed what a compressed cluster can refer to",
                )
            metadata.overlap.check(host, len(packed))
            metadata.file.write(host, packed)
        self.data_written += len(packed)
        self._room = (host + len(packed), room - len(packed), places - 1)
        sectors = (host % layout.SECTOR + len(packed) - 1) // layout.SECTOR
        self._set(cluster, (layout.COMPRESSED | sectors << offset_bits | host, 0))

    def _set(self, cluster: int, entry: tuple[int, int]) -> None:
        """Replace the L2 entry of a cluster."""
        geometry = self._metadata.geometry
        table = self._table(cluster >> geometry.l2_bits)
        at = (cluster & (1 << geometry.l2_bits) - 1) * self._words
        old = table[at]
        if old & ~layout.ZERO:
            self._references.remove_entries((old,))
        if entry[0] & ~layout.ZERO:
            self._references.add_entries(entry[:1])
        table[at] = entry[0]
        if self._words > 1:
            table[at + 1] = entry[1]

    def _table(self, index: int) -> array[int]:
        """The L2 table for an L1 index, to be changed."""
        table = self._tables.get(index)
        if table is None:
            metadata = self._metadata
            geometry = metadata.geometry
            entries = geometry.l1_entries(metadata.header.size) + index + 1
            if 8 * entries > layout.MAX_L1_SIZE:
                raise BackendError(errno.EFBIG, "Failed to grow the L1 table: File too large")
            self._l1.extend([0] * (index + 1 - len(self._l1)))
            offset = self._l1[index]
            if offset:
                with metadata.lock:
                    table = unpack_table(metadata.read_l2_table(offset))
                self._references.remove_clusters([offset >> metadata.cluster_bits])
            else:
                table = array("Q", bytes(metadata.cluster_size))
            self._tables[index] = table
        return table

    # -- the end -------------------------------------------------------------------------------

    def finish(self, undo: ExitStack) -> array[int]:
        """Raise the refcounts of all that is shared, and write the tables that changed (lock held,
        in an exclusive operation).

        Returns the L1 entries of the VM state. What is to be done if the snapshot comes to nothing
        is pushed to ``undo``; the draft is given up then.
        """
        metadata = self._metadata
        self._check_usable()
        self.closed = True  # from here on it is the snapshot's, or that of ``undo``
        undo.callback(self._give_up)
        self._free_orphans()
        taken = [(first, self._references.take_run(first, count)) for first, count in self._fresh]
        try:
            undo.callback(locked(metadata, self._references.raise_refcounts()))
        finally:
            for first, counts in taken:
                self._references.put_run(first, counts)
        indices = sorted(self._tables)
        done = 0
        while done < len(indices):
            first, count, _ = metadata.refcounts.allocate(len(indices) - done)
            self._fresh.append((first, count))
            part = indices[done : done + count]
            host, length = first << metadata.cluster_bits, count << metadata.cluster_bits
            metadata.overlap.check(host, length)
            metadata.file.writev(host, [memoryview(pack_table(self._tables[i])) for i in part])
            for i, index in enumerate(part):
                self._l1[index] = host + (i << metadata.cluster_bits)
            self._references.add_clusters(range(first, first + count))
            done += count
        return self._l1

    def kept(self, snapshot: Snapshot) -> Base:
        """The draft became this snapshot, which another may be based on."""
        return Base(snapshot, self._l1, self._references)

    def close(self) -> None:
        """Give the draft up, unless it became a snapshot. Should that fail, its clusters leak."""
        if not self.closed:
            self.closed = True
            self._give_up()

    def _give_up(self) -> None:
        metadata = self._metadata
        if metadata.refcounts is not self._refcounts:
            return  # read anew, and perhaps repaired: what was taken is not ours
        with metadata.lock, suppress(PyvirtioError):
            for cluster in self._extra:
                metadata.refcounts.add(cluster, 1, -1)
            for first, count in self._fresh:
                for part in metadata.refcounts.slices(first, count):
                    metadata.lower(*part, DiscardKind.OTHER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self.closed or self._metadata.refcounts is not self._refcounts:
            raise BackendError(errno.ESTALE, "the image is not what it was when the draft began")

    def _free_orphans(self) -> None:
        """Give up fresh clusters that something else was written in place of."""
        held, kept, extra = Counter(self._extra), [], Counter[int]()
        for first, number in self._fresh:
            counts = self._references.run(first, number)
            if counts == b"\1" * number:
                kept.append((first, number))
                continue
            for cluster, count in enumerate(counts, first):
                if count:
                    kept.append((cluster, 1))
                    extra[cluster] = count - 1
                spare = 1 + held[cluster] - count
                if spare:
                    self._metadata.lower(cluster, 1, DiscardKind.OTHER, spare)
        self._fresh, self._extra = kept, list(extra.elements())


def locked(metadata: Metadata, action: Callable[[], None]) -> Callable[[], None]:
    """``action``, to be called without the lock."""

    def call() -> None:
        with metadata.lock:
            action()

    return call
