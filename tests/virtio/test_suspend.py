"""Suspension (VIRTIO_F_SUSPEND): the device stands still, and goes on as if nothing had been."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from time import sleep
from typing import Any

import pytest

from pyvirtio import (
    ErrorPolicy,
    GuestMemory,
    ImageError,
    VirtioBlk,
    VirtioMmio,
    VirtioPci,
)
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.virtio import layout as at
from pyvirtio.virtio import pci_layout as pci
from pyvirtio.virtio.driver import Arena, BlockDriver, DriverError, PciFunction, PciRegisters

SUSPENDED = 15 - at.STATUS_DRIVER_OK | at.STATUS_SUSPEND
PATIENCE = 30
"""Seconds after which a test that waits has failed."""
PLAIN = sum(
    1 << bit for bit in (at.VIRTIO_F_VERSION_1, at.VIRTIO_F_SUSPEND, at.VIRTIO_F_RING_RESET)
)
KINDS = [
    {},
    {"memory": "callbacks"},
    {"packed": True},
    {"packed": True, "in_order": True},
    {"notify": "deferred"},
    {"driver": {"features": PLAIN}},
]


@pytest.fixture(params=KINDS, ids=str)
def machine(request: pytest.FixtureRequest, make_started: Any) -> Any:
    return make_started(**request.param)


def available_write(machine: Any, sector: int, letter: bytes) -> int:
    """A write that is made available and kicked for, whether that is wanted or not."""
    head: int = machine.driver.submit(at.VIRTIO_BLK_T_OUT, sector, letter * 512)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    return head


def finish(machine: Any) -> Any:
    machine.mmio.poll()
    return machine.driver.collect()


# -- the driver's view -----------------------------------------------------------------------


def test_suspend_shows_in_place_of_driver_ok_bf_70(machine: Any) -> None:
    machine.driver.suspend()
    assert machine.registers.status == SUSPENDED
    assert machine.device.suspended
    machine.driver.resume()
    assert machine.registers.status == 15
    machine.driver.write(0, b"1" * 512)


def test_ten_times_in_a_row_bf_71(machine: Any) -> None:
    for number in range(10):
        machine.driver.suspend()
        machine.driver.resume()
        machine.driver.write(number, bytes([number]) * 512)
    assert machine.disk.content[512 * 9] == 9


def test_nothing_is_done_and_nothing_is_lost_bf_65_bf_66(machine: Any) -> None:
    machine.driver.flush()
    machine.registers.take_interrupt()
    machine.driver.suspend()
    machine.levels.clear()
    head = available_write(machine, 1, b"2")
    before = bytes(machine.ram)
    machine.registers.notify(0)
    machine.mmio.poll()
    assert bytes(machine.ram) == before
    assert machine.levels == []
    machine.driver.resume()
    assert finish(machine)[head].status == 0
    assert machine.disk.content[512:1024] == b"2" * 512


def test_what_was_kicked_before_is_not_lost(make_started: Any) -> None:
    machine = make_started(notify="deferred")
    head = available_write(machine, 1, b"2")
    machine.driver.suspend()
    assert finish(machine) == {}
    machine.driver.resume()
    assert finish(machine)[head].status == 0


def test_kicks_that_were_suppressed_are_asked_for_again(make_started: Any) -> None:
    features = 1 << at.VIRTIO_F_VERSION_1 | 1 << at.VIRTIO_F_SUSPEND
    machine = make_started(notify="deferred", driver={"features": features})
    machine.driver.flush()
    head = available_write(machine, 0, b"a")
    assert machine.driver.ring.used_flags == at.VIRTQ_USED_F_NO_NOTIFY
    machine.driver.suspend()
    machine.driver.resume()
    assert finish(machine)[head].status == 0
    assert machine.driver.ring.used_flags == 0
    machine.driver.flush()


@pytest.mark.parametrize("value", [16, 31])
def test_it_is_ignored_before_driver_ok_bf_63(make_machine: Any, value: int) -> None:
    machine = make_machine()
    driver, registers = machine.driver, machine.registers
    driver.identify()
    registers.status = 16 | 3
    assert registers.status == 3
    driver.negotiate()
    driver.set_up_queue()
    registers.status |= value
    assert not registers.status & at.STATUS_SUSPEND
    registers.status |= at.STATUS_DRIVER_OK
    assert registers.status == 15
    driver.flush()


def test_it_is_ignored_unless_it_was_negotiated(make_started: Any) -> None:
    machine = make_started(driver={"features": 1 << at.VIRTIO_F_VERSION_1})
    machine.registers.status |= at.STATUS_SUSPEND
    assert machine.registers.status == 15
    machine.driver.flush()


def test_a_legacy_device_has_no_such_thing(make_started: Any) -> None:
    machine = make_started(legacy=True)
    machine.registers.status |= at.STATUS_SUSPEND
    assert machine.registers.status == 7
    machine.driver.flush()


def test_a_reset_ends_it(machine: Any) -> None:
    machine.driver.suspend()
    available_write(machine, 0, b"x")
    machine.registers.status = 0
    assert machine.registers.status == 0
    machine.driver.start()
    machine.mmio.poll()
    assert machine.disk.calls == []
    machine.driver.flush()


def test_failed_may_be_said_and_ends_nothing(make_started: Any) -> None:
    machine = make_started()
    machine.driver.suspend()
    machine.registers.status |= at.STATUS_FAILED
    assert machine.registers.status == SUSPENDED | at.STATUS_FAILED


def test_a_queue_is_reset_and_used_again(machine: Any) -> None:
    machine.driver.suspend()
    available_write(machine, 0, b"x")
    machine.registers.select_queue(0)
    assert machine.registers.reset_queue()
    machine.driver.set_up_queue()
    machine.driver.resume()
    machine.mmio.poll()
    assert machine.disk.calls == []
    machine.driver.flush()


def test_a_queue_that_cannot_be_needs_a_reset_when_it_is_to_go_on_bf_71(make_started: Any) -> None:
    machine = make_started()
    machine.driver.suspend()
    machine.registers.select_queue(0)
    machine.registers.reset_queue()
    machine.registers.enable_queue(16, 1 << 40, 1 << 40, 1 << 40)
    machine.registers.take_interrupt()
    machine.registers.status |= at.STATUS_DRIVER_OK
    assert machine.registers.status & at.STATUS_NEEDS_RESET
    assert machine.registers.take_interrupt() == at.MMIO_INTERRUPT_CONFIG_CHANGE  # BF-08
    machine.driver.start()
    machine.driver.flush()


def test_the_driver_says_what_is_wrong(make_started: Any) -> None:
    machine = make_started(driver={"features": 1 << at.VIRTIO_F_VERSION_1})
    with pytest.raises(DriverError, match="stays 0xf"):
        machine.driver.suspend(timeout=0)
    machine = make_started()
    machine.driver.ring.offer(9999)
    machine.driver.kick()
    with pytest.raises(DriverError, match="reset"):
        machine.driver.suspend()


# -- configuration ---------------------------------------------------------------------------


def test_configuration_is_not_written_bf_64(make_started: Any) -> None:
    machine = make_started()
    machine.driver.suspend()
    machine.registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, 0)
    assert machine.registers.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 1
    machine.driver.resume()
    machine.registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, 0)
    assert machine.registers.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 0


def test_writethrough_stays_over_it(make_started: Any) -> None:
    machine = make_started()
    machine.registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, 0)
    machine.driver.suspend()
    machine.driver.resume()
    assert machine.registers.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 0


def test_a_driver_that_never_says_features_ok_keeps_its_cache_mode(make_machine: Any) -> None:
    machine = make_machine()
    driver, registers = machine.driver, machine.registers
    driver.identify()
    registers.accept_features(registers.offered_features())
    driver.set_up_queue()
    registers.status |= at.STATUS_DRIVER_OK
    registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, 0)
    driver.suspend()
    driver.resume()
    assert registers.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 0


def test_a_resize_is_told_on_waking_bf_67_to_bf_69(machine: Any) -> None:
    machine.driver.flush()
    machine.driver.suspend()
    machine.registers.take_interrupt()
    before, generation = machine.driver.capacity, machine.registers.generation()
    machine.disk.truncate(1 << 21)
    machine.disk.truncate(1 << 22)
    assert machine.driver.capacity == before
    assert machine.registers.generation() == generation
    assert machine.registers.take_interrupt() == 0
    machine.driver.resume()
    assert machine.driver.capacity == 1 << 13
    assert machine.registers.generation() != generation
    assert machine.registers.take_interrupt() & at.MMIO_INTERRUPT_CONFIG_CHANGE
    assert machine.driver.read((1 << 13) - 1, 1) == bytes(512)


def test_what_has_changed_and_is_as_before_is_not_told(make_started: Any) -> None:
    machine = make_started()
    machine.driver.suspend()
    machine.disk.truncate(1 << 21)
    machine.disk.truncate(1 << 20, shrink=True)
    machine.driver.resume()
    assert machine.registers.take_interrupt() == 0


# -- the host's actions ----------------------------------------------------------------------


def test_the_host_pauses_a_suspended_device(machine: Any) -> None:
    machine.driver.suspend()
    machine.device.pause()
    head = available_write(machine, 0, b"p")
    machine.device.resume()
    assert finish(machine) == {}
    assert machine.registers.status == SUSPENDED
    machine.driver.resume()
    assert finish(machine)[head].status == 0


def test_the_driver_suspends_and_wakes_a_paused_device(machine: Any) -> None:
    machine.device.pause()
    machine.driver.suspend()
    machine.driver.resume()
    head = available_write(machine, 0, b"p")
    assert finish(machine) == {}
    machine.device.resume()
    assert finish(machine)[head].status == 0


def test_memory_is_replaced_under_it(make_started: Any) -> None:
    machine = make_started()
    machine.driver.suspend()
    ram = bytearray(machine.ram)
    memory = GuestMemory.from_buffer(ram, machine.base)
    machine.device.set_memory(memory)
    machine.driver.memory = machine.driver.ring.memory = memory
    assert machine.registers.status == SUSPENDED
    machine.driver.resume()
    machine.driver.write(0, b"n" * 512)


def test_memory_without_the_rings_shows_on_waking_bf_71(make_started: Any) -> None:
    machine = make_started()
    machine.driver.suspend()
    machine.device.set_memory(GuestMemory.from_buffer(bytearray(4096)))
    assert machine.registers.status == SUSPENDED
    with pytest.raises(DriverError, match="reset"):
        machine.driver.resume()
    assert machine.registers.status & at.STATUS_NEEDS_RESET


def test_from_inside_a_request_it_waits_for_that_one_bf_73_bf_74(machine: Any) -> None:
    original = machine.disk._note
    seen = []

    def suspend(*call: Any) -> None:
        original(*call)
        machine.registers.status |= at.STATUS_SUSPEND
        seen.append(machine.registers.status)

    machine.disk._note = suspend
    heads = [machine.driver.submit(at.VIRTIO_BLK_T_IN, n, incoming=512) for n in range(3)]
    machine.driver.kick()
    machine.mmio.poll()
    assert seen == [15]
    assert machine.registers.status == SUSPENDED
    assert machine.registers.take_interrupt() & at.MMIO_INTERRUPT_USED_BUFFER
    assert list(machine.driver.collect()) == heads[:1]
    machine.disk._note = original
    machine.driver.resume()
    assert list(finish(machine)) == heads[1:]


def test_a_request_that_an_error_has_stopped_is_done_first_bf_73(make_machine: Any) -> None:
    machine = make_machine(errors=ErrorPolicy(writes="stop"))
    machine.driver.start()
    machine.disk.error = OSError(errno.EIO, "no")
    first = available_write(machine, 0, b"1")
    assert machine.device.paused
    second = machine.driver.submit(at.VIRTIO_BLK_T_OUT, 1, b"2" * 512)
    machine.driver.ring.publish()
    machine.registers.status |= at.STATUS_SUSPEND
    assert machine.registers.status == 15, "a request is under way"
    machine.device.resume()
    assert machine.registers.status == 15, "it has failed again"
    machine.disk.error = None
    machine.device.resume()
    assert machine.registers.status == SUSPENDED
    assert list(machine.driver.collect()) == [first]
    machine.driver.resume()
    assert list(machine.driver.collect()) == [second]


def test_the_reset_of_the_queue_of_a_stopped_request_lets_it_go(make_machine: Any) -> None:
    machine = make_machine(errors=ErrorPolicy(writes="stop"))
    machine.driver.start()
    machine.disk.error = OSError(errno.EIO, "no")
    available_write(machine, 0, b"1")
    machine.registers.status |= at.STATUS_SUSPEND
    machine.registers.select_queue(0)
    machine.registers.reset_queue()
    assert machine.registers.status == SUSPENDED


def test_an_error_of_the_driver_ends_it_in_needs_reset_bf_70(make_machine: Any) -> None:
    machine = make_machine(errors=ErrorPolicy(writes="stop"))
    machine.driver.start()
    machine.disk.error = OSError(errno.EIO, "no")
    available_write(machine, 0, b"1")
    machine.registers.status |= at.STATUS_SUSPEND
    machine.device.stop_working()
    assert machine.registers.status == 15 | at.STATUS_NEEDS_RESET


# -- saving ----------------------------------------------------------------------------------


class Successor:
    """Another device that a machine's driver goes on with."""

    def __init__(self, machine: Any, disk: Any, **options: Any) -> None:
        stream = StateWriter()
        machine.mmio.save_state(stream)
        self.disk = disk
        self.ram = bytearray(machine.ram)
        memory = GuestMemory.from_buffer(self.ram, machine.base)
        self.device = VirtioBlk(disk, queue_size=16, **options)
        self.mmio = VirtioMmio(self.device, memory)
        self.registers = machine.registers
        state = StateReader(bytes(stream), name="disk", version=self.mmio.state_version)
        adopt = self.mmio.load_state(state)
        self.registers.read, self.registers.write = self.mmio.read, self.mmio.write
        self.driver = machine.driver
        self.driver.memory = self.driver.ring.memory = memory
        self.driver._wait = self.mmio.poll
        adopt()


