"""Counting references in bulk comes to what counting them one by one does."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from pyvirtio.qcow2 import layout, tally
from pyvirtio.qcow2.geometry import Geometry
from pyvirtio.qcow2.table_io import pack_table
from pyvirtio.qcow2.tally import WINDOW, Tally, host_clusters, progression

GEOMETRY = Geometry(version=3, cluster_bits=12, refcount_order=4)
ENTRIES = 1 << GEOMETRY.l2_bits


def counting() -> tuple[Tally, Counter[int]]:
    found: Counter[int] = Counter()

    def action(first: int, counts: Sequence[int]) -> None:
        found.update({first + i: count for i, count in enumerate(counts) if count})

    return Tally(GEOMETRY, action), found


def entry(cluster: int, *, copied: bool = False) -> int:
    return cluster << GEOMETRY.cluster_bits | (layout.COPIED if copied else 0)


def compressed(offset: int, sectors: int) -> int:
    return layout.COMPRESSED | (sectors - 1) << GEOMETRY.compressed_offset_bits | offset


def expected(entries: Sequence[int], times: int = 1) -> Counter[int]:
    """One by one, as the specification says it."""
    found: Counter[int] = Counter()
    for value in entries:
        if value & layout.COMPRESSED:
            offset, length = GEOMETRY.compressed_extent(value)
            for cluster in range(offset >> 12, (offset + length - 1 >> 12) + 1):
                found[cluster] += times
        elif value & layout.OFFSET_MASK:
            found[(value & layout.OFFSET_MASK) >> 12] += times
    return found


@pytest.mark.parametrize("highest", [700, WINDOW - 1, WINDOW + 400, (1 << 44) - 1])
def test_random_tables_are_counted_as_one_by_one(highest: int) -> None:
    chance = random.Random(highest)
    counts, found = counting()
    wanted: Counter[int] = Counter()
    for _ in range(6):
        entries = []
        for _ in range(ENTRIES):
            what = chance.random()
            cluster = chance.randint(max(1, highest - 600), highest)
            if what < 0.2:
                entries.append(chance.choice([0, layout.ZERO]))
            elif what < 0.4:
                offset = cluster << 12 | chance.randrange(8) << 9
                entries.append(compressed(offset, chance.randint(1, 9)))
            else:
                entries.append(entry(cluster, copied=what < 0.7) | (what > 0.9))
        times = chance.choice([1, 1, 3, 300])
        counts.add_table(pack_table(entries), times)
        wanted += expected(entries, times)
    counts.finish()
    assert found == wanted


def test_tables_in_order_of_the_file_are_counted_as_runs() -> None:
    counts, found = counting()
    first = range(100, 100 + ENTRIES)
    for clusters in (first, first, range(100 + ENTRIES - 5, 100 + 2 * ENTRIES - 5)):
        table = pack_table([entry(cluster, copied=True) for cluster in clusters])
        assert progression(table, 4096) == (entry(clusters[0], copied=True), ENTRIES)
        counts.add_table(table)
    counts.finish()
    assert found == Counter([*first, *first, *range(100 + ENTRIES - 5, 100 + 2 * ENTRIES - 5)])


def test_a_run_is_one_in_its_middle_too() -> None:
    clusters = [*range(100, 100 + ENTRIES)]
    clusters[7], clusters[8] = clusters[8], clusters[7]
    assert progression(pack_table([entry(cluster) for cluster in clusters]), 4096) is None


def test_a_cluster_referred_to_very_often_keeps_its_exact_count() -> None:
    counts, found = counting()
    counts.add_clusters([7] * 254)
    counts.add_clusters([7, 7, 7, 8])
    counts.add_run(7, 2, 1000)
    counts.finish()
    assert found == {7: 1257, 8: 1001}


def test_far_clusters_are_handed_on_before_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_MAX_OUTSIDE", 100)
    counts, found = counting()
    far = [WINDOW + 3 * i for i in range(300)]
    for start in range(0, 300, 60):
        counts.add_clusters(far[start : start + 60])
    assert len(found) >= 200
    counts.finish()
    assert found == Counter(far)


def test_what_was_handed_on_is_not_counted_again() -> None:
    counts, found = counting()
    counts.add_run(5, 3)
    counts.finish()
    counts.finish()
    assert found == {5: 1, 6: 1, 7: 1}


def test_entries_that_lie_unaligned_do_not_spill_into_their_neighbours() -> None:
    table = pack_table([entry(9) | 0xE00, entry(3, copied=True), 0, layout.ZERO])
    assert list(host_clusters(table, 12)) == [9, 3, 0, 0]


def test_a_run_across_the_window_counts_on_both_sides() -> None:
    counts, found = counting()
    counts.add_run(WINDOW - 2, 4, 2)
    counts.finish()
    assert found == {WINDOW - 2: 2, WINDOW - 1: 2, WINDOW: 2, WINDOW + 1: 2}
