"""A device is paused and resumed: nothing is done between, and no kick is lost."""

from __future__ import annotations

from typing import Any

import pytest

from pyvirtio import GuestMemory
from pyvirtio.virtio import layout as at

KINDS = [
    {},
    {"memory": "callbacks"},
    {"packed": True},
    {"packed": True, "in_order": True},
    {"notify": "deferred"},
    {"driver": {"features": 1 << at.VIRTIO_F_VERSION_1}},
]


@pytest.fixture(params=KINDS, ids=str)
def machine(request: pytest.FixtureRequest, make_started: Any) -> Any:
    return make_started(**request.param)


def finish(machine: Any) -> Any:
    machine.mmio.poll()
    return machine.driver.collect()


def test_nothing_is_done_until_resume(machine: Any) -> None:
    machine.driver.write(0, b"1" * 512)
    machine.device.pause()
    head = machine.driver.submit(at.VIRTIO_BLK_T_OUT, 1, b"2" * 512)
    machine.driver.kick()
    assert finish(machine) == {}
    assert machine.device.paused
    machine.device.resume()
    assert finish(machine)[head].status == 0
    machine.driver.write(2, b"3" * 512)
    assert machine.disk.content[: 3 * 512] == b"1" * 512 + b"2" * 512 + b"3" * 512


def test_a_kick_that_was_never_sent_is_not_needed(machine: Any) -> None:
    """Kicks may be suppressed at the pause: what is available is found without one."""
    machine.device.pause()
    head = machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    machine.device.resume()
    assert finish(machine)[head].status == 0


def test_kicks_that_were_suppressed_are_asked_for_again(make_started: Any) -> None:
    machine = make_started(notify="deferred", driver={"features": 1 << at.VIRTIO_F_VERSION_1})
    machine.driver.flush()
    head = machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()
    assert machine.driver.ring.used_flags == at.VIRTQ_USED_F_NO_NOTIFY
    machine.device.pause()
    machine.device.resume()
    assert finish(machine)[head].status == 0
    assert machine.driver.ring.used_flags == 0
    machine.driver.flush()


def test_pausing_twice_is_pausing_once(machine: Any) -> None:
    machine.device.pause()
    machine.device.pause()
    machine.device.resume()
    machine.device.resume()
    machine.driver.flush()


def test_pause_from_inside_a_request_finishes_that_one(machine: Any) -> None:
    original = machine.disk._note

    def pause(*call: Any) -> None:
        original(*call)
        machine.device.pause()

    machine.disk._note = pause
    heads = [machine.driver.submit(at.VIRTIO_BLK_T_OUT, n, bytes(512)) for n in range(3)]
    machine.driver.kick()
    assert list(finish(machine)) == heads[:1]
    assert [call[0] for call in machine.disk.calls].count("write") == 1
    machine.disk._note = original
    machine.device.resume()
    assert list(finish(machine)) == heads[1:]
    assert not machine.driver.registers.status & at.STATUS_NEEDS_RESET


def test_resume_from_inside_a_request_is_refused(machine: Any) -> None:
    refused = []

    def pause(*call: Any) -> None:
        machine.device.pause()
        with pytest.raises(ValueError, match="inside"):
            machine.device.resume()
        refused.append(call)

    machine.disk._note = pause
    machine.driver.flush()
    assert refused


def test_reset_while_paused(machine: Any) -> None:
    machine.device.pause()
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()
    machine.driver.start()
    machine.device.resume()
    assert machine.disk.calls == []
    machine.driver.flush()


def test_a_queue_that_is_enabled_while_paused_works_after(make_machine: Any) -> None:
    machine = make_machine()
    machine.device.pause()
    machine.driver.start()
    head = machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()
    assert finish(machine) == {}
    machine.device.resume()
    assert finish(machine)[head].status == 0


def test_memory_is_replaced_under_a_device(make_started: Any) -> None:
    machine = make_started()
    machine.driver.write(0, b"o" * 512)
    ram = bytearray(machine.ram)
    memory = GuestMemory.from_buffer(ram, machine.base)
    machine.device.set_memory(memory)
    driver = machine.driver
    driver.memory = driver.ring.memory = memory
    before = bytes(machine.ram)
    assert driver.read(0, 1) == b"o" * 512
    driver.write(1, b"n" * 512)
    assert machine.ram == before
    assert machine.disk.content[512:1024] == b"n" * 512


def test_memory_without_the_rings_breaks_the_device(make_started: Any) -> None:
    machine = make_started()
    machine.device.set_memory(GuestMemory.from_buffer(bytearray(4096)))
    assert machine.registers.status & at.STATUS_NEEDS_RESET


def test_a_stopped_queue_keeps_its_indices(make_started: Any) -> None:
    machine = make_started()
    for _ in range(5):
        machine.driver.flush()
    machine.device.stop_queue(0)
    state = machine.device.queue_state(0)
    assert (state.ready, state.next_avail, state.used_index) == (False, 5, 5)
    machine.device.enable_queue(0)
    machine.driver.flush()
    assert machine.device.queue_state(1) is None
