"""What a check of an image with an external data file does otherwise.

Guest clusters have no refcounts: no reference is counted, and COPIED is always to be set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from . import layout
from .data_file_tables import data_file_kind
from .layout import ClusterKind

__all__ = ["check_data_file_copied", "check_data_file_entries"]


class Findings(Protocol):
    """Where the findings go: a CheckResult."""

    def corrupt(self, message: str) -> None:
        """Count a corruption."""


def check_data_file_entries(
    result: Findings, entries: Sequence[int], table: int, cluster_size: int
) -> None:
    """The entries of the L2 table at host byte ``table``."""
    if not any(entries):
        return
    for index, entry in enumerate(entries):
        if entry & layout.COMPRESSED:
            result.corrupt(f"compressed cluster {index} with data file, entry={entry:#x}")
            continue
        offset = entry & layout.OFFSET_MASK
        if offset % cluster_size:
            result.corrupt(
                f"offset={offset:x}: Cluster is not properly aligned; L2 entry corrupted."
            )
        if entry & layout.L2_RESERVED_MASK:
            result.corrupt(
                f"found l2 entry with reserved bits set: {entry:x} in the L2 table at {table:#x}"
            )


def check_data_file_copied(result: Findings, entries: Sequence[int]) -> None:
    """The COPIED flags of one L2 table."""
    for entry in entries:
        stored = data_file_kind(entry) in (ClusterKind.NORMAL, ClusterKind.ZERO_ALLOCATED)
        if stored and not entry & layout.COPIED:
            result.corrupt(f"OFLAG_COPIED data cluster: l2_entry={entry:x} refcount=1")
