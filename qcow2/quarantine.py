"""References that were dropped, until it is safe to lower the refcounts.

A cluster that lost a reference keeps its refcount, and so cannot be handed out again, until the
drop is on stable storage *and* every request that may have mapped it has finished. A cut
before that leaks the cluster; it never lets two owners have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

__all__ = ["DiscardKind", "DroppedReferences", "merge_runs"]


class DiscardKind(Enum):
    """Why clusters became free (``QCOW2_DISCARD_*``): decides whether the file below hears."""

    NEVER = "never"
    REQUEST = "request"
    SNAPSHOT = "snapshot"
    OTHER = "other"
    ALWAYS = "always"


class DroppedReferences:
    """A batch of (first host cluster, count, kind): one reference to each cluster was dropped."""

    __slots__ = ("requested", "runs")

    def __init__(self) -> None:
        self.requested = 0
        """How many clusters were dropped because the guest does not want them any more."""
        self.runs: list[tuple[int, int, DiscardKind]] = []

    def __bool__(self) -> bool:
        return bool(self.runs)

    def add(self, first: int, count: int, kind: DiscardKind) -> None:
        """One more run; joined to the last one where it continues it."""
        if kind is DiscardKind.REQUEST:
            self.requested += count
        if self.runs:
            last, length, last_kind = self.runs[-1]
            if last + length == first and last_kind is kind:
                self.runs[-1] = (last, length + count, kind)
                return
        self.runs.append((first, count, kind))

    def extend(self, other: DroppedReferences) -> None:
        """Take over another batch's runs."""
        self.runs += other.runs
        self.requested += other.requested


def merge_runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Cluster numbers, in any order, as sorted runs (first, count); each counts once."""
    runs: list[tuple[int, int]] = []
    first = end = -1
    for number in sorted(numbers):
        if number == end:
            end += 1
        elif number >= end:
            if end > first:
                runs.append((first, end - first))
            first, end = number, number + 1
    if end > first:
        runs.append((first, end - first))
    return runs
