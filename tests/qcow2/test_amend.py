"""Amending images: every option, read by QEMU afterwards, and QEMU's refusals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import ImageError, MemoryDisk, UnsupportedError
from support.peers import requires
from support.qemu import qemu_check, qemu_img, qemu_img_json, qemu_read

SIZE = 1 << 20


def make(**options: Any) -> Any:
    return pyvirtio.create_disk(MemoryDisk(growable=True), SIZE, **options)


def worn(disk: Any) -> None:
    """Shared clusters, zero clusters of both kinds, in the disk and in snapshots."""
    chance = random.Random(2)
    for turn in range(24):
        start = chance.randrange(SIZE * 3 // 4)
        disk.write(start, chance.randbytes(chance.randrange(60_000)))
        if turn in (8, 16):
            disk.snapshots.create(f"at {turn}")
        disk.write_zeroes(start // 2, chance.randrange(100_000), unmap=bool(turn & 1))


def contents(disk: Any) -> list[bytes]:
    """Of the disk and of each snapshot."""
    found = [disk.read(0, disk.size)]
    for snapshot in disk.snapshots:
        with disk.snapshots.open(snapshot) as view:
            found.append(view.read(0, view.size))
    return found


@requires("qemu-img")
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_every_refcount_width_counts_the_same(tmp_path: Path, cluster_size: int) -> None:
    path = tmp_path / "disk"
    with pyvirtio.create_disk(path, SIZE, cluster_size=cluster_size) as disk:
        worn(disk)
        before = contents(disk)
        for bits in (64, 2, 8, 4, 32, 16):
            heard: list[tuple[int, int]] = []
            disk.amend(refcount_bits=bits, progress=lambda *step, heard=heard: heard.append(step))
            assert heard[-1][0] == heard[-1][1] > 0
            assert disk.info().specific["refcount-bits"] == bits
            assert disk.check().clean
            disk.write(0, before[0][:9000])
        assert contents(disk) == before
    qemu_check(path)
    assert qemu_read(path, tmp_path) == before[0]


def test_a_width_that_is_too_small_is_refused() -> None:
    with make(cluster_size=512) as disk:
        worn(disk)
        text = r"Cannot decrease refcount entry width to 1 bits: Cluster at offset 0x\w+ has a"
        with pytest.raises(ImageError, match=text):
            disk.amend(refcount_bits=1)
        assert disk.check().clean


@requires("qemu-img")
@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("backed", [False, True])
def test_downgrade_and_upgrade_keep_what_is_read(
    tmp_path: Path, cluster_size: int, backed: bool
) -> None:
    path = tmp_path / "disk"
    options: dict[str, Any] = {"cluster_size": cluster_size, "lazy_refcounts": True}
    if backed:
        (tmp_path / "base").write_bytes(b"b" * SIZE)
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    with pyvirtio.create_disk(path, SIZE, **options) as disk:
        worn(disk)
        before = contents(disk)
        disk.amend(compat="0.10")
        assert disk.info().specific["compat"] == "0.10"
        assert contents(disk) == before
        assert disk.check().clean
    qemu_check(path)
    assert qemu_read(path, tmp_path) == before[0]
    assert qemu_img_json("info", path)["format-specific"]["data"]["compat"] == "0.10"
    with pyvirtio.open_disk(path) as disk:
        assert contents(disk) == before
        disk.amend(compat="1.1", lazy_refcounts=True, refcount_bits=32)
        disk.write_zeroes(0, 65536)
        assert disk.check().clean
    qemu_check(path)
    assert qemu_img_json("info", path)["format-specific"]["data"]["lazy-refcounts"]


def after_a_cut(below: MemoryDisk) -> Any:
    """What check says of the file as it is at this moment."""
    copy = MemoryDisk(growable=True)
    copy.write(0, below.read(0, below.size))
    with pyvirtio.open_disk(copy, format="qcow2", read_only=True) as disk:
        return disk.check()


def test_lazy_refcounts_are_in_the_file_before_a_downgrade_gives_up_the_dirty_bit() -> None:
    below = MemoryDisk(growable=True)
    with pyvirtio.create_disk(below, SIZE, lazy_refcounts=True, cluster_size=4096) as disk:
        disk.write(0, b"d" * 300_000)
        disk.flush()
        disk.amend(compat="0.10")
        assert not after_a_cut(below).corruptions
        disk.write(500_000, b"e" * 300_000)
        disk.flush()
        assert not after_a_cut(below).corruptions


def test_a_downgraded_image_has_no_lazy_refcounts_after_it_was_reopened() -> None:
    below = MemoryDisk(growable=True)
    below.reopen = lambda *, read_only: None  # type: ignore[method-assign]
    with pyvirtio.create_disk(below, SIZE, lazy_refcounts=True, cluster_size=4096) as disk:
        disk.amend(compat="0.10")
        disk.reopen(read_only=True)
        disk.reopen(read_only=False)
        disk.write(0, b"d" * 300_000)
        disk.flush()
        assert not after_a_cut(below).corruptions


@requires("qemu-img")
def test_qemu_downgrades_what_we_wrote_and_we_read_it(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with pyvirtio.create_disk(path, SIZE, cluster_size=4096) as disk:
        worn(disk)
        for snapshot in disk.snapshots:  # QEMU 7.2 sets wrong COPIED flags where they share
            disk.snapshots.delete(snapshot)
        before = disk.read(0, SIZE)
    qemu_img("amend", "-f", "qcow2", "-o", "compat=0.10", path)
    with pyvirtio.open_disk(path) as disk:
        assert disk.read(0, SIZE) == before
        assert disk.check().clean


def test_the_size_is_amended() -> None:
    with make() as disk:
        disk.amend(size=SIZE * 2)
        assert disk.size == SIZE * 2
        disk.amend(size=SIZE // 2)
        assert disk.size == SIZE // 2


def test_the_backing_file_is_amended(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(512))
    options = {"backing_file": "base", "backing_fmt": "raw"}
    with pyvirtio.create_disk(tmp_path / "disk", SIZE, **options) as disk:
        disk.amend(backing_file="other")
        assert disk.info().backing_filename == "other"
        assert disk.info().backing_format == "raw"
        disk.amend(backing_file="")
        assert disk.info().backing_filename is None


@pytest.mark.parametrize(
    ("made", "options", "text"),
    [
        ({}, {"cluster_size": 4096}, "Invalid parameter 'cluster_size'.*only supported for image"),
        ({}, {"nonsense": 1}, "Invalid parameter 'nonsense'$"),
        ({}, {"compat": "0.7"}, "Unknown compatibility level 0.7"),
        ({}, {"refcount_bits": 3}, "Refcount width must be a power of two"),
        ({}, {"compat": "0.10", "refcount_bits": 8}, "Refcount widths other than 16 bits require"),
        ({}, {"compat": "0.10", "lazy_refcounts": True}, "Lazy refcounts only supported"),
        ({"compat": "0.10"}, {"lazy_refcounts": True}, "Lazy refcounts only supported"),
        ({"refcount_bits": 8}, {"compat": "0.10"}, "compat=0.10 requires refcount_bits=16"),
        ({"extended_l2": True}, {"compat": "0.10"}, "incompatible features 0x10 set"),
        ({}, {"data_file_raw": True}, "data-file-raw cannot be set on existing images"),
    ],
)
def test_refusals(made: dict[str, Any], options: dict[str, Any], text: str) -> None:
    with make(**made) as disk, pytest.raises(ValueError, match=text):
        disk.amend(**options)


def test_snapshots_of_another_size_prevent_a_downgrade() -> None:
    with make() as disk:
        disk.snapshots.create("one")
        disk.truncate(2 * SIZE)
        with pytest.raises(UnsupportedError, match="Internal snapshots prevent downgrade"):
            disk.amend(compat="0.10")
