"""How often an L1 table reaches each host cluster, laid out like the refcounts themselves.

One array of counts for each slice of a refcount block that is touched. To raise a slice is one
addition of two long integers, whose digits are the refcounts: a few microseconds for thousands of
clusters, whatever their order. A vector is kept and changed as a table changes, so that an
incremental snapshot looks at what is new in it, and not at every table again.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import BackendError, ImageError, UnsupportedError
from . import layout
from .metadata import Metadata
from .table_io import unpack_table
from .tally import progression

__all__ = ["ReferenceVector", "VectorTooLong"]

_TYPECODES = {4: "H", 5: "I", 6: "Q"}
"""By refcount order; narrower ones are counted in bytes."""
_MAX_SLICES = 1 << 15
"""128 MiB: the refcounts of 256 GiB at 4 KiB a cluster, of 4 TiB at 64 KiB, all of them touched."""


class VectorTooLong(UnsupportedError):
    """The references are spread too far to be held; count them piece by piece."""

    def __init__(self) -> None:
        super().__init__(
            "What is shared is spread too far over the file", feature="shared VM state"
        )


class ReferenceVector:
    """References to host clusters, by cluster number. Methods that look at the refcounts want the
    metadata lock held."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self.refcounts = metadata.refcounts
        """Those whose layout it has."""
        self._geometry = geometry = metadata.geometry
        self._bits = metadata.refcounts.slice_bits
        self._mask = (1 << self._bits) - 1
        self._zeroes = array(_TYPECODES.get(geometry.refcount_order, "B"), [0]) * (1 << self._bits)
        self._slices: dict[int, array[int]] = {}

    def copy(self) -> ReferenceVector:
        """Another vector with the same counts."""
        other = ReferenceVector(self._metadata)
        other._slices = {number: counts[:] for number, counts in self._slices.items()}
        return other

    def _slice(self, number: int) -> array[int]:
        counts = self._slices.get(number)
        if counts is None:
            if len(self._slices) >= _MAX_SLICES:
                raise VectorTooLong
            counts = self._slices[number] = self._zeroes[:]
        return counts

    # -- counting ------------------------------------------------------------------------------

    def add_clusters(self, clusters: Iterable[int]) -> None:
        """One reference more to each cluster named, as often as it is.

        Raises ImageError where that is more than a refcount can hold.
        """
        slices, bits, mask = self._slices, self._bits, self._mask
        try:
            for cluster in clusters:
                counts = slices.get(cluster >> bits)
                if counts is None:
                    counts = self._slice(cluster >> bits)
                counts[cluster & mask] += 1
        except OverflowError:
            raise self._limit(cluster) from None

    def remove_clusters(self, clusters: Iterable[int]) -> None:
        """One reference less to each; it was added before."""
        for cluster in clusters:
            self._slices[cluster >> self._bits][cluster & self._mask] -= 1

    def add_table(self, table: bytes) -> None:
        """What the standard L2 entries of a table refer to."""
        bits = self._geometry.cluster_bits
        run = progression(table, 1 << bits)
        if run is not None and not run[0] & ~(layout.OFFSET_MASK | layout.COPIED):
            first = (run[0] & layout.OFFSET_MASK) >> bits
            if first and (first + run[1]) << bits <= layout.MAX_HOST_OFFSET:
                self._add_run(first, run[1])
                return
        if any(table):
            self.add_entries(unpack_table(table))

    def add_entries(self, entries: Sequence[int]) -> None:
        """What standard L2 entries refer to."""
        self.add_clusters(self.clusters_of(entries))

    def remove_entries(self, entries: Sequence[int]) -> None:
        """:meth:`add_entries`, taken back."""
        self.remove_clusters(self.clusters_of(entries))

    def clusters_of(self, entries: Sequence[int]) -> list[int]:
        """Host clusters that standard L2 entries refer to."""
        mask, bits, compressed = layout.OFFSET_MASK, self._geometry.cluster_bits, layout.COMPRESSED
        clusters = [(e & mask) >> bits for e in entries if e & mask and not e & compressed]
        for entry in entries:
            if entry & compressed:
                offset, length = self._geometry.compressed_extent(entry)
                clusters += range(offset >> bits, (offset + length - 1 >> bits) + 1)
        return clusters

    def _add_run(self, first: int, count: int) -> None:
        for number, start, part in self._pieces(first, count):
            counts = self._slice(number)
            old = counts[start : start + part]
            if old == self._zeroes[:part]:
                counts[start : start + part] = array(old.typecode, [1]) * part
                continue
            try:
                counts[start : start + part] = array(old.typecode, [v + 1 for v in old])
            except OverflowError:
                raise self._limit(first) from None

    def _limit(self, cluster: int) -> ImageError:
        return ImageError(
            "Reference count limit reached: a cluster cannot be shared more often",
            field="refcount",
            value=cluster,
            limit=self._geometry.refcount_max,
        )

    def run(self, first: int, count: int) -> Sequence[int]:
        """The counts of a run of clusters; as bytes, if none is above 1."""
        counts = array(self._zeroes.typecode)
        for number, start, part in self._pieces(first, count):
            counts += self._slices.get(number, self._zeroes)[start : start + part]
        return bytes(counts.tolist()) if max(counts, default=0) <= 1 else counts

    def take_run(self, first: int, count: int) -> list[array[int]]:
        """The counts of a run of clusters, which are 0 here until :meth:`put_run`."""
        taken = []
        for number, start, part in self._pieces(first, count):
            counts = self._slice(number)
            taken.append(counts[start : start + part])
            counts[start : start + part] = self._zeroes[:part]
        return taken

    def put_run(self, first: int, taken: list[array[int]]) -> None:
        """Put back what :meth:`take_run` took."""
        pieces = self._pieces(first, sum(map(len, taken)))
        for (number, start, part), counts in zip(pieces, taken, strict=True):
            self._slice(number)[start : start + part] = counts

    def _pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(slice, index in it, counts) of a run of clusters."""
        while count > 0:
            start = first & self._mask
            part = min(count, self._mask + 1 - start)
            yield first >> self._bits, start, part
            first += part
            count -= part

    # -- into the refcounts --------------------------------------------------------------------

    def raise_refcounts(self) -> Callable[[], None]:
        """Add every count to its refcount; all of them or none. Returns how to take them off.

        Raises ImageError where a refcount has reached what its width can hold, or there is no
        refcount block; BackendError where one cannot be read.
        """
        refcounts = self._metadata.refcounts
        done: list[tuple[int, bytes]] = []

        def take_off() -> None:
            for number, deltas in done:
                refcounts.add_slice(number, deltas, -1)

        try:
            for number in sorted(self._slices):
                counts = self._slices[number]
                if counts == self._zeroes:
                    del self._slices[number]
                    continue
                deltas = refcounts.pack(counts)
                refcounts.add_slice(number, deltas, 1)
                done.append((number, deltas))
        except (ImageError, BackendError):
            take_off()
            raise
        return take_off
