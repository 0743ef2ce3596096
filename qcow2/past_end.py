"""What an image maps past the end of its disk: VM state, and what an interrupted resize left.

Before the disk grows it has to go, or it would show as the disk's contents.
"""

from __future__ import annotations

from array import array

from . import layout
from .cache import CacheFull
from .metadata import Metadata
from .quarantine import DiscardKind
from .sharing import lower_references

__all__ = ["drop_past_end", "drop_tables"]


def drop_past_end(metadata: Metadata, size: int) -> None:
    """Give up every cluster mapped behind the one with byte ``size - 1`` (exclusively).

    A cut leaves some of them mapped, or leaks.
    """
    geometry = metadata.geometry
    tables = geometry.l1_entries(size)
    _drop_entries(metadata, geometry.clusters(size), tables << geometry.l2_bits)
    drop_tables(metadata, tables, DiscardKind.ALWAYS)
    metadata.settle()
    metadata.vm_state_end = 0


def drop_tables(metadata: Metadata, first: int, kind: DiscardKind) -> None:
    """Clear the L1 entries from index ``first`` on, and give up what they refer to (exclusively).

    The entries are off the disk before any refcount falls.
    """
    gone = array("Q", metadata.tables.l1[first:])
    if not any(gone):
        return
    with metadata.lock:
        for index, entry in enumerate(gone, first):
            if entry:
                metadata.tables.set_l1(index, 0)
    metadata.settle()
    with metadata.lock, metadata.health.step("Giving up what lies past the end"):
        lower_references(metadata, gone, kind)


def _drop_entries(metadata: Metadata, cluster: int, end: int) -> None:
    """Clear the L2 entries of guest clusters [cluster, end), which one table maps."""
    while cluster < end:
        try:
            with metadata.lock:
                done = _drop_in_slice(metadata, cluster, end - cluster)
        except CacheFull:
            metadata.settle()
            continue
        if not done:
            return
        cluster += done


def _drop_in_slice(metadata: Metadata, cluster: int, count: int) -> int:
    """The part in the first slice (lock held): how many entries that was, 0 without a table."""
    tables = metadata.tables
    position = tables.locate(cluster)
    if position < 0:
        return 0
    count = min(count, tables.left_in_slice(cluster))
    old = tables.entries_at(position, count)
    if not any(old):
        return count
    for i, entry in enumerate(old):
        if entry & layout.OFFSET_MASK:
            tables.check_entry(entry, cluster + i)
    position = metadata.prepare(cluster)
    try:
        with metadata.health.step("Giving up what lies past the end"):
            tables.set_entries(position, [0] * count)
            for entry in old:
                if entry:
                    metadata.drop_entry(entry, DiscardKind.ALWAYS)
    finally:
        metadata.unpin(position)
    return count
