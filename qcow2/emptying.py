"""Making an overlay empty again: everything shows the backing file's data."""

from __future__ import annotations

from array import array

from .metadata import Metadata
from .quarantine import DiscardKind
from .sharing import lower_references

__all__ = ["make_empty"]


def make_empty(metadata: Metadata) -> None:
    """Forget every cluster of the disk (in an exclusive operation); internal snapshots stay.

    The L1 entries go first and are off the disk before any refcount falls, so a cut leaves an
    image in which each L2 table is there whole or not at all, and leaks.
    """
    metadata.check_writable()
    metadata.file.debug_event("empty_image_prepare")
    tables = metadata.tables
    entries = metadata.geometry.l1_entries(metadata.header.size)
    former = array("Q", tables.l1[:entries])
    with metadata.lock:
        for index, entry in enumerate(former):
            if entry:
                tables.set_l1(index, 0)
    metadata.flush_alone()
    with metadata.lock, metadata.health.step("Emptying the image"):
        lower_references(metadata, former, DiscardKind.REQUEST)
