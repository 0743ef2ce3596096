"""What an image says of itself (``qemu-img info``), under QEMU's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .header import Header
from .layout import COMPRESSION_NAMES, Compatible, Incompatible
from .snapshot_table import Snapshot

__all__ = ["snapshot_facts", "specific_facts"]

_SECOND = 1_000_000_000


def specific_facts(header: Header) -> dict[str, Any]:
    """``ImageInfoSpecificQCow2``."""
    facts: dict[str, Any] = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": COMPRESSION_NAMES[header.compression_type],
        "refcount-bits": 1 << header.refcount_order,
    }
    if header.version >= 3:
        facts |= {
            "lazy-refcounts": bool(header.compatible_features & Compatible.LAZY_REFCOUNTS),
            "corrupt": bool(header.incompatible_features & Incompatible.CORRUPT),
            "extended-l2": header.geometry.extended_l2,
        }
    return facts


def snapshot_facts(snapshots: Iterable[Snapshot]) -> tuple[Mapping[str, Any], ...]:
    """``SnapshotInfo`` of each snapshot."""
    return tuple(_one_snapshot(snapshot) for snapshot in snapshots)


def _one_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // _SECOND,
        "vm-clock-nsec": snapshot.vm_clock_nsec % _SECOND,
    }
    if snapshot.icount is not None:
        facts["icount"] = snapshot.icount
    return facts
