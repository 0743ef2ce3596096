"""Virtio over PCI: discovery, capabilities, common configuration (virtio 1.4 §4.1)."""

from __future__ import annotations

from typing import Any

import pytest

from .. import layout as at
from .. import pci_layout as pci
from ..driver import PciFunction
from .bench import Bench
from .plugin import Rules, shows
from .test_status import queue_reset_while_the_disk_waits

STRUCTURES = {
    "PCI-32": pci.VIRTIO_PCI_CAP_COMMON_CFG,
    "PCI-60": pci.VIRTIO_PCI_CAP_NOTIFY_CFG,
    "PCI-71": pci.VIRTIO_PCI_CAP_ISR_CFG,
    "PCI-78": pci.VIRTIO_PCI_CAP_DEVICE_CFG,
    "PCI-88": pci.VIRTIO_PCI_CAP_PCI_CFG,
}
KNOWN = {1, 2, 3, 4, 5, 8, 9}


@pytest.fixture
def card(split: Bench) -> Bench:
    """A bench with a PCI function, whichever of its interfaces drivers use."""
    if split.device.function is None:
        pytest.skip("for devices on PCI")
    return split


@pytest.fixture
def function(card: Bench) -> Any:
    """The function alone."""
    return card.device.function


@pytest.fixture
def modern(card: Bench) -> Bench:
    """A bench with a PCI function that is used through its modern interface."""
    card.need_modern()
    return card


def transitional(function: PciFunction) -> bool:
    """By its device id."""
    return 0x1000 <= function.bus.config_read(pci.PCI_DEVICE_ID, 2) <= 0x103F


# -- discovery -------------------------------------------------------------------------------


@shows("PCI-01")
def test_configuration_space_is_that_of_a_pci_function(function: Any) -> None:
    read = function.bus.config_read
    assert read(pci.PCI_HEADER_TYPE, 1) & 0x7F == 0
    capabilities = function.capabilities()  # ends
    assert all(0x40 <= each.offset < 0x100 and each.offset % 4 == 0 for each in capabilities)
    assert len({each.offset for each in capabilities}) == len(capabilities)
    for index in range(6):
        size = function.bar_size(index)
        assert size & (size - 1) == 0, f"BAR {index} has {size} bytes"
    assert read(pci.PCI_INTERRUPT_PIN, 1) <= 4


@shows("PCI-01")
def test_capabilities_lie_inside_their_bars(function: Any) -> None:
    for each in function.capabilities():
        if each.ident == pci.PCI_CAP_ID_VENDOR and each.kind in (1, 2, 3, 4, 8):
            assert each.bar <= 5
            assert each.start + each.size <= function.bar_size(each.bar)


@shows("PCI-02", "PCI-03")
def test_vendor_and_device_id(function: Any, rule: Rules) -> None:
    with rule("PCI-02"):
        assert function.bus.config_read(pci.PCI_VENDOR_ID, 2) == 0x1AF4
    with rule("PCI-03"):
        assert function.bus.config_read(pci.PCI_DEVICE_ID, 2) in (0x1042, 0x1001)


@shows("PCI-05", "PCI-06", "PCI-07")
def test_ids_of_a_modern_device(function: Any, rule: Rules) -> None:
    if transitional(function):
        pytest.skip("a transitional device")
    read = function.bus.config_read
    with rule("PCI-05"):
        assert 0x1040 <= read(pci.PCI_DEVICE_ID, 2) <= 0x107F
    with rule("PCI-06"):
        assert read(pci.PCI_REVISION_ID, 1) >= 1
    with rule("PCI-07"):
        assert read(pci.PCI_SUBSYSTEM_ID, 2) >= 0x40


@shows("PCI-12", "PCI-13", "PCI-14")
def test_ids_of_a_transitional_device(card: Bench, rule: Rules) -> None:
    function: Any = card.device.function
    if not (card.legacy or transitional(function)):
        pytest.skip("not a transitional device")
    read = function.bus.config_read
    with rule("PCI-14"):
        assert 0x1000 <= read(pci.PCI_DEVICE_ID, 2) <= 0x103F
    with rule("PCI-12"):
        assert read(pci.PCI_REVISION_ID, 1) == 0
    with rule("PCI-13"):
        assert read(pci.PCI_SUBSYSTEM_ID, 2) == at.VIRTIO_ID_BLOCK


