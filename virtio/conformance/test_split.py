"""The split virtqueue (virtio 1.4 §2.7)."""

from __future__ import annotations

from typing import Any

import pytest

from .. import layout as at
from .bench import Bench, pattern
from .plugin import Rules, shows
from .test_status import with_data


@shows("VQ-S-05")
@pytest.mark.parametrize("size", [2, 4, 128])
def test_legacy_queues_of_several_sizes(split: Bench, size: int) -> None:
    split.need_legacy()
    driver = split.start(queue_size=size)
    for _ in range(size + 2):
        driver.read(0, split.unit // 512)


@shows("VQ-S-06")
def test_legacy_rings_are_in_guest_order(split: Bench) -> None:
    split.need_legacy()
    driver = split.start()
    driver.read(0, split.unit // 512)
    assert driver.ring.used_index == 1


def _cuts(unit: int, writing: bool) -> list[tuple[int, ...]]:
    if writing:
        header = [(each,) for each in range(1, 16)]
        half = (16, unit // 2, unit // 2)
        return [*header, (17,), (16, 1), (16, unit - 1), (16, unit), half, (1,) * 20]
    return [(16, unit), (16, 1), (16, unit - 1, 1), (16, 100, unit - 100), (16, unit + 1), (5, 11)]


@shows("VQ-S-08")
def test_requests_may_be_cut_anywhere(split: Bench) -> None:
    driver = split.start_read_write(queue_size=64)
    if split.legacy and not driver.features >> at.VIRTIO_F_ANY_LAYOUT & 1:
        pytest.skip("the legacy device does not offer ANY_LAYOUT")
    unit, tried = split.unit, 0

    def may_be(cuts: tuple[int, ...]) -> bool:
        """The queue has room for it, and the device's limits on segments allow it."""
        parts = len(cuts) + 2
        segments = parts == 3 or parts <= split.segment_limit(driver)
        return parts <= driver.ring.size and segments and unit + 1 <= driver.segment_bytes

    for number, cuts in enumerate(_cuts(unit, True)):
        if may_be(cuts):
            tried += 1
            sector, data = number * unit // 512, pattern(unit, number)
            done = driver.request(at.VIRTIO_BLK_T_OUT, sector, data, cuts=cuts)
            assert done.status == 0, f"a write cut at {cuts}"
            assert driver.read(sector, unit // 512) == data, f"a write cut at {cuts}"
    driver.write(0, pattern(unit))
    for cuts in _cuts(unit, False):
        if may_be(cuts):
            tried += 1
            done = driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=unit, cuts=cuts)
            assert (done.status, done.data) == (0, pattern(unit)), f"a read cut at {cuts}"
    if not tried:
        pytest.skip("queue and segments are too small")


@shows("VQ-S-12", "VQ-S-15")
def test_what_the_device_may_not_write_stays(split: Bench, rule: Rules) -> None:
    driver = split.start_read_write()
    for kind in (at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_IN):
        mark = split.arena.take(0)
        writing = kind == at.VIRTIO_BLK_T_OUT
        data, room = (pattern(split.unit), 0) if writing else (b"", split.unit)
        driver.submit(kind, 0, data, room)
        driver.ring.publish()
        table = split.memory.read(driver.ring.descriptors, 16 * driver.ring.size)
        request = split.memory.read(mark, 16 + len(data))
        driver.registers.notify(0, with_data(driver))
        split.finish(driver)
        with rule("VQ-S-12"):
            now = split.memory.read(mark, 16 + len(data))
            assert now == request, "a readable buffer was written"
        with rule("VQ-S-15"):
            now = split.memory.read(driver.ring.descriptors, 16 * driver.ring.size)
            assert now == table, "the descriptor table was written"


@shows("VQ-S-23", "VQ-S-24")
@pytest.mark.parametrize(("direct", "flags"), [(0, 0), (1, 0), (2, 0), (0, at.VIRTQ_DESC_F_WRITE)])
def test_indirect_tables(split: Bench, direct: int, flags: int, rule: Rules) -> None:
    split.need(at.VIRTIO_F_INDIRECT_DESC, "INDIRECT_DESC")
    driver = split.start_read_write()
    split.need_room(driver, direct + 1)
    unit = split.unit
    driver.write(unit // 512, pattern(unit))
    head = driver.submit(at.VIRTIO_BLK_T_IN, unit // 512, incoming=unit, indirect=direct)
    last = driver.ring._chains[head][-1]
    address = driver.ring.descriptors + 16 * last
    old = driver.ring.load16(address + 12)
    driver.ring.store16(address + 12, old | flags)
    driver.kick()
    with rule("VQ-S-23" if flags else "VQ-S-24"):
        done = split.finish(driver)[head]
        assert (done.status, done.data) == (0, pattern(unit))


# -- notifications to the driver -------------------------------------------------------------


def one(bench: Bench, driver: Any, *, expected: bool = False) -> bool:
    """Do one request; whether an interrupt came for it. Where it is ``expected`` it is waited for:
    how long a device takes, or gathers what it tells, is its own affair."""
    bench.interrupts()
    driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=bench.unit)
    driver.kick()
    assert bench.until(lambda: driver.ring.has_used), "the request did not come back"
    came = bench.interrupted(1) if expected else bool(bench.interrupts() & 1)
    driver.ring.collect()
    return came


@shows("VQ-S-31", "VQ-S-33")
def test_without_event_index_every_batch_interrupts(split: Bench, rule: Rules) -> None:
    driver = split.start()
    with rule("VQ-S-33"):
        came = [one(split, driver, expected=True) for _ in range(4)]
        assert all(came), "a used buffer without an interrupt"
    with rule("VQ-S-31"):
        for event in (0xFFFF, 0x8000, driver.ring.used_index + 2, 0):
            driver.ring.used_event = event
            came_too = one(split, driver, expected=True)
            assert came_too, f"used_event {event} has kept an interrupt away"


@shows("VQ-S-32")
def test_without_event_index_flags_suppress(split: Bench) -> None:
    driver = split.start()
    driver.ring.want_interrupts(False)
    came = [one(split, driver) for _ in range(4)]
    assert not any(came), came


@shows("VQ-S-34", "VQ-S-35", "VQ-S-36")
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_event_index_says_when(split: Bench, ahead: int, rule: Rules) -> None:
    split.need(at.VIRTIO_F_EVENT_IDX, "EVENT_IDX")
    driver = split.start(want=[at.VIRTIO_F_EVENT_IDX])
    for _ in range(12):  # over the end of the ring, too
        driver.ring.used_event = driver.ring.used_index + ahead
        came = [one(split, driver) for _ in range(ahead)]
        with rule("VQ-S-35"):
            last = one(split, driver, expected=True)
            assert last, "no interrupt at the used index that was asked for"
        with rule("VQ-S-36"):
            assert not any(came), "an interrupt before that"
    driver.ring.want_interrupts(False)
    driver.ring.used_event = driver.ring.used_index
    with rule("VQ-S-34"):
        assert one(split, driver, expected=True), "flags count in spite of EVENT_IDX"


@shows("VQ-S-35")
def test_event_index_inside_a_batch(split: Bench) -> None:
    split.need(at.VIRTIO_F_EVENT_IDX, "EVENT_IDX")
    driver = split.start(want=[at.VIRTIO_F_EVENT_IDX])
    count = split.requests_that_fit(driver, 5)
    for offset in sorted({0, count // 2, count - 1}):
        split.interrupts()
        driver.ring.used_event = driver.ring.used_index + offset
        for _ in range(count):
            driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=split.unit)
        driver.kick()
        assert split.interrupted(1), "no interrupt"
        taken = len(driver.ring.collect())
        while taken < count:
            assert split.until(lambda: driver.ring.has_used)
            taken += len(driver.ring.collect())


@shows("VQ-S-37", "VQ-S-38")
def test_used_lengths_are_true(split: Bench, rule: Rules) -> None:
    driver = split.start_read_write()
    whole = split.unit * min(8, max(driver.most // split.unit, 1))
    driver.write(0, pattern(whole))
    for length in sorted({split.unit, whole}):
        done = driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=length)
        assert done.status == 0
        with rule("VQ-S-37"):
            assert 0 <= done.used_length <= length + 1, "a used length beyond the buffers"
        with rule("VQ-S-38"):
            expected = pattern(whole)[:length]
            assert done.data[: done.used_length] == expected[: done.used_length]


@shows("VQ-S-49", "VQ-S-51")
def test_used_flags(split: Bench, rule: Rules) -> None:
    driver = split.start()
    for _ in range(4):
        one(split, driver)
        with rule("VQ-S-49"):
            assert driver.ring.used_flags in (0, 1)
    if split.offers(at.VIRTIO_F_EVENT_IDX):
        driver = split.start(want=[at.VIRTIO_F_EVENT_IDX])
        for _ in range(4):
            one(split, driver)
            with rule("VQ-S-51"):
                assert driver.ring.used_flags == 0


@shows("VQ-S-53")
def test_kicks_for_nothing(split: Bench) -> None:
    driver = split.start()
    for _ in range(5):
        driver.registers.notify(0, with_data(driver))
        split.settle()
    assert not driver.ring.has_used
    driver.read(0, split.unit // 512)


@shows("VQ-S-53")
def test_a_kick_for_what_is_done_already(split: Bench) -> None:
    driver = split.start()
    one(split, driver)
    index = driver.ring.used_index
    driver.registers.notify(0, with_data(driver))
    split.settle()
    assert driver.ring.used_index == index
