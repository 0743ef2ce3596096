"""Resizing: sizes and layouts as qemu-img's, what shows afterwards, and what is refused."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import BackendError, MemoryDisk, UnsupportedError
from support.images import as_qcow2, new_image, poke, reopen
from support.peers import requires
from support.qemu import qemu_check, qemu_create, qemu_img, qemu_read

SIZE = 3 << 20
LAYOUTS = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "refcount_bits": 64},
    {"cluster_size": 65536},
    {"cluster_size": 16384, "extended_l2": True},
]


def make(size: int = 1 << 20, **options: Any) -> Any:
    return pyvirtio.create_disk(MemoryDisk(growable=True), size, **options)


def clean(disk: Any) -> bool:
    return bool(disk.check().clean)


@requires("qemu-img")
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_preallocated_image_is_as_long_as_qemus(
    tmp_path: Path, layout: dict[str, Any], mode: str
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    pyvirtio.create_disk(ours, SIZE, preallocation=mode, **layout).close()
    named = {key: "on" if value is True else value for key, value in layout.items()}
    qemu_create(theirs, SIZE, preallocation=mode, **named)
    qemu_check(ours)
    assert ours.stat().st_size == theirs.stat().st_size
    assert qemu_read(ours, tmp_path) == bytes(SIZE)
    if mode != "metadata":
        assert ours.stat().st_blocks * 512 >= SIZE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_preallocated_clusters_are_written_in_place(layout: dict[str, Any]) -> None:
    file = MemoryDisk(growable=True)
    with pyvirtio.create_disk(file, SIZE, preallocation="metadata", **layout) as disk:
        length = file.size
        disk.write(0, b"x" * SIZE)
        assert file.size == length
        assert clean(disk)


@requires("qemu-img")
@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_growing_with_a_snapshot_shows_zeroes(
    tmp_path: Path, layout: dict[str, Any], mode: str
) -> None:
    path = tmp_path / "disk"
    with pyvirtio.create_disk(path, 1 << 20, **layout) as disk:
        disk.write(0, b"a" * (1 << 20))
        disk.snapshots.create("one")
        disk.truncate(SIZE + 512, preallocation=mode)
        assert disk.read(1 << 20, SIZE + 512 - (1 << 20)) == bytes(SIZE + 512 - (1 << 20))
        disk.snapshots.apply("one")
        assert disk.size == 1 << 20
    qemu_check(path)
    assert qemu_read(path, tmp_path) == b"a" * (1 << 20)


@pytest.mark.parametrize("mode", ["off", "metadata"])
@pytest.mark.parametrize("layout", [*LAYOUTS, {"cluster_size": 4096, "compat": "0.10"}])
def test_growing_hides_a_longer_backing_file(
    tmp_path: Path, layout: dict[str, Any], mode: str
) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * SIZE)
    options = {"backing_file": str(base), "backing_fmt": "raw", **layout}
    with pyvirtio.create_disk(tmp_path / "disk", 700 * 1024 + 512, **options) as disk:
        disk.truncate(SIZE + 1024, preallocation=mode)
        assert disk.read(0, 700 * 1024 + 512) == b"b" * (700 * 1024 + 512)
        rest = disk.size - 700 * 1024 - 512
        assert disk.read(700 * 1024 + 512, rest) == bytes(rest)
        assert clean(disk)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_cut_off_does_not_come_back(layout: dict[str, Any]) -> None:
    with make(SIZE, **layout) as disk:
        disk.write(0, b"x" * SIZE)
        disk.truncate(512 * 1001, shrink=True)
        assert clean(disk)
        disk.truncate(SIZE)
        assert disk.read(0, 512 * 1001) == b"x" * 512 * 1001
        assert disk.read(512 * 1001, SIZE - 512 * 1001) == bytes(SIZE - 512 * 1001)
        assert clean(disk)


def test_what_a_cluster_has_behind_the_end_does_not_show() -> None:
    """As where another program has shrunk the disk."""
    file, disk = new_image(4096, cluster_size=4096)
    disk.write(0, b"x" * 4096)
    disk.close()
    poke(file, 24, 1024)
    with reopen(file) as disk:
        disk.truncate(8192)
        assert disk.read(0, 8192) == b"x" * 1024 + bytes(7168)
        assert disk.check().clean


def test_zeroes_behind_the_end_are_not_stored_again() -> None:
    _, disk = new_image(8704, cluster_size=65536, extended_l2=True)
    disk.write(0, b"x" * 1024)
    disk.write(8192, b"y" * 512)
    disk.snapshots.create("s")
    disk.truncate(131072)
    assert [extent.length for extent in disk.extents() if extent.data] == [2048, 2048]


def test_growing_hides_a_longer_backing_file_by_subclusters() -> None:
    below = MemoryDisk(bytearray(b"b" * 131072))
    named = {"backing_file": "b", "backing_fmt": "raw"}
    file, disk = new_image(8704, cluster_size=65536, extended_l2=True, **named)
    disk.close()
    disk = pyvirtio.open_disk(file, format="qcow2", backing=lambda reference: below)
    disk.write(0, b"x" * 512)
    disk.truncate(131072)
    assert disk.read(0, 131072) == b"x" * 512 + b"b" * 8192 + bytes(131072 - 8704)
    assert [e.length for e in disk.extents() if e.data and not e.depth] == [2048, 2048]
    assert disk.check().clean


def test_what_is_hidden_for_growing_is_no_write_for_bitmaps() -> None:
    below = MemoryDisk(bytearray(b"b" * 8192))
    file, disk = new_image(1024, cluster_size=512, backing_file="b", backing_fmt="raw")
    disk.close()
    disk = as_qcow2(pyvirtio.open_disk(file, format="qcow2", backing=lambda reference: below))
    disk.bitmaps.add("m", granularity=4096)
    disk.truncate(8192)
    assert disk.bitmaps["m"].count == 0


def test_shrinking_cuts_the_file() -> None:
    file = MemoryDisk(growable=True)
    with pyvirtio.create_disk(file, SIZE, preallocation="metadata") as disk:
        disk.truncate(65536, shrink=True)
        # header, refcount table and block, L1 table, L2 table, one cluster
        assert file.size == 6 * 65536


def test_shrinking_keeps_what_a_snapshot_has() -> None:
    with make(SIZE, cluster_size=4096) as disk:
        disk.write(0, b"x" * SIZE)
        disk.snapshots.create("one")
        disk.truncate(512, shrink=True)
        assert clean(disk)
        disk.snapshots.apply("one")
        assert disk.read(0, disk.size) == b"x" * SIZE


def test_shrinking_drops_refcount_blocks_that_count_nothing() -> None:
    with make(4 << 20, cluster_size=512) as disk:
        disk.write(0, b"x" * disk.size)
        before = sum(map(bool, disk._metadata.refcounts.table))
        disk.truncate(512, shrink=True)
        assert sum(map(bool, disk._metadata.refcounts.table)) < before
        assert clean(disk)
        disk.truncate(1 << 20)
        disk.write(0, b"y" * disk.size)
        assert clean(disk)


@requires("qemu-img")
def test_qemu_resizes_what_we_resized(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with pyvirtio.create_disk(path, 1 << 20, cluster_size=4096) as disk:
        disk.write(0, b"x" * (1 << 20))
        disk.truncate(SIZE, preallocation="metadata")
    qemu_img("resize", "-q", "-f", "qcow2", "--shrink", path, 600 * 1024)
    with pyvirtio.open_disk(path) as disk:
        assert disk.read(0, disk.size) == b"x" * 600 * 1024
        disk.truncate(SIZE)
    qemu_check(path)


def test_small_clusters_need_an_l1_table_of_many() -> None:
    with make(1 << 20, cluster_size=512) as disk:
        disk.truncate(3 << 30)
        disk.write((3 << 30) - 5, b"there")
        assert disk.read((3 << 30) - 5, 5) == b"there"
        assert clean(disk)


# -- refusals --------------------------------------------------------------------------------------


def test_a_size_of_half_a_sector_is_refused() -> None:
    with make() as disk, pytest.raises(ValueError, match="The new size must be a multiple of 512"):
        disk.truncate((1 << 20) + 100)


def test_preallocation_when_shrinking_is_refused() -> None:
    text = "Preallocation can't be used for shrinking an image"
    with make() as disk, pytest.raises(ValueError, match=text):
        disk.truncate(512, preallocation="metadata", shrink=True)


def test_an_unknown_mode_is_refused() -> None:
    with make() as disk, pytest.raises(UnsupportedError, match="does not accept value 'some'"):
        disk.truncate(2 << 20, preallocation="some")


@pytest.mark.parametrize("size", [512, 2 << 20])
def test_version_2_with_snapshots_is_not_resized(size: int) -> None:
    with make(compat="0.10") as disk:
        disk.snapshots.create("one")
        with pytest.raises(UnsupportedError, match="Can't resize a v2 image which has snapshots"):
            disk.truncate(size, shrink=True)


def test_an_l1_table_beyond_qemus_limit_is_refused() -> None:
    with make(cluster_size=512) as disk:
        with pytest.raises(BackendError, match="Failed to grow the L1 table") as caught:
            disk.truncate(1 << 40)
        assert caught.value.errno == errno.EFBIG
        assert disk.size == 1 << 20


def test_preallocation_over_a_backing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(512))
    with pytest.raises(ValueError, match="can only be used at the same time if extended_l2"):
        pyvirtio.create_disk(
            tmp_path / "disk", 512, backing_file="base", backing_fmt="raw", preallocation="metadata"
        )


def test_a_host_without_room_leaves_the_old_size(tmp_path: Path) -> None:
    class Full(MemoryDisk):
        def _truncate(self, size: int, preallocation: str) -> None:
            if size > 2 << 20:
                raise BackendError(errno.ENOSPC, "full")
            super()._truncate(size, preallocation)

    with pyvirtio.create_disk(Full(growable=True), 1 << 20, cluster_size=4096) as disk:
        disk.write(0, b"x" * 5000)
        with pytest.raises(BackendError, match="full"):
            disk.truncate(8 << 20, preallocation="metadata")
        assert disk.size == 1 << 20
        assert clean(disk)
        disk.truncate(2 << 20)
        assert disk.read(0, 5000) == b"x" * 5000
        assert clean(disk)


@pytest.mark.parametrize("below", [0, 60_000, 100_000, 110_000])
def test_preallocated_growth_maps_the_cluster_with_the_old_end(below: int) -> None:
    old, size = 100_352, 131_072  # the old end lies within the second cluster
    base = MemoryDisk(bytearray(b"b" * below)) if below else None
    file = MemoryDisk(growable=True)
    names = {"backing_file": "b", "backing_fmt": "raw"} if below else {}
    disk = pyvirtio.create_disk(file, old, backing=lambda reference: base, **names)
    with disk:
        disk.truncate(size, preallocation="metadata")
        length = file.size
        found = disk.block_status(old, size - old)
        assert found.host_offset is not None
        assert disk.read(0, size) == (b"b" * min(below, old)).ljust(size, b"\0")
        disk.write(old, b"x" * (size - old))
        assert file.size == length
        assert clean(disk)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_growth_reserves_the_rest_of_a_preallocated_cluster(tmp_path: Path, mode: str) -> None:
    old, size = 100_352, 131_072
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, old, preallocation="metadata") as disk:
        disk.write(0, b"x" * old)
        disk.truncate(size, preallocation=mode)
        disk.flush()
        before = path.stat().st_blocks
        disk.write(old, b"y" * (size - old))
        disk.flush()
        assert path.stat().st_blocks - before < 32  # some for the tree of extents
        assert clean(disk)


@pytest.mark.parametrize("what", ["a snapshot is applied", "VM state is written"])
def test_growing_is_refused_if_something_else_changes_the_disk_meanwhile(what: str) -> None:
    base = MemoryDisk(bytearray(b"b" * (4 << 20)))
    file, disk = new_image(1 << 20, backing_file="b", backing_fmt="raw", backing=lambda _: base)
    disk.snapshots.create("small")
    disk.truncate(2 << 20)
    hide = disk._zero_past_end

    def meanwhile(offset: int, length: int) -> None:
        if what == "a snapshot is applied":
            disk.snapshots.apply("small")
        else:
            disk.vmstate.write(0, b"s" * 600)
        hide(offset, length)

    disk._zero_past_end = meanwhile  # type: ignore[method-assign]
    with pytest.raises(BackendError) as caught:
        disk.truncate(3 << 20)
    assert caught.value.errno in (errno.EBUSY, errno.EIO)
    disk._zero_past_end = hide  # type: ignore[method-assign]
    size = disk.size
    disk.close()
    with reopen(file, backing=lambda _: base) as again:
        assert again.size == size
        again.truncate(3 << 20)
        assert not any(again.read(size, again.size - size))
        assert again.check().clean


def test_sizes_that_two_threads_ask_for_are_set_one_after_the_other() -> None:
    base = MemoryDisk(bytearray(b"b" * (4 << 20)))
    _, disk = new_image(1 << 20, backing_file="b", backing_fmt="raw", backing=lambda _: base)
    hide = disk._zero_past_end
    other = threading.Thread(target=disk.truncate, args=(2 << 20,), kwargs={"shrink": True})

    def meanwhile(offset: int, length: int) -> None:
        if other.ident is None:
            other.start()
            other.join(0.1)
        hide(offset, length)

    disk._zero_past_end = meanwhile  # type: ignore[method-assign]
    disk.truncate(3 << 20)
    other.join(60)
    assert disk.size == 2 << 20
    assert not any(disk.read(1 << 20, 1 << 20))
    assert clean(disk)
    disk.close()


def test_a_disk_that_became_smaller_meanwhile_is_not_shrunk_to_more() -> None:
    file, disk = new_image(1 << 20)
    disk.snapshots.create("small")
    disk.truncate(8 << 20)
    metadata, exclusive = disk._metadata, disk._metadata.exclusive

    def late() -> Any:
        metadata.exclusive = exclusive  # type: ignore[method-assign]
        disk.snapshots.apply("small")
        return exclusive()

    metadata.exclusive = late  # type: ignore[method-assign, assignment]
    with pytest.raises(BackendError) as caught:
        disk.truncate(4 << 20, shrink=True)
    assert caught.value.errno == errno.EBUSY
    disk.close()
    with reopen(file) as again:
        assert again.size == 1 << 20
