"""Zeroes for a part of a cluster: all of it becomes a zero cluster where the rest is zeroes."""

from __future__ import annotations

from threading import Thread

import pytest

import pyvirtio
from pyvirtio import Disk, MemoryDisk
from pyvirtio.qcow2 import Qcow2Disk
from support.encrypted import open_blank
from support.images import as_qcow2, l2_entry_at, new_image, number_at

CLUSTER = 4096


def image(base: bytes | None = None, **options: object) -> tuple[MemoryDisk, Qcow2Disk]:
    """Four clusters, over a raw backing file that holds ``base``."""
    if base is not None:
        below = MemoryDisk(bytearray(base))
        return over(below, "raw", CLUSTER, **options)
    return new_image(4 * CLUSTER, cluster_size=CLUSTER, **options)


def over(below: Disk, fmt: str, size: int, **options: object) -> tuple[MemoryDisk, Qcow2Disk]:
    """Four clusters of ``size`` bytes over a backing file."""
    named = {"backing_file": "base", "backing_fmt": fmt}
    file, disk = new_image(4 * CLUSTER, cluster_size=size, **named, **options)
    disk.close()
    return file, as_qcow2(pyvirtio.open_disk(file, format="qcow2", backing=lambda _: below))


def finish(disk: Qcow2Disk) -> None:
    disk.flush()
    found = disk.check()
    assert found.clean, found.messages
    disk.close()


def kinds(disk: Qcow2Disk) -> list[str]:
    """What each cluster is in this layer."""
    found = []
    for at in range(0, disk.size, CLUSTER):
        extent = disk.block_status(at, CLUSTER)
        own = extent.allocated and not extent.depth
        found.append("data" if own and extent.data else "zero" if own else "nothing")
    return found


def test_nothing_is_stored_where_nothing_was() -> None:
    file, disk = image()
    disk.write_zeroes(CLUSTER + 100, 2 * CLUSTER)
    disk.flush()
    assert kinds(disk) == ["nothing", "zero", "zero", "zero"]
    assert number_at(file, l2_entry_at(file, 1, CLUSTER)) == 1
    finish(disk)


def test_a_zero_cluster_keeps_its_host_cluster() -> None:
    file, disk = image()
    disk.write(0, b"x" * CLUSTER)
    disk.write_zeroes(0, CLUSTER)
    disk.flush()
    entry = number_at(file, l2_entry_at(file, 0, CLUSTER))
    disk.write_zeroes(100, 1000)
    disk.flush()
    assert number_at(file, l2_entry_at(file, 0, CLUSTER)) == entry
    disk.write_zeroes(100, 1000, unmap=True)
    disk.flush()
    assert number_at(file, l2_entry_at(file, 0, CLUSTER)) == 1
    finish(disk)


def test_stored_data_are_overwritten() -> None:
    _, disk = image()
    disk.write(0, b"x" * CLUSTER)
    disk.write_zeroes(100, 1000)
    assert kinds(disk)[0] == "data"
    assert disk.read(0, CLUSTER) == b"x" * 100 + bytes(1000) + b"x" * (CLUSTER - 1100)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (b"x" * 100, "zero"),  # what is left of the backing file's data is zeroed
        (b"x" * 101, "data"),
        (bytes(50) + b"x" * 50, "zero"),
        (bytes(5000) + b"x", "data"),  # the backing file does not know of its zeroes
    ],
)
def test_the_backing_file_decides_where_nothing_is_stored(base: bytes, expected: str) -> None:
    _, disk = image(base)
    wanted = base.ljust(disk.size, b"\0")[: disk.size]
    for at, length in ((0, 100), (100, 900)):
        disk.write_zeroes(at, length)
        wanted = wanted[:at] + bytes(length) + wanted[at + length :]
    assert disk.read(0, disk.size) == wanted
    assert kinds(disk)[0] == expected
    finish(disk)


