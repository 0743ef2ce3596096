"""Status field, reset, configuration space, suspension (virtio 1.4 §2.1, §2.4, §2.5, §2.11)."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from time import sleep
from typing import Any

import pytest

from .. import layout as at
from .bench import PATIENCE, Bench
from .device import CannotMakeError
from .plugin import Rules, shows

RUNS = at.STATUS_SUSPEND | at.STATUS_DRIVER_OK
ENDED = at.STATUS_SUSPEND | at.STATUS_NEEDS_RESET
BLOCK_CONFIG = ((at.VIRTIO_BLK_F_ZONED, 96), (at.VIRTIO_BLK_F_SECURE_ERASE, 72))
"""Bytes of configuration that a device with a feature may be asked for; else it is 60."""


def publish_read(bench: Bench, driver: Any, count: int = 1) -> list[int]:
    """Make reads of the first sectors available and kick whether that is wanted or not."""
    heads = [
        driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=bench.unit)
        for _ in range(bench.requests_that_fit(driver, count))
    ]
    kick(driver)
    return heads


def kick(driver: Any) -> None:
    """Show what was added, and kick whether that is wanted or not."""
    driver.ring.publish()
    driver.registers.notify(driver.queue_index, with_data(driver))


def with_data(driver: Any) -> int | None:
    """What a kick carries."""
    negotiated = driver.features >> at.VIRTIO_F_NOTIFICATION_DATA & 1
    return driver.ring.next_place if negotiated else None


@shows("BF-05", "BF-06")
def test_nothing_is_used_before_driver_ok(bench: Bench, rule: Rules) -> None:
    bench.need_status()
    driver = bench.before_driver_ok()
    bench.interrupts()
    publish_read(bench, driver)
    bench.settle()
    with rule("BF-05"):
        assert not driver.ring.has_used, "a buffer was used before DRIVER_OK"
    with rule("BF-06"):
        assert not bench.interrupts() & 1, "an interrupt came before DRIVER_OK"


@shows("BF-07", "BF-08")
def test_a_broken_ring_needs_a_reset(split: Bench, rule: Rules) -> None:
    split.need_status()
    driver = split.start()
    split.interrupts()
    driver.ring.offer(0xFFF0)
    driver.ring.publish()
    driver.registers.notify(0, with_data(driver))
    needs_reset = split.until(lambda: bool(split.registers.status & at.STATUS_NEEDS_RESET), 1)
    with rule("BF-07"):
        assert needs_reset, "an available index that cannot be leaves DEVICE_NEEDS_RESET clear"
    with rule("BF-08"):
        assert split.interrupted(2), "DEVICE_NEEDS_RESET was set without a notification"


@shows("BF-27")
def test_status_reads_0_after_a_reset(bench: Bench) -> None:
    driver = bench.start()
    publish_read(bench, driver)
    bench.registers.status = 0
    assert bench.until(lambda: bench.registers.status == 0), "the reset never completes"


@shows("BF-28", "BF-29")
def test_a_device_that_was_reset_leaves_its_queues_alone(bench: Bench, rule: Rules) -> None:
    driver = bench.start()
    for _ in range(bench.requests_that_fit(driver, 3)):
        driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=bench.unit)
    driver.ring.publish()  # made available; perhaps nobody kicks before the reset
    bench.registers.status = 0
    assert bench.until(lambda: bench.registers.status == 0), "the reset never completes"
    bench.registers.take_interrupt()
    before = bench.ram()
    if bench.device.transport != "vhost-user":
        bench.registers.notify(0, with_data(driver))
    bench.settle()
    with rule("BF-29"):
        assert bench.ram() == before, "memory changed after the reset"
    with rule("BF-28"):
        assert not bench.interrupts(), "an interrupt came after the reset"


@shows("BF-36")
def test_configuration_can_be_read_before_features_ok(split: Bench) -> None:
    driver = split.driver()
    driver.identify()
    read = split.registers.read_config
    size = next((size for bit, size in BLOCK_CONFIG if split.offers(bit)), 60)
    early = [read(offset, 1) for offset in range(size)]
    driver.negotiate()
    driver.set_up_queue()
    split.registers.status |= at.STATUS_DRIVER_OK
    late = [read(offset, 1) for offset in range(size)]
    early[at.BLK_CONFIG_WRITEBACK] = late[at.BLK_CONFIG_WRITEBACK]  # it follows the features
    assert early == late


@shows("BF-38", "BF-39")
def test_a_queue_that_was_reset_is_left_alone(bench: Bench, rule: Rules) -> None:
    bench.need_modern()
    bench.need(at.VIRTIO_F_RING_RESET, "RING_RESET")
    driver = bench.start()
    for _ in range(bench.requests_that_fit(driver, 3)):
        driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=bench.unit)
    driver.ring.publish()
    bench.registers.select_queue(0)
    assert bench.reset_queue(), "the queue's reset never completes"
    bench.registers.take_interrupt()
    before = bench.ram()
    if bench.device.transport != "vhost-user":
        bench.registers.notify(0, with_data(driver))
    bench.settle()
    with rule("BF-38"):
        assert bench.ram() == before, "requests were done after their queue was reset"
    with rule("BF-39"):
        assert not bench.interrupts() & 1, "a queue that was reset has interrupted"


@shows("BF-40", "BF-43")
@pytest.mark.parametrize("size", [16, 4])
def test_a_queue_begins_anew_after_its_reset(bench: Bench, size: int, rule: Rules) -> None:
    bench.need_modern()
    bench.need(at.VIRTIO_F_RING_RESET, "RING_RESET")
    driver = bench.start()
    for _ in range(3):
        driver.read(0, bench.unit // 512)
    bench.registers.select_queue(0)
    assert bench.reset_queue(), "the queue's reset never completes"
    driver.queue_size = size
    with rule("BF-40" if size == 16 else "BF-43"):
        driver.set_up_queue()
        for _ in range(2 * size):  # more than once around
            driver.read(0, bench.unit // 512)


def queue_reset_while_the_disk_waits(
    bench: Bench,
    start: Callable[[], object],
    resetting: Callable[[], int],
    enabled: Callable[[], int],
) -> None:
    """Reset a queue that has a request under way: its reset goes on until that is done, or the
    device lets go of it at once. What it shows has to be the one or the other."""
    bench.need(at.VIRTIO_F_RING_RESET, "RING_RESET")
    driver = bench.start()
    try:
        go_on = bench.device.stall()
    except CannotMakeError as error:
        pytest.skip(str(error))
    threads = [Thread(target=lambda: publish_read(bench, driver), daemon=True)]
    try:
        threads[0].start()
        sleep(0.1)  # the request is with the disk by now, or will have to wait as well
        bench.registers.select_queue(0)
        threads.append(Thread(target=start, daemon=True))
        threads[1].start()  # it may well be that this returns when the reset is complete
        sleep(0.1)
        seen = resetting(), enabled()
    finally:
        go_on()
        for thread in threads:
            thread.join(PATIENCE)
    assert seen[0] == 1 or seen == (0, 0), "the reset is neither complete nor shown to go on"
    if seen == (0, 0):
        pytest.skip("a queue is reset at once, whatever is under way")
    assert bench.until(lambda: (resetting(), enabled()) == (0, 0)), "it is never complete"


# -- the legacy interface --------------------------------------------------------------------


@shows("BF-53")
def test_legacy_configuration_can_be_written_before_features(split: Bench) -> None:
    split.need_legacy()
    split.need(at.VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE")
    split.driver().identify()
    registers = split.registers
    for value in (0, 1, 0):
        registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, value)
        assert registers.read_config(at.BLK_CONFIG_WRITEBACK, 1) == value


@shows("BF-54", "BF-23")
def test_legacy_queues_work_before_driver_ok(split: Bench) -> None:
    split.need_legacy()
    driver = split.before_driver_ok()
    driver.read(0, split.unit // 512)


@shows("BF-22", "BF-23")
def test_a_driver_without_version_1_is_a_legacy_one(split: Bench) -> None:
    split.need_legacy()
    driver = split.start()
    assert split.registers.status == 7, "a legacy status field has no FEATURES_OK"
    if not split.offers(at.VIRTIO_BLK_F_RO):
        count = split.unit // 512
        driver.write(3 * count, b"L" * split.unit)
        assert driver.read(3 * count, count) == b"L" * split.unit


# -- suspension ------------------------------------------------------------------------------


@shows("BF-63")
def test_suspend_is_ignored_before_initialization(split: Bench) -> None:
    split.need_status()
    driver = split.driver()
    driver.identify()
    split.registers.status |= at.STATUS_SUSPEND
    assert not split.registers.status & at.STATUS_SUSPEND, "before FEATURES_OK"
    driver.negotiate()
    driver.set_up_queue()
    split.registers.status |= at.STATUS_SUSPEND
    assert not split.registers.status & at.STATUS_SUSPEND, "before DRIVER_OK"
    split.registers.status |= at.STATUS_DRIVER_OK
    assert split.registers.status & RUNS == at.STATUS_DRIVER_OK, "it was remembered"
    driver.read(0, split.unit // 512)


def to_be_suspended(bench: Bench) -> Any:
    """A started driver of a device that can be suspended."""
    bench.need_status()
    bench.need(at.VIRTIO_F_SUSPEND, "SUSPEND")
    return bench.start()


def suspend(bench: Bench) -> None:
    """Suspend the device; skips the test if that fails, as it may (BF-70)."""
    bench.registers.status |= at.STATUS_SUSPEND
    assert bench.until(lambda: bool(bench.registers.status & ENDED)), "it is never suspended"
    if bench.registers.status & at.STATUS_NEEDS_RESET:
        pytest.skip("the device cannot be suspended, and says so")
    assert bench.registers.status & RUNS == at.STATUS_SUSPEND, "DRIVER_OK is still set"


def wake(bench: Bench) -> None:
    """Have it go on."""
    bench.registers.status |= at.STATUS_DRIVER_OK
    ended = (at.STATUS_DRIVER_OK, at.STATUS_DRIVER_OK | at.STATUS_NEEDS_RESET)
    seen = RUNS | at.STATUS_NEEDS_RESET
    assert bench.until(lambda: bench.registers.status & seen in ended), "it does not go on"
    if bench.registers.status & at.STATUS_NEEDS_RESET:
        pytest.skip("the device cannot go on, and says so")


@shows("BF-70", "BF-71", "BF-73", "BF-74")
def test_suspending_and_resuming(bench: Bench, rule: Rules) -> None:
    driver = to_be_suspended(bench)
    bench.interrupts()
    count = len(publish_read(bench, driver, 3))
    with rule("BF-70"):
        suspend(bench)
    interrupts = bench.registers.take_interrupt()
    done = driver.collect()
    # What it had not begun with may wait; what it has used, it has told of.
    with rule("BF-74"):
        assert interrupts & 1 or not done, "the interrupt for used buffers did not come before"
    bench.settle()
    with rule("BF-73"):
        assert not driver.ring.has_used, "requests were under way while it was suspended"
    with rule("BF-71"):
        wake(bench)
        while len(done) < count:
            assert bench.until(lambda: driver.ring.has_used), "what was available is lost"
            done |= driver.collect()
        assert all(each.status == 0 for each in done.values())
        driver.read(0, bench.unit // 512)


@shows("BF-72")
def test_nothing_is_taken_once_it_is_suspended(bench: Bench) -> None:
    driver = to_be_suspended(bench)
    for _ in range(4):
        driver.read(0, bench.unit // 512)
        suspend(bench)
        (head,) = publish_read(bench, driver)
        bench.settle()
        assert not driver.ring.has_used
        wake(bench)
        kick(driver)  # that of before may be lost: no driver may
        assert bench.until(lambda: driver.ring.has_used)
        assert driver.collect()[head].status == 0


@shows("BF-65", "BF-66")
def test_a_suspended_device_leaves_its_queues_alone(bench: Bench, rule: Rules) -> None:
    driver = to_be_suspended(bench)
    driver.read(0, bench.unit // 512)
    suspend(bench)
    bench.interrupts()
    for _ in range(bench.requests_that_fit(driver, 3)):  # which no driver may
        driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=bench.unit)
    driver.ring.publish()
    before = bench.ram()
    kick(driver)
    bench.settle()
    with rule("BF-66"):
        assert bench.ram() == before, "a suspended device has used its queue"
        assert not driver.ring.has_used, "a suspended device has used its queue"
    with rule("BF-65"):
        assert not bench.interrupts() & 1, "a suspended device has interrupted"


@shows("BF-64")
def test_a_suspended_device_ignores_its_configuration(split: Bench) -> None:
    driver = to_be_suspended(split)
    split.need(at.VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE")
    assert driver.features >> at.VIRTIO_BLK_F_CONFIG_WCE & 1
    suspend(split)
    before = split.registers.read_config(at.BLK_CONFIG_WRITEBACK, 1)
    split.registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, 1 - before)
    assert split.registers.read_config(at.BLK_CONFIG_WRITEBACK, 1) == before


@shows("BF-67", "BF-68", "BF-69")
def test_a_change_is_told_when_the_device_goes_on(split: Bench, rule: Rules) -> None:
    driver = to_be_suspended(split)
    suspend(split)
    capacity = driver.capacity
    split.interrupts()
    split.resize(capacity + 8)
    split.settle()
    with rule("BF-67"):
        assert driver.capacity == capacity, "a suspended device has changed its configuration"
    with rule("BF-68"):
        assert not split.interrupts() & 2, "a suspended device has told of a change"
    with rule("BF-69"):
        wake(split)
        assert split.interrupted(2), "the change was not told when the device went on"
        assert driver.capacity == capacity + 8
