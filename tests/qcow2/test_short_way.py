"""Reads by the short way (one memoryview in a list) find data where it is now, not where it was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import pyvirtio

CLUSTER = 512
TABLE = 64 * CLUSTER
"""Guest bytes of one L2 table, which is one slice here."""
SIZE = 64 * TABLE


def read(disk: pyvirtio.Disk, offset: int, length: int = CLUSTER) -> bytes:
    """By the short way, which must say the same as the long one."""
    data = bytearray(length)
    disk.readv(offset, [memoryview(data)])
    assert disk.read(offset, length) == data
    return bytes(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image of many small L2 tables."""
    path = tmp_path / "image.qcow2"
    pyvirtio.create_disk(path, SIZE, cluster_size=CLUSTER).close()
    return path


def test_slices_that_come_and_go_in_a_small_cache(path: Path) -> None:
    chance = random.Random(1)
    places = [table * TABLE + chance.randrange(64) * CLUSTER for table in range(64)]
    with pyvirtio.open_disk(path, l2_cache_size=8 * CLUSTER) as disk:
        for number, place in enumerate(places):
            disk.write(place, bytes([number + 1]) * CLUSTER)
        for _ in range(500):
            number = chance.choice([chance.randrange(64), chance.randrange(4)])
            assert read(disk, places[number]) == bytes([number + 1]) * CLUSTER


def test_an_l1_table_is_switched(path: Path) -> None:
    with pyvirtio.open_disk(path) as disk:
        disk.write(0, b"a" * CLUSTER)
        disk.snapshots.create("a")
        disk.write(0, b"b" * CLUSTER)
        assert read(disk, 0) == b"b" * CLUSTER
        disk.snapshots.apply("a")
        assert read(disk, 0) == b"a" * CLUSTER


def test_a_shared_l2_table_is_copied(path: Path) -> None:
    with pyvirtio.open_disk(path) as disk:
        disk.write(0, b"a" * 2 * CLUSTER)
        disk.snapshots.create("a")
        assert read(disk, 0) == b"a" * CLUSTER
        disk.writev(0, [memoryview(b"b" * CLUSTER)])
        assert read(disk, 0) == b"b" * CLUSTER
        assert read(disk, CLUSTER) == b"a" * CLUSTER


@pytest.mark.parametrize("change", ["write_zeroes", "discard"])
def test_data_goes_away(path: Path, change: str) -> None:
    with pyvirtio.open_disk(path) as disk:
        disk.write(0, b"a" * 4 * CLUSTER)
        assert read(disk, CLUSTER) == b"a" * CLUSTER
        getattr(disk, change)(CLUSTER, CLUSTER)
        assert read(disk, CLUSTER) == bytes(CLUSTER)
        assert read(disk, 2 * CLUSTER) == b"a" * CLUSTER


@pytest.mark.parametrize("options", [{}, {"extended_l2": True, "cluster_size": 1 << 16}])
def test_ranges_over_cluster_borders(tmp_path: Path, options: dict[str, Any]) -> None:
    chance = random.Random(2)
    size = 1 << 20
    content = bytearray(size)
    with pyvirtio.create_disk(tmp_path / "image.qcow2", size, **options) as disk:
        for _ in range(40):
            start = chance.randrange(size // 512) * 512
            data = chance.randbytes(min(chance.choice([512, 4096, 1 << 16]), size - start))
            disk.write(start, data)
            content[start : start + len(data)] = data
        for _ in range(400):
            start = chance.randrange(size)
            length = min(chance.choice([1, 512, 4096, 1 << 17]), size - start)
            assert read(disk, start, length) == content[start : start + length]
