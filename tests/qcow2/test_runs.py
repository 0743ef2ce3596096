"""The state of a range in bulk: the same as asked for run by run."""

from __future__ import annotations

import random

import pytest

import pyvirtio
from pyvirtio import ImageError, MemoryDisk
from pyvirtio.qcow2 import Qcow2Disk
from support.chains import Chain, words
from support.images import new_image, number_at, poke, reopen

FIELDS = ("data", "zero", "allocated", "compressed", "depth", "host_offset", "file")


def merged(extents):
    """Runs as long as they can be."""
    found = []
    for extent in extents:
        state = [getattr(extent, field) for field in FIELDS]
        if found:
            length, last = found[-1]
            host = last[5]
            expected = [*last[:5], None if host is None else host + length, last[6]]
            if expected == state:
                found[-1] = (length + extent.length, last)
                continue
        found.append((extent.length, state))
    return found


def one_by_one(disk, offset, end):
    while offset < end:
        extent = disk.block_status(offset, end - offset)
        yield extent
        offset += extent.length


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{"cluster_size": 512}, {}, {"extended_l2": True}])
def test_runs_are_those_of_block_status(tmp_path, seed, options):
    chain = Chain(tmp_path, seed=seed, **options)
    chance = random.Random(seed)
    with chain.open(read_only=True) as disk:
        ranges = [(0, disk.size)]
        for _ in range(20):
            start = chance.randrange(disk.size)
            ranges.append((start, chance.randint(1, disk.size - start)))
        for start, length in ranges:
            bulk = merged(disk.extents(start, length))
            assert bulk == merged(one_by_one(disk, start, start + length))
            assert sum(size for size, _ in bulk) == length


def test_long_runs_cross_tables_that_are_there_and_not():
    disk = pyvirtio.create_disk(MemoryDisk(growable=True), 4 << 20, cluster_size=512)
    disk.write(1 << 20, words(1, 600_000))
    disk.write_zeroes(3 << 20, 200_000)
    assert merged(disk.extents()) == merged(one_by_one(disk, 0, disk.size))
    assert len(list(disk.runs())) < 40


def test_a_range_outside_the_disk_is_refused():
    disk = pyvirtio.create_disk(MemoryDisk(growable=True), 1 << 20)
    with pytest.raises(ValueError, match="not inside"):
        disk.runs(0, (1 << 20) + 1)
    assert list(disk.runs(1 << 20)) == []


def test_an_entry_that_cannot_be_followed_is_refused_where_it_stands():
    file = MemoryDisk(growable=True)
    disk = pyvirtio.create_disk(file, 1 << 20)
    disk.write(0, bytes(2 << 16))
    disk.flush()
    table = disk._metadata.tables.l2_offset(0)
    file.write(table + 8, (1 << 63 | 0x12345600).to_bytes(8))
    runs = Qcow2Disk.open(file, read_only=True).runs()
    assert next(runs)[0] == 1 << 16
    with pytest.raises(ImageError, match="unaligned"):
        next(runs)


def test_holes_of_the_host_in_preallocated_clusters_are_zeroes(tmp_path):
    path = tmp_path / "a"
    with pyvirtio.create_disk(path, 1 << 20) as disk:
        disk.write(0, b"\x11" * (1 << 20))
        file = disk.children["file"]
        with disk._metadata.lock:
            host = disk._metadata.tables.map(0, 1)[1]
        disk.flush()
        file.discard(host + (64 << 10), 900 << 10)
    with pyvirtio.open_disk(path, read_only=True) as disk:
        assert [(e.length >> 10, e.data, e.zero) for e in disk.extents()] == [
            (64, True, False),
            (900, True, True),
            (60, True, False),
        ]


def test_nobody_asks_for_holes_where_the_host_has_the_space(tmp_path):
    """One hole in much that is stored is not worth a question for each run."""
    path = tmp_path / "a"
    with pyvirtio.create_disk(path, 4 << 20) as disk:
        disk.write(0, b"\x11" * (4 << 20))
        with disk._metadata.lock:
            host = disk._metadata.tables.map(0, 1)[1]
        disk.flush()
        disk.children["file"].discard(host + (64 << 10), 64 << 10)
    with pyvirtio.open_disk(path, read_only=True) as disk:
        assert [(e.length, e.data, e.zero) for e in disk.extents()] == [(4 << 20, True, False)]


def test_a_sparse_file_of_any_length_is_not_gone_over_for_holes(tmp_path):
    """Only what has refcount blocks is: the rest would take for ever."""
    path = tmp_path / "a"
    with pyvirtio.create_disk(path, 1 << 20) as disk:
        disk.write(0, b"\x11" * 512)
    with pyvirtio.open_disk(path, read_only=True) as disk:
        asked = []
        refcounts = disk._metadata.refcounts
        counts = refcounts.counts

        def watched(first, count):
            asked.append(count)
            assert sum(asked) <= 1 << 20
            return counts(first, count)

        refcounts.counts = watched
        disk.children["file"].size = 1 << 62
        assert next(disk.extents()).data
        assert asked


def test_what_refcounts_cannot_be_had_for_is_mapped_and_copied_all_the_same():
    file, disk = new_image(cluster_size=4096)
    disk.write(0, b"\x11" * 512)
    disk.close()
    poke(file, number_at(file, 48), 0x2200)  # the only refcount block
    target = MemoryDisk(disk.size)
    with reopen(file, read_only=True) as disk:
        heard = []
        disk.on_corruption(heard.append)
        assert next(disk.extents()).data
        assert len(heard) == 1
    with reopen(file, read_only=True) as disk:
        pyvirtio.convert(disk, target)
    assert target.read(0, 513) == b"\x11" * 512 + b"\0"


def test_a_run_is_one_in_its_middle_too():
    """Where it goes on in another slice of the table, which is compared as a whole."""
    file = MemoryDisk(growable=True)
    disk = pyvirtio.create_disk(file, 1 << 20, cluster_size=4096, preallocation="metadata")
    disk.flush()
    table = disk._metadata.tables.l2_offset(0)
    entries = [file.read(table + 8 * i, 8) for i in (100, 101)]
    file.write(table + 8 * 100, entries[1] + entries[0])
    again = Qcow2Disk.open(file, read_only=True, l2_cache_entry_size=512)
    assert [size >> 12 for size, *_ in again.runs()] == [100, 1, 1, 154]


def test_zero_clusters_with_a_place_are_no_data():
    disk = pyvirtio.create_disk(MemoryDisk(growable=True), 1 << 20)
    disk.write(0, words(1, 200_000))
    disk.write_zeroes(0, 1 << 17)
    first = next(iter(disk.extents()))
    assert (first.length, first.data, first.zero, first.allocated) == (1 << 17, False, True, True)
    assert first.host_offset is not None


def test_a_part_begins_where_it_lies():
    disk = pyvirtio.create_disk(MemoryDisk(growable=True), 1 << 20)
    disk.write(0, words(1, 200_000))
    (whole, *_), (part, *_) = list(disk.extents()), list(disk.extents(1000, 5000))
    assert part.host_offset == whole.host_offset + 1000
