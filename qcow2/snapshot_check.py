"""Checking and repairing the snapshot table, as QEMU does.

A table that is longer than any program reads is cut short; entries that lack what version 3 demands
of them, or have more extra data than allowed, are written anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from . import layout
from .header import Header
from .references import CheckFailed
from .result import CheckResult
from .snapshot_table import Snapshot, TableRepair, read_snapshots

__all__ = ["SnapshotTable", "read_table"]

_REQUIRED_EXTRA_DATA = 16
"""Bytes of extra data that every entry of a version 3 image has (spec, "Snapshots")."""


@dataclass(slots=True)
class SnapshotTable:
    """What the check works with."""

    snapshots: list[Snapshot] = field(default_factory=list)
    length: int = 0
    """Bytes, as it stands in the file."""
    wrong_entries: int = 0
    """Entries that a new table puts right."""


def read_table(file: Disk, header: Header, result: CheckResult, *, repair: bool) -> SnapshotTable:
    """The snapshot table; with ``repair`` what is too much is dropped, in the header, too.

    Raises CheckFailed if it cannot be read.
    """
    number = header.nb_snapshots
    discarded = 0
    if number > layout.MAX_SNAPSHOTS and repair:
        discarded = number - layout.MAX_SNAPSHOTS
        number = layout.MAX_SNAPSHOTS
    cluster_size = 1 << header.cluster_bits
    if number > layout.MAX_SNAPSHOTS:
        result.unreadable("snapshot table too large")
        result.say(
            f"You can force-remove all {number - layout.MAX_SNAPSHOTS} overhanging snapshots by "
            "repairing the image"
        )
        raise CheckFailed
    end = header.snapshots_offset + number * layout.SNAPSHOT_HEADER.size
    if end > layout.INT64_MAX or header.snapshots_offset % cluster_size:
        result.unreadable("snapshot table offset invalid")
        raise CheckFailed
    findings = TableRepair()
    try:
        snapshots, length = read_snapshots(file, header, number, findings if repair else None)
    except ImageError as error:
        result.unreadable(f"failed to read the snapshot table: {error}")
        raise CheckFailed from error
    except BackendError as error:
        result.unreadable(f"failed to read the snapshot table: {error.strerror}")
        raise CheckFailed from error
    discarded += number - len(snapshots)
    if discarded:
        file.write(layout.NB_SNAPSHOTS_OFFSET, len(snapshots).to_bytes(4))
        file.flush()
        header.nb_snapshots = len(snapshots)
        result.fixed(f"snapshot table: discarding {discarded} overhanging snapshots", discarded)
    wrong = findings.extra_data_dropped
    if wrong:
        result.say(f"Repairing snapshot table: too much extra data in {wrong} entries")
    if header.version >= 3:
        for number, snapshot in enumerate(snapshots):
            if snapshot.extra_data_size < _REQUIRED_EXTRA_DATA:
                wrong += 1
                verb = "Repairing" if repair else "ERROR"
                result.say(f"{verb} snapshot table entry {number} is incomplete")
    return SnapshotTable(snapshots, length, wrong)