def test_a_suspended_device_goes_on_elsewhere_bf_67_to_bf_69(
    make_started: Any, make_disk: Any
) -> None:
    machine = make_started()
    machine.driver.suspend()
    head = available_write(machine, 0, b"s")
    after = Successor(machine, make_disk(1 << 21))
    assert after.registers.status == SUSPENDED
    assert after.driver.capacity == 1 << 11
    assert after.registers.take_interrupt() == 0
    after.driver.resume()
    assert after.driver.collect()[head].status == 0
    assert after.driver.capacity == 1 << 12
    assert after.disk.content[:512] == b"s" * 512


def test_a_device_that_waits_for_a_request_goes_on_waiting(
    make_machine: Any, make_disk: Any
) -> None:
    machine = make_machine(errors=ErrorPolicy(writes="stop"))
    machine.driver.start()
    machine.disk.error = OSError(errno.EIO, "no")
    head = available_write(machine, 0, b"s")
    machine.registers.status |= at.STATUS_SUSPEND
    after = Successor(machine, make_disk(1 << 20))
    assert after.registers.status == SUSPENDED, "the request was done again at once"
    assert after.driver.collect()[head].status == 0
    after.driver.resume()
    after.driver.flush()


def test_a_status_that_cannot_be_is_refused(make_started: Any, make_disk: Any) -> None:
    machine = make_started(driver={"features": 1 << at.VIRTIO_F_VERSION_1})
    machine.device.state.status = SUSPENDED
    with pytest.raises(ImageError, match="status of 0x1b"):
        Successor(machine, make_disk(1 << 20))


