"""What each host cluster is for, and how that is told in few words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.backend.file import FileDisk
from pyvirtio.qcow2.host_map import KINDS, HostMap, host_map

CLUSTER = 65536


def map_of(path: Path) -> HostMap:
    with FileDisk(path, read_only=True) as file:
        return host_map(file)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(made, 64 << 20) as disk:
        disk.write(0, b"x" * CLUSTER * 20)
    return made


def test_every_cluster_is_counted_once(path: Path) -> None:
    with pyvirtio.open_disk(path) as disk:
        disk.snapshots.create("one")
        disk.write(0, b"y" * CLUSTER)
        disk.bitmaps.add("b")
    found = map_of(path)
    assert sum(found.totals().values()) == found.clusters == -(-path.stat().st_size // CLUSTER)
    assert found.totals()["data"] == 20
    assert found.totals()["bitmaps"] == 2
    assert not found.problems


def test_data_are_told_by_the_oldest_snapshot_that_holds_them(path: Path) -> None:
    with pyvirtio.open_disk(path) as disk:
        for name, count in (("one", 3), ("two", 2)):
            disk.snapshots.create(name)
            disk.write(0, b"y" * CLUSTER * count)
    totals = map_of(path).totals()
    assert (totals["data"], totals["snapshot one"], totals["snapshot two"]) == (20, 3, 2)


def test_tables_in_any_order_are_told_as_those_in_a_row(tmp_path: Path) -> None:
    order = list(range(300))
    random.Random(1).shuffle(order)
    totals = []
    for name, clusters in (("row", range(300)), ("shuffled", order)):
        with pyvirtio.create_disk(tmp_path / name, 300 * CLUSTER) as disk:
            for cluster in clusters:
                disk.write(cluster * CLUSTER, b"x" * CLUSTER)
        totals.append(map_of(tmp_path / name).totals())
    assert totals[0] == totals[1]


def test_full_tables_are_told_cluster_by_cluster(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    options = {"cluster_size": 4096, "preallocation": "metadata"}
    with pyvirtio.create_disk(path, 8 << 20, **options) as disk:
        disk.snapshots.create("one")
        disk.write(4096, b"y" * 4096 * 3)
        now = {disk.block_status(at, 1).host_offset for at in range(0, 8 << 20, 4096)}
    found = map_of(path)
    data = found.kinds.index("data")
    assert {at * 4096 for at, kind in enumerate(found.use) if kind == data} == now
    assert found.totals()["snapshot one"] == 3


@pytest.mark.parametrize("bits", [1, 16, 64])
def test_what_is_counted_but_not_used_has_leaked(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, 64 << 20, refcount_bits=bits) as disk:
        disk.write(0, b"x" * CLUSTER * 5)
        at = disk.block_status(CLUSTER, 1).host_offset
    assert at is not None
    with path.open("r+b") as file:
        file.seek(4 * CLUSTER + 8)  # the second entry of the first L2 table
        assert int.from_bytes(file.read(8)) & 0xFFFFFFFFFE00 == at
        file.seek(4 * CLUSTER + 8)
        file.write(bytes(8))
    found = map_of(path)
    assert found.kinds[found.use[at // CLUSTER]] == "leaked"
    assert found.totals()["leaked"] == 1


def test_a_damaged_table_is_a_problem_and_no_error(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(3 * CLUSTER)
        file.write((1 << 63 | 12345 << 9).to_bytes(8))
    assert "refers to no cluster" in map_of(path).problems[0]


def test_runs_add_up_to_the_map() -> None:
    use = bytearray(random.Random(1).choices(range(len(KINDS)), k=1000)) + bytes([10]) * 5000
    unit, runs = HostMap(CLUSTER, use).runs(2000)
    assert unit == 1
    assert b"".join(bytes([kind]) * length for kind, length in runs) == use


def test_too_many_runs_become_fewer_in_larger_units_without_losing_a_leak() -> None:
    use = bytearray([10, 4] * 50_000)
    use[77_777] = KINDS.index("leaked")
    unit, runs = HostMap(CLUSTER, use).runs(1000)
    assert len(runs) <= 1000
    assert (len(use) + unit - 1) // unit == sum(length for _, length in runs)
    at = 0
    for kind, length in runs:
        if at <= 77_777 // unit < at + length:
            assert KINDS[kind] == "leaked"
        at += length
