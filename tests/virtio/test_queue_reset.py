"""Resetting one queue (§2.6.1, §4.2.2: QueueReset), split and packed."""

from __future__ import annotations

from typing import Any

import pytest

from pyvirtio.virtio import layout as at

NO_RESET = {"features": (1 << 41) - 1 & ~(1 << at.VIRTIO_F_RING_RESET)}


@pytest.fixture(params=["split", "packed"])
def make(request: pytest.FixtureRequest, make_machine: Any) -> Any:
    """``make(**options)``: a started machine, over either kind of queue."""

    def machine(**options: Any) -> Any:
        made = make_machine(packed=request.param == "packed", **options)
        made.driver.start()
        made.mmio.poll()
        return made

    return machine


def test_ring_reset_is_offered(make_machine: Any) -> None:
    assert make_machine().registers.offered_features() >> at.VIRTIO_F_RING_RESET & 1


def test_a_legacy_device_has_no_queue_reset(make_machine: Any) -> None:
    machine = make_machine(legacy=True)
    machine.driver.start()
    machine.registers.store(at.MMIO_QUEUE_RESET, 1)
    assert machine.registers.load(at.MMIO_QUEUE_RESET) == 0
    machine.driver.flush()


def test_queue_reset_reads_0_after_device_reset_mmio_09(make: Any) -> None:
    registers = make().registers
    registers.store(at.MMIO_QUEUE_RESET, 1)
    registers.status = 0
    assert registers.load(at.MMIO_QUEUE_RESET) == 0


def test_queue_reset_reads_0_after_enabling_mmio_10(make: Any) -> None:
    machine = make()
    assert machine.registers.reset_queue()
    machine.driver.set_up_queue()
    assert machine.registers.load(at.MMIO_QUEUE_RESET) == 0


def test_the_queue_is_let_go_of_mmio_11_mmio_13_bf_38(make: Any) -> None:
    machine = make()
    machine.driver.flush()
    assert machine.registers.reset_queue()
    assert machine.registers.load(at.MMIO_QUEUE_READY) == 0
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    before = bytes(machine.ram)
    machine.registers.notify(0)
    machine.mmio.poll()
    assert bytes(machine.ram) == before
    assert machine.disk.calls == [("flush",)]


def test_kicks_that_wait_are_forgotten_bf_38_bf_39(make: Any) -> None:
    machine = make(notify="deferred")
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()
    assert machine.registers.reset_queue()
    assert not machine.mmio.poll()
    assert (machine.disk.calls, machine.levels) == ([], [])


def test_all_state_is_as_at_the_start_bf_40(make: Any) -> None:
    machine = make(queue_size=32)
    state = machine.device.state
    first = state.queues[0]
    for _ in range(20):
        machine.driver.flush()
    machine.registers.reset_queue()
    fresh = state.queues[0]
    assert fresh == type(first)(32, 32)
    assert fresh is machine.device.queues[0].state


def test_the_queue_can_be_another_one_afterwards_bf_43_mmio_36(make: Any) -> None:
    """Of another size, and elsewhere."""
    machine = make(queue_size=64)
    machine.driver.write(0, b"a" * 512)
    for size in (4, 16, 64):
        assert machine.registers.reset_queue()
        machine.driver.queue_size = size
        machine.driver.set_up_queue()
        assert machine.device.queues[0].state.size == size
        for sector in range(size):
            machine.driver.write(sector, bytes([size]) * 512)
    assert machine.disk.content[: 64 * 512] == bytes([64]) * 64 * 512
    assert machine.registers.status == 15


def test_other_queues_go_on(make: Any) -> None:
    machine = make(num_queues=2)
    machine.registers.select_queue(1)
    assert machine.registers.reset_queue()
    machine.driver.write(2, b"o" * 512)
    assert machine.disk.content[1024:1536] == b"o" * 512


def test_without_the_feature_nothing_is_reset(make: Any) -> None:
    machine = make(driver=NO_RESET)
    machine.registers.select_queue(0)
    machine.registers.store(at.MMIO_QUEUE_RESET, 1)
    assert machine.registers.load(at.MMIO_QUEUE_READY) == 1
    machine.driver.flush()


@pytest.mark.parametrize("value", [0, 2, 0xFFFF_FFFE])
def test_only_1_resets(make: Any, value: int) -> None:
    machine = make()
    machine.registers.select_queue(0)
    machine.registers.store(at.MMIO_QUEUE_RESET, value)
    machine.driver.flush()


def test_a_queue_that_is_none_is_not_reset(make: Any) -> None:
    machine = make()
    machine.registers.select_queue(7)
    machine.registers.store(at.MMIO_QUEUE_RESET, 1)
    assert machine.registers.load(at.MMIO_QUEUE_RESET) == 0
    machine.driver.flush()


def test_a_reset_under_a_request_goes_on_to_its_end_mmio_12_bf_39(make: Any) -> None:
    """The disk's code has the queue reset; what is behind that request is not done."""
    machine = make()
    machine.registers.select_queue(0)
    seen = []
    original = machine.disk._flush

    def flush() -> None:
        original()
        machine.registers.store(at.MMIO_QUEUE_RESET, 1)
        seen.append(machine.registers.load(at.MMIO_QUEUE_RESET))

    machine.disk._flush = flush
    for _ in range(3):
        machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()
    seen.append(machine.registers.load(at.MMIO_QUEUE_RESET))
    assert seen == [1, 0]
    assert (len(machine.disk.calls), machine.levels) == (1, [])
    assert machine.driver.collect() == {}
