"""Check and repair: are the refcounts what the references say, and the COPIED flags what the
refcounts say?

Counts as ``qemu-img check`` does: a refcount that is too high is a leak, one that is too low or an
entry that cannot be right is a corruption. A repair changes, in this order, entries that cannot be
followed, refcounts, COPIED flags, the snapshot table, and at last the bits in the header that say
that the image is damaged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from errno import EIO
from typing import Literal

from ..errors import BackendError, ImageError
from .copied import check_copied
from .metadata import Metadata
from .references import CheckFailed
from .repair import adjust_refcounts, rebuild_refcounts, release_old_structure
from .result import CheckResult
from .snapshot_check import SnapshotTable, read_table
from .snapshot_table import Snapshot
from .state import mark_clean, mark_consistent
from .survey import Survey

__all__ = ["CheckResult", "Fix", "check"]

Fix = Literal["leaks", "all"]
"""What is repaired (``qemu-img check -r``)."""

_MAX_ROUNDS = 4
"""A repair can bring to light what could not be seen before; then it is repaired, too."""

RewriteTable = Callable[[list[Snapshot], int], None]
"""Write a new snapshot table in place of the old one, of so many bytes."""


def check(metadata: Metadata, fix: Fix | None, rewrite: RewriteTable) -> CheckResult:
    """Check everything, in an exclusive operation with settled metadata, and repair what ``fix``
    says.

    After a repair the numbers are those of a second look: what is left.
    """
    result = _look(metadata, fix, rewrite)
    if fix is None:
        return result
    for _ in range(_MAX_ROUNDS):
        fixed = result.corruptions_fixed + result.leaks_fixed
        if not fixed:
            break
        again = _look(metadata, None, rewrite)
        if again.corruptions or again.leaks:
            more = _look(metadata, fix, rewrite)
            if more.corruptions_fixed + more.leaks_fixed:
                _add(more, result)
                result = more
                continue
        _add(again, result)
        result = again
        break
    if not (result.corruptions or result.check_errors or result.failure):
        metadata.file.flush()
        mark_clean(metadata.file, metadata.header)
        mark_consistent(metadata.file, metadata.header)
    return result


def _add(result: CheckResult, earlier: CheckResult) -> None:
    """What was done earlier was done in all."""
    result.corruptions_fixed += earlier.corruptions_fixed
    result.leaks_fixed += earlier.leaks_fixed
    messages = earlier.messages + result.messages
    result.messages = []
    for message in messages:
        result.say(message)


def _look(metadata: Metadata, fix: Fix | None, rewrite: RewriteTable) -> CheckResult:
    result = CheckResult(total_clusters=metadata.geometry.clusters(metadata.header.size))
    try:
        _look_at_all(metadata, result, fix, rewrite)
    except CheckFailed as error:  # the result says why
        result.failure = error.errno
    except BackendError as error:
        if fix is None:
            raise
        result.unreadable(f"The repair failed: {error.strerror}")
        result.failure = error.errno
    finally:
        if fix is not None:
            metadata.reload()
    return result


def _look_at_all(
    metadata: Metadata, result: CheckResult, fix: Fix | None, rewrite: RewriteTable
) -> None:
    everything = fix == "all"
    table = read_table(metadata.file, metadata.header, result, repair=everything)
    with closing(Survey(metadata, result, repair=everything)) as survey:
        survey.count_references(table)
        survey.check_structure()
        survey.load_refcounts()
        if everything:
            metadata.file.flush()  # repaired entries, before a refcount falls
        _compare(survey, fix)
        good = not (result.corruptions or result.leaks or result.check_errors)
        check_copied(survey, repair=everything or (fix == "leaks" and good))
        result.image_end_offset = survey.end << survey.bits
    _repair_snapshots(metadata, table, result, rewrite if everything else None)


def _compare(survey: Survey, fix: Fix | None) -> None:
    """Compare, and repair."""
    result = survey.result
    corruptions = result.corruptions
    survey.compare()
    if fix is None:
        return
    if survey.rebuild and fix == "all":
        old_corruptions, old_leaks = result.corruptions, result.leaks
        result.say("Rebuilding refcount structure")
        rebuild_refcounts(survey)
        result.corruptions, result.leaks = survey.entry_corruptions, 0
        result.corruptions_fixed += old_corruptions - result.corruptions
        result.leaks_fixed += old_leaks
        survey.load_refcounts()
        release_old_structure(survey)
    elif survey.rebuild:
        result.unreadable("need to rebuild refcount structures")
        raise CheckFailed(EIO)
    elif result.leaks or result.corruptions:
        result.corruptions, result.leaks = corruptions, 0
        adjust_refcounts(survey, raising=fix == "all")


def _repair_snapshots(
    metadata: Metadata, table: SnapshotTable, result: CheckResult, rewrite: RewriteTable | None
) -> None:
    if not table.wrong_entries:
        return
    if rewrite is None:
        result.corruptions += table.wrong_entries
        return
    metadata.reload()
    try:
        rewrite(table.snapshots, table.length)
    except ImageError as error:
        result.corruptions += table.wrong_entries
        result.unreadable(f"failed to update snapshot table: {error}")
    else:
        result.corruptions_fixed += table.wrong_entries
