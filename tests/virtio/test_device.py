"""Status, features and configuration (§2.1, §2.2, §2.5, §3.1), by requirement."""

from __future__ import annotations

from typing import Any

import pytest

from pyvirtio import GuestError, GuestMemory, Limits, VirtioBlk
from pyvirtio.virtio import layout as at


def prepared(make_machine: Any, **options: Any) -> Any:
    """A machine whose queue is set up and that has no DRIVER_OK."""
    machine = make_machine(**options)
    machine.driver.identify()
    machine.driver.negotiate()
    machine.driver.set_up_queue()
    return machine


def test_status_follows_the_driver_bf_01(make_machine: Any) -> None:
    registers = make_machine().registers
    seen = []
    for value in (0, 1, 3):
        registers.status = value
        seen.append(registers.status)
    registers.accept_features(1 << 32)
    for value in (11, 15):
        registers.status = value
        seen.append(registers.status)
    assert seen == [0, 1, 3, 11, 15]


def test_bits_are_not_cleared_one_by_one_bf_02(make_started: Any) -> None:
    machine = make_started()
    machine.registers.status = 1
    assert machine.registers.status == 15
    machine.driver.flush()


def test_failed_makes_it_inert_until_a_reset_bf_03_bf_49(make_started: Any) -> None:
    machine = make_started()
    machine.registers.status |= at.STATUS_FAILED
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert machine.disk.calls == []
    machine.driver.start()
    machine.driver.flush()


def test_nothing_is_done_before_driver_ok_bf_05_bf_06_bf_51(make_machine: Any) -> None:
    machine = prepared(make_machine)
    head = machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert (machine.disk.calls, machine.driver.ring.used_index, machine.levels) == ([], 0, [])
    machine.registers.status |= at.STATUS_DRIVER_OK
    assert machine.driver.collect()[head].status == 0


def test_needs_reset_is_told_by_a_config_interrupt_bf_07_bf_08(make_started: Any) -> None:
    machine = make_started()
    machine.driver.ring.offer(9999)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert machine.registers.status == 15 | at.STATUS_NEEDS_RESET
    assert machine.registers.load(at.MMIO_INTERRUPT_STATUS) == 2
    machine.driver.start()
    assert machine.registers.status == 15
    machine.driver.flush()


def test_features_not_offered_are_refused_bf_09_bf_13_bf_19(make_machine: Any) -> None:
    for bit in (0, 3, 8, 17, 24, 30, 33, 34, 41, 44, 63):
        registers = make_machine().registers
        registers.status = 3
        registers.accept_features(registers.offered_features() | 1 << bit)
        registers.status = 11
        assert registers.status == 3
        registers.status = 15
        assert not registers.status & at.STATUS_DRIVER_OK


def test_any_subset_of_features_is_accepted_bf_18(make_machine: Any) -> None:
    offered = make_machine().registers.offered_features()
    for bit in range(64):
        if offered >> bit & 1:
            machine = make_machine(driver={"features": offered & ~(1 << bit)})
            machine.driver.start()
            machine.driver.write(0, b"s" * 512)


def test_version_1_is_offered_and_may_be_left_out_bf_88_bf_89(make_machine: Any) -> None:
    """xv6 accepts only the first 32 bits, on a version 2 device."""
    machine = make_machine(driver={"features": (1 << 32) - 1})
    assert machine.registers.offered_features() >> 32 & 1
    machine.driver.start()
    machine.driver.flush()


def test_the_same_features_again_after_a_reset_bf_21(make_machine: Any) -> None:
    machine = make_machine()
    for _ in range(3):
        machine.driver.start()


def test_features_hold_still_after_features_ok_bf_48(make_started: Any) -> None:
    machine = make_started()
    before = machine.device.state.driver_features
    machine.registers.accept_features(0)
    assert machine.device.state.driver_features == before


def test_driver_ok_without_features_ok_is_let_pass(make_machine: Any) -> None:
    machine = make_machine()
    machine.driver.identify()
    machine.registers.accept_features(1 << 32)
    machine.driver.features = 1 << 32
    machine.driver.set_up_queue()
    machine.registers.status |= at.STATUS_DRIVER_OK
    machine.driver.flush()