# -- capabilities ----------------------------------------------------------------------------


@shows(*STRUCTURES)
def test_there_is_a_capability_of_each_kind(function: Any, rule: Rules) -> None:
    kinds = {each.kind for each in function.capabilities() if each.ident == pci.PCI_CAP_ID_VENDOR}
    for ident, kind in STRUCTURES.items():
        with rule(ident):
            assert kind in kinds, f"no capability of type {kind}"


@shows("PCI-26", "PCI-31", "PCI-77")
def test_sizes_and_alignments(function: Any, rule: Rules) -> None:
    least = {pci.VIRTIO_PCI_CAP_NOTIFY_CFG: 20, pci.VIRTIO_PCI_CAP_PCI_CFG: 20, 8: 24, 9: 8}
    for each in function.capabilities():
        if each.ident != pci.PCI_CAP_ID_VENDOR or each.kind not in KNOWN:
            continue
        with rule("PCI-26"):
            assert each.length >= least.get(each.kind, 16), f"cap_len {each.length}"
        if each.kind in (pci.VIRTIO_PCI_CAP_COMMON_CFG, pci.VIRTIO_PCI_CAP_DEVICE_CFG):
            with rule("PCI-31" if each.kind == pci.VIRTIO_PCI_CAP_COMMON_CFG else "PCI-77"):
                assert each.start % 4 == 0


def notification_rules(modern: Bench, width: int) -> tuple[Any, int, list[int]]:
    """The notification capability, its multiplier, and where each queue's notification is."""
    offered = modern.offers(at.VIRTIO_F_NOTIFICATION_DATA)
    if offered != (width == 4):
        pytest.skip(f"NOTIFICATION_DATA is {'' if offered else 'not '}offered")
    registers = modern.registers
    offsets = []
    for index in range(registers.load(pci.COMMON_NUM_QUEUES, 2)):
        registers.select_queue(index)
        offsets.append(registers.load(pci.COMMON_QUEUE_NOTIFY_OFF, 2) * registers.multiplier)
    return registers.notification, registers.multiplier, offsets


@shows("PCI-61", "PCI-62", "PCI-63", "PCI-64", "PCI-65")
def test_notifications_of_16_bits(modern: Bench, rule: Rules) -> None:
    capability, multiplier, offsets = notification_rules(modern, 2)
    with rule("PCI-61"):
        assert capability.start % 2 == 0
    with rule("PCI-62"):
        assert multiplier == 0 or (multiplier % 2 == 0 and not multiplier & (multiplier - 1))
    with rule("PCI-63"):
        assert capability.size >= 2
    with rule("PCI-64", "PCI-65"):
        assert all(offset + 2 <= capability.size for offset in offsets), capability.size


@shows("PCI-66", "PCI-67", "PCI-68", "PCI-69", "PCI-70")
def test_notifications_of_32_bits(modern: Bench, rule: Rules) -> None:
    capability, multiplier, offsets = notification_rules(modern, 4)
    with rule("PCI-66"):
        assert multiplier == 0 or (multiplier % 4 == 0 and not multiplier & (multiplier - 1))
    with rule("PCI-67"):
        assert capability.start % 4 == 0
    with rule("PCI-68"):
        assert capability.size >= 4
    with rule("PCI-69", "PCI-70"):
        assert all(offset + 4 <= capability.size for offset in offsets), capability.size


@shows("PCI-83", "PCI-84", "PCI-85")
def test_vendor_data(function: Any, rule: Rules) -> None:
    found = [
        each
        for each in function.capabilities()
        if (each.ident, each.kind) == (pci.PCI_CAP_ID_VENDOR, pci.VIRTIO_PCI_CAP_VENDOR_CFG)
    ]
    if not found:
        pytest.skip("there is no vendor data capability")
    read = function.bus.config_read
    for each in found:
        with rule("PCI-83"):
            assert read(each.offset + 4, 2) != pci.VIRTIO_PCI_VENDOR
        with rule("PCI-84"):
            assert each.length % 4 == 0
        with rule("PCI-85"):
            first, second = (
                [read(each.offset + place, 1) for place in range(each.length)] for _ in range(2)
            )
            assert first == second


