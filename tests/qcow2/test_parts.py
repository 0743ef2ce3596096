"""The parts that stand alone: sizes, refcount widths, runs, health, the cache of slices."""

from __future__ import annotations

import random

import pytest

from pyvirtio import BackendError, MemoryDisk
from pyvirtio.qcow2 import layout
from pyvirtio.qcow2.cache import CacheFull, TableCache
from pyvirtio.qcow2.geometry import Geometry
from pyvirtio.qcow2.health import Health
from pyvirtio.qcow2.quarantine import DiscardKind, DroppedReferences, merge_runs
from pyvirtio.qcow2.refcount_codec import codec_for
from support.filters import FaultyDisk, RecordingDisk

# -- geometry ----------------------------------------------------------------------------------


def test_sizes_that_follow_from_the_header() -> None:
    plain = Geometry(3, 16, 4)
    assert plain.l2_coverage == 512 << 20
    assert plain.refcount_block_bits == 15
    assert plain.refcount_max == 65535
    assert plain.subcluster_size == 65536
    assert Geometry(3, 16, 4, extended_l2=True).subcluster_size == 2048
    assert Geometry(3, 16, 4, extended_l2=True).l2_coverage == 256 << 20


def test_a_part_of_a_cluster_counts_as_one() -> None:
    plain = Geometry(3, 9, 4)
    assert [plain.clusters(n) for n in (0, 1, 512, 513)] == [0, 1, 1, 2]
    assert [plain.l1_entries(n) for n in (0, 1, 32768, 32769)] == [0, 1, 1, 2]


def test_the_descriptor_of_a_compressed_cluster() -> None:
    """qcow2 spec: offset in bits 0 to x-1, x = 62 - (cluster_bits - 8); sectors above."""
    geometry = Geometry(3, 16, 4)
    assert geometry.compressed_offset_bits == 54
    entry = 1 << 62 | 2 << 54 | 0x12345
    assert geometry.compressed_extent(entry) == (0x12345, 3 * 512 - 0x145)


def test_a_compressed_offset_has_no_more_than_56_bits() -> None:
    geometry = Geometry(3, 9, 4)
    entry = 1 << 62 | 1 << 58 | 1 << 55 | 0x200
    assert geometry.compressed_extent(entry)[0] == 1 << 55 | 0x200


# -- refcounts of every width ------------------------------------------------------------------