def test_reset_reads_zero_and_leaves_the_queues_alone_bf_27_to_29(make_started: Any) -> None:
    machine = make_started()
    machine.registers.status = 0
    assert machine.registers.status == 0
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    before = bytes(machine.ram)
    machine.registers.notify(0)
    machine.mmio.poll()
    assert (bytes(machine.ram), machine.levels) == (before, [])


@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
def test_a_reset_from_inside_a_request_ends_it_bf_29(make_started: Any, memory: str) -> None:
    machine = make_started(memory=memory)
    original = machine.disk._readv

    def reset_then_read(*arguments: Any) -> None:
        machine.registers.status = 0
        original(*arguments)

    machine.disk._readv = reset_then_read
    for each in range(2):
        machine.driver.submit(at.VIRTIO_BLK_T_IN, each, incoming=512)
    machine.driver.kick()
    assert len(machine.disk.calls) == 1
    statuses = [pending.status for pending in machine.driver._pending.values()]
    assert [machine.memory.read(each, 1) for each in statuses] == [b"\xff"] * 2
    assert (machine.driver.ring.used_index, machine.levels) == (0, [])
    assert not any(machine.memory.read(machine.driver.ring.used + 4, 8 * 16))


def test_a_kick_from_inside_the_interrupt_is_served(make_machine: Any) -> None:
    machine = make_machine()
    machine.driver.start()
    left = [3]

    def interrupt(level: bool) -> None:
        if level and left[0]:
            left[0] -= 1
            machine.driver.collect()
            machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
            machine.driver.kick()

    machine.mmio._line.callback = interrupt
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()
    assert machine.disk.calls == [("flush",)] * 4


def test_config_can_be_read_at_any_time_bf_36(make_machine: Any) -> None:
    machine = make_machine()
    before = [machine.registers.config(offset, 1) for offset in range(96)]
    machine.driver.start()
    assert [machine.registers.config(offset, 1) for offset in range(96)] == before


def test_config_tells_of_the_disk(make_machine: Any, make_disk: Any) -> None:
    limits = Limits(request_alignment=4096, discard_alignment=65536, optimal_io_size=131072)
    machine = make_machine(
        disk=make_disk((1 << 20) + 100, limits=limits), queue_size=64, logical_block_size=1024
    )
    config = machine.registers.config
    assert config(0, 8) == 2048  # capacity; the part of a sector is not reached
    assert config(12, 4) == 62  # seg_max
    assert config(20, 4) == 1024  # blk_size
    assert (config(24, 1), config(25, 1), config(26, 2), config(28, 4)) == (2, 0, 4, 128)
    assert (config(36, 4), config(44, 4)) == (0x3FFFFF, 128)
    assert (config(48, 4), config(52, 4), config(56, 1)) == (0x3FFFFF, 1, 1)
    assert [config(offset, 1) for offset in (33, 57, 58, 59)] == [0] * 4  # BLK-14


def test_flush_is_offered_with_config_wce_blk_11_blk_12(make_machine: Any) -> None:
    offered = make_machine().registers.offered_features()
    assert offered >> at.VIRTIO_BLK_F_FLUSH & 1
    assert offered >> at.VIRTIO_BLK_F_CONFIG_WCE & 1


def writes_are_flushed(machine: Any) -> bool:
    machine.disk.calls.clear()
    machine.driver.write(0, bytes(512))
    return ("flush",) in machine.disk.calls


def without(*bits: int) -> dict[str, int]:
    return {"features": (1 << 34) - 1 & ~sum(1 << bit for bit in bits)}


@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
def test_a_driver_that_cannot_flush_gets_stable_writes_blk_76(
    make_started: Any, memory: str
) -> None:
    neither = without(at.VIRTIO_BLK_F_FLUSH, at.VIRTIO_BLK_F_CONFIG_WCE)
    assert writes_are_flushed(make_started(driver=neither, memory=memory))
    one = without(at.VIRTIO_BLK_F_CONFIG_WCE)
    assert not writes_are_flushed(make_started(driver=one, memory=memory))


