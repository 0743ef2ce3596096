"""The bits in the header that say what state an image is in: dirty, corrupt.

Each change is one write of the field ``incompatible_features``, made stable before it counts.
Images of version 2 have no such field: there the state is in memory only.
"""

from __future__ import annotations

from ..backend.disk import Disk
from . import layout
from .header import Header
from .layout import Incompatible

__all__ = ["is_corrupt", "is_dirty", "mark_clean", "mark_consistent", "mark_corrupt", "mark_dirty"]


def is_dirty(header: Header) -> bool:
    """True if the refcounts in the file may be wrong."""
    return bool(header.incompatible_features & Incompatible.DIRTY)


def is_corrupt(header: Header) -> bool:
    """True if the image must not be written but to repair it."""
    return bool(header.incompatible_features & Incompatible.CORRUPT)


def mark_dirty(file: Disk, header: Header) -> None:
    """Say in the file that its refcounts may be wrong from now on."""
    _change(file, header, header.incompatible_features | Incompatible.DIRTY)


def mark_clean(file: Disk, header: Header) -> None:
    """Say in the file that its refcounts are right: everything must be stable already."""
    _change(file, header, header.incompatible_features & ~Incompatible.DIRTY)


def mark_corrupt(file: Disk, header: Header) -> None:
    """Say in the file that it must not be written before it is repaired."""
    _change(file, header, header.incompatible_features | Incompatible.CORRUPT)


def mark_consistent(file: Disk, header: Header) -> None:
    """Say in the file that it is repaired: everything must be stable already."""
    _change(file, header, header.incompatible_features & ~Incompatible.CORRUPT)


def _change(file: Disk, header: Header, features: int) -> None:
    if features == header.incompatible_features:
        return
    if not features & ~header.incompatible_features:
        # Bits that go: should the file still have them, that does no harm, but the other way.
        header.incompatible_features = features
    if header.version >= 3:
        file.write(layout.INCOMPATIBLE_FEATURES_OFFSET, layout.U64.pack(features))
        file.flush()
    header.incompatible_features = features
