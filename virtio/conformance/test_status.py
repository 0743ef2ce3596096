"""Status field, reset, configuration space, suspension (virtio 1.4 §2.1, §2.4, §2.5, §2.11)."""

from __future__ import annotations

from typing import Any

import pytest

from .. import layout as at
from .bench import Bench
from .plugin import Rules, shows

F_SUSPEND = 43
BLOCK_CONFIG = 60
"""Bytes of configuration that every block device may be asked for."""


def publish_read(driver: Any) -> int:
    """Make a read of the first sector available and kick whether that is wanted or not."""
    head: int = driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    driver.ring.publish()
    driver.registers.notify(driver.queue_index, with_data(driver))
    return head


def with_data(driver: Any) -> int | None:
    """What a kick carries."""
    negotiated = driver.features >> at.VIRTIO_F_NOTIFICATION_DATA & 1
    return driver.ring.next_place if negotiated else None


@shows("BF-05", "BF-06")
def test_nothing_is_used_before_driver_ok(bench: Bench, rule: Rules) -> None:
    bench.need_status()
    driver = bench.before_driver_ok()
    bench.interrupts()
    publish_read(driver)
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
        assert split.interrupts() & 2, "DEVICE_NEEDS_RESET was set without a notification"


@shows("BF-27")
def test_status_reads_0_after_a_reset(bench: Bench) -> None:
    driver = bench.start()
    publish_read(driver)
    bench.registers.status = 0
    assert bench.until(lambda: bench.registers.status == 0), "the reset never completes"


@shows("BF-28", "BF-29")
def test_a_device_that_was_reset_leaves_its_queues_alone(bench: Bench, rule: Rules) -> None:
    driver = bench.start()
    for _ in range(3):
        driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=4096)
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
    early = [read(offset, 1) for offset in range(BLOCK_CONFIG)]
    driver.negotiate()
    driver.set_up_queue()
    split.registers.status |= at.STATUS_DRIVER_OK
    late = [read(offset, 1) for offset in range(BLOCK_CONFIG)]
    early[at.BLK_CONFIG_WRITEBACK] = late[at.BLK_CONFIG_WRITEBACK]  # it follows the features
    assert early == late


@shows("BF-38", "BF-39")
def test_a_queue_that_was_reset_is_left_alone(bench: Bench, rule: Rules) -> None:
    bench.need_modern()
    bench.need(at.VIRTIO_F_RING_RESET, "RING_RESET")
    driver = bench.start()
    for _ in range(3):
        driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=1024)
    driver.ring.publish()
    bench.registers.select_queue(0)
    assert bench.until(bench.registers.reset_queue), "the queue's reset never completes"
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
        driver.flush()
    bench.registers.select_queue(0)
    bench.registers.reset_queue()
    driver.queue_size = size
    with rule("BF-40" if size == 16 else "BF-43"):
        driver.set_up_queue()
        for _ in range(2 * size):  # more than once around
            assert driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=512).status == 0


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
    assert driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=512).status == 0


@shows("BF-22", "BF-23")
def test_a_driver_without_version_1_is_a_legacy_one(split: Bench) -> None:
    split.need_legacy()
    driver = split.start()
    assert split.registers.status == 7, "a legacy status field has no FEATURES_OK"
    if not split.offers(at.VIRTIO_BLK_F_RO):
        driver.write(3, b"L" * 512)
        assert driver.read(3, 1) == b"L" * 512


# -- suspension ------------------------------------------------------------------------------


@shows("BF-63")
def test_suspend_is_ignored_before_initialization(split: Bench) -> None:
    split.need_status()
    split.before_driver_ok()
    split.registers.status |= at.STATUS_SUSPEND
    assert not split.registers.status & at.STATUS_SUSPEND


def suspended(bench: Bench, count: int = 0) -> Any:
    """A driver whose device was suspended behind ``count`` requests."""
    bench.need_status()
    bench.need(F_SUSPEND, "SUSPEND")
    driver = bench.driver()
    driver.features |= 1 << F_SUSPEND
    driver.start()
    for _ in range(count):
        driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    driver.kick()
    bench.registers.status |= at.STATUS_SUSPEND
    return driver


def is_suspended(bench: Bench) -> bool:
    """Suspended, or failed to be."""
    return bool(bench.registers.status & (at.STATUS_SUSPEND | at.STATUS_NEEDS_RESET))


@shows("BF-70", "BF-71", "BF-72", "BF-73", "BF-74")
def test_suspending_and_resuming(bench: Bench, rule: Rules) -> None:
    driver = suspended(bench, 3)
    with rule("BF-70"):
        assert bench.until(lambda: is_suspended(bench)), "the device is never suspended"
    interrupts = bench.registers.take_interrupt()
    with rule("BF-73"):
        assert len(driver.collect()) == 3, "requests are still under way"
    with rule("BF-74"):
        assert interrupts & 1, "their interrupt did not come"
    with rule("BF-71"):
        bench.registers.status |= at.STATUS_DRIVER_OK
        wanted = at.STATUS_DRIVER_OK | at.STATUS_NEEDS_RESET
        assert bench.until(lambda: bool(bench.registers.status & wanted)), "it does not resume"
        driver.flush()
    with rule("BF-72"):
        assert not driver.ring.has_used


@shows("BF-64", "BF-65", "BF-66", "BF-67", "BF-68", "BF-69")
def test_a_suspended_device_is_quiet(bench: Bench, rule: Rules) -> None:
    driver = suspended(bench)
    assert bench.until(lambda: is_suspended(bench))
    capacity = driver.capacity
    bench.interrupts()
    publish_read(driver)
    before = bench.ram()
    bench.settle()
    with rule("BF-66"):
        assert bench.ram() == before, "a suspended device has used its queue"
    with rule("BF-65"):
        assert not bench.interrupts() & 1
    if driver.features >> at.VIRTIO_BLK_F_CONFIG_WCE & 1:
        writeback = bench.registers.read_config(at.BLK_CONFIG_WRITEBACK, 1)
        bench.registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, 1 - writeback)
        with rule("BF-64"):
            assert bench.registers.read_config(at.BLK_CONFIG_WRITEBACK, 1) == writeback
    bench.resize(capacity + 8)
    with rule("BF-67"):
        assert driver.capacity == capacity, "a suspended device has changed its configuration"
    with rule("BF-68"):
        assert not bench.interrupts() & 2
    with rule("BF-69"):
        bench.registers.status |= at.STATUS_DRIVER_OK
        assert bench.interrupts() & 2, "the change was not told on resuming"
        assert driver.capacity == capacity + 8