# -- other ways in ---------------------------------------------------------------------------


def test_pci_waits_for_bus_mastering_to_wake(make_disk: Any) -> None:
    memory = GuestMemory.from_buffer(bytearray(1 << 20))
    card = VirtioPci(VirtioBlk(make_disk(1 << 20)), memory, msi=lambda address, data: None)
    function = PciFunction(card)
    function.map_bars()
    registers = PciRegisters(function)
    driver = BlockDriver(registers, memory, Arena(0, 1 << 20))
    driver.start()
    driver.suspend()
    function.disable(pci.PCI_COMMAND_MASTER)
    with pytest.raises(DriverError, match="stays"):
        driver.resume(timeout=0)
    function.enable(pci.PCI_COMMAND_MASTER)
    assert registers.status == 15
    function.disable(pci.PCI_COMMAND_MASTER)
    driver.suspend()
    function.enable(pci.PCI_COMMAND_MASTER)
    assert registers.status == SUSPENDED
    driver.resume()
    driver.flush()


@pytest.fixture
def make_threaded(make_machine: Any) -> Iterator[Callable[..., Any]]:
    """``make_threaded(**options)``: a started machine with worker threads, whose disk waits for
    ``machine.go``."""
    machines = []

    def make(**options: Any) -> Any:
        machine = make_machine(io_threads=2, **options)
        machine.go, machine.reached = threading.Event(), threading.Semaphore(0)
        original = machine.disk._note

        def note(*call: Any) -> None:
            machine.reached.release()
            assert machine.go.wait(PATIENCE)
            original(*call)

        machine.disk._note = note
        machine.driver._wait = None
        machine.driver.start()
        machines.append(machine)
        return machine

    yield make
    for machine in machines:
        machine.go.set()
        machine.device.detach()


