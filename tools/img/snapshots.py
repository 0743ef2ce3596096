"""Reading a snapshot in place of the disk (``-l`` of convert and measure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import PyvirtioError
from ..messages import Failure, text_of
from ..optlist import split

if TYPE_CHECKING:
    from ...backend.disk import Disk
    from ...qcow2.snapshots import Snapshots

__all__ = ["SnapshotChoice", "open_snapshot"]


class SnapshotChoice:
    """What ``-l`` says: ``snapshot.id=…,snapshot.name=…``, or an id or a name."""

    def __init__(self, text: str) -> None:
        self.id: str | None = None
        self.name: str | None = None
        self.either: str | None = None
        if not text.startswith("snapshot."):
            self.either = text
            return
        for name, value in split(text):
            if name == "snapshot.id":
                self.id = value
            elif name == "snapshot.name":
                self.name = value
            else:
                from ..messages import report

                report(f"Invalid parameter '{name}'")
                raise Failure(f"Failed in parsing snapshot param '{text}'")


def open_snapshot(disk: Disk, choice: SnapshotChoice) -> Disk:
    """The snapshot as a disk, which is closed with its image. Raises Failure."""
    try:
        return _open(disk, choice)
    except (PyvirtioError, ValueError, OSError) as error:
        raise Failure(f"Failed to load snapshot: {text_of(error)}") from error


def _open(disk: Disk, choice: SnapshotChoice) -> Disk:
    snapshots: Snapshots | None = getattr(disk, "snapshots", None)
    if snapshots is None:
        name = disk.format_name
        raise ValueError(
            f"Block format '{name}' used by device '' does not support temporarily loading "
            "internal snapshots"
        )
    try:
        if choice.either is not None:
            return snapshots.open(snapshots.find(choice.either))
        return snapshots.open(snapshots.find_by(id=choice.id, name=choice.name))
    except KeyError:
        raise ValueError("Can't find snapshot") from None