@shows("PCI-89", "PCI-90")
def test_configuration_access_window(modern: Bench, rule: Rules) -> None:
    bus, registers = modern.device.function.bus, modern.registers  # type: ignore[union-attr]
    window = registers.function.find(pci.VIRTIO_PCI_CAP_PCI_CFG).offset

    def aim(capability: Any, offset: int, length: int) -> None:
        bus.config_write(window + pci.CAP_BAR, 1, capability.bar)
        bus.config_write(window + pci.CAP_OFFSET, 4, capability.start + offset)
        bus.config_write(window + pci.CAP_LENGTH, 4, length)

    modern.driver().identify()
    with rule("PCI-90"):
        for offset in (0, 4):
            aim(registers.device, offset, 4)
            assert bus.config_read(window + pci.CAP_DATA, 4) == registers.read_config(offset, 4)
        aim(registers.common, pci.COMMON_NUM_QUEUES, 2)
        assert bus.config_read(window + pci.CAP_DATA, 2) == registers.load(18, 2)
    with rule("PCI-89"):
        aim(registers.common, pci.COMMON_DEVICE_STATUS, 1)
        assert bus.config_read(window + pci.CAP_DATA, 1) == 3
        bus.config_write(window + pci.CAP_DATA, 1, 0)
        assert modern.until(lambda: registers.status == 0), "the status was not written"


# -- common configuration ----------------------------------------------------------------------


@shows("PCI-17")
@pytest.mark.parametrize("high_first", [False, True])
def test_halves_of_64_bit_fields(modern: Bench, high_first: bool) -> None:
    registers = modern.registers
    driver = modern.driver()
    driver.identify()
    driver.negotiate()
    registers.select_queue(0)
    for number, field in enumerate((32, 40, 48)):
        halves = [(field, 0x1000 * (number + 1)), (field + 4, number + 1)]
        for offset, value in reversed(halves) if high_first else halves:
            registers.store(offset, 4, value)
        assert [(offset, registers.load(offset, 4)) for offset, _ in halves] == halves


@shows("PCI-33", "PCI-34")
def test_features_by_word(modern: Bench, rule: Rules) -> None:
    registers = modern.registers
    modern.driver().identify()
    words = []
    for word in (0, 1, 4, 5, 0xFFFF_FFFF):
        registers.store(pci.COMMON_DEVICE_FEATURE_SELECT, 4, word)
        words.append(registers.load(pci.COMMON_DEVICE_FEATURE, 4))
    with rule("PCI-33"):
        assert words[1] & 1, "VERSION_1 is not bit 0 of word 1"
        assert words[2:] == [0, 0, 0], "there are features beyond 128"
    subset = words[0] & 0x5555_5555, words[1]
    for word in (0, 1):
        registers.store(pci.COMMON_DRIVER_FEATURE_SELECT, 4, word)
        registers.store(pci.COMMON_DRIVER_FEATURE, 4, subset[word])
    for word in (1, 0):
        registers.store(pci.COMMON_DRIVER_FEATURE_SELECT, 4, word)
        with rule("PCI-34"):
            assert registers.load(pci.COMMON_DRIVER_FEATURE, 4) == subset[word]


@shows("PCI-36")
def test_generation_moves_with_what_is_read(modern: Bench) -> None:
    driver = modern.start()
    registers = modern.registers
    sectors = driver.capacity
    for changes in (1, 255, 256):
        registers.read_config(0, 4)
        before = registers.generation()
        for _ in range(changes):
            sectors += 1
            modern.resize(sectors)
        registers.read_config(0, 4)
        assert registers.generation() != before, f"after {changes} changes"


@shows("PCI-37", "PCI-38", "PCI-39")
def test_reset(modern: Bench, rule: Rules) -> None:
    modern.start()
    registers = modern.registers
    registers.status = 0
    with rule("PCI-38"):
        assert modern.until(lambda: registers.status == 0)
    with rule("PCI-37", "PCI-39"):
        for index in range(registers.load(pci.COMMON_NUM_QUEUES, 2)):
            registers.select_queue(index)
            assert registers.load(pci.COMMON_QUEUE_ENABLE, 2) == 0


