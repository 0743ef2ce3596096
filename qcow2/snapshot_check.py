"""Checking and repairing the snapshot table, as QEMU does.

A table that is longer than any program reads is cut short; entries that lack what version 3 demands
of them, or have more extra data than allowed, are written anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from errno import EFBIG, EINVAL

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from . import layout
from .header import Header
from .references import CheckFailed
from .result import CheckResult, Report
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
    discarded = max(number - layout.MAX_SNAPSHOTS, 0) if repair else 0
    if discarded:
        result.say(f"Discarding {discarded} overhanging snapshots")
        number = layout.MAX_SNAPSHOTS
    _check_place(header, number, result)
    findings = TableRepair()
    try:
        snapshots, length = read_snapshots(file, header, number, findings if repair else None)
    except ImageError as error:
        _fail(result, f"failed to read the snapshot table: {error}")
        raise CheckFailed(EFBIG) from error
    except BackendError as error:
        text = f"Failed to read snapshot table: {error.strerror}"
        _fail(result, f"failed to read the snapshot table: {text}")
        raise CheckFailed(error.errno) from error
    for message in findings.messages:
        result.say(message)
    discarded += number - len(snapshots)
    if discarded:
        file.write(layout.NB_SNAPSHOTS_OFFSET, len(snapshots).to_bytes(4))
        file.flush()
        header.nb_snapshots = len(snapshots)
        result.corruptions_fixed += discarded
    wrong = findings.extra_data_dropped
    if header.version >= 3:
        for number, snapshot in enumerate(snapshots):
            if snapshot.extra_data_size < _REQUIRED_EXTRA_DATA:
                wrong += 1
                verb = "Repairing" if repair else "ERROR"
                result.say(f"{verb} snapshot table entry {number} is incomplete")
    return SnapshotTable(snapshots, length, wrong)


def _check_place(header: Header, number: int, result: CheckResult) -> None:
    """Raise CheckFailed unless a table of ``number`` entries can be where the header says."""
    if number > layout.MAX_SNAPSHOTS:
        _fail(result, "snapshot table too large")
        result.say(
            f"You can force-remove all {number - layout.MAX_SNAPSHOTS} overhanging snapshots with "
            "qemu-img check -r all"
        )
        raise CheckFailed(EFBIG)
    end = header.snapshots_offset + number * layout.SNAPSHOT_HEADER.size
    if end > layout.INT64_MAX or header.snapshots_offset % (1 << header.cluster_bits):
        _fail(result, "snapshot table offset invalid")
        raise CheckFailed(EINVAL)


def _fail(result: CheckResult, message: str) -> None:
    result.check_errors += 1
    result.say(Report(f"ERROR {message}"))
