"""The packed virtqueue (virtio 1.4 §2.8)."""

from __future__ import annotations

import pytest

from .. import layout as at
from ..driver import Buffer
from .bench import Bench, pattern
from .plugin import Rules, shows
from .test_split import one
from .test_status import kick, with_data

OWNER = at.VIRTQ_DESC_F_AVAIL | at.VIRTQ_DESC_F_USED


def read_buffers(bench: Bench, sector: int, length: int | None = None) -> list[Buffer]:
    """Header, data and status of a read, in memory of their own."""
    length = bench.unit if length is None else length
    header = bench.arena.take(16)
    bench.memory.write(header, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_IN, 0, sector))
    data = bench.arena.take(length + 1)
    bench.memory.write(data, b"\xff" * (length + 1))
    return [Buffer(header, 16), Buffer(data, length, True), Buffer(data + length, 1, True)]


@shows("PKD-05")
def test_readable_buffers_are_not_written(packed: Bench) -> None:
    driver = packed.start_read_write()
    mark = packed.arena.take(0)
    driver.submit(at.VIRTIO_BLK_T_OUT, 0, pattern(packed.unit))
    before = packed.memory.read(mark, 16 + packed.unit)
    driver.kick()
    packed.finish(driver)
    assert packed.memory.read(mark, 16 + packed.unit) == before


