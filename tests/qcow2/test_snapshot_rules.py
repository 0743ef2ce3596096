"""Internal snapshots: what they keep, what they share, what the table says."""

from __future__ import annotations

import random

import pytest

import pyvirtio
from pyvirtio import BackendError, ImageError, MemoryDisk
from pyvirtio.backend.filter import FilterDisk
from pyvirtio.qcow2 import reference_vector, sharing, tally
from pyvirtio.qcow2.header import read_header
from pyvirtio.qcow2.snapshot_table import Snapshot, check_l1, read_snapshots
from support.images import (
    as_qcow2,
    assert_clean,
    copy_of,
    l2_entry_at,
    new_image,
    number_at,
    poke,
    reopen,
    with_compressed,
)

CLUSTER = 512


def test_writing_after_a_snapshot_leaves_it_alone() -> None:
    file, disk = new_image()
    disk.write(0, b"a" * 8 * CLUSTER)
    disk.snapshots.create("s")
    disk.write(0, b"b" * 8 * CLUSTER)
    assert disk.read(0, CLUSTER) == b"b" * CLUSTER
    disk.snapshots.apply("s")
    assert disk.read(0, 8 * CLUSTER) == b"a" * 8 * CLUSTER
    disk.close()
    assert_clean(file)


def test_a_run_that_is_ours_only_in_part_is_not_written_in_place() -> None:
    _, disk = new_image()
    disk.write(0, b"a" * 8 * CLUSTER)
    disk.snapshots.create("s")
    disk.write(0, b"b" * 2 * CLUSTER)
    disk.write(0, b"c" * 8 * CLUSTER)
    disk.snapshots.apply("s")
    assert disk.read(0, 8 * CLUSTER) == b"a" * 8 * CLUSTER