def naive(block: bytes, order: int, index: int) -> int:
    """A refcount by the words of the specification."""
    width = 1 << order
    if width < 8:
        return block[index * width // 8] >> (index * width % 8) & ((1 << width) - 1)
    return int.from_bytes(block[index * width // 8 : (index + 1) * width // 8])


@pytest.mark.parametrize("order", range(7))
def test_refcounts_are_stored_as_specified(order: int) -> None:
    chance = random.Random(order)
    codec = codec_for(order)
    block = bytearray(chance.randbytes(64))
    count = 64 * 8 >> order
    before = [naive(block, order, i) for i in range(count)]
    start, length = count // 4 + 1, max(1, count // 3)
    values = [chance.randint(0, codec.max) for _ in range(length)]
    codec.store(memoryview(block), start, values)
    before[start : start + length] = values
    assert [naive(block, order, i) for i in range(count)] == before
    assert (
        list(codec.load(memoryview(block), start - 1, length + 1))
        == (before[start - 1 : start + length])
    )


@pytest.mark.parametrize("order", range(7))
def test_free_refcounts_are_found(order: int) -> None:
    codec = codec_for(order)
    chance = random.Random(order)
    count = 64 * 8 >> order
    for _ in range(30):
        block = bytearray(64)
        used = [chance.random() < 0.7 for _ in range(count)]
        high = codec.max ^ (codec.max >> 1)  # only the highest bit: easily overlooked
        codec.store(memoryview(block), 0, [high if u else 0 for u in used])
        start = chance.randrange(count)
        free = next((i for i in range(start, count) if not used[i]), -1)
        assert codec.find_zero(memoryview(block), start, count) == free
        if free >= 0:
            run = next((i for i in range(free, count) if used[i]), count) - free
            assert codec.zero_run(memoryview(block), free, count) == run


# -- quarantine --------------------------------------------------------------------------------


def test_dropped_runs_are_joined_where_they_continue() -> None:
    dropped = DroppedReferences()
    dropped.add(5, 2, DiscardKind.REQUEST)
    dropped.add(7, 1, DiscardKind.REQUEST)
    dropped.add(8, 1, DiscardKind.OTHER)
    dropped.add(10, 1, DiscardKind.OTHER)
    assert dropped.runs == [
        (5, 3, DiscardKind.REQUEST),
        (8, 1, DiscardKind.OTHER),
        (10, 1, DiscardKind.OTHER),
    ]


def test_runs_of_cluster_numbers() -> None:
    assert merge_runs([9, 3, 4, 4, 10, 1]) == [(1, 1), (3, 2), (9, 2)]
    assert merge_runs([]) == []
    assert merge_runs([0]) == [(0, 1)]


# -- health ------------------------------------------------------------------------------------


def test_an_interrupted_step_ends_writing_for_good() -> None:
    health = Health()
    with pytest.raises(KeyboardInterrupt), health.step("Mapping"):
        raise KeyboardInterrupt
    with pytest.raises(BackendError, match="Mapping was interrupted by KeyboardInterrupt"):
        health.check()


def test_the_first_reason_stays() -> None:
    health = Health()
    health.poison("first")
    health.poison("second")
    assert health.reason == "first"


# -- the cache of slices -----------------------------------------------------------------------

SLICE = 512


def cache_of(slots: int, *, write_back: bool = True) -> tuple[RecordingDisk, TableCache]:
    below = MemoryDisk(64 * SLICE)
    for i in range(64):
        below.write(i * SLICE, bytes([i]) * SLICE)
    file = RecordingDisk(below)
    return file, TableCache(file, SLICE, slots, write_back=write_back)


def first_byte(cache: TableCache, number: int) -> int:
    return cache.slice(cache.get(number * SLICE))[0]


def test_a_pinned_slice_stays_where_it_is() -> None:
    _, cache = cache_of(2)
    slot = cache.get(5 * SLICE)
    cache.pin(slot)
    for i in range(10, 20):
        first_byte(cache, i)
    assert cache.slice(slot)[0] == 5
    assert cache.get(5 * SLICE) == slot


def test_pins_are_counted() -> None:
    _, cache = cache_of(1)
    slot = cache.get(0)
    cache.pin(slot)
    cache.pin(slot)
    cache.unpin(slot)
    with pytest.raises(CacheFull):
        cache.get(SLICE)
    cache.unpin(slot)
    assert first_byte(cache, 1) == 1


def test_an_evicted_slice_is_written_back_and_read_again() -> None:
    _, cache = cache_of(2)
    slot = cache.get(5 * SLICE)
    cache.mark_dirty(slot)
    cache.slice(slot)[0] = 0x55
    for i in range(10, 20):
        cache.mark_dirty(cache.get(i * SLICE))
    assert first_byte(cache, 5) == 0x55


def test_a_slice_is_found_in_its_own_slot_only() -> None:
    _, cache = cache_of(3)
    for i in (0, 1, 2, 3, 0, 1, 4, 2, 0, 5, 3):
        assert first_byte(cache, i) == i


def test_without_write_back_a_cache_full_of_dirty_slices_is_full() -> None:
    file, cache = cache_of(2, write_back=False)
    for i in range(2):
        cache.mark_dirty(cache.get(i * SLICE))
    with pytest.raises(CacheFull):
        cache.get(9 * SLICE)
    assert file.log == []


def test_a_slot_whose_reading_failed_is_not_lost() -> None:
    file = FaultyDisk(MemoryDisk(64 * SLICE), kinds=frozenset({"read"}))
    cache = TableCache(file, SLICE, 2, write_back=True)
    file.fail_at, file.persistent = 0, True
    for _ in range(3):
        with pytest.raises(BackendError):
            cache.get(0)
    file.fail_at = None
    cache.pin(cache.get(0))
    cache.pin(cache.get(SLICE))


def test_another_slice_in_a_slot_is_another_generation() -> None:
    _, cache = cache_of(1)
    slot = cache.get(0)
    before = cache.generations[slot]
    assert cache.get(SLICE) == slot
    assert cache.generations[slot] != before


def test_what_is_written_is_clean() -> None:
    file, cache = cache_of(4)
    cache.mark_dirty(cache.get(0))
    cache.write_dirty()
    cache.write_dirty()
    assert [event.kind for event in file.log] == ["write"]
    assert not cache.dirty


def test_forgotten_slices_are_not_written() -> None:
    file, cache = cache_of(4)
    for i in range(3):
        cache.mark_dirty(cache.get(i * SLICE))
    cache.forget(SLICE, SLICE)
    cache.write_dirty()
    assert sorted(event.offset for event in file.log) == [0, 2 * SLICE]


def test_a_forgotten_slice_is_read_again() -> None:
    file, cache = cache_of(4)
    cache.get(0)
    cache.forget(0, SLICE)
    file.below.write(0, b"\x77")
    assert first_byte(cache, 0) == 0x77


def test_a_forgotten_slot_with_a_pin_is_used_again_after_it() -> None:
    _, cache = cache_of(1)
    slot = cache.get(0)
    cache.pin(slot)
    cache.forget(0, SLICE)
    with pytest.raises(CacheFull):
        cache.get(SLICE)
    cache.unpin(slot)
    assert first_byte(cache, 1) == 1


def test_staged_slices_are_as_they_were() -> None:
    file, cache = cache_of(4, write_back=False)
    slot = cache.get(0)
    cache.mark_dirty(slot)
    cache.slice(slot)[0] = 1
    staged = cache.take_dirty()
    cache.slice(slot)[0] = 2
    staged.write(file)
    assert file.below.read(0, 1) == b"\x01"


def test_staged_slices_that_were_not_written_are_dirty_again() -> None:
    _, cache = cache_of(4, write_back=False)
    cache.mark_dirty(cache.get(0))
    staged = cache.take_dirty()
    assert not cache.dirty
    staged.done(written=False)
    assert cache.dirty


def test_what_was_forgotten_while_staged_does_not_come_back() -> None:
    _, cache = cache_of(4, write_back=False)
    cache.mark_dirty(cache.get(0))
    staged = cache.take_dirty()
    cache.forget(0, SLICE)
    staged.done(written=False)
    assert not cache.dirty


def test_a_staged_slice_keeps_its_slot_until_it_is_written() -> None:
    _, cache = cache_of(1, write_back=False)
    cache.mark_dirty(cache.get(0))
    staged = cache.take_dirty()
    with pytest.raises(CacheFull):
        cache.get(SLICE)
    staged.done(written=True)
    assert first_byte(cache, 1) == 1


def test_the_limits_are_qemus() -> None:
    assert layout.MAX_L1_SIZE == 32 << 20
    assert layout.MAX_REFCOUNT_TABLE_SIZE == 8 << 20
    assert layout.MAX_SNAPSHOTS == 65536
    assert layout.MAX_SNAPSHOT_EXTRA_DATA == 1024
    assert layout.MAX_BACKING_NAME == 1023
    assert (layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS) == (9, 21)