@shows("PKD-07")
def test_descriptors_that_are_not_available_are_not_used(packed: Bench) -> None:
    driver = packed.start()
    packed.need_room(driver, 3)
    ring = driver.ring
    buffers = read_buffers(packed, 0)
    for flags in (0, OWNER, at.VIRTQ_DESC_F_USED):  # never available; used; of another wrap
        for slot, buffer in enumerate(buffers):
            kind = at.VIRTQ_DESC_F_WRITE if buffer.writable else 0
            kind |= at.VIRTQ_DESC_F_NEXT if slot < 2 else 0
            ring.set_descriptor(slot, buffer.address, buffer.length, kind | flags, 0)
        before = packed.ram()
        driver.registers.notify(0, with_data(driver))
        packed.settle()
        after = packed.ram()
        ours = ring.used - packed.device.base  # the event suppression is the device's to write
        assert before[:ours] == after[:ours]
        assert before[ours + 4 :] == after[ours + 4 :]
    driver.read(0, packed.unit // 512)


@shows("PKD-08", "PKD-32", "PKD-34")
def test_used_descriptors(packed: Bench, rule: Rules) -> None:
    driver = packed.start(queue_size=16)
    packed.need_room(driver, 3)
    ring = driver.ring
    seen = {}
    for _ in range(ring.size // 3):  # not once around
        slot = ring.used_slot
        ring.add(read_buffers(packed, 0))
        kick(driver)
        assert packed.until(lambda: ring.has_used), "the request did not come back"
        _, length, flags, _ = seen[slot] = ring.get_descriptor(slot)
        with rule("PKD-32"):
            assert flags & OWNER == OWNER, f"flags {flags:#x}"
        with rule("PKD-34"):
            assert flags & at.VIRTQ_DESC_F_WRITE, "data was written, and WRITE is clear"
            assert 1 <= length <= packed.unit + 1
        ring.collect()
    packed.settle()
    with rule("PKD-08"):
        assert seen == {slot: ring.get_descriptor(slot) for slot in seen}


@shows("PKD-32")
def test_used_descriptors_of_the_second_round(packed: Bench) -> None:
    driver = packed.start(queue_size=4)
    packed.need_room(driver, 3)
    ring = driver.ring
    for _ in range(8):
        slot, wrap = ring.used_slot, ring.used_wrap
        ring.add(read_buffers(packed, 0))
        kick(driver)
        packed.until(lambda: ring.has_used)
        flags = ring.get_descriptor(slot)[2]
        assert flags & OWNER == (OWNER if wrap else 0), f"flags {flags:#x}, wrap counter {wrap}"
        ring.collect()


@shows("PKD-19")
def test_lists_of_many_buffers(packed: Bench) -> None:
    driver = packed.start_read_write(queue_size=64)
    parts = min(packed.segment_limit(driver), 8, driver.ring.size - 2)
    if parts < 2:
        pytest.skip("no list may have several data segments")
    data = pattern(512 * parts // packed.unit * packed.unit or packed.unit)
    cuts = (16, *[len(data) // parts] * (parts - 1))
    assert driver.request(at.VIRTIO_BLK_T_OUT, 0, data, cuts=cuts).status == 0
    done = driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=len(data), cuts=cuts)
    assert done.data == data


@shows("PKD-31")
@pytest.mark.parametrize("size", [5, 7, 8])
def test_several_times_around_a_ring_of_any_size(packed: Bench, size: int) -> None:
    driver = packed.start(queue_size=size)
    for _ in range(3 * size):
        driver.read(0, packed.unit // 512)


@shows("PKD-33", "PKD-35")
def test_one_used_descriptor_for_each_list(packed: Bench, rule: Rules) -> None:
    driver = packed.start(queue_size=16)
    packed.need_room(driver, 4)
    ring = driver.ring
    for ident in (ring.size - 1, 0, 2, ring.size - 2, 1, 2):
        slot = ring.used_slot
        buffers = read_buffers(packed, 0)
        ring._slots[ident] = 3
        for position, buffer in enumerate(buffers):
            flags = at.VIRTQ_DESC_F_WRITE if buffer.writable else 0
            flags |= at.VIRTQ_DESC_F_NEXT if position < 2 else 0
            ring.put(buffer.address, buffer.length, flags, ident if position == 2 else 3)
        kick(driver)
        with rule("PKD-33"):
            assert packed.until(lambda: ring.has_used), f"nothing is used at {slot}"
        with rule("PKD-35"):
            assert ring.get_descriptor(slot)[3] == ident, "the id is not that of the last one"
        ring.collect()


@shows("PKD-36", "PKD-37")
def test_indirect_tables(packed: Bench, rule: Rules) -> None:
    packed.need(at.VIRTIO_F_INDIRECT_DESC, "INDIRECT_DESC")
    driver = packed.start_read_write(queue_size=16)
    ring = driver.ring
    parts = min(packed.segment_limit(driver), 8)
    each = min(packed.unit, driver.segment_bytes)
    driver.write(0, pattern(each * parts))
    buffers = read_buffers(packed, 0, each * parts)
    whole = buffers[1]
    buffers[1:2] = [Buffer(whole.address + each * part, each, True) for part in range(parts)]
    junk = at.VIRTQ_DESC_F_NEXT | OWNER
    for strange, on_pointer in ((0, 0), (junk, 0), (0, at.VIRTQ_DESC_F_WRITE)):
        packed.memory.write(whole.address, b"\xff" * (whole.length + 1))
        table = packed.arena.take(16 * len(buffers))
        entries = b"".join(
            ring.descriptor(
                each.address,
                each.length,
                (at.VIRTQ_DESC_F_WRITE if each.writable else 0) | strange,
                7 if strange else 0,
            )
            for each in buffers
        )
        packed.memory.write(table, entries)
        ident = ring.size - 1
        ring.put(table, len(entries), at.VIRTQ_DESC_F_INDIRECT | on_pointer, ident)
        kick(driver)
        with rule("PKD-36" if strange or on_pointer else "PKD-37"):
            assert packed.until(lambda: ring.has_used), "the request did not come back"
            ring.collect()
            assert packed.memory.read(whole.address, whole.length) == pattern(whole.length)


# -- event suppression -------------------------------------------------------------------------


@shows("PKD-38")
def test_without_event_index_the_device_names_no_descriptor(packed: Bench) -> None:
    driver = packed.start()
    for _ in range(4):
        one(packed, driver)
        assert driver.ring.device_event[1] in (0, 1)


@shows("PKD-38")
def test_with_event_index_the_devices_flags_are_valid(packed: Bench) -> None:
    packed.need(at.VIRTIO_F_EVENT_IDX, "EVENT_IDX")
    driver = packed.start(want=[at.VIRTIO_F_EVENT_IDX])
    for _ in range(4):
        one(packed, driver)
        assert driver.ring.device_event[1] in (0, 1, 2)


@shows("PKD-39")
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_an_interrupt_for_the_descriptor_that_is_named(packed: Bench, ahead: int) -> None:
    packed.need(at.VIRTIO_F_EVENT_IDX, "EVENT_IDX")
    driver = packed.start(want=[at.VIRTIO_F_EVENT_IDX], queue_size=16)
    ring = driver.ring
    packed.need_room(driver, 3 * ahead + 3)
    for _ in range(8):  # over the end of the ring
        slot = ring.used_slot + 3 * ahead  # a read takes three places
        wrap = ring.used_wrap
        if slot >= ring.size:
            slot, wrap = slot - ring.size, not wrap
        ring.driver_event = (slot | wrap << 15, at.RING_EVENT_FLAGS_DESC)
        for _ in range(ahead):
            one(packed, driver)
        last = one(packed, driver, expected=True)
        assert last, "no interrupt for the descriptor that was named"