@pytest.mark.parametrize("packed", [False, True])
def test_worker_threads_finish_first_bf_72_to_bf_74(make_threaded: Any, packed: bool) -> None:
    machine = make_threaded(packed=packed)
    heads = [available_write(machine, n, b"t") for n in range(4)]
    for _ in range(2):
        assert machine.reached.acquire(timeout=PATIENCE)
    machine.registers.status |= at.STATUS_SUSPEND
    assert machine.registers.status == 15
    machine.go.set()
    machine.driver.suspend()
    assert machine.registers.take_interrupt() == at.MMIO_INTERRUPT_USED_BUFFER
    done = machine.driver.collect()
    before = bytes(machine.ram)
    assert set(done) == set(heads[:2])
    machine.registers.notify(0)
    assert not machine.reached.acquire(timeout=0.05)
    assert machine.registers.take_interrupt() == 0
    assert bytes(machine.ram) == before
    machine.driver.resume()
    while len(done) < 4:
        done |= machine.driver.collect()
    assert all(each.status == 0 for each in done.values())


def test_what_is_kept_alone_is_done_by_threads_bf_72(make_threaded: Any) -> None:
    """Requests that an error has stopped, and behind them one that was not taken."""
    machine = make_threaded(errors=ErrorPolicy(writes="stop"))
    machine.disk.error = OSError(errno.EIO, "no")
    heads = [available_write(machine, n, b"t") for n in range(2)]
    for _ in range(2):
        assert machine.reached.acquire(timeout=PATIENCE)
    machine.go.set()
    while not machine.device.paused or machine.device.service._busy:
        pass
    later = machine.driver.submit(at.VIRTIO_BLK_T_OUT, 9, b"9" * 512)
    machine.driver.ring.publish()
    machine.registers.status |= at.STATUS_SUSPEND
    machine.disk.error = None
    slow, original = threading.Event(), machine.disk._note

    def note(*call: Any) -> None:
        assert call[1:2] != (512,) or slow.wait(PATIENCE)
        original(*call)

    machine.disk._note = note
    machine.device.resume()
    while not machine.driver.ring.has_used:
        pass
    sleep(0.05)  # the other thread would take it now
    slow.set()
    machine.driver.suspend()
    assert set(machine.driver.collect()) == set(heads)
    assert machine.disk.content[9 * 512] == 0
    machine.driver.resume()
    done: dict[int, Any] = {}
    while later not in done:
        done |= machine.driver.collect()


