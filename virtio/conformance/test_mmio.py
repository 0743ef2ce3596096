"""The registers of virtio over MMIO (virtio 1.4 §4.2)."""

from __future__ import annotations

from typing import Any

import pytest

from .. import layout as at
from .bench import Bench
from .plugin import Rules, shows
from .test_status import publish_read, queue_reset_while_the_disk_waits, with_data


@pytest.fixture
def mmio(split: Bench) -> Bench:
    """A bench with a device on MMIO, version 2."""
    if split.device.transport != "mmio":
        pytest.skip("for devices on MMIO")
    split.need_modern()
    return split


@pytest.fixture
def legacy(split: Bench) -> Bench:
    """The same, version 1."""
    if split.device.transport != "mmio":
        pytest.skip("for devices on MMIO")
    split.need_legacy()
    return split


@shows("MMIO-01", "MMIO-02")
def test_identity(mmio: Bench, rule: Rules) -> None:
    with rule("MMIO-01"):
        assert mmio.registers.load(at.MMIO_MAGIC_VALUE) == 0x74726976
    with rule("MMIO-02"):
        assert mmio.registers.load(at.MMIO_VERSION) == 2


@shows("MMIO-46", "MMIO-47", "MMIO-48", "MMIO-49")
def test_legacy_registers(legacy: Bench, rule: Rules) -> None:
    load = legacy.registers.load
    with rule("MMIO-46"):
        assert load(at.MMIO_VERSION) == 1
    driver = legacy.start()
    with rule("MMIO-47"):
        assert load(at.MMIO_QUEUE_PFN) == driver.ring.descriptors // driver.page_size
    with rule("MMIO-49"):
        assert legacy.registers.select_queue(0xFFFF) == 0
    legacy.registers.status = 0
    legacy.registers.select_queue(0)
    with rule("MMIO-48"):
        assert load(at.MMIO_QUEUE_PFN) == 0


@shows("MMIO-03", "MMIO-04")
def test_interrupt_status_until_it_is_acknowledged(mmio: Bench, rule: Rules) -> None:
    load, store = mmio.registers.load, mmio.registers.store
    driver = mmio.start()
    with rule("MMIO-04"):
        assert load(at.MMIO_INTERRUPT_STATUS) == 0
    driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=mmio.unit)
    driver.kick()
    assert mmio.until(lambda: driver.ring.has_used)
    with rule("MMIO-03"):
        assert mmio.until(lambda: load(at.MMIO_INTERRUPT_STATUS) & 1 == 1)
        mmio.settle()
        assert [load(at.MMIO_INTERRUPT_STATUS) & 1 for _ in range(3)] == [1, 1, 1]
    with rule("MMIO-04"):
        assert load(at.MMIO_INTERRUPT_STATUS) == 1
    with rule("MMIO-03"):
        store(at.MMIO_INTERRUPT_ACK, 2)
        assert load(at.MMIO_INTERRUPT_STATUS) & 1, "another bit was acknowledged"
        store(at.MMIO_INTERRUPT_ACK, 1)
        assert load(at.MMIO_INTERRUPT_STATUS) == 0, "it was acknowledged"


@shows("MMIO-05", "MMIO-06")
def test_reset_clears_interrupts_and_queues(mmio: Bench, rule: Rules) -> None:
    driver = mmio.start()
    publish_read(mmio, driver)
    mmio.settle()
    mmio.registers.status = 0
    assert mmio.until(lambda: mmio.registers.status == 0)
    with rule("MMIO-05"):
        assert mmio.registers.load(at.MMIO_INTERRUPT_STATUS) == 0
    with rule("MMIO-06"):
        index = 0
        while mmio.registers.select_queue(index):
            assert mmio.registers.load(at.MMIO_QUEUE_READY) == 0
            index += 1


@shows("MMIO-07")
def test_generation_follows_the_configuration(mmio: Bench) -> None:
    driver = mmio.start()
    low, high = at.MMIO_CONFIG, at.MMIO_CONFIG + 4
    sectors = driver.capacity
    for _ in range(3):  # what a driver does that reads both halves, while the disk changes
        before = mmio.registers.generation()
        mmio.registers.load(low)
        sectors += 8
        mmio.resize(sectors)
        mmio.registers.load(high)
        assert mmio.registers.generation() != before


@shows("MMIO-08")
def test_a_queue_that_is_not_ready_is_left_alone(mmio: Bench) -> None:
    driver = mmio.start()
    mmio.registers.select_queue(0)
    mmio.registers.store(at.MMIO_QUEUE_READY, 0)
    assert mmio.until(lambda: mmio.registers.load(at.MMIO_QUEUE_READY) == 0)
    driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=mmio.unit)
    driver.ring.publish()
    before = mmio.ram()
    driver.registers.notify(0, with_data(driver))
    mmio.settle()
    assert mmio.ram() == before


@shows("MMIO-09", "MMIO-10", "MMIO-11", "MMIO-13")
def test_queue_reset(mmio: Bench, rule: Rules) -> None:
    mmio.need(at.VIRTIO_F_RING_RESET, "RING_RESET")
    registers = mmio.registers
    driver = mmio.start()
    registers.select_queue(0)
    with rule("MMIO-10"):
        assert registers.load(at.MMIO_QUEUE_RESET) == 0
    driver.read(0, mmio.unit // 512)
    registers.store(at.MMIO_QUEUE_RESET, 1)
    with rule("MMIO-13"):
        assert mmio.until(lambda: registers.load(at.MMIO_QUEUE_RESET) == 0)
        assert registers.load(at.MMIO_QUEUE_READY) == 0
    with rule("MMIO-11"):
        driver.set_up_queue()
        driver.read(0, mmio.unit // 512)
    registers.status = 0
    driver.start()
    registers.status = 0
    assert mmio.until(lambda: registers.status == 0)
    registers.select_queue(0)
    with rule("MMIO-09"):
        assert registers.load(at.MMIO_QUEUE_RESET) == 0


@shows("MMIO-54")
def test_no_admin_queues(split: Bench) -> None:
    if split.device.transport != "mmio":
        pytest.skip("for devices on MMIO")
    assert not split.offers(41)


@shows("MMIO-12")
def test_a_queue_reset_that_takes_its_time(make_bench: Any) -> None:
    bench = make_bench(stalls=True)
    if bench.device.transport != "mmio":
        pytest.skip("for devices on MMIO")
    bench.need_modern()
    registers = bench.registers
    queue_reset_while_the_disk_waits(
        bench,
        start=lambda: registers.store(at.MMIO_QUEUE_RESET, 1),
        resetting=lambda: registers.load(at.MMIO_QUEUE_RESET),
        enabled=lambda: registers.load(at.MMIO_QUEUE_READY),
    )
