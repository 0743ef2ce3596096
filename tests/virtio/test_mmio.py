"""The registers of virtio over MMIO (§4.2.2, §4.2.4), by requirement."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest

from pyvirtio import NullDisk, VirtioBlk, VirtioMmio
from pyvirtio.virtio import layout as at

WRITE_ONLY = [0x014, 0x020, 0x024, 0x030, 0x038, 0x050, 0x064, 0x080, 0x084, 0x0AC]


@pytest.mark.parametrize(("legacy", "version"), [(False, 2), (True, 1)])
def test_identity_mmio_01_mmio_02_mmio_46(make_machine: Any, legacy: bool, version: int) -> None:
    registers = make_machine(legacy=legacy).registers
    values = [registers.load(offset) for offset in (0x000, 0x004, 0x008, 0x00C)]
    assert values == [0x74726976, version, 2, 0x554D4551]


def test_interrupt_status_until_acknowledged_mmio_03_mmio_04(make_started: Any) -> None:
    machine = make_started()
    registers = machine.registers
    assert registers.load(at.MMIO_INTERRUPT_STATUS) == 0
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()
    assert [registers.load(at.MMIO_INTERRUPT_STATUS) for _ in range(2)] == [1, 1]
    registers.store(at.MMIO_INTERRUPT_ACK, 2)
    assert registers.load(at.MMIO_INTERRUPT_STATUS) == 1
    registers.store(at.MMIO_INTERRUPT_ACK, 1)
    assert registers.load(at.MMIO_INTERRUPT_STATUS) == 0


def test_interrupt_callable_is_called_on_change_only(make_started: Any) -> None:
    machine = make_started()
    for _ in range(2):
        machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
        machine.driver.kick()
        machine.driver.ring.used_event = machine.driver.ring.used_index
    assert (machine.levels, machine.mmio.irq_level) == ([True], True)
    machine.registers.store(at.MMIO_INTERRUPT_ACK, 1)
    machine.registers.store(at.MMIO_INTERRUPT_ACK, 1)
    assert (machine.levels, machine.mmio.irq_level) == ([True, False], False)


def test_reset_drops_interrupt_and_queues_mmio_05_mmio_06(make_started: Any) -> None:
    machine = make_started()
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()
    registers = machine.registers
    registers.status = 0
    assert registers.load(at.MMIO_INTERRUPT_STATUS) == 0
    assert machine.levels == [True, False]
    assert registers.select_queue(0) == 16
    assert registers.load(at.MMIO_QUEUE_READY) == 0


def test_resize_changes_generation_and_interrupts_mmio_07_blk_65(make_started: Any) -> None:
    machine = make_started()
    registers = machine.registers
    before = registers.load(at.MMIO_CONFIG_GENERATION)
    machine.disk.truncate(1 << 21)
    assert registers.load(at.MMIO_CONFIG_GENERATION) != before
    assert registers.load(at.MMIO_INTERRUPT_STATUS) == 2
    assert machine.driver.capacity == 4096
    assert machine.driver.request(at.VIRTIO_BLK_T_IN, 4095, incoming=512).status == 0


def test_a_stopped_queue_is_left_alone_mmio_08(make_started: Any) -> None:
    machine = make_started()
    registers = machine.registers
    registers.select_queue(0)
    registers.store(at.MMIO_QUEUE_READY, 0)
    assert registers.load(at.MMIO_QUEUE_READY) == 0
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    before = bytes(machine.ram)
    registers.notify(0)
    assert (bytes(machine.ram), machine.disk.calls) == (before, [])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_load_and_store_is_survived_mmio_14_to_17(
    make_machine: Any, legacy: bool, size: int
) -> None:
    machine = make_machine(legacy=legacy)
    for offset in range(0x110):
        machine.mmio.write(offset, size, 0xA5A5A5A5_A5A5A5A5 & (1 << 8 * size) - 1)
        value = machine.mmio.read(offset, size)
        assert 0 <= value < 1 << 8 * size
        if offset < 0x100 and (size != 4 or offset % 4):
            assert value == 0


@pytest.mark.parametrize("offset", WRITE_ONLY)
def test_write_only_registers_read_zero_mmio_16(make_machine: Any, offset: int) -> None:
    assert make_machine().registers.load(offset) == 0


def test_read_only_registers_keep_their_value_mmio_15(make_machine: Any) -> None:
    registers = make_machine().registers
    for offset in (0x000, 0x004, 0x008, 0x00C, 0x010, 0x034, 0x060, 0x0B0, 0x0FC):
        before = registers.load(offset)
        registers.store(offset, ~before & 0xFFFF_FFFF)
        assert registers.load(offset) == before


def test_config_answers_any_width_mmio_18(make_machine: Any) -> None:
    machine = make_machine(disk=NullDisk(0x1234567 * 512))
    read = machine.mmio.read
    expected = bytes(0x1234567.to_bytes(8, "little"))
    for size in (1, 2, 4, 8):
        for offset in range(9 - size):
            got = read(0x100 + offset, size)
            assert got == int.from_bytes(expected[offset : offset + size], "little")
    assert read(0x100 + 4000, 4) == 0


def test_features_by_word_mmio_25(make_machine: Any) -> None:
    registers = make_machine().registers
    words = []
    for select in (0, 1, 2, 3, 4, 0xFFFF_FFFF):
        registers.store(at.MMIO_DEVICE_FEATURES_SEL, select)
        words.append(registers.load(at.MMIO_DEVICE_FEATURES))
    assert words[0] >> 28 & 3 == 3
    second = 1 | 1 << at.VIRTIO_F_RING_RESET - 32 | 1 << at.VIRTIO_F_SUSPEND - 32
    assert words[1:] == [second, 0, 0, 0, 0]


def test_only_known_features_are_offered_bf_20_mmio_54(make_machine: Any) -> None:
    from pyvirtio.virtio.driver.blk import UNDERSTOOD

    for legacy in (False, True):
        offered = make_machine(legacy=legacy).registers.offered_features()
        understood = UNDERSTOOD | legacy << at.VIRTIO_F_NOTIFY_ON_EMPTY
        assert offered & ~understood == 0


@pytest.mark.parametrize("size", [0, 3, 32, 0x8000, 0x10000, 0xFFFF_FFFF])
def test_an_impossible_queue_size_is_not_enabled_mmio_27(make_machine: Any, size: int) -> None:
    machine = make_machine()
    machine.driver.identify()
    machine.driver.negotiate()
    registers = machine.registers
    registers.select_queue(0)
    assert not registers.enable_queue(size, 0x8000_0000, 0x8000_1000, 0x8000_2000)
    assert registers.status & at.STATUS_NEEDS_RESET


@pytest.mark.parametrize(
    "areas",
    [
        (0x8000_0008, 0x8000_1000, 0x8000_2000),
        (0x8000_0000, 0x8000_1001, 0x8000_2000),
        (0x8000_0000, 0x8000_1000, 0x8000_2002),
        (0, 0x8000_1000, 0x8000_2000),
        (0x8000_0000, 0xFFFF_FFFF_FFFF_FFFE, 0x8000_2000),
        (0x8000_0000, 0x8000_1000, 0x803F_FFF0),
        (0xFFFF_FFFF_FFFF_FFF0, 0x8000_1000, 0x8000_2000),
    ],
)
@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
def test_impossible_ring_addresses_are_not_enabled_vq_s_01(
    make_machine: Any, areas: tuple[int, int, int], memory: str
) -> None:
    machine = make_machine(memory=memory)
    machine.driver.identify()
    machine.driver.negotiate()
    registers = machine.registers
    registers.select_queue(0)
    assert not registers.enable_queue(16, *areas)
    assert registers.status & at.STATUS_NEEDS_RESET


def test_a_running_queue_keeps_its_registers_mmio_28(make_started: Any) -> None:
    machine = make_started()
    registers = machine.registers
    registers.select_queue(0)
    for offset in (0x038, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4):
        registers.store(offset, 0x77777777)
    assert machine.driver.read(0, 1) == bytes(512)


def test_no_shared_memory_mmio_41(make_machine: Any) -> None:
    registers = make_machine().registers
    registers.store(at.MMIO_SHM_SEL, 1)
    assert [registers.load(offset) for offset in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFF_FFFF] * 4


@pytest.mark.parametrize("select", [1, 2, 0xFFFF, 0xFFFF_FFFF])
def test_queues_that_are_not_there_mmio_49(make_machine: Any, select: int) -> None:
    registers = make_machine().registers
    assert registers.select_queue(select) == 0
    for offset in (0x038, 0x044, 0x080, 0x050):
        registers.store(offset, 1)
    assert registers.load(at.MMIO_QUEUE_READY) == 0
    registers.notify(select)


def test_every_access_may_be_repeated(make_machine: Any) -> None:
    """As Unicorn does when its CPU is stopped inside the access."""
    machine = make_machine()
    mmio = machine.mmio

    def read(offset: int, size: int) -> int:
        first = mmio.read(offset, size)
        assert mmio.read(offset, size) == first
        return first

    def write(offset: int, size: int, value: int) -> None:
        for _ in range(2):
            mmio.write(offset, size, value)

    machine.registers.read = read
    machine.registers.write = write
    machine.driver.start()
    for each in range(40):
        machine.driver.write(each, bytes([each]) * 512)
        assert machine.driver.read(each, 1) == bytes([each]) * 512
    assert len(machine.disk.calls) == 80


def test_deferred_work_waits_for_poll(make_started: Any) -> None:
    machine = make_started(notify="deferred")
    machine.driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    machine.driver.kick()
    assert (machine.disk.calls, machine.mmio.irq_level) == ([], False)
    assert machine.mmio.poll()
    assert (machine.disk.calls, machine.mmio.irq_level) == ([("read", 0, 512)], True)
    assert not machine.mmio.poll()


def test_deferred_suppresses_kicks_until_the_poll_vq_s_50(make_started: Any) -> None:
    features = (1 << 34) - 1 & ~(1 << at.VIRTIO_F_EVENT_IDX)
    machine = make_started(notify="deferred", driver={"features": features})
    machine.mmio.poll()
    ring = machine.driver.ring
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    assert ring.publish()
    machine.registers.notify(0)
    assert ring.used_flags == 1
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    assert not ring.publish()
    machine.mmio.poll()
    assert (ring.used_flags, ring.used_index) == (0, 2)


def test_an_unknown_way_to_notify_is_refused(make_disk: Any) -> None:
    import pyvirtio

    memory = pyvirtio.GuestMemory.from_buffer(bytearray(64))
    with pytest.raises(ValueError, match="notify"):
        VirtioMmio(VirtioBlk(make_disk(512)), memory, notify="later")  # type: ignore[arg-type]


def test_a_device_has_one_transport(make_machine: Any) -> None:
    machine = make_machine()
    with pytest.raises(ValueError, match="attached"):
        VirtioMmio(machine.device, machine.memory)


@pytest.mark.parametrize("queues", [1, 4])
def test_several_queues_share_the_interrupt_mmio_44(make_started: Any, queues: int) -> None:
    machine = make_started(num_queues=queues, driver={"queue_index": queues - 1})
    machine.driver.write(1, b"q" * 512)
    assert machine.driver.read(1, 1) == b"q" * 512
    assert machine.registers.config(34, 2) == (queues if queues > 1 else 0)


# -- the legacy interface ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
def test_legacy_requests_in_guest_order_vq_s_06_blk_31_blk_117(
    make_started: Any, memory: str, order: str
) -> None:
    machine = make_started(legacy=True, order=order, memory=memory, serial="old")
    driver = machine.driver
    assert driver.capacity == 2048
    driver.write(7, b"L" * 1024)
    assert driver.read(7, 2) == b"L" * 1024
    driver.flush()
    driver.write_zeroes(8, 1)
    driver.discard(0, 1)
    assert driver.serial() == "old"
    assert machine.disk.content[7 * 512 : 9 * 512] == b"L" * 512 + bytes(512)


@pytest.mark.parametrize("page", [4096, 65536])
def test_legacy_pages_mmio_47_mmio_50(make_started: Any, page: int) -> None:
    machine = make_started(legacy=True, driver={"page_size": page})
    machine.driver.write(0, b"p" * 512)
    registers = machine.registers
    registers.select_queue(0)
    assert registers.load(at.MMIO_QUEUE_PFN) * page == machine.driver.ring.descriptors
    registers.status = 0
    registers.select_queue(0)
    assert registers.load(at.MMIO_QUEUE_PFN) == 0  # MMIO-48


@pytest.mark.parametrize(("page", "align"), [(0, 4096), (3, 4096), (4096, 0), (4096, 3)])
def test_legacy_sizes_that_are_no_power_of_two_mmio_50_mmio_51(
    make_machine: Any, page: int, align: int
) -> None:
    machine = make_machine(legacy=True)
    registers = machine.registers
    registers.select_queue(0)
    registers.store(at.MMIO_GUEST_PAGE_SIZE, page)
    registers.store(at.MMIO_QUEUE_SIZE, 16)
    registers.store(at.MMIO_QUEUE_ALIGN, align)
    registers.store(at.MMIO_QUEUE_PFN, 0x80000)
    assert registers.load(at.MMIO_QUEUE_PFN) == 0


def test_legacy_works_before_driver_ok_bf_54(make_machine: Any) -> None:
    machine = make_machine(legacy=True)
    machine.driver.identify()
    machine.driver.negotiate()
    machine.driver.set_up_queue()
    assert machine.driver.read(0, 1) == bytes(512)


def test_legacy_page_size_outlives_a_reset(make_machine: Any) -> None:
    """Linux writes it once, before its first reset."""
    machine = make_machine(legacy=True)
    registers = machine.registers
    registers.store(at.MMIO_GUEST_PAGE_SIZE, 4096)
    registers.status = 0
    registers.select_queue(0)
    registers.store(at.MMIO_QUEUE_SIZE, 16)
    registers.store(at.MMIO_QUEUE_ALIGN, 4096)
    registers.store(at.MMIO_QUEUE_PFN, 0x80000)
    assert registers.load(at.MMIO_QUEUE_PFN) == 0x80000


def test_legacy_pfn_zero_stops_the_queue_mmio_52(make_started: Any) -> None:
    machine = make_started(legacy=True)
    registers = machine.registers
    registers.select_queue(0)
    registers.store(at.MMIO_QUEUE_PFN, 0)
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.publish()
    registers.notify(0)
    assert (machine.disk.calls, registers.load(at.MMIO_QUEUE_PFN)) == ([], 0)


def test_legacy_features_bf_101(make_machine: Any) -> None:
    registers = make_machine(legacy=True).registers
    offered = registers.offered_features()
    assert offered >> at.VIRTIO_F_ANY_LAYOUT & 1
    assert offered >> 32 == 0


def test_only_a_legacy_device_has_another_byte_order(make_machine: Any) -> None:
    with pytest.raises(ValueError, match="legacy"):
        make_machine(order="big")


@pytest.mark.parametrize("legacy", [False, True])
def test_no_register_has_the_device_remember_more_and_more(make_machine: Any, legacy: bool) -> None:
    machine = make_machine(legacy=legacy)
    registers = machine.registers

    def writes(start: int) -> int:
        for number in range(start, start + 2000):
            registers.store(at.MMIO_QUEUE_SEL, number)
            for offset in range(0, 0x100, 4):
                if offset not in (at.MMIO_QUEUE_SEL, at.MMIO_STATUS):
                    registers.store(offset, number)
        gc.collect()
        return sys.getallocatedblocks()

    before = writes(0)
    assert writes(1 << 20) - before < 500


def test_a_status_without_known_bits_is_no_reset(make_started: Any) -> None:
    machine = make_started()
    machine.registers.status = 0x100
    assert machine.registers.status == 15
    machine.driver.flush()
