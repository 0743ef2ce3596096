"""The list of snapshots: one derived from another knows what one made anew does."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pyvirtio import ImageError
from pyvirtio.qcow2.snapshot_list import SnapshotList
from pyvirtio.qcow2.snapshot_table import Snapshot


def snapshot(id: str, name: str) -> Snapshot:
    return Snapshot(id, name, l1_table_offset=65536, l1_size=1, disk_size=512)


def knowledge(known: SnapshotList) -> Any:
    entries = list(known)
    return (
        entries,
        known.packed(),
        known.new_id(),
        [known.with_id(entry.id) is entry for entry in entries],
        [known.named(entry.name) is entry for entry in entries],
        known.named("x"),
        known.with_id("x"),
        [entry in known for entry in entries],
    )


@pytest.mark.parametrize("twins", [False, True])
def test_a_derived_list_knows_what_a_new_one_does(twins: bool) -> None:
    """``twins``: some have one id, some one name, as other programs may make them."""
    chance, known = random.Random(1), SnapshotList()
    for number in range(300):
        if len(known) and chance.random() < 0.45:
            gone = chance.choice(list(known))
            known = known.removed(gone)
            assert gone not in known
        elif twins:
            id, name = str(chance.randrange(9)), chance.choice("abc")
            known = known.added(snapshot(chance.choice([id, "no number"]), name))
        else:
            known = known.added(snapshot(known.new_id(), f"s{number}"))
        assert knowledge(known) == knowledge(SnapshotList(known))


def test_an_equal_snapshot_is_not_the_one_in_the_list() -> None:
    one = snapshot("1", "one")
    assert one in SnapshotList([one])
    assert snapshot("1", "one") not in SnapshotList([one])


def test_an_id_with_too_many_digits_is_no_number() -> None:
    known = SnapshotList([snapshot("9" * 5000, "one"), snapshot("7", "two")])
    assert known.new_id() == "8"


def test_more_snapshots_than_qemu_reads_are_refused() -> None:
    one = snapshot("1", "one")
    with pytest.raises(ImageError, match="Too many snapshots"):
        SnapshotList([one] * 65537).packed()
    with pytest.raises(ImageError, match="Too many snapshots"):
        SnapshotList([one] * 65536).added(one).packed()
