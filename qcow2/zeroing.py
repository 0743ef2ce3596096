"""Zero clusters and discards: changes of mapping that move no data."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UnsupportedError
from . import layout
from .cache import CacheFull
from .data_file import zero_data_file
from .layout import ClusterKind
from .metadata import Metadata
from .quarantine import DiscardKind, merge_runs
from .reading import Reader
from .subclusters import allocated_mask, zero_mask
from .tables import entry_kind

__all__ = ["discard", "write_zeroes", "write_zeroes_in_part"]

_LOW = (1 << 64) - 1
_ALL_ZEROES = layout.ALL_ZEROES << 64


def write_zeroes(
    metadata: Metadata, offset: int, length: int, *, unmap: bool, backed: bool
) -> None:
    """Make whole clusters read as zeroes; ``unmap`` gives their host clusters back.

    With extended L2 entries a part of one cluster, in whole subclusters, will do. Needs version 3,
    or that the image is not ``backed`` by another file, so that clusters given back read as zeroes;
    and that such a part is not compressed (raises UnsupportedError, with nothing changed). The end
    may be the end of the disk.
    """
    if metadata.geometry.version < 3 and not backed:
        discard(metadata, offset, length, backed=False)
        return
    if metadata.geometry.version < 3:
        raise UnsupportedError(
            "Zero clusters need a qcow2 image of compatibility level 1.1", feature="zero clusters"
        )
    zero_data_file(metadata, offset, length, unmap=unmap)

    zeroed = _zeroed(metadata, offset, length, unmap=unmap)
    _replace_entries(metadata, offset, length, zeroed)


def _zeroed(metadata: Metadata, offset: int, length: int, *, unmap: bool) -> Callable[[int], int]:
    """What an L2 entry of these guest bytes is to be replaced by."""

    def replace(entry: int) -> int:
        kind = entry_kind(entry)
        if kind is ClusterKind.COMPRESSED or (unmap and kind is not ClusterKind.UNALLOCATED):
            return layout.ZERO
        return entry | layout.ZERO

    def replace_extended(entry: int) -> int:
        if unmap or entry & layout.COMPRESSED:
            return _ALL_ZEROES
        return entry & _LOW | _ALL_ZEROES

    bits = metadata.geometry.subcluster_bits
    within = offset & (metadata.cluster_size - 1)
    first, end = within >> bits, -(-(within + length) >> bits)

    def replace_part(entry: int) -> int:
        if entry & layout.COMPRESSED:
            raise UnsupportedError("A part of a compressed cluster", feature="zero subclusters")
        return entry & ~allocated_mask(first, end) | zero_mask(first, end)

    if metadata.geometry.extended_l2:
        at_end = offset + length >= metadata.header.size
        whole = not within and (at_end or end % layout.SUBCLUSTERS == 0)
        return replace_extended if whole else replace_part
    return replace


class _Changed(Exception):
    """Somebody else has changed an L2 entry since it was looked at."""


def write_zeroes_in_part(
    reader: Reader, offset: int, length: int, *, unmap: bool, backed: bool
) -> bool:
    """Make a part of one cluster (of one subcluster) read as zeroes without writing any.

    That goes where nothing is stored and what lies around the part reads as zeroes already: all of
    it becomes a zero cluster. False, with nothing done, elsewhere (``qcow2_co_pwrite_zeroes``).
    """
    metadata = reader.metadata
    metadata.health.check()
    size = metadata.geometry.subcluster_size
    start = offset // size * size
    end = min(start + size, max(reader.size, offset + length))
    cluster = offset >> metadata.cluster_bits
    around = [(start, offset - start), (offset + length, end - offset - length)]
    zeroed = _zeroed(metadata, start, size, unmap=unmap)
    try:
        with metadata.lock:
            metadata.gate.enter()
            if metadata.encryption is not None:
                metadata.gate.claim(start, end)
        while True:
            try:
                with metadata.lock:
                    metadata.gate.wait_for_allocations(cluster, 1)
                    kind, _, run = metadata.tables.map(start, end - start)
                    position = metadata.tables.locate(cluster)
                    seen = metadata.tables.entry_at(position) if position >= 0 else 0
                if run < end - start:
                    return False
                if not all(not part or reader.is_zero(kind, at, part) for at, part in around):
                    return False
                if metadata.geometry.version < 3:
                    return not backed  # no zero clusters, and no need of one where nothing is below
                zero_data_file(metadata, offset, length, unmap=unmap)

                def replace(entry: int, seen: int = seen) -> int:
                    if entry != seen:
                        raise _Changed
                    return zeroed(entry)

                with metadata.lock:
                    if _replace_in_slice(metadata, cluster, 1, replace, False, _nothing):
                        return True
            except CacheFull:
                metadata.flush_inside()
            except _Changed:
                pass  # since it was looked at, outside the lock; look again
    finally:
        if metadata.encryption is not None:
            metadata.gate.end_claim()
        metadata.gate.leave()


def _nothing() -> None:
    pass


def discard(
    metadata: Metadata, offset: int, length: int, *, backed: bool, keep: bool = False
) -> None:
    """Give whole clusters back. ``backed``: the image has a backing file; ``keep``: the host
    clusters stay allocated, as zero clusters, and are discarded in the file below
    (``discard-no-unref``).

    Afterwards they read as zeroes in a version 3 image, as they do in one without a backing file.
    In a version 2 image with a backing file nothing is done: its old data would show again.
    """
    if metadata.geometry.version < 3 and backed:
        return
    zero_data_file(metadata, offset, length, unmap=True)
    nothing = layout.ZERO if metadata.geometry.version >= 3 else 0
    if metadata.geometry.extended_l2:
        nothing = _ALL_ZEROES
    own = 0 if metadata.data_file is None else layout.COPIED  # allocated at offset 0
    kept: list[int] = []

    def replace(entry: int) -> int:
        if keep and entry & layout.COPIED and entry & layout.OFFSET_MASK:
            kept.append((entry & layout.OFFSET_MASK) >> metadata.cluster_bits)
            return entry & _LOW | _ALL_ZEROES if metadata.geometry.extended_l2 else entry | nothing
        if not backed and entry_kind(entry) is ClusterKind.UNALLOCATED and not entry & own:
            return entry
        return nothing

    def discard_kept() -> None:
        # Before the clusters become zero clusters, which another request may fill again.
        if kept and metadata.discards[DiscardKind.REQUEST]:
            metadata.discard_in_file(merge_runs(kept))
        kept.clear()

    _replace_entries(
        metadata, offset, length, replace, skip_unallocated=not backed, before=discard_kept
    )


def _replace_entries(
    metadata: Metadata,
    offset: int,
    length: int,
    replace: Callable[[int], int],
    *,
    skip_unallocated: bool = False,
    before: Callable[[], None] = _nothing,
) -> None:
    """Put ``replace(entry)`` in place of every L2 entry of the range.

    ``skip_unallocated``: where there is no L2 table nothing needs to change. ``before()`` is called
    each time the replacements are known and not yet made (lock held).
    """
    metadata.health.check()
    cluster = offset >> metadata.cluster_bits
    end = ((offset + length - 1) >> metadata.cluster_bits) + 1
    try:
        with metadata.lock:
            metadata.gate.enter()
            if metadata.encryption is not None:
                metadata.gate.claim(offset, offset + length)
        while cluster < end:
            try:
                with metadata.lock:
                    cluster += _replace_in_slice(
                        metadata, cluster, end - cluster, replace, skip_unallocated, before
                    )
            except CacheFull:
                metadata.flush_inside()
    finally:
        if metadata.encryption is not None:
            metadata.gate.end_claim()
        metadata.gate.leave()


def _replace_in_slice(
    metadata: Metadata,
    cluster: int,
    count: int,
    replace: Callable[[int], int],
    skip_unallocated: bool,
    announce: Callable[[], None],
) -> int:
    """The part of the range in the first slice (lock held); how many clusters that was."""
    tables = metadata.tables
    if skip_unallocated:
        l2_bits = metadata.geometry.l2_bits
        if not tables.l2_offset(cluster >> l2_bits):
            return min(count, (((cluster >> l2_bits) + 1) << l2_bits) - cluster)
    count = min(count, tables.left_in_slice(cluster))
    if metadata.gate.wait_for_allocations(cluster, count):
        return 0
    position = metadata.prepare(cluster)
    try:
        old = tables.entries_at(position, count)
        for i, entry in enumerate(old):
            tables.check_entry(entry, cluster + i)
        new = [replace(entry) for entry in old]
        announce()
        if list(old) == new:
            return count  # nothing to be written
        with metadata.health.step("Changing the mapping"):
            tables.set_entries(position, new)
            for before, after in zip(old, new, strict=True):
                if before != after and not after & layout.OFFSET_MASK and before:
                    metadata.drop_entry(before, DiscardKind.REQUEST)
    finally:
        metadata.unpin(position)
    return count
