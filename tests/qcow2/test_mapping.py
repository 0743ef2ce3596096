"""From guest bytes to host clusters and back: what is read, written, zeroed and given back."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio import BackendError, Extent, ImageError, MemoryDisk
from pyvirtio.backend.blockdev import Context, Graph, open_node
from pyvirtio.qcow2 import Qcow2Disk
from support.filters import FaultyDisk, RecordingDisk
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


def over(base: bytes, size: int = 1 << 16, **options: object) -> tuple[MemoryDisk, Qcow2Disk]:
    """An empty image over a raw backing file that holds ``base``."""
    file, disk = new_image(size, backing_file="base", backing_fmt="raw", **options)
    disk.close()
    return file, over_again(file, base)


def over_again(file: MemoryDisk, base: bytes) -> Qcow2Disk:
    below = MemoryDisk(bytearray(base))
    return as_qcow2(
        pyvirtio.open_disk(copy_of(file), format="qcow2", backing=lambda reference: below)
    )


def file_of(disk: Qcow2Disk) -> MemoryDisk:
    file = disk.children["file"]
    assert isinstance(file, MemoryDisk)
    return file


# -- reading -------------------------------------------------------------------------------------


def test_past_the_end_of_a_backing_file_buffers_are_cleared() -> None:
    _, disk = over(b"b" * 1536)
    buffer = bytearray(b"?" * 4096)
    disk.readv(0, [buffer])
    assert buffer == b"b" * 1536 + bytes(4096 - 1536)


def test_past_the_end_of_a_qcow2_backing_file_buffers_are_cleared() -> None:
    _, below = new_image(1536)
    below.write(0, b"b" * 1536)
    file, disk = new_image(backing_file="base", backing_fmt="qcow2")
    disk.close()
    top = pyvirtio.open_disk(copy_of(file), format="qcow2", backing=lambda reference: below)
    buffer = bytearray(b"?" * 4096)
    top.readv(0, [buffer])
    assert buffer == b"b" * 1536 + bytes(4096 - 1536)


def test_a_chain_tells_which_layer_answers() -> None:
    _, below = new_image(1536)
    below.write(512, b"b" * 512)
    file, disk = new_image(backing_file="base", backing_fmt="qcow2")
    disk.close()
    top = pyvirtio.open_disk(copy_of(file), format="qcow2", backing=lambda reference: below)
    top.write(0, b"t" * 512)

    def kind(extent: Extent) -> tuple[int, bool, int]:
        return extent.length, extent.data, extent.depth

    found = [kind(top.block_status(at, 4096 - at)) for at in (0, 512, 1024)]
    assert found[:2] == [(512, True, 0), (512, True, 1)]
    assert found[2] == (512, False, 1)
    found = [kind(extent) for extent in top.extents(0, 4096)]
    assert found[:2] == [(512, True, 0), (512, True, 1)]
    assert found[2] == (512, False, 1)
    assert sum(length for length, _, _ in found) == 4096


def test_data_in_a_backing_file_that_was_not_opened_is_an_error() -> None:
    file, disk = new_image(backing_file="base", backing_fmt="raw")
    disk.close()
    alone = pyvirtio.open_disk(copy_of(file), format="qcow2", backing=lambda reference: None)
    with pytest.raises(ImageError, match="was not opened"):
        alone.read(0, 512)


def test_each_compressed_cluster_has_its_own_contents() -> None:
    one, two = bytes(range(128)) * 4, bytes(range(128, 256)) * 4
    with reopen(with_compressed(one, two)) as disk:
        assert disk.read(0, 1024) == one + two
        assert disk.read(0, 1024) == one + two
        assert disk.read(100, 500) == (one + two)[100:600]


def test_a_compressed_cluster_that_is_too_short_is_an_error() -> None:
    with reopen(with_compressed(b"a" * 511)) as disk, pytest.raises(ImageError, match="511 bytes"):
        disk.read(0, 512)


def test_a_compressed_cluster_that_is_no_deflate_stream_is_an_error() -> None:
    file = with_compressed(b"a" * 512)
    poke(file, number_at(file, l2_entry_at(file)) & 0xFFFF_FFFF, (1 << 64) - 1)
    with reopen(file) as disk, pytest.raises(ImageError, match="cannot be decompressed"):
        disk.read(0, 512)


def test_a_run_ends_where_host_clusters_do_not_follow() -> None:
    _, disk = new_image()
    for cluster in (0, 2, 1, 3, 4, 5):
        disk.write(cluster * CLUSTER, bytes([65 + cluster]) * CLUSTER)
    assert disk.read(0, 6 * CLUSTER) == b"".join(bytes([65 + c]) * CLUSTER for c in range(6))
    lengths = [extent.length for extent in disk.extents(0, 6 * CLUSTER)]
    assert lengths == [512, 512, 512, 1536]


def test_a_run_goes_on_over_missing_l2_tables() -> None:
    _, disk = new_image(1 << 20)
    disk.write(5 * 32768, b"x" * 512)
    assert disk.block_status(0, 1 << 20).length == 5 * 32768
    assert disk.read(0, 1 << 20).index(b"x") == 5 * 32768


def test_a_run_of_one_kind_is_one_extent() -> None:
    _, disk = new_image()
    disk.write(0, b"x" * 40 * CLUSTER)
    assert disk.block_status(0, 1 << 16).length == 40 * CLUSTER


@pytest.mark.parametrize(
    ("entry", "text"),
    [(0x700 | 1 << 63, "unaligned"), (0x701 | 1 << 63, "Preallocated zero cluster")],
)
def test_an_unaligned_cluster_is_an_error(entry: int, text: str) -> None:
    file, disk = new_image(cluster_size=1024)
    disk.write(0, b"x" * 4096)
    disk.close()
    poke(file, l2_entry_at(file, 1, 1024), entry)
    with reopen(file) as found, pytest.raises(ImageError, match=text):
        found.read(1024, 1024)
    with reopen(file) as found, pytest.raises(ImageError, match=text):
        found.write(1024, b"y" * 1024)


def test_a_zero_cluster_in_version_2_is_an_error() -> None:
    file, disk = new_image(compat="0.10")
    disk.write(0, b"x" * 512)
    disk.close()
    poke(file, l2_entry_at(file), 1)
    with reopen(file) as found, pytest.raises(ImageError, match="pre-v3"):
        found.read(0, 512)


def test_requests_outside_the_disk_are_refused_on_the_short_way_too() -> None:
    _, disk = new_image(1 << 15)
    disk.write(0, b"x" * (1 << 15))
    buffer = memoryview(bytearray(1024))
    for offset in (-512, (1 << 15) - 512, 1 << 15):
        with pytest.raises(ValueError, match="not inside"):
            disk.readv(offset, [buffer])
        with pytest.raises(ValueError, match="not inside"):
            disk.writev(offset, [buffer])


def test_the_short_way_ends_with_the_disk() -> None:
    """The cluster goes on behind the disk's end; a guest's requests do not."""
    _, disk = new_image((1 << 15) + 512, cluster_size=65536)
    disk.write(0, b"x" * 512)
    buffer = memoryview(bytearray(1024))
    with pytest.raises(ValueError, match="not inside"):
        disk.readv(1 << 15, [buffer])
    with pytest.raises(ValueError, match="not inside"):
        disk.writev(1 << 15, [buffer])


def test_fua_is_obeyed_on_the_short_way_too() -> None:
    log = RecordingDisk(MemoryDisk(growable=True))
    disk = pyvirtio.create_disk(log, 1 << 16, format="qcow2", cluster_size=512)
    disk.write(0, b"x" * 512)
    disk.flush()
    log.log.clear()
    disk.writev(0, [memoryview(b"y" * 512)], fua=True)
    assert [event.kind for event in log.log] == ["write", "flush"]


# -- writing -------------------------------------------------------------------------------------


def test_a_small_write_keeps_the_backing_files_data_around_it() -> None:
    base = bytes(range(256)) * 16
    _, disk = over(base)
    disk.write(700, b"x" * 100)
    assert disk.read(0, 4096) == base[:700] + b"x" * 100 + base[800:]


def test_a_small_write_keeps_shared_data_around_it() -> None:
    _, disk = new_image()
    old = bytes(range(256)) * 2
    disk.write(0, old)
    disk.snapshots.create("s")
    disk.write(200, b"x" * 100)
    assert disk.read(0, 512) == old[:200] + b"x" * 100 + old[300:]


def test_a_small_write_keeps_compressed_data_around_it() -> None:
    with reopen(with_compressed(bytes(range(128)) * 4)) as disk:
        disk.write(200, b"x" * 100)
        old = bytes(range(128)) * 4
        assert disk.read(0, 512) == old[:200] + b"x" * 100 + old[300:]


def test_a_cluster_that_was_used_before_shows_nothing_of_it() -> None:
    file, disk = new_image()
    disk.write(0, b"secret!!" * 64 * 20)
    disk.discard(0, 20 * CLUSTER)
    disk.flush()
    length = file.size
    for cluster in range(30, 50):
        disk.write(cluster * CLUSTER + 100, b"x")
    disk.flush()
    assert file.size <= length + CLUSTER, "they were not used again"
    assert disk.read(30 * CLUSTER, 20 * CLUSTER) == (bytes(100) + b"x" + bytes(411)) * 20


def test_the_last_cluster_of_the_file_shows_nothing_when_used_again() -> None:
    """A cluster at the very end of what was ever handed out is not a fresh one."""
    _, disk = new_image()
    disk.write(0, b"1" * CLUSTER)
    disk.write(CLUSTER, b"2" * CLUSTER)
    disk.discard(CLUSTER, CLUSTER)
    disk.flush()
    disk.write(3 * CLUSTER + 7, b"x")
    assert disk.read(3 * CLUSTER, CLUSTER) == bytes(7) + b"x" + bytes(504)


def test_what_is_ours_is_written_in_place() -> None:
    file, disk = new_image()
    disk.write(CLUSTER, b"x" * CLUSTER)
    disk.flush()
    place = number_at(file, l2_entry_at(file, 1))
    disk.write(0, b"y" * 3 * CLUSTER)
    disk.flush()
    assert number_at(file, l2_entry_at(file, 1)) == place
    assert disk.read(0, 3 * CLUSTER) == b"y" * 3 * CLUSTER


def test_an_allocated_zero_cluster_is_used_and_loses_its_flag() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 4 * CLUSTER)
    disk.write_zeroes(0, 4 * CLUSTER)
    disk.flush()
    before = [number_at(file, l2_entry_at(file, i)) for i in range(4)]
    disk.write(100, b"y" * 3 * CLUSTER)
    disk.flush()
    assert [number_at(file, l2_entry_at(file, i)) for i in range(4)] == [e & ~1 for e in before]
    assert disk.read(0, 4 * CLUSTER) == bytes(100) + b"y" * 3 * CLUSTER + bytes(412)
    disk.close()
    assert_clean(file)


def test_stored_clusters_and_zero_clusters_between_are_one_write_that_goes_around_nothing() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 5 * CLUSTER)
    disk.write_zeroes(CLUSTER, CLUSTER)
    disk.write_zeroes(3 * CLUSTER, CLUSTER)
    disk.close()
    log = RecordingDisk(copy_of(file))
    with as_qcow2(pyvirtio.open_disk(log, format="qcow2")) as again:
        start = again.block_status(0, CLUSTER).host_offset
        assert start is not None
        again.write(100, b"y" * 4 * CLUSTER)
        writes = [(e.offset, e.length) for e in log.log if e.kind == "write"]
        assert writes == [(start + 100, 4 * CLUSTER)]
        assert again.read(0, 5 * CLUSTER) == b"x" * 100 + b"y" * 4 * CLUSTER + b"x" * 412
        again.flush()
        assert again.check().clean


def test_an_error_in_a_write_over_stored_and_zero_clusters_leaves_all_of_them() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 3 * CLUSTER)
    disk.write_zeroes(CLUSTER, CLUSTER)
    disk.close()
    faulty = FaultyDisk(copy_of(file), kinds=frozenset({"write"}))
    disk = as_qcow2(pyvirtio.open_disk(faulty, format="qcow2"))
    faulty.fail_at = faulty.count
    with pytest.raises(BackendError):
        disk.write(0, b"y" * 3 * CLUSTER)
    assert disk.read(0, 3 * CLUSTER) == b"x" * CLUSTER + bytes(CLUSTER) + b"x" * CLUSTER


def test_new_clusters_are_marked_as_ours_alone() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 4 * CLUSTER)
    disk.close()
    assert all(number_at(file, l2_entry_at(file, i)) >> 63 for i in range(4))
    assert number_at(file, number_at(file, 40)) >> 63
    assert_clean(file)


def test_a_write_that_fails_gives_its_clusters_back() -> None:
    inner = MemoryDisk(growable=True)
    file = FaultyDisk(inner, kinds=frozenset({"write"}))
    disk = as_qcow2(pyvirtio.create_disk(file, 1 << 16, format="qcow2", cluster_size=512))
    disk.write(0, b"x" * CLUSTER)
    disk.flush()
    file.fail_at = file.count
    with pytest.raises(BackendError):
        disk.write(CLUSTER, b"y" * 8 * CLUSTER)
    file.fail_at = None
    assert disk.read(0, 4 * CLUSTER) == b"x" * CLUSTER + bytes(3 * CLUSTER)
    disk.write(CLUSTER, b"z" * 30 * CLUSTER)  # a leak past the end of the file is none
    assert disk.check().leaks == 0


def test_a_new_l2_table_that_cannot_be_written_is_given_back() -> None:
    inner = MemoryDisk(growable=True)
    file = FaultyDisk(inner, kinds=frozenset({"write"}))
    disk = as_qcow2(pyvirtio.create_disk(file, 1 << 16, format="qcow2", cluster_size=512))
    file.fail_at = file.count
    with pytest.raises(BackendError):
        disk.write(0, b"y" * 512)
    file.fail_at = None
    disk.write(0, b"z" * 30 * CLUSTER)  # a leak past the end of the file is none
    assert disk.check().clean


def test_writes_of_all_sizes_are_found_again_by_the_next_process() -> None:
    file, disk = new_image(1 << 18)
    model = bytearray(1 << 18)
    for offset, length in ((0, 1), (511, 2), (5000, 40000), (100_000, 512), (262_143, 1)):
        disk.write(offset, bytes([length % 255 + 1]) * length)
        model[offset : offset + length] = bytes([length % 255 + 1]) * length
    disk.close()
    with reopen(file) as found:
        assert found.read(0, 1 << 18) == model
    assert_clean(file)


# -- zeroes and discards -------------------------------------------------------------------------


def test_zeroes_keep_the_host_cluster_unless_told_otherwise() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 2 * CLUSTER)
    disk.flush()
    host = number_at(file, l2_entry_at(file, 0))
    disk.write_zeroes(0, CLUSTER)
    disk.write_zeroes(CLUSTER, CLUSTER, unmap=True)
    disk.flush()
    assert number_at(file, l2_entry_at(file, 0)) == host | 1
    assert number_at(file, l2_entry_at(file, 1)) == 1
    disk.close()
    assert_clean(file)


def test_zeroed_compressed_clusters_are_given_back() -> None:
    file = with_compressed(b"a" * 512, b"b" * 512)
    disk = reopen(file)
    disk.write_zeroes(0, 1024)
    assert disk.read(0, 1024) == bytes(1024)
    below = file_of(disk)
    disk.close()
    assert number_at(below, l2_entry_at(below, 0)) == 1
    assert_clean(below)


def test_a_discard_hides_the_backing_file() -> None:
    _, disk = over(b"b" * 8192)
    disk.discard(0, 4096)
    assert disk.read(0, 8192) == bytes(4096) + b"b" * 4096


def test_a_discard_in_version_2_never_uncovers_the_backing_file() -> None:
    _, disk = over(b"b" * 8192, compat="0.10")
    disk.write(0, b"x" * 1024)
    disk.discard(0, 2048)
    assert disk.read(0, 2048) == b"x" * 1024 + b"b" * 1024


def test_a_discard_of_nothing_takes_no_space() -> None:
    file, disk = new_image()
    length = file.size
    disk.discard(0, 1 << 16)
    disk.flush()
    assert file.size == length
    disk.write(0, b"x" * 512)
    disk.discard(512, 512)
    disk.flush()
    assert number_at(file, l2_entry_at(file, 1)) == 0


def test_what_is_discarded_is_free_again() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 20 * CLUSTER)
    disk.discard(0, 20 * CLUSTER)
    disk.close()
    assert_clean(file)


def test_discards_of_the_guest_reach_the_file_below_and_overwriting_does_not() -> None:
    log = RecordingDisk(MemoryDisk(growable=True))
    disk = as_qcow2(pyvirtio.create_disk(log, 1 << 16, format="qcow2", cluster_size=512))
    disk.write(0, b"x" * 1024)
    disk.snapshots.create("s")
    disk.write(0, b"y" * 512)
    disk.flush()
    disk.snapshots.delete("s")
    assert sum(event.kind == "discard" for event in log.log) > 0
    log.log.clear()
    disk.discard(512, 512)
    disk.flush()
    assert [event.length for event in log.log if event.kind == "discard"] == [512]


# -- refcounts -----------------------------------------------------------------------------------


def test_a_grown_refcount_table_leaks_nothing() -> None:
    """One 512-byte refcount table names 64 blocks of 256 clusters: 8 MiB."""
    file, disk = new_image(24 << 20)
    disk.write(0, b"x" * (10 << 20))
    disk.close()
    assert number_at(file, 56, 4) > 1
    assert_clean(file)
    with reopen(file) as found:
        assert found.read((10 << 20) - 512, 1024) == b"x" * 512 + bytes(512)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32, 64])
def test_new_refcount_blocks_count_themselves(width: int) -> None:
    file, disk = new_image(1 << 20, refcount_bits=width)
    disk.write(0, b"x" * (1 << 20))
    disk.close()
    assert_clean(file)


def test_freed_clusters_are_used_again() -> None:
    file, disk = new_image()
    for _ in range(20):
        disk.write(0, b"x" * 20 * CLUSTER)
        disk.discard(0, 20 * CLUSTER)
        disk.flush()
    assert file.size < 60 * CLUSTER


@pytest.mark.parametrize("what", ["qcow2_header", "active L1 table", "refcount table"])
def test_what_every_image_has_is_never_handed_out(what: str) -> None:
    file, disk = new_image()
    disk.close()
    offset = {"qcow2_header": 0, "active L1 table": number_at(file, 40), "refcount table": 512}[
        what
    ]
    block = number_at(file, number_at(file, 48))
    poke(file, block + 2 * (offset // 512), 0, 2)
    with reopen(file) as found:
        clusters = (found.write(i * CLUSTER, b"x" * CLUSTER) for i in range(40))
        with pytest.raises(
            ImageError, match=rf"overlaps with {what}|L2 table at offset 0"
        ) as error:
            list(clusters)
        assert error.value.field == "refcount"  # before anything was handed out
        with pytest.raises(BackendError, match="not written any more"):
            found.write(0, b"x")


def test_an_unaligned_refcount_block_is_an_error() -> None:
    file, disk = new_image()
    disk.close()
    poke(file, number_at(file, 48), 0x600, 8)
    poke(file, number_at(file, 48) + 6, 0x0700 + 0x100, 2)
    with reopen(file) as found:
        found.check()
    poke(file, number_at(file, 48), 1 << 63, 8)
    with reopen(file) as found, pytest.raises(ImageError, match="Refblock offset"):
        found.write(0, b"x")


# -- growing -------------------------------------------------------------------------------------


def test_growing_moves_the_l1_table_and_leaks_nothing() -> None:
    file, disk = new_image(1 << 16)
    disk.write(0, b"x" * 512)
    disk.truncate(8 << 20)
    assert disk.size == 8 << 20
    disk.write((8 << 20) - 512, b"y" * 512)
    disk.close()
    assert_clean(file)
    with reopen(file) as found:
        assert found.size == 8 << 20
        assert (found.read(0, 1), found.read((8 << 20) - 1, 1)) == (b"x", b"y")


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_growing_does_not_uncover_a_longer_backing_file(compat: str) -> None:
    _, disk = over(b"b" * 65536, size=1024 + 512, compat=compat)
    disk.truncate(32768)
    assert disk.read(0, 32768) == b"b" * 1536 + bytes(32768 - 1536)


def test_a_size_that_is_no_number_of_sectors_is_refused() -> None:
    _, disk = new_image()
    with pytest.raises(ValueError, match="multiple of 512"):
        disk.truncate((1 << 16) + 100)


def test_a_version_2_image_with_snapshots_is_not_resized() -> None:
    _, disk = new_image(compat="0.10")
    disk.snapshots.create("s")
    with pytest.raises(pyvirtio.UnsupportedError, match="v2 image which has snapshots"):
        disk.truncate(1 << 17)


def test_a_disk_too_large_for_the_l1_table_is_refused() -> None:
    _, disk = new_image()
    with pytest.raises((ValueError, BackendError), match="too large"):
        disk.truncate((128 << 30) + 32768)
    with pytest.raises(ValueError, match="too large for file format"):
        new_image((128 << 30) + 32768)


# -- subclusters ---------------------------------------------------------------------------------


def sub_image(size: int = 1 << 18) -> tuple[MemoryDisk, Qcow2Disk]:
    """An image with 16 KiB clusters of 32 subclusters of 512 bytes."""
    return new_image(size, cluster_size=16384, extended_l2=True)


def states(file: MemoryDisk, cluster: int = 0) -> int:
    table = number_at(file, number_at(file, 40)) & 0x00FF_FFFF_FFFF_FE00
    return number_at(file, table + 16 * cluster + 8)


def test_only_written_subclusters_are_allocated() -> None:
    file, disk = sub_image()
    disk.write(1024, b"x" * 1024)
    disk.flush()
    assert states(file) == 0b1100
    disk.write(512 * 31 + 10, b"y")
    disk.flush()
    assert states(file) == 1 << 31 | 0b1100
    assert disk.read(0, 4096) == bytes(1024) + b"x" * 1024 + bytes(2048)


def test_zeroed_subclusters_are_not_allocated_any_more() -> None:
    file, disk = sub_image()
    disk.write(0, b"x" * 16384)
    disk.write_zeroes(1024, 1024)
    disk.flush()
    assert states(file) == 0b1100 << 32 | (0xFFFF_FFFF & ~0b1100)
    assert disk.read(0, 4096) == b"x" * 1024 + bytes(1024) + b"x" * 2048
    disk.close()
    assert_clean(file)


def test_runs_of_subclusters_over_several_clusters() -> None:
    _, disk = sub_image()
    disk.write(0, b"x" * 3 * 16384)
    disk.write_zeroes(16384 + 8192, 512)
    found = [(extent.length, extent.data) for extent in disk.extents(0, 3 * 16384)]
    assert found == [(16384 + 8192, True), (512, False), (2 * 16384 - 8192 - 512, True)]


def test_a_shared_cluster_is_copied_with_its_stored_subclusters() -> None:
    file, disk = sub_image()
    disk.write(512, b"a" * 512)
    disk.write(512 * 20, b"b" * 512)
    disk.snapshots.create("s")
    disk.write(512 * 10, b"c" * 512)
    expected = bytearray(16384)
    expected[512:1024] = b"a" * 512
    expected[512 * 20 : 512 * 21] = b"b" * 512
    with_c = bytearray(expected)
    with_c[512 * 10 : 512 * 11] = b"c" * 512
    assert disk.read(0, 16384) == with_c
    disk.snapshots.apply("s")
    assert disk.read(0, 16384) == expected
    disk.close()
    assert_clean(file)


def test_shared_subclusters_are_not_written_in_place() -> None:
    _, disk = sub_image()
    disk.write(0, b"x" * 4 * 16384)
    disk.snapshots.create("s")
    disk.write(0, b"y" * 16384)
    disk.write(0, b"z" * 2 * 16384)
    disk.snapshots.apply("s")
    assert disk.read(0, 4 * 16384) == b"x" * 4 * 16384


def test_a_subcluster_both_allocated_and_zero_is_an_error() -> None:
    file, disk = sub_image()
    disk.write(0, b"x" * 512)
    disk.close()
    table = number_at(file, number_at(file, 40)) & 0x00FF_FFFF_FFFF_FE00
    poke(file, table + 8, 1 << 32 | 1)
    with reopen(file) as found, pytest.raises(ImageError, match="Invalid L2 entry"):
        found.read(0, 512)


def test_a_small_write_to_a_subcluster_keeps_what_is_around_it() -> None:
    _, disk = sub_image()
    disk.write(0, bytes(range(256)) * 8)
    disk.write(700, b"x" * 1000)
    old = bytes(range(256)) * 8
    assert disk.read(0, 2048) == old[:700] + b"x" * 1000 + old[1700:]
    disk.write(4096 + 100, b"y")
    assert disk.read(4096, 512) == bytes(100) + b"y" + bytes(411)


def test_an_image_in_a_file_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with pyvirtio.create_disk(path, 1 << 20, format="qcow2") as disk:
        disk.write(12345, b"x" * 100_000)
    with pyvirtio.open_disk(path) as disk:
        assert disk.read(12345, 100_000) == b"x" * 100_000


def test_a_gap_that_is_too_small_is_not_used_for_a_table() -> None:
    file, disk = new_image(1 << 16)
    disk.write(0, b"x" * 32 * CLUSTER)
    for cluster in range(0, 32, 2):
        disk.discard(cluster * CLUSTER, CLUSTER)
    disk.flush()
    disk.truncate(16 << 20)  # an L1 table of 8 clusters
    assert disk.read(0, 32 * CLUSTER) == (bytes(CLUSTER) + b"x" * CLUSTER) * 16
    disk.close()
    assert_clean(file)


def test_allocated_zero_clusters_that_do_not_follow() -> None:
    _, disk = new_image()
    for cluster in (0, 5, 1):
        disk.write(cluster * CLUSTER, b"x" * CLUSTER)
    disk.write_zeroes(0, 2 * CLUSTER)
    disk.write(0, bytes(range(256)) * 4)
    assert disk.read(0, 2 * CLUSTER) == bytes(range(256)) * 4
    assert disk.read(5 * CLUSTER, CLUSTER) == b"x" * CLUSTER
    assert disk.check().clean


def test_new_tables_are_not_mixed_up_with_ones_that_were_cut_off() -> None:
    _, disk = new_image(8 * 32768)
    for region in range(1, 8):
        disk.write(region * 32768, b"x" * CLUSTER)
    disk.truncate(32768, shrink=True)
    disk.truncate(8 * 32768)
    for region in range(1, 8):
        disk.write(region * 32768 + 4 * CLUSTER, b"y" * CLUSTER)
        assert disk.read(region * 32768, 5 * CLUSTER) == bytes(4 * CLUSTER) + b"y" * CLUSTER
    assert disk.check().clean


def test_a_zeroed_subcluster_is_written_again() -> None:
    file, disk = sub_image()
    disk.write(0, b"x" * 16384)
    disk.write_zeroes(1024, 1024)
    disk.write(1024, b"y" * 512)
    disk.flush()
    assert states(file) == 0b1000 << 32 | (0xFFFF_FFFF & ~0b1000)
    assert disk.read(0, 4096) == b"x" * 1024 + b"y" * 512 + bytes(512) + b"x" * 2048


def test_many_zeroes_with_a_small_cache() -> None:
    file, disk = new_image(4 << 20)
    disk.close()
    with reopen(file, l2_cache_size=1) as found:
        for region in range(40):
            found.write_zeroes(region * 65536, 512)
        assert found.read(0, 512) == bytes(512)


def test_the_depth_of_a_raw_backing_file() -> None:
    _, disk = over(b"b" * 8192)
    disk.write(0, b"x" * 512)
    assert [extent.depth for extent in disk.extents(0, 4096)] == [0, 1]
    assert disk.block_status(512, 512).depth == 1


def test_a_snapshot_keeps_the_highest_zero_subcluster() -> None:
    file, disk = sub_image()
    disk.write(0, b"x" * 16384)
    disk.write_zeroes(31 * 512, 512)
    disk.snapshots.create("s")
    assert disk.read(30 * 512, 1024) == b"x" * 512 + bytes(512)
    disk.flush()
    assert states(file) == 1 << 63 | 0x7FFF_FFFF


# -- the host's space for clusters written in part -------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}])
def test_a_cluster_written_in_part_has_its_whole_space_on_the_host(tmp_path, options) -> None:
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, 1 << 20, **options) as disk:
        disk.flush()
        before = path.stat()
        disk.write(65536 + 700, b"x" * 512)
        disk.write(3 << 16, b"y" * 70_000)
        host = disk.block_status(65536 + 700, 512).host_offset
    after = path.stat()
    filled = 2048 if options else 3 * 65536  # a subcluster, or all that was written to
    assert after.st_size >= (host & -65536) + filled
    assert (after.st_blocks - before.st_blocks) * 512 >= filled
    with pyvirtio.open_disk(path, read_only=True) as disk:
        assert disk.check().clean


def test_no_space_for_the_rest_of_a_cluster_fails_the_write_and_leaks_nothing(tmp_path) -> None:
    path = tmp_path / "a.qcow2"
    pyvirtio.create_disk(path, 1 << 20).close()
    rule = "file.inject-error.0."
    options = {"driver": "qcow2", "file.driver": "blkdebug", "file.image.filename": str(path)}
    options |= {f"{rule}event": "cluster_alloc_space", f"{rule}errno": "28", f"{rule}once": "on"}
    with open_node(Context(Graph()), None, options) as disk:
        with pytest.raises(BackendError) as caught:
            disk.write(512, b"x" * 512)
        assert caught.value.errno == errno.ENOSPC
    with pyvirtio.open_disk(path, read_only=True) as disk:
        assert disk.check().clean


def image_with_free_header() -> MemoryDisk:
    file, disk = new_image()
    disk.write(0, b"x" * CLUSTER)
    disk.close()
    poke(file, number_at(file, number_at(file, 48)), 0, 2)
    return file


def test_an_l2_table_that_would_take_the_header_is_named() -> None:
    with (
        reopen(image_with_free_header()) as found,
        pytest.raises(ImageError, match=r"invalid allocation of L2 table at offset 0$"),
    ):
        found.write(64 * CLUSTER, b"x" * CLUSTER)


def test_a_compressed_cluster_that_would_take_the_header_is_named() -> None:
    with (
        reopen(image_with_free_header()) as found,
        pytest.raises(ImageError, match=r"invalid allocation of compressed cluster at offset 0$"),
    ):
        found.write_compressed(CLUSTER, [b"x" * CLUSTER])


def test_a_large_write_passes_small_gaps_by_and_a_small_one_after_a_free_fills_them() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 10 * CLUSTER)
    start = disk.block_status(0, CLUSTER).host_offset
    assert start is not None
    disk.discard(0, 2 * CLUSTER)
    disk.flush()
    disk.write(20 * CLUSTER, b"y" * 4 * CLUSTER)
    assert disk.block_status(20 * CLUSTER, CLUSTER).host_offset == start + 10 * CLUSTER
    disk.discard(2 * CLUSTER, CLUSTER)
    disk.flush()
    disk.write(30 * CLUSTER, b"z" * CLUSTER)
    assert disk.block_status(30 * CLUSTER, CLUSTER).host_offset == start + 2 * CLUSTER
    assert file.size <= start + 14 * CLUSTER


def test_a_new_refcount_block_lies_behind_the_clusters_that_needed_it() -> None:
    disk = pyvirtio.create_disk(MemoryDisk(growable=True), 1 << 20, cluster_size=CLUSTER)
    for i in range(300):
        disk.write(i * 3 * CLUSTER, b"x" * 3 * CLUSTER)
    disk.flush()
    refcounts = disk._metadata.refcounts
    for block in range(1, len([entry for entry in refcounts.table if entry])):
        first = block << 8
        place = refcounts.block_offset(block) // CLUSTER
        assert first < place < first + 4
        assert refcounts.get(place) == 1
    found = disk.check()
    assert (found.corruptions, found.leaks) == (0, 0)


def test_much_that_was_discarded_is_used_again_without_a_flush_of_the_guests() -> None:
    size = 32 << 20
    file, disk = new_image(size, cluster_size=65536)
    disk.write(0, b"x" * size)
    before = file.size
    disk.discard(0, size // 2)
    disk.write(0, b"y" * (size // 2))
    assert file.size < before + (1 << 20)
    assert disk.read(size // 2 - 10, 20) == b"y" * 10 + b"x" * 10
    disk.flush()
    assert disk.check().clean
