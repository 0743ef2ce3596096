"""What a check finds, and how it counts it."""

from __future__ import annotations

import pytest

from pyvirtio import MemoryDisk, open_disk
from pyvirtio.backend.filter import FilterDisk
from pyvirtio.qcow2 import CheckResult
from support.images import checked, l2_entry_at, new_image, number_at, poke, with_compressed

CLUSTER = 512
COPIED = 1 << 63


def image(clusters: int = 4) -> MemoryDisk:
    file, disk = new_image()
    disk.write(0, b"x" * clusters * CLUSTER)
    disk.close()
    return file


def refcount_at(file: MemoryDisk, cluster: int) -> int:
    """Where the refcount of a host cluster stands (one block, 16 bits)."""
    return number_at(file, number_at(file, 48)) + 2 * cluster


def counts(found: CheckResult) -> tuple[int, int, int]:
    return found.corruptions, found.leaks, found.check_errors


def host(file: MemoryDisk, cluster: int = 0) -> int:
    return (number_at(file, l2_entry_at(file, cluster)) & ~COPIED) // CLUSTER


def test_nothing_in_a_good_image() -> None:
    found = checked(image())
    assert counts(found) == (0, 0, 0)
    assert (found.allocated_clusters, found.total_clusters) == (4, 128)
    assert (found.compressed_clusters, found.fragmented_clusters) == (0, 0)
    assert found.image_end_offset == (host(image(), 3) + 1) * CLUSTER


def test_a_refcount_that_is_too_high_is_a_leak() -> None:
    file = image()
    file.write(40 * CLUSTER, bytes(CLUSTER))
    poke(file, refcount_at(file, 40), 1, 2)
    assert counts(checked(file)) == (0, 1, 0)


def test_a_refcount_that_is_too_low_is_a_corruption() -> None:
    file = image()
    poke(file, refcount_at(file, host(file)), 0, 2)
    found = checked(file)
    assert counts(found) == (2, 0, 0)  # the count, and the COPIED flag that is not right with it
    assert any("refcount=0 reference=1" in message for message in found.messages)


def test_a_flag_that_is_missing_where_the_count_is_one_is_counted() -> None:
    file = image()
    poke(file, l2_entry_at(file), host(file) * CLUSTER)
    assert counts(checked(file)) == (1, 0, 0)
    file = image()
    l1 = number_at(file, 40)
    poke(file, l1, number_at(file, l1) & ~COPIED)
    assert counts(checked(file)) == (1, 0, 0)


def test_a_flag_where_the_count_is_two_is_counted() -> None:
    file = image()
    poke(file, refcount_at(file, host(file)), 2, 2)
    assert counts(checked(file)) == (1, 1, 0)


@pytest.mark.parametrize("bit", [1, 8, 56, 61])
def test_reserved_bits_of_an_l2_entry(bit: int) -> None:
    file = image()
    at = l2_entry_at(file)
    poke(file, at, number_at(file, at) | 1 << bit)
    assert checked(file).corruptions == 1


def test_the_zero_flag_is_no_reserved_bit() -> None:
    file = image()
    at = l2_entry_at(file)
    poke(file, at, number_at(file, at) | 1)
    assert checked(file).clean


@pytest.mark.parametrize("bit", [0, 8, 56, 62])
def test_reserved_bits_of_an_l1_entry(bit: int) -> None:
    file = image()
    at = number_at(file, 40)
    poke(file, at, number_at(file, at) | 1 << bit)
    assert checked(file).corruptions == 1


def test_reserved_bits_of_the_refcount_table() -> None:
    file = image()
    at = number_at(file, 48)
    poke(file, at, number_at(file, at) | 4)
    assert checked(file).corruptions == 1


def test_a_refcount_block_where_no_file_reaches_cannot_be_read() -> None:
    file = image()
    poke(file, number_at(file, 48), 1 << 63)
    found = checked(file)
    assert found.check_errors == -(-file.size // CLUSTER)


def test_two_owners_of_a_cluster() -> None:
    file = image()
    poke(file, l2_entry_at(file, 1), number_at(file, l2_entry_at(file, 0)))
    found = checked(file)
    assert (found.corruptions, found.leaks) == (1, 1)


def test_a_cluster_past_the_end_of_the_file() -> None:
    file = image()
    poke(file, l2_entry_at(file), 1 << 40 | COPIED)
    found = checked(file)
    assert any("exceeding the end of the file" in message for message in found.messages)
    assert found.leaks == 1


def test_a_compressed_cluster_with_the_copied_flag() -> None:
    file = with_compressed(b"a" * 512)
    assert checked(file).clean
    assert checked(file).compressed_clusters == 1
    at = l2_entry_at(file)
    poke(file, at, number_at(file, at) | COPIED)
    assert checked(file).corruptions == 1


def test_an_unaligned_l2_table() -> None:
    file, disk = new_image(cluster_size=1024)
    disk.write(0, b"x" * 1024)
    disk.close()
    at = number_at(file, 40)
    poke(file, at, number_at(file, at) + 512)
    assert any("Table is not cluster aligned" in m for m in checked(file).messages)


def test_flags_of_a_table_that_is_named_twice_are_looked_at_once_and_count_twice() -> None:
    file = image()
    l1 = number_at(file, 40)
    table = number_at(file, l1) & ~COPIED
    poke(file, l1 + 8, table)
    poke(file, l1, table)
    reads: list[int] = []

    class Watched(FilterDisk):
        def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
            reads.append(offset)
            super()._readv(offset, views, length)

    poke(file, refcount_at(file, table // CLUSTER), 2, 2)
    for cluster in range(4):
        poke(file, refcount_at(file, host(file, cluster)), 2, 2)
    with open_disk(Watched(file), format="qcow2", read_only=True, for_check=True) as disk:
        found = disk.check()
    assert counts(found) == (8, 0, 0)  # four flags, in each of the two
    assert reads.count(table) == 2  # for the references, and for the flags


def test_a_refcount_block_that_something_else_uses() -> None:
    file = image()
    block = number_at(file, number_at(file, 48))
    poke(file, l2_entry_at(file), block | COPIED)
    assert checked(file).corruptions >= 2


def test_fragments_are_clusters_that_do_not_follow() -> None:
    file, disk = new_image()
    for cluster in (0, 2, 1):
        disk.write(cluster * CLUSTER, b"x" * CLUSTER)
    disk.close()
    assert checked(file).fragmented_clusters == 2


def test_what_a_snapshot_refers_to_is_counted() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 4 * CLUSTER)
    disk.snapshots.create("s")
    disk.write(0, b"y" * 2 * CLUSTER)
    disk.close()
    assert checked(file).clean
    poke(file, 60, 0, 4)  # now nobody names it
    assert checked(file).leaks > 4


def test_the_messages_are_bounded() -> None:
    file, disk = new_image(1 << 20)
    disk.write(0, b"x" * (1 << 20))
    disk.close()
    table = number_at(file, 48)
    for at in range(table, table + 64, 8):
        poke(file, at, 0)
    found = checked(file)
    assert found.corruptions > 2000
    assert len(found.messages) == 1000
