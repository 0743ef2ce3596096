"""Kicks that say how far the ring is filled (§4.2.3.3)."""

from __future__ import annotations

from typing import Any

import pytest

from pyvirtio.virtio import layout as at


@pytest.fixture
def kicks(make_machine: Any) -> Any:
    """``kicks(**options)``: a started machine, and the list of what goes to QueueNotify."""

    def make(**options: Any) -> tuple[Any, list[int]]:
        machine = make_machine(**options)
        values: list[int] = []

        def write(offset: int, size: int, value: int) -> None:
            if offset == at.MMIO_QUEUE_NOTIFY:
                values.append(value)
            machine.mmio.write(offset, size, value)

        machine.registers.write = write
        machine.driver.start()
        return machine, values

    return make


@pytest.mark.parametrize("wanted", [False, True])
def test_it_is_an_option(make_machine: Any, wanted: bool) -> None:
    offered = make_machine(notification_data=wanted).registers.offered_features()
    assert offered >> at.VIRTIO_F_NOTIFICATION_DATA & 1 == wanted


def test_a_legacy_device_has_none(kicks: Any) -> None:
    machine, values = kicks(notification_data=True, legacy=True)
    machine.driver.flush()
    assert values == [0]


@pytest.mark.parametrize("notify", ["inline", "deferred"])
def test_split_kicks_carry_the_available_index(kicks: Any, notify: str) -> None:
    machine, values = kicks(notification_data=True, notify=notify)
    for _ in range(3):
        machine.driver.flush()
    assert values == [1 << 16, 2 << 16, 3 << 16]
    assert machine.disk.calls == [("flush",)] * 3


def test_packed_kicks_carry_place_and_wrap_counter_pkd_11(kicks: Any) -> None:
    machine, values = kicks(notification_data=True, packed=True, queue_size=4)
    for _ in range(4):
        machine.driver.flush()
    assert [value >> 16 for value in values] == [1 << 15 | 2, 0, 2, 1 << 15]
    assert machine.disk.calls == [("flush",)] * 4


@pytest.mark.parametrize("data", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_what_the_data_says_is_not_relied_on(kicks: Any, data: int) -> None:
    machine, _ = kicks(notification_data=True)
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    machine.registers.notify(0, data)
    assert machine.disk.calls == [("flush",)]


@pytest.mark.parametrize("value", [1, 0xFFFF, 0xFFFF_FFFF])
def test_a_queue_that_is_none_is_not_kicked(kicks: Any, value: int) -> None:
    machine, _ = kicks(notification_data=True)
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    machine.registers.store(at.MMIO_QUEUE_NOTIFY, value)
    assert (machine.disk.calls, machine.registers.status) == ([], 15)


def test_without_it_the_value_is_the_queue_and_nothing_else(kicks: Any) -> None:
    machine, _ = kicks()
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    machine.registers.notify(0, 1)
    assert machine.disk.calls == []
    machine.registers.notify(0)
    assert machine.disk.calls == [("flush",)]


def test_a_reset_ends_it(kicks: Any) -> None:
    machine, values = kicks(notification_data=True)
    machine.driver.features &= ~(1 << at.VIRTIO_F_NOTIFICATION_DATA)
    machine.driver.start()
    machine.driver.flush()
    machine.registers.notify(0, 7)
    assert values == [0, 7 << 16]