def test_writeback_starts_as_0_without_flush_blk_13(make_started: Any) -> None:
    machine = make_started(driver=without(at.VIRTIO_BLK_F_FLUSH))
    assert machine.registers.config(32, 1) == 0
    assert writes_are_flushed(machine)


def test_writeback_switches_durability_blk_47(make_started: Any) -> None:
    machine = make_started()
    assert (machine.registers.config(32, 1), writes_are_flushed(machine)) == (1, False)
    machine.mmio.write(0x120, 1, 0)
    assert (machine.registers.config(32, 1), writes_are_flushed(machine)) == (0, True)
    machine.mmio.write(0x120, 1, 1)
    assert (machine.registers.config(32, 1), writes_are_flushed(machine)) == (1, False)


def test_writeback_is_not_written_without_config_wce(make_started: Any) -> None:
    machine = make_started(driver=without(at.VIRTIO_BLK_F_CONFIG_WCE))
    machine.mmio.write(0x120, 1, 0)
    assert machine.registers.config(32, 1) == 1


def test_no_other_config_field_can_be_written(make_started: Any) -> None:
    machine = make_started()
    before = [machine.registers.config(offset, 1) for offset in range(60) if offset != 32]
    for offset in range(60):
        if offset != 32:
            machine.mmio.write(0x100 + offset, 1, 0xEE)
    assert [machine.registers.config(offset, 1) for offset in range(60) if offset != 32] == before


def test_strict_raises_what_a_reset_must_mend(make_started: Any) -> None:
    machine = make_started(strict=True)
    machine.driver.ring.offer(99)
    machine.driver.ring.publish()
    with pytest.raises(GuestError, match="descriptor 99"):
        machine.registers.notify(0)
    assert machine.registers.status & at.STATUS_NEEDS_RESET


@pytest.mark.parametrize("packed", [False, True])
def test_strict_raises_after_the_answer(make_started: Any, packed: bool) -> None:
    machine = make_started(strict=True, packed=packed)
    head = machine.driver.submit(at.VIRTIO_BLK_T_IN, 5000, incoming=512)
    with pytest.raises(GuestError, match="sector 5000"):
        machine.driver.kick()
    assert machine.driver.collect()[head].status == 1
    machine.driver.flush()


class Doorbell:
    """A transport without registers."""

    def __init__(self) -> None:
        self.rung: list[int] = []

    def queue_interrupt(self, index: int) -> None:
        self.rung.append(index)

    def note_interrupt(self, index: int | None) -> None:
        self.rung.append(-1 if index is None else index)

    def deliver(self) -> None:
        pass


def test_the_device_works_without_registers(make_disk: Any) -> None:
    """For hypervisors that say no more than "queue n was kicked"."""
    from pyvirtio.virtio.driver import Arena, Buffer, DriverRing

    ram = bytearray(1 << 16)
    memory = GuestMemory.from_buffer(ram)
    disk = make_disk(4096)
    disk.content[:4] = b"disk"
    device = VirtioBlk(disk, queue_size=8)
    doorbell = Doorbell()
    device.connect(memory, doorbell)
    device.set_status(at.STATUS_ACKNOWLEDGE | at.STATUS_DRIVER)
    device.set_driver_features(1 << at.VIRTIO_F_VERSION_1)
    ring = DriverRing.allocate(memory, Arena(0, 4096), 8)
    state = device.queues[0].state
    state.size = 8
    state.descriptor_area, state.driver_area = ring.descriptors, ring.available
    state.device_area = ring.used
    device.enable_queue(0)
    device.set_status(at.STATUS_FEATURES_OK | at.STATUS_DRIVER_OK)
    ring.add([Buffer(0x2000, 16), Buffer(0x3000, 512, True), Buffer(0x2010, 1, True)])
    ring.publish()
    device.kick(0)
    assert (ram[0x3000:0x3004], ring.collect(), doorbell.rung) == (b"disk", [(0, 513)], [0])


@pytest.mark.parametrize(
    "options",
    [
        {"queue_size": 0},
        {"queue_size": 3},
        {"queue_size": 65536},
        {"num_queues": 0},
        {"logical_block_size": 100},
        {"logical_block_size": 768},
    ],
)
def test_impossible_options_are_refused(make_disk: Any, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        VirtioBlk(make_disk(512), **options)
