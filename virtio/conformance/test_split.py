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
    driver = split.start(queue_size=size, want=[at.VIRTIO_F_INDIRECT_DESC])
    for _ in range(size + 2):
        assert driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=512, indirect=0).status == 0


@shows("VQ-S-06")
def test_legacy_rings_are_in_guest_order(split: Bench) -> None:
    split.need_legacy()
    driver = split.start()
    assert driver.request(at.VIRTIO_BLK_T_IN, 1, incoming=512).status == 0
    assert driver.ring.used_index == 1


def _cuts() -> list[tuple[int, ...]]:
    header = [(each,) for each in range(1, 16)]
    return [*header, (17,), (16, 1), (16, 511), (16, 512), (528,), (16, 256, 256), (1,) * 20]


@shows("VQ-S-08")
def test_requests_may_be_cut_anywhere(split: Bench) -> None:
    driver = split.start_read_write(queue_size=64)
    if split.legacy and not driver.features >> at.VIRTIO_F_ANY_LAYOUT & 1:
        pytest.skip("the legacy device does not offer ANY_LAYOUT")
    for number, cuts in enumerate(_cuts()):
        data = pattern(512, number)
        done = driver.request(at.VIRTIO_BLK_T_OUT, number, data, cuts=cuts)
        assert done.status == 0, f"a write cut at {cuts}"
    for number in range(len(_cuts())):
        for cuts in ((16, 512), (16, 1), (16, 511, 1), (16, 100, 412), (16, 513), (5, 11, 7)):
            done = driver.request(at.VIRTIO_BLK_T_IN, number, incoming=512, cuts=cuts)
            assert (done.status, done.data) == (0, pattern(512, number)), f"a read cut at {cuts}"


@shows("VQ-S-12", "VQ-S-15")
def test_what_the_device_may_not_write_stays(split: Bench, rule: Rules) -> None:
    driver = split.start_read_write()
    mark = split.arena.take(0)
    for kind, incoming in ((at.VIRTIO_BLK_T_OUT, 0), (at.VIRTIO_BLK_T_IN, 2048)):
        outgoing = b"" if incoming else pattern(2048)
        driver.submit(kind, 0, outgoing, incoming)
    driver.ring.publish()
    table = split.memory.read(driver.ring.descriptors, 16 * driver.ring.size)
    request = split.memory.read(mark, 16 + 2048)
    driver.registers.notify(0, with_data(driver))
    split.finish(driver, 2)
    with rule("VQ-S-12"):
        assert split.memory.read(mark, 16 + 2048) == request, "a readable buffer was written"
    with rule("VQ-S-15"):
        now = split.memory.read(driver.ring.descriptors, 16 * driver.ring.size)
        assert now == table, "the descriptor table was written"


@shows("VQ-S-23", "VQ-S-24")
@pytest.mark.parametrize(("direct", "flags"), [(0, 0), (1, 0), (2, 0), (0, at.VIRTQ_DESC_F_WRITE)])
def test_indirect_tables(split: Bench, direct: int, flags: int, rule: Rules) -> None:
    split.need(at.VIRTIO_F_INDIRECT_DESC, "INDIRECT_DESC")
    driver = split.start_read_write()
    driver.write(9, pattern(512))
    head = driver.submit(at.VIRTIO_BLK_T_IN, 9, incoming=512, indirect=direct)
    last = driver.ring._chains[head][-1]
    address = driver.ring.descriptors + 16 * last
    old = driver.ring.load16(address + 12)
    driver.ring.store16(address + 12, old | flags)
    driver.kick()
    with rule("VQ-S-23" if flags else "VQ-S-24"):
        done = split.finish(driver)[head]
        assert (done.status, done.data) == (0, pattern(512))


# -- notifications to the driver -------------------------------------------------------------


def one(bench: Bench, driver: Any) -> int:
    """Do one request; which interrupts came for it."""
    bench.interrupts()
    driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    driver.kick()
    assert bench.until(lambda: driver.ring.has_used), "the request did not come back"
    interrupts = bench.interrupts()
    driver.ring.collect()
    return interrupts & 1


@shows("VQ-S-31", "VQ-S-33")
def test_without_event_index_every_batch_interrupts(split: Bench, rule: Rules) -> None:
    driver = split.start()
    with rule("VQ-S-33"):
        came = [one(split, driver) for _ in range(4)]
        assert all(came), "a used buffer without an interrupt"
    with rule("VQ-S-31"):
        for event in (0xFFFF, 0x8000, driver.ring.used_index + 2, 0):
            driver.ring.used_event = event
            assert one(split, driver), f"used_event {event} has kept an interrupt away"


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
        came = [one(split, driver) for _ in range(ahead + 1)]
        with rule("VQ-S-35"):
            assert came[-1], "no interrupt at the used index that was asked for"
        with rule("VQ-S-36"):
            assert not any(came[:-1]), "an interrupt before that"
    driver.ring.want_interrupts(False)
    driver.ring.used_event = driver.ring.used_index
    with rule("VQ-S-34"):
        assert one(split, driver), "flags count in spite of EVENT_IDX"


@shows("VQ-S-35")
def test_event_index_inside_a_batch(split: Bench) -> None:
    split.need(at.VIRTIO_F_EVENT_IDX, "EVENT_IDX")
    driver = split.start(want=[at.VIRTIO_F_EVENT_IDX])
    for offset in (0, 2, 4):
        split.interrupts()
        driver.ring.used_event = driver.ring.used_index + offset
        for _ in range(5):
            driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
        driver.kick()
        assert split.until(lambda: split.registers.take_interrupt() & 1 == 1), "no interrupt"
        taken = len(driver.ring.collect())
        while taken < 5:
            assert split.until(lambda: driver.ring.has_used)
            taken += len(driver.ring.collect())


@shows("VQ-S-37", "VQ-S-38")
def test_used_lengths_are_true(split: Bench, rule: Rules) -> None:
    driver = split.start_read_write()
    driver.write(0, pattern(4096))
    for count in (1, 3, 8):
        length = 512 * count
        done = driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=length)
        assert done.status == 0
        with rule("VQ-S-37"):
            assert 0 <= done.used_length <= length + 1, "a used length beyond the buffers"
        with rule("VQ-S-38"):
            expected = pattern(4096)[:length]
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
    if split.device.transport != "vhost-user":
        driver.registers.notify(0x3FF, None)  # a queue that is not there
    assert not driver.ring.has_used
    assert driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=512).status == 0


@shows("VQ-S-53")
def test_a_kick_for_what_is_done_already(split: Bench) -> None:
    driver = split.start()
    one(split, driver)
    index = driver.ring.used_index
    driver.registers.notify(0, with_data(driver))
    split.settle()
    assert driver.ring.used_index == index
