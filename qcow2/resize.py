"""Changing the size of the disk.

Growing: what lies past the end is dropped | a larger L1 table is made beside the old one and
switched to | what the backing file has there is hidden | preallocation | the size, by one header
write. Shrinking: the size first, then what lies past the end is dropped, the refcount table and the
file cut. So a cut leaves the old size or the new one, and never shows what was not there.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from contextlib import suppress

from ..errors import BackendError, UnsupportedError
from . import layout
from .data_file import is_raw, map_everything
from .layout import ClusterKind
from .metadata import Metadata
from .past_end import drop_past_end
from .preallocate import check_mode, preallocate
from .quarantine import DiscardKind
from .table_io import pack_table

__all__ = ["grow_l1", "set_size", "truncate"]


def truncate(
    metadata: Metadata,
    size: int,
    preallocation: str,
    *,
    backing_size: int,
    hide: Callable[[int, int], None],
    hide_stored: Callable[[int, int], None],
) -> None:
    """Make ``size`` bytes the disk's size.

    ``hide(offset, length)`` makes a part of the disk past its end read as zeroes, by requests;
    ``hide_stored`` does so if it does not yet.
    Raises ValueError, UnsupportedError or BackendError with QEMU's texts; the size is the old one
    then. BackendError (EBUSY), too, if something else has changed the disk meanwhile.
    """
    metadata.check_writable()
    check_mode(preallocation)
    header, old = metadata.header, metadata.header.size
    if size % layout.SECTOR:
        raise ValueError("The new size must be a multiple of 512")
    if header.nb_snapshots and header.version < 3:
        raise UnsupportedError(
            "Can't resize a v2 image which has snapshots", feature="resize with snapshots"
        )
    if size < old:
        if preallocation != "off":
            raise ValueError("Preallocation can't be used for shrinking an image")
        _shrink(metadata, size)
    elif size > old:
        _grow(metadata, size, preallocation, backing_size, hide, hide_stored)


def _grow(
    metadata: Metadata,
    size: int,
    preallocation: str,
    backing_size: int,
    hide: Callable[[int, int], None],
    hide_stored: Callable[[int, int], None],
) -> None:
    old = metadata.header.size
    with metadata.exclusive():
        drop_past_end(metadata, old)
        grow_l1(metadata, metadata.geometry.l1_entries(size))
        partial = min(size, metadata.geometry.clusters(old) << metadata.cluster_bits) - old
        stored = _stored_runs(metadata, old, old + partial)
        l1 = metadata.tables.l1
    # What the cluster with the old end holds behind it, and what the backing file has there.
    reserve = preallocation in ("falloc", "full")  # which the cluster's end may lack
    for at, length in stored:
        (hide if reserve else hide_stored)(at, length)
    hidden = min(size, backing_size) - old
    if preallocation != "off" and backing_size > old & -metadata.cluster_size:
        hidden = max(hidden, partial)  # and mapped, together with what the backing file has before
    if hidden > 0:
        hide(old, hidden)
    if metadata.data_file is not None and (preallocation != "off" or is_raw(metadata.header)):
        map_everything(metadata, old, size)
    with metadata.exclusive():
        # A snapshot may have been applied, or VM state written, where the disk is to be.
        if metadata.header.size != old or metadata.tables.l1 is not l1 or metadata.vm_state_end:
            raise BackendError(errno.EBUSY, "The disk has changed while it was to grow")
        if metadata.data_file is None and preallocation != "off":
            preallocate(metadata, old, size, preallocation)
        set_size(metadata, size)


def _stored_runs(metadata: Metadata, start: int, end: int) -> list[tuple[int, int]]:
    """(guest offset, bytes) of what one cluster stores from ``start`` on and before ``end``."""
    runs = []
    with metadata.lock:
        while start < end:
            kind, _, length = metadata.tables.map(start, end - start)
            if kind in (ClusterKind.NORMAL, ClusterKind.COMPRESSED):
                runs.append((start, length))
            start += length
    return runs


def grow_l1(metadata: Metadata, entries: int) -> None:
    """Have an L1 table of at least ``entries`` entries (exclusively).

    It is made beside the old one; one header write switches to it. Raises BackendError (EFBIG)
    beyond QEMU's limit.
    """
    header, geometry = metadata.header, metadata.geometry
    if entries <= header.l1_size:
        return
    if 8 * entries > layout.MAX_L1_SIZE:
        raise BackendError(errno.EFBIG, "Failed to grow the L1 table: File too large")
    l1 = array("Q", metadata.tables.l1)
    l1.frombytes(bytes(8 * (entries - len(l1))))
    clusters = geometry.clusters(8 * entries)
    with metadata.lock:
        metadata.file.debug_event("l1_grow_alloc_table")
        first = metadata.refcounts.allocate_contiguous(clusters)
        metadata.overlap.check(first << metadata.cluster_bits, clusters << metadata.cluster_bits)
        try:
            contents = pack_table(l1).ljust(clusters << metadata.cluster_bits, b"\0")
            metadata.file.debug_event("l1_grow_write_table")
            metadata.file.write(first << metadata.cluster_bits, contents)
        except BaseException:
            _give_back(metadata, first, clusters)
            raise
    metadata.flush_alone()
    old_offset, old_size = header.l1_table_offset, header.l1_size
    with metadata.lock, metadata.health.step("Growing the L1 table"):
        metadata.file.debug_event("l1_grow_activate_table")
        failed = metadata.switch_l1(l1, first << metadata.cluster_bits, header.size)
        old_clusters = geometry.clusters(8 * old_size)
        if failed is not None:
            _give_back(metadata, first, clusters)
        elif old_clusters:
            metadata.lower(old_offset >> metadata.cluster_bits, old_clusters, DiscardKind.OTHER)
    if failed is not None:
        raise failed


def _give_back(metadata: Metadata, first: int, clusters: int) -> None:
    """Give back clusters that came to no use (lock held)."""
    for part in metadata.refcounts.slices(first, clusters):
        metadata.refcounts.add(*part, -1)


def set_size(metadata: Metadata, size: int) -> None:
    """Make ``size`` bytes, which the L1 table can map, the disk's size (exclusively)."""
    header = metadata.header
    with metadata.lock, metadata.health.step("Changing the size"):
        failed = metadata.switch_l1(metadata.tables.l1, header.l1_table_offset, size)
    if failed is not None:
        raise failed


def _shrink(metadata: Metadata, size: int) -> None:
    with metadata.exclusive():
        if size >= metadata.header.size:
            raise BackendError(errno.EBUSY, "The disk has changed while it was to shrink")
        set_size(metadata, size)
        drop_past_end(metadata, size)
        with metadata.lock, metadata.health.step("Shrinking the refcount table"):
            metadata.refcounts.drop_empty_blocks()
        metadata.settle()
        _cut_file(metadata)


def _cut_file(metadata: Metadata) -> None:
    """Cut the file behind the last cluster in use. Where it cannot be, it stays as long as it is,
    as QEMU has it."""
    with metadata.lock:
        used = metadata.refcounts.end_of_use()
        end = used << metadata.cluster_bits
        if end < metadata.file.size and metadata.file.growable:
            with suppress(BackendError, UnsupportedError):
                metadata.file.truncate(end, shrink=True)
                metadata.refcounts.fresh = used
