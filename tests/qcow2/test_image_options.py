"""Creating, opening, and what an image says of itself."""

from __future__ import annotations

from typing import Any

import pytest

import pyvirtio
from pyvirtio import ImageError, UnsupportedError
from support.images import assert_clean, copy_of, new_image, number_at, poke, reopen


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compat": "2.0"}, "Parameter 'version' does not accept value '2.0'"),
        ({"cluster_size": 256}, "Cluster size must be a power of two"),
        ({"cluster_size": 4 << 20}, "Cluster size must be a power of two"),
        ({"cluster_size": 1000}, "Cluster size must be a power of two"),
        ({"refcount_bits": 3}, "Refcount width must be a power of two"),
        ({"refcount_bits": 128}, "Refcount width must be a power of two"),
        ({"refcount_bits": 8, "compat": "0.10"}, "Different refcount widths"),
        ({"lazy_refcounts": True, "compat": "0.10"}, "Lazy refcounts only"),
        ({"extended_l2": True, "compat": "0.10", "cluster_size": 65536}, "Extended L2 entries"),
        ({"extended_l2": True, "cluster_size": 8192}, "at least 16384"),
        ({"backing_fmt": "raw"}, "without backing file"),
        ({"backing_file": "x" * 1024, "cluster_size": 65536}, "Backing file name too long"),
        ({"backing_file": "x", "backing_fmt": "y" * 16}, "Backing format name too long"),
    ],
)
def test_an_option_qemu_refuses_is_refused_in_its_words(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        new_image(**options)


def test_a_size_that_is_no_number_of_sectors_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 512"):
        new_image(1000)


@pytest.mark.parametrize("width", [1, 16, 64])
@pytest.mark.parametrize("size", [0, 512, 1 << 20, 64 << 20, 4 << 30])
def test_an_empty_image_is_clean(size: int, width: int) -> None:
    """The largest here need several refcount blocks for the L1 table."""
    file, disk = new_image(size, refcount_bits=width)
    disk.close()
    assert_clean(file)
    with reopen(file) as found:
        assert found.size == size


def test_images_of_every_length_of_l1_table_are_clean() -> None:
    """So that some need just one refcount block more for the blocks themselves."""
    for clusters in (*range(1, 4), *range(50, 70), *range(110, 135)):
        file, disk = new_image(clusters * 64 * 32768, refcount_bits=64)
        disk.write(0, b"x" * 40_000)  # a leak past the end of the file would be none
        disk.close()
        assert_clean(file)


def test_an_image_says_what_it_is() -> None:
    _, disk = new_image(cluster_size=16384, extended_l2=True, refcount_bits=8, lazy_refcounts=True)
    info = disk.info()
    assert (info.format, info.virtual_size, info.cluster_size) == ("qcow2", 1 << 16, 16384)
    assert {
        "compat": "1.1",
        "lazy-refcounts": True,
        "refcount-bits": 8,
        "corrupt": False,
        "extended-l2": True,
    }.items() <= info.specific.items()
    assert new_image(compat="0.10")[1].info().specific["compat"] == "0.10"


def test_requests_are_aligned_to_clusters_and_subclusters() -> None:
    _, disk = new_image(cluster_size=16384, extended_l2=True)
    assert disk.limits.write_zeroes_alignment == 512
    assert disk.limits.discard_alignment == 16384
    _, disk = new_image(cluster_size=16384)
    assert disk.limits.write_zeroes_alignment == 16384


def test_an_image_marked_corrupt_is_read_and_not_written() -> None:
    file, disk = new_image()
    disk.write(0, b"x")
    disk.close()
    poke(file, 72, 2)
    with reopen(file, read_only=True) as found:
        assert found.read(0, 1) == b"x"
    with pytest.raises(ImageError, match="corrupt"):
        reopen(file)


def test_unknown_autoclear_bits_are_cleared_by_a_writer_only() -> None:
    file, disk = new_image()
    disk.close()
    poke(file, 88, 1 << 50)
    looked_at = copy_of(file)
    pyvirtio.open_disk(looked_at, format="qcow2", read_only=True).close()
    assert number_at(looked_at, 88) == 1 << 50
    pyvirtio.open_disk(file, format="qcow2").close()
    assert number_at(file, 88) == 0


def test_zeroes_need_version_3() -> None:
    """Or that there is no backing file: then what is unallocated reads as zeroes."""
    _, disk = new_image(compat="0.10", backing_file="base", backing_fmt="raw")
    disk.write(0, b"x" * 1024)
    with pytest.raises(UnsupportedError):
        disk.write_zeroes(0, 512, fallback=False)
    disk.write_zeroes(0, 512)
    assert disk.read(0, 1024) == bytes(512) + b"x" * 512


def test_what_was_written_is_there_after_a_close_without_a_flush() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 4096)
    disk.close()
    with reopen(file) as found:
        assert found.read(0, 4096) == b"x" * 4096
    with pytest.raises(ValueError, match="closed"):
        disk.read(0, 1)
