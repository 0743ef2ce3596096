"""COPIED flags: set where the refcount is exactly 1, and nowhere else.

A flag that is wrongly clear costs a copy; one that is wrongly set lets two owners write to one
cluster.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ..errors import BackendError
from . import layout
from .layout import Incompatible
from .references import CheckFailed, read_padded
from .survey import Survey
from .table_io import pack_table, unpack_table

__all__ = ["check_copied"]


def check_copied(survey: Survey, *, repair: bool) -> None:
    """Look at the flags of the active tables, and put them right with ``repair``."""
    _Copied(survey, repair).run()


class _Copied:
    def __init__(self, survey: Survey, repair: bool) -> None:
        metadata = survey.metadata
        self.survey = survey
        self.repair = repair
        self.metadata = metadata
        self.result = survey.result
        self.bits = survey.bits
        features = metadata.header.incompatible_features
        self.step = 2 if features & Incompatible.EXTENDED_L2 else 1
        self.external = bool(features & Incompatible.DATA_FILE)
        self.found: dict[int, int] = {}
        """Wrong entries that are left in each table that was looked at: however many L1 entries
        name it, that is done once."""

    def run(self) -> None:
        metadata, survey = self.metadata, self.survey
        # Where all counts are right and none is above 1, everything referred to has to have the
        # flag: the tables in which everything has it need no second look.
        simple = not survey.unreadable and not survey.stored.above_one
        simple = simple and next(survey.differences(), None) is None
        for index, entry in enumerate(metadata.tables.l1):
            table = entry & layout.OFFSET_MASK
            if not table:
                continue
            refcount = survey.refcount(table >> self.bits)
            if refcount is None:
                continue
            if (refcount == 1) != bool(entry & layout.COPIED):
                message = (
                    f"OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} "
                    f"refcount={refcount}"
                )
                if self.repair:
                    place = metadata.header.l1_table_offset + 8 * index
                    metadata.overlap.check_l1(place, 8)
                    metadata.file.write(place, layout.U64.pack(entry ^ layout.COPIED))
                    self.result.fixed(message)
                else:
                    self.result.corrupt(message)
            if not simple or table in survey.references.unflagged:
                left = self.found.get(table)
                if left is None:
                    self.found[table] = self.check_table(table)
                else:
                    self.result.corruptions += left

    def check_table(self, offset: int) -> int:
        """Look at one table; how many wrong entries it has then."""
        size = self.metadata.cluster_size
        try:
            data = read_padded(self.metadata.file, offset, size)
        except BackendError as error:
            self.result.unreadable(f"Could not read L2 table: {error.strerror}")
            raise CheckFailed(error.errno) from error
        entries = unpack_table(data)
        wrong = self.wrong_entries(entries[:: self.step] if self.step > 1 else entries)
        for i, refcount in wrong:
            message = (
                f"OFLAG_COPIED data cluster: l2_entry={entries[i * self.step]:x} "
                f"refcount={refcount}"
            )
            if self.repair:
                entries[i * self.step] ^= layout.COPIED
                self.result.fixed(message)
            else:
                self.result.corrupt(message)
        if not wrong or not self.repair:
            return len(wrong)
        self.metadata.overlap.check_l2(offset, size, active=True)
        self.metadata.file.write(offset, pack_table(entries))
        return 0

    def wrong_entries(self, entries: Sequence[int]) -> list[tuple[int, int]]:
        """(index, refcount) of the entries whose flag is not what it should be."""
        if self._all_own(entries):
            return []
        wrong = []
        copied, compressed = layout.COPIED, layout.COMPRESSED
        mask, bits = layout.OFFSET_MASK, self.bits
        stored, known = self.survey.stored.bytes, self.survey.stored.size
        for i, entry in enumerate(entries):
            host = entry & mask
            if entry & compressed or not (host or (self.external and entry & copied)):
                continue
            cluster = host >> bits
            refcount: int | None
            if self.external:
                refcount = 1
            elif cluster < known and not self.survey.unreadable:
                refcount = stored[cluster]
            else:
                refcount = self.survey.refcount(cluster)
            if refcount is not None and (refcount == 1) != bool(entry & copied):
                wrong.append((i, refcount if self.external else self.exact(cluster, refcount)))
        return wrong

    def exact(self, cluster: int, refcount: int) -> int:
        return self.survey.stored.many.get(cluster, refcount)

    def _all_own(self, entries: Sequence[int]) -> bool:
        """True for a table whose clusters lie in a row, with the flag, and a refcount of 1."""
        first, count = entries[0], len(entries)
        size = self.metadata.cluster_size
        if (
            first & ~layout.OFFSET_MASK != layout.COPIED
            or entries[-1] - first != (count - 1) * size
        ):
            return False
        if self.external or self.survey.unreadable or first & (size - 1):
            return False
        if array("Q", range(first, first + count * size, size)) != entries:
            return False
        cluster = (first & layout.OFFSET_MASK) >> self.bits
        return self.survey.stored.piece(cluster, cluster + count) == b"\1" * count