@shows("PCI-40", "PCI-41", "PCI-42", "PCI-44")
def test_queue_reset(modern: Bench, rule: Rules) -> None:
    modern.need(at.VIRTIO_F_RING_RESET, "RING_RESET")
    registers = modern.registers
    driver = modern.start()
    registers.select_queue(0)
    with rule("PCI-41"):
        assert registers.load(pci.COMMON_QUEUE_RESET, 2) == 0
    driver.read(0, modern.unit // 512)
    registers.select_queue(0)
    registers.store(pci.COMMON_QUEUE_RESET, 2, 1)
    with rule("PCI-44"):
        assert modern.until(lambda: registers.load(pci.COMMON_QUEUE_RESET, 2) == 0)
        assert registers.load(pci.COMMON_QUEUE_ENABLE, 2) == 0
    with rule("PCI-42"):
        driver.set_up_queue()
        driver.read(0, modern.unit // 512)
    registers.status = 0
    assert modern.until(lambda: registers.status == 0)
    with rule("PCI-40"):
        registers.select_queue(0)
        assert registers.load(pci.COMMON_QUEUE_RESET, 2) == 0


@shows("PCI-43")
def test_a_queue_reset_that_takes_its_time(make_bench: Any) -> None:
    bench = make_bench(stalls=True)
    if bench.device.transport != "pci":
        pytest.skip("for devices on PCI")
    bench.need_modern()
    registers = bench.registers
    queue_reset_while_the_disk_waits(
        bench,
        start=lambda: registers.store(pci.COMMON_QUEUE_RESET, 2, 1),
        resetting=lambda: registers.load(pci.COMMON_QUEUE_RESET, 2),
        enabled=lambda: registers.load(pci.COMMON_QUEUE_ENABLE, 2),
    )


@shows("PCI-47", "PCI-48")
def test_admin_queues_come_behind_the_others(modern: Bench, rule: Rules) -> None:
    modern.need(41, "ADMIN_VQ")
    driver = modern.driver()
    driver.features |= 1 << 41
    driver.identify()
    driver.negotiate()
    queues, first, count = (modern.registers.load(offset, 2) for offset in (18, 60, 62))
    with rule("PCI-47"):
        assert first >= queues
    with rule("PCI-48"):
        assert count <= 0x10000 - first


@shows("PCI-45", "PCI-46")
def test_queue_sizes(modern: Bench, rule: Rules) -> None:
    registers = modern.registers
    driver = modern.driver()
    driver.identify()
    driver.negotiate()
    count = registers.load(pci.COMMON_NUM_QUEUES, 2)
    for index in (count, count + 1, 0xFFFF):
        with rule("PCI-45"):
            assert registers.select_queue(index) == 0, f"queue {index} of {count}"
    for index in range(count):
        size = registers.select_queue(index)
        with rule("PCI-46"):
            assert size & (size - 1) == 0, f"queue {index} has {size} entries"


# -- the legacy interface --------------------------------------------------------------------


@pytest.fixture
def legacy(card: Bench) -> Bench:
    """A bench with a PCI function that is used through its legacy interface."""
    card.need_legacy()
    return card


@shows("PCI-94", "PCI-103")
def test_legacy_registers_are_in_io_bar_0(legacy: Bench) -> None:
    bus = legacy.device.function.bus  # type: ignore[union-attr]
    assert bus.config_read(pci.PCI_BAR_0, 4) & pci.PCI_BAR_IO, "BAR 0 is no I/O region"
    driver = legacy.start()
    driver.read(0, legacy.unit // 512)


@shows("PCI-95")
def test_legacy_configuration_in_any_width(legacy: Bench) -> None:
    legacy.start()
    read = legacy.registers.read_config
    single = bytes(read(offset, 1) for offset in range(24))
    order = legacy.registers.order
    for width in (2, 4):
        parts = [read(offset, width).to_bytes(width, order) for offset in range(0, 24, width)]
        assert b"".join(parts) == single


@shows("PCI-96")
def test_legacy_configuration_moves_with_msix(legacy: Bench) -> None:
    function = legacy.device.function
    driver = legacy.start()
    capacity = driver.capacity
    assert function is not None
    if function.msix() is None:
        pytest.skip("no MSI-X")
    assert function.bus.bar_read(0, 20, 4) == capacity & 0xFFFF_FFFF
    function.set_msix(enabled=True)
    assert function.bus.bar_read(0, 24, 4) == capacity & 0xFFFF_FFFF


@shows("PCI-97")
def test_legacy_drivers_have_no_feature_beyond_31(legacy: Bench) -> None:
    driver = legacy.start()
    driver.read(0, legacy.unit // 512)
    assert driver.ring.used_index == 1  # a split ring, at the place that a legacy one has