def test_it_shows_after_the_last_interrupt_was_told_bf_74(make_threaded: Any) -> None:
    machine = make_threaded()
    machine.go.set()
    telling, told = threading.Event(), threading.Event()

    def interrupt(level: bool) -> None:
        telling.set()
        assert told.wait(PATIENCE)

    machine.mmio._line.callback = interrupt
    available_write(machine, 0, b"t")
    assert telling.wait(PATIENCE)
    machine.registers.status |= at.STATUS_SUSPEND
    assert machine.registers.status == 15
    told.set()
    machine.driver.suspend()


def test_a_reset_while_it_waits(make_threaded: Any) -> None:
    machine = make_threaded()
    available_write(machine, 0, b"t")
    assert machine.reached.acquire(timeout=PATIENCE)
    machine.registers.status |= at.STATUS_SUSPEND
    machine.go.set()
    machine.registers.status = 0
    machine.driver.start()
    assert machine.registers.status == 15


def test_a_kick_from_the_last_interrupt_takes_nothing_bf_72(make_machine: Any) -> None:
    """The interrupt for what was kept, in whose callback the guest goes on at once."""
    machine = make_machine(errors=ErrorPolicy(writes="stop"))
    machine.driver.start()
    machine.disk.error = OSError(errno.EIO, "no")
    available_write(machine, 0, b"1")
    machine.registers.status |= at.STATUS_SUSPEND
    machine.driver.submit(at.VIRTIO_BLK_T_OUT, 1, b"2" * 512)
    machine.driver.ring.publish()
    machine.mmio._line.callback = lambda level: machine.registers.notify(0)
    machine.disk.error = None
    machine.device.resume()
    assert machine.registers.status == SUSPENDED
    assert machine.disk.content[512] == 0


def test_features_stay_as_they_are_without_features_ok(make_machine: Any) -> None:
    """A driver that never says FEATURES_OK has neither that nor DRIVER_OK while it is suspended."""
    machine = make_machine()
    driver, registers = machine.driver, machine.registers
    driver.identify()
    registers.accept_features(registers.offered_features())
    driver.set_up_queue()
    registers.status |= at.STATUS_DRIVER_OK
    before = machine.device.driver_features
    driver.suspend()
    registers.accept_features(0)
    assert machine.device.driver_features == before