def test_zeroes_of_a_layer_below_count_piece_by_piece() -> None:
    middle = image(b"y" * 512)[1]
    middle.write_zeroes(0, CLUSTER)
    middle.truncate(CLUSTER + 512, shrink=True)
    _, disk = over(middle, "qcow2", 2 * CLUSTER)
    disk.write_zeroes(1000, 100)  # a zero cluster, an unallocated one, and the end of the layer
    assert disk.block_status(0, 2 * CLUSTER).depth == 0
    assert not disk.block_status(0, 2 * CLUSTER).data
    finish(disk)


def test_data_behind_zeroes_of_a_layer_below_are_kept() -> None:
    middle = image()[1]
    middle.write_zeroes(0, CLUSTER)
    middle.write(CLUSTER, b"m" * CLUSTER)
    _, disk = over(middle, "qcow2", 2 * CLUSTER)
    disk.write_zeroes(1000, 100)
    assert disk.read(0, 2 * CLUSTER) == bytes(CLUSTER) + b"m" * CLUSTER
    finish(disk)


def test_without_zero_clusters_nothing_is_done_where_nothing_is() -> None:
    _, disk = image(compat="0.10")
    disk.write_zeroes(100, 2 * CLUSTER)
    assert kinds(disk) == ["nothing"] * 4
    finish(disk)


def test_without_zero_clusters_zeroes_hide_a_backing_file() -> None:
    _, disk = image(b"x" * 100, compat="0.10")
    disk.write_zeroes(0, 100)
    assert not any(disk.read(0, CLUSTER))


def test_a_subcluster_is_enough() -> None:
    _, disk = new_image(1 << 16, cluster_size=16384, extended_l2=True)
    disk.write(0, b"x" * 512)
    disk.write_zeroes(600, 100)
    disk.write_zeroes(100, 100)
    assert disk.read(0, 1024) == b"x" * 100 + bytes(100) + b"x" * 312 + bytes(512)
    assert [(e.length, e.data, e.zero and e.allocated) for e in disk.extents(0, 1536)] == [
        (512, True, False),
        (512, False, True),
        (512, False, False),
    ]


@pytest.mark.parametrize("where", ["around", "inside"])
def test_a_write_that_comes_in_between_is_kept(where: str) -> None:
    """Between looking at what lies around the part and changing the mapping."""
    _, disk = image(b"")
    is_zero = disk.reader.is_zero
    at, length = (0, 100) if where == "around" else (150, 20)

    def overtaken(*arguments: int) -> bool:
        disk.reader.is_zero = is_zero
        zero = is_zero(*arguments)
        thread = Thread(target=lambda: disk.write(at, b"w" * length))
        thread.start()
        thread.join()
        return zero

    disk.reader.is_zero = overtaken
    disk.write_zeroes(100, 1000)
    expected = bytearray(CLUSTER)
    if where == "around":
        expected[at : at + length] = b"w" * length
    assert disk.read(0, CLUSTER) == expected
    finish(disk)


def test_a_zero_cluster_that_is_filled_in_between_keeps_its_data() -> None:
    _, disk = image(b"z" * CLUSTER)
    disk.write(0, b"x" * CLUSTER)
    disk.write_zeroes(0, CLUSTER)  # with a host cluster, which a write fills again
    is_zero = disk.reader.is_zero

    def overtaken(*arguments: int) -> bool:
        disk.reader.is_zero = is_zero
        thread = Thread(target=lambda: disk.write(2000, b"w" * 10))
        thread.start()
        thread.join()
        return is_zero(*arguments)

    disk.reader.is_zero = overtaken
    disk.write_zeroes(100, 1000)
    assert disk.read(0, CLUSTER) == bytes(2000) + b"w" * 10 + bytes(CLUSTER - 2010)
    finish(disk)


def test_bitmaps_hear_of_it() -> None:
    _, disk = image()
    disk.bitmaps.add("b", granularity=512)
    disk.write_zeroes(CLUSTER + 100, 1000)
    assert list(disk.bitmaps["b"].dirty()) == [(CLUSTER, 1536)]


def test_an_encrypted_image_stores_nothing_either() -> None:
    disk = as_qcow2(open_blank("luks", 4 * CLUSTER, cluster_size=CLUSTER))
    disk.write_zeroes(512, 1024)
    assert kinds(disk)[0] == "zero"
    assert not any(disk.read(0, CLUSTER))
    disk.close()