@pytest.mark.parametrize("window", [16, 64, 1 << 12])
def test_flags_are_right_in_tables_without_any_order(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Clusters in and behind those that are looked up together."""
    monkeypatch.setattr(sharing, "_CHUNK_BITS", 4)
    monkeypatch.setattr(sharing, "_CHUNK", 16)
    monkeypatch.setattr(sharing, "WINDOW", window)
    chance = random.Random(window)
    file, disk = new_image(1 << 17)
    order = list(range(256))
    for name in ("one", "two", "three"):
        chance.shuffle(order)
        for cluster in order[:150]:
            disk.write(cluster * CLUSTER, name.encode().ljust(CLUSTER, b"."))
        disk.snapshots.create(name)
    for cluster in order[:40]:
        disk.write(cluster * CLUSTER, b"last".ljust(CLUSTER, b"."))
    for step, name in ((disk.snapshots.delete, "two"), (disk.snapshots.apply, "one")):
        step(name)
        disk.flush()
        assert_clean(file)
    disk.snapshots.delete("three")
    disk.snapshots.delete("one")
    disk.close()
    assert_clean(file)


def test_what_is_not_allocated_gets_no_flag() -> None:
    file, disk = new_image()
    for cluster in (9, 3, 6):
        disk.write(cluster * CLUSTER, b"x" * CLUSTER)
    disk.snapshots.create("s")
    disk.snapshots.delete("s")
    disk.flush()
    assert number_at(file, l2_entry_at(file, 3)) >> 63
    assert number_at(file, l2_entry_at(file, 4)) == 0


def test_flags_of_compressed_clusters_stay_clear() -> None:
    file = with_compressed(b"a" * 512, b"b" * 512)
    disk = reopen(file)
    disk.write(4 * CLUSTER, b"x" * CLUSTER)
    disk.snapshots.create("s")
    disk.snapshots.delete("s")
    assert disk.check().clean
    assert disk.read(0, CLUSTER) == b"a" * CLUSTER
    disk.close()


def test_a_write_inside_one_shared_cluster_leaves_the_snapshot_alone() -> None:
    _, disk = new_image()
    disk.write(0, b"a" * CLUSTER)
    disk.snapshots.create("s")
    disk.write(CLUSTER, b"b" * CLUSTER)  # so the L2 table is ours
    disk.write(0, b"c" * 100)
    disk.snapshots.apply("s")
    assert disk.read(0, CLUSTER) == b"a" * CLUSTER


@pytest.mark.parametrize("size", [512, 16384])
def test_a_run_of_ours_ends_where_a_shared_cluster_follows_it_in_the_file(size: int) -> None:
    """With 16 KiB clusters, ones of subclusters."""
    in_a_row = 0
    for gap in range(1, 8):
        _, disk = new_image(32 * size, cluster_size=size, extended_l2=size > 512)
        disk.write(8 * size, b"x" * gap * size)
        disk.write(size, b"a" * size)
        disk.discard(8 * size, gap * size)
        disk.flush()
        disk.snapshots.create("s")  # its tables, and a new L2 table, take most of the gap
        disk.write(0, b"b" * size)
        in_a_row += disk.block_status(0, 2 * size).length == 2 * size
        disk.write(0, b"c" * 2 * size)
        disk.snapshots.apply("s")
        assert disk.read(0, 2 * size) == bytes(size) + b"a" * size
    assert in_a_row


def test_new_tables_are_not_mixed_up_with_ones_that_were_freed() -> None:
    file, disk = new_image(1 << 20)
    disk.write(0, b"a" * CLUSTER)
    disk.snapshots.create("s")
    disk.write(0, b"b" * CLUSTER)
    disk.snapshots.apply("s")
    for region in range(1, 20):
        assert disk.read(region * 32768, 8 * CLUSTER) == bytes(8 * CLUSTER)
        disk.write(region * 32768 + 4 * CLUSTER, b"n" * CLUSTER)
        assert disk.read(region * 32768, 4 * CLUSTER) == bytes(4 * CLUSTER)
    assert disk.read(0, CLUSTER) == b"a" * CLUSTER
    disk.close()
    assert_clean(file)


def test_deleting_frees_what_only_the_snapshot_used() -> None:
    file, disk = new_image()
    disk.write(0, b"a" * 8 * CLUSTER)
    disk.snapshots.create("one")
    disk.snapshots.create("two")
    disk.write(0, b"b" * 4 * CLUSTER)
    disk.snapshots.delete("one")
    assert disk.check().clean
    disk.snapshots.delete("two")
    assert disk.check().clean
    disk.close()
    assert_clean(file)
    assert number_at(file, 60, 4) == 0


def test_a_table_is_read_before_its_cluster_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large image refcounts are lowered while the tables are walked."""

    class Forgetting(FilterDisk):
        def _discard(self, offset: int, length: int) -> None:
            self.below.write(offset, bytes(length))

    monkeypatch.setattr(tally, "_MAX_OUTSIDE", -1)
    with pyvirtio.create_disk(Forgetting(MemoryDisk(growable=True)), 1 << 16) as disk:
        disk.write(0, b"x" * (1 << 16))
        disk.snapshots.create("one")
        disk.write(0, b"y" * (1 << 16))
        disk.snapshots.delete("one")
        assert disk.check().clean


def test_what_is_ours_again_is_written_in_place_again() -> None:
    file, disk = new_image()
    disk.write(0, b"a" * 4 * CLUSTER)
    disk.snapshots.create("s")
    disk.snapshots.delete("s")
    length = file.size
    disk.write(0, b"b" * 4 * CLUSTER)
    disk.flush()
    assert file.size == length
    assert disk.check().clean


def test_applying_brings_the_size_back() -> None:
    file, disk = new_image(1 << 16)
    sizes: list[int] = []
    disk.on_resize(sizes.append)
    disk.snapshots.create("small")
    disk.truncate(1 << 20)
    disk.snapshots.create("large")
    disk.snapshots.apply("small")
    assert disk.size == 1 << 16
    disk.snapshots.apply("large")
    assert (disk.size, sizes) == (1 << 20, [1 << 20, 1 << 16, 1 << 20])
    disk.write((1 << 20) - 1, b"x")
    disk.close()
    assert_clean(file)


def test_snapshots_of_compressed_clusters_count_every_host_cluster() -> None:
    """Two compressed clusters whose data crosses from one host cluster into the next."""
    data = bytes(range(256)) * 2
    file = with_compressed(data, data)
    disk = reopen(file)
    disk.snapshots.create("s")
    disk.write(0, b"x" * 1024)
    assert disk.check().clean
    disk.snapshots.apply("s")
    assert disk.read(0, 1024) == data * 2
    disk.snapshots.delete("s")
    assert disk.check().clean


def test_compressed_data_that_crosses_into_another_cluster_is_counted_there() -> None:
    file, disk = new_image()
    disk.write(0, b"?" * 2 * CLUSTER)
    disk.close()
    first = number_at(file, l2_entry_at(file)) & ~(1 << 63)
    # 1 KiB from the middle of the first host cluster on: two sectors more than the one it is in.
    poke(file, l2_entry_at(file), 1 << 62 | 1 << 61 | (first + 256))
    poke(file, l2_entry_at(file, 1), 0)
    disk = reopen(file)
    assert disk.check().clean
    disk.snapshots.create("s")
    assert disk.check().clean
    disk.snapshots.delete("s")
    disk.discard(0, CLUSTER)
    disk.flush()
    assert disk.check().clean


def test_tables_that_are_named_twice_count_twice() -> None:
    """Not made by anybody, but a refcount that is raised must be lowered as often."""
    file, disk = new_image(1 << 16)
    disk.write(0, b"x" * CLUSTER)
    disk.close()
    l1 = number_at(file, 40)
    table = number_at(file, l1) & ~(1 << 63)
    poke(file, l1, table)
    poke(file, l1 + 8, table)
    entry = number_at(file, table) & ~(1 << 63)
    poke(file, table, entry)
    poke(file, table + 8, entry)  # and two entries of it name one cluster
    block = number_at(file, number_at(file, 48))
    poke(file, block + 2 * (table // CLUSTER), 2, 2)
    poke(file, block + 2 * (entry // CLUSTER), 4, 2)
    disk = reopen(file)
    assert disk.check().clean
    disk.snapshots.create("s")
    assert disk.check().clean
    disk.snapshots.delete("s")
    assert disk.check().clean


@pytest.fixture(params=["as a whole", "piece by piece"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How references are counted: those of very large images are too many to be held."""
    if request.param == "piece by piece":
        monkeypatch.setattr(reference_vector, "_MAX_SLICES", 0)


@pytest.mark.usefixtures("way")
def test_a_refcount_that_cannot_rise_refuses_the_snapshot_and_changes_nothing() -> None:
    file, disk = new_image(refcount_bits=1)
    disk.write(0, b"a" * 4 * CLUSTER)
    with pytest.raises(ImageError, match="Reference count limit"):
        disk.snapshots.create("s")
    disk.write(0, b"b" * CLUSTER)
    assert disk.read(0, 2 * CLUSTER) == b"b" * CLUSTER + b"a" * CLUSTER
    assert len(disk.snapshots) == 0
    disk.close()
    assert_clean(file)


@pytest.mark.usefixtures("way")
def test_what_was_raised_before_a_refcount_at_its_limit_is_lowered_again() -> None:
    """A block of refcounts is 64 clusters here."""
    file, disk = new_image(refcount_bits=64)
    disk.write(0, b"x" * 100 * CLUSTER)
    disk.close()
    last = (number_at(file, l2_entry_at(file, 99)) & ~(1 << 63)) // CLUSTER
    block = number_at(file, number_at(file, 48) + 8 * (last // 64))
    poke(file, block + 8 * (last % 64), (1 << 64) - 1)
    file = copy_of(file)
    disk = as_qcow2(pyvirtio.open_disk(file, format="qcow2"))
    with pytest.raises(ImageError, match="Reference count limit reached"):
        disk.snapshots.create("s")
    disk.close()
    poke(file, block + 8 * (last % 64), 1)
    assert {(number_at(file, l2_entry_at(file, c)) >> 63) for c in range(99)} == {1}
    with reopen(file) as disk:
        assert not disk.check().leaks


@pytest.mark.usefixtures("way")
def test_the_highest_refcount_can_be_reached() -> None:
    file, disk = new_image(refcount_bits=2)
    disk.write(0, b"a" * 4 * CLUSTER)
    disk.snapshots.create("one")
    disk.snapshots.create("two")
    with pytest.raises(ImageError, match="Reference count limit"):
        disk.snapshots.create("three")
    disk.close()
    assert_clean(file)


def test_ids_are_one_more_than_the_highest() -> None:
    _, disk = new_image()
    for name in "abc":
        disk.snapshots.create(name)
    disk.snapshots.delete("a")
    assert disk.snapshots.create("d").id == "4"


def test_an_id_is_looked_for_before_a_name() -> None:
    _, disk = new_image()
    disk.snapshots.create("2")
    disk.snapshots.create("b")
    assert disk.snapshots.find("2").name == "b"
    assert disk.snapshots.find("b").id == "2"
    with pytest.raises(KeyError):
        disk.snapshots.find("3")


def test_snapshots_are_found_by_the_next_process() -> None:
    file, disk = new_image()
    disk.write(0, b"a" * CLUSTER)
    disk.snapshots.create("odd", date=1234.5, vm_clock=77, vm_state_size=0)
    disk.snapshots.create("names")
    disk.close()
    with reopen(file) as found:
        first, second = found.snapshots
        assert (first.id, first.name, first.date_sec, first.date_nsec) == (
            *("1", "odd", 1234, 500_000_000),
        )
        assert (first.vm_clock_nsec, first.icount, first.disk_size) == (77, None, 1 << 16)
        assert (second.name, second.l1_size) == ("names", 2)


def test_a_name_that_is_too_long_is_refused() -> None:
    _, disk = new_image()
    with pytest.raises(ValueError, match="65535"):
        disk.snapshots.create("x" * 65536)


def test_a_read_only_image_takes_no_snapshots() -> None:
    file, disk = new_image()
    disk.snapshots.create("s")
    disk.close()
    with reopen(file, read_only=True) as found:
        for work in (found.snapshots.create, found.snapshots.apply, found.snapshots.delete):
            with pytest.raises(BackendError, match="read-only"):
                work("s")


# -- the table -----------------------------------------------------------------------------------


def table_of(*entries: bytes) -> tuple[MemoryDisk, object]:
    file, disk = new_image()
    disk.close()
    file = copy_of(file)
    header = read_header(file)
    header.snapshots_offset, header.nb_snapshots = 1 << 20, len(entries)
    at = 1 << 20
    for entry in entries:
        file.write(at, entry)
        at += len(entry) + -len(entry) % 8
    return file, header


def snapshot(**fields: object) -> Snapshot:
    known: dict[str, object] = {
        "id": "1", "name": "abc", "l1_table_offset": 512, "l1_size": 1, "disk_size": 4096
    }  # fmt: skip
    return Snapshot(**(known | fields))  # type: ignore[arg-type]


def short(extra: bytes) -> bytes:
    """An entry with this much extra data only, a disk of its own size and 7 bytes of VM state."""
    fixed = (512).to_bytes(8) + (1).to_bytes(4) + b"\0\1" + b"\0\1" + bytes(8) + bytes(8)
    return fixed + (7).to_bytes(4) + len(extra).to_bytes(4) + extra + b"1" + b"n"


def test_entries_are_padded_to_eight_bytes() -> None:
    packed = [snapshot(name="x" * n).pack() for n in range(1, 9)]
    assert {len(entry) % 8 for entry in packed} == {0}
    file, header = table_of(*packed)
    found, _ = read_snapshots(file, header)  # type: ignore[arg-type]
    assert [len(s.name) for s in found] == list(range(1, 9))


def test_old_entries_take_the_disks_size_and_the_small_state_size() -> None:
    file, header = table_of(short(b""), short((9).to_bytes(8)), short((9).to_bytes(8) + bytes(8)))
    found, _ = read_snapshots(file, header)  # type: ignore[arg-type]
    assert [(s.vm_state_size, s.disk_size) for s in found] == [(7, 1 << 16), (9, 1 << 16), (9, 0)]
    assert [s.icount for s in found] == [None, None, None]


def test_a_large_state_has_no_small_size() -> None:
    assert snapshot(vm_state_size=5).pack()[32:36] == (5).to_bytes(4)
    assert snapshot(vm_state_size=1 << 32).pack()[32:36] == bytes(4)
    assert snapshot(vm_state_size=1 << 32).pack()[40:48] == (1 << 32).to_bytes(8)


def test_no_instruction_count_is_all_ones() -> None:
    assert snapshot().pack()[56:64] == b"\xff" * 8
    assert snapshot(icount=3).pack()[56:64] == (3).to_bytes(8)


def test_unknown_extra_data_is_kept() -> None:
    file, header = table_of(snapshot(unknown_extra_data=b"new").pack())
    (found,), _ = read_snapshots(file, header)  # type: ignore[arg-type]
    assert found.unknown_extra_data == b"new"
    assert found.name == "abc"


def test_too_much_extra_data_is_refused() -> None:
    file, header = table_of(snapshot(unknown_extra_data=bytes(1000)).pack())
    assert len(read_snapshots(file, header)[0]) == 1  # type: ignore[arg-type]
    file, header = table_of(snapshot(unknown_extra_data=bytes(1001)).pack())
    with pytest.raises(ImageError, match="Too much extra metadata"):
        read_snapshots(file, header)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [100, (1 << 63) - 512])
def test_a_snapshots_table_in_an_impossible_place_is_refused(place: int) -> None:
    _, header = table_of()
    with pytest.raises(ImageError, match="L1 table offset invalid"):
        check_l1(header, snapshot(l1_table_offset=place, l1_size=100))  # type: ignore[arg-type]


def test_a_snapshots_table_that_is_too_large_is_refused() -> None:
    _, header = table_of()
    check_l1(header, snapshot(l1_size=4 << 20))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="L1 table too large"):
        check_l1(header, snapshot(l1_size=(4 << 20) + 1))  # type: ignore[arg-type]


def test_a_snapshot_of_an_impossible_size_is_not_applied() -> None:
    file, disk = new_image()
    disk.snapshots.create("s")
    disk.close()
    poke(file, number_at(file, 64) + 48, 1 << 60)
    with reopen(file) as found, pytest.raises(ImageError, match="disk size is too big"):
        found.snapshots.apply("s")


def test_a_short_table_of_a_larger_disk_is_filled_up() -> None:
    file, disk = new_image()
    disk.write(0, b"a" * CLUSTER)
    disk.snapshots.create("s")
    disk.close()
    poke(file, number_at(file, 64) + 48, 1 << 20)
    disk = reopen(file)
    disk.snapshots.apply("s")
    assert disk.size == 1 << 20
    disk.write((1 << 20) - 1, b"x")
    assert disk.read(0, CLUSTER) == b"a" * CLUSTER
    assert disk.check().clean
