"""The device's state: saved on one machine, loaded on another, the driver goes on."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from pyvirtio import GuestMemory, ImageError, MemoryDisk, UnsupportedError, VirtioBlk, VirtioMmio
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.machine.state import Machine
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Registers

BASE = 0x8000_0000


def state_of(part: Any) -> bytes:
    stream = StateWriter()
    part.save_state(stream)
    return bytes(stream)


def load(part: Any, state: bytes) -> None:
    stream = StateReader(state, name="disk", version=part.state_version)
    adopt = part.load_state(stream)
    stream.end()
    adopt()


class Successor:
    """Another device, on a copy of the RAM and of the disk, that a machine's driver goes on with.

    The driver is a part of the test, not of the guest: it is led to the new registers and RAM.
    """

    def __init__(self, machine: Any, disk: Any, **options: Any) -> None:
        self.disk = disk
        self.disk.content[:] = machine.disk.content
        self.ram = bytearray(machine.ram)
        self.levels: list[bool] = []
        names = ("legacy", "order", "notify")
        transport = {name: options.pop(name) for name in names if name in options}
        options.setdefault("queue_size", 16)
        self.device = VirtioBlk(disk, **options)
        memory = GuestMemory.from_buffer(self.ram, BASE)
        self.mmio = VirtioMmio(self.device, memory, self.levels.append, **transport)
        self.state = state_of(machine.mmio)
        self._driver = machine.driver
        self._memory = memory

    def go_on(self) -> Any:
        """Load the state; gives the driver."""
        load(self.mmio, self.state)
        driver = self._driver
        driver.registers = Registers(self.mmio.read, self.mmio.write)
        driver.memory = driver.ring.memory = self._memory
        driver._wait = self.mmio.poll
        return driver


@pytest.mark.parametrize(
    "options", [{}, {"packed": True}, {"legacy": True}, {"legacy": True, "order": "big"}]
)
def test_a_queue_goes_on_on_another_device(
    make_started: Any, make_disk: Any, options: dict[str, Any]
) -> None:
    machine = make_started(**options)
    for number in range(20):  # once around the ring
        machine.driver.write(number, bytes([number]) * 512)
    driver = Successor(machine, make_disk(1 << 20), **options).go_on()
    for number in range(20):
        assert driver.read(number, 1) == bytes([number]) * 512
    driver.write(5, b"n" * 512)
    assert driver.read(5, 1) == b"n" * 512
    assert machine.disk.content[5 * 512] == 5


def test_what_was_available_and_not_served_is_served_after(
    make_started: Any, make_disk: Any
) -> None:
    machine = make_started(notify="deferred")
    head = machine.driver.submit(at.VIRTIO_BLK_T_OUT, 3, b"w" * 512)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    after = Successor(machine, make_disk(1 << 20), notify="deferred")
    driver = after.go_on()
    assert machine.disk.content[3 * 512] == 0
    assert after.mmio.poll()
    assert driver.collect()[head].status == 0
    assert after.disk.content[3 * 512 : 4 * 512] == b"w" * 512
    driver.flush()  # kicks, which were suppressed, are asked for again


def test_an_interrupt_that_was_not_acknowledged_is_still_there(
    make_started: Any, make_disk: Any
) -> None:
    machine = make_started()
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert machine.mmio.irq_level
    after = Successor(machine, make_disk(1 << 20))
    driver = after.go_on()
    assert after.levels == [True]
    assert driver.registers.load(at.MMIO_INTERRUPT_STATUS) == at.MMIO_INTERRUPT_USED_BUFFER
    driver.registers.store(at.MMIO_INTERRUPT_ACK, 1)
    assert after.levels == [True, False]


def test_saving_twice_gives_the_same(make_started: Any, make_disk: Any) -> None:
    machine = make_started()
    machine.driver.flush()
    machine.registers.store(at.MMIO_QUEUE_SEL, 7)
    after = Successor(machine, make_disk(1 << 20))
    after.go_on()
    assert state_of(after.mmio) == after.state


def test_a_device_that_needs_a_reset_still_does(make_started: Any, make_disk: Any) -> None:
    machine = make_started()
    machine.driver.ring.offer(9999)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    driver = Successor(machine, make_disk(1 << 20)).go_on()
    assert driver.registers.status == 15 | at.STATUS_NEEDS_RESET


def test_writethrough_stays(make_started: Any, make_disk: Any) -> None:
    machine = make_started()
    machine.device.write_config(at.BLK_CONFIG_WRITEBACK, b"\0")
    after = Successor(machine, make_disk(1 << 20))
    after.go_on()
    assert after.device.writeback is False
    assert after.device.read_config(at.BLK_CONFIG_WRITEBACK, 1) == b"\0"


def test_a_disk_of_another_size_is_told_to_the_driver(make_started: Any, make_disk: Any) -> None:
    machine = make_started()
    after = Successor(machine, make_disk(2 << 20))
    driver = after.go_on()
    assert driver.registers.load(at.MMIO_INTERRUPT_STATUS) & at.MMIO_INTERRUPT_CONFIG_CHANGE
    assert int.from_bytes(after.device.read_config(0, 8), "little") == (2 << 20) // 512


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_queues": 2}, "queues"),
        ({"queue_size": 32}, "entries"),
        ({"logical_block_size": 4096}, "blocks"),
        ({"legacy": True}, "virtio version"),
        ({"read_only": True}, "features"),
    ],
)
def test_a_device_that_differs_refuses_and_stays_as_it_is(
    make_started: Any, make_disk: Any, options: dict[str, Any], reason: str
) -> None:
    after = Successor(make_started(), make_disk(1 << 20), **options)
    before = state_of(after.mmio)
    with pytest.raises(ImageError, match=reason):
        after.go_on()
    assert state_of(after.mmio) == before


def test_a_newer_state_is_refused(make_machine: Any) -> None:
    machine = make_machine()
    state = bytearray(state_of(machine.device))
    struct.pack_into("<I", state, 4, 3)
    with pytest.raises(UnsupportedError, match="version 3"):
        load(machine.device, bytes(state))


def test_a_state_from_a_stranger_is_taken_or_refused(make_started: Any, make_disk: Any) -> None:
    """Whatever it says, loading either refuses it or gives a device that can be reset."""
    machine = make_started()
    state = state_of(machine.mmio)
    for index in range(len(state)):
        for value in (0, 1, 0x80, 0xFF):
            after = Successor(machine, make_disk(1 << 20))
            after.state = state[:index] + bytes([value]) + state[index + 1 :]
            before = state_of(after.mmio)
            try:
                driver = after.go_on()
            except (ImageError, UnsupportedError):
                assert state_of(after.mmio) == before
            else:
                driver.registers.notify(0)
                driver.registers.status = 0
                assert driver.registers.status == 0


def test_a_device_is_not_saved_inside_a_request(make_started: Any, make_disk: Any) -> None:
    class Saving(type(make_disk(0))):  # type: ignore[misc]
        def _flush(self) -> None:
            with pytest.raises(ValueError, match="inside"):
                machine.device.save_state(StateWriter())
            tried.append(True)

    tried: list[bool] = []
    machine = make_started(disk=Saving(1 << 20))
    machine.driver.flush()
    assert tried


def test_a_device_is_a_component_of_a_machine(make_started: Any) -> None:
    board = make_started()
    machine = Machine({"disk": board.mmio}, {"main": board.ram})
    board.driver.write(0, b"x" * 512)
    store = MemoryDisk(growable=True)
    machine.save(store)
    was = state_of(board.mmio), bytes(board.ram)
    board.driver.start()
    board.driver.write(0, b"y" * 512)
    machine.load(store)
    assert (state_of(board.mmio), bytes(board.ram)) == was
