"""How a virtio PCI function interrupts: ISR, INTx, MSI-X (virtio 1.4 §4.1.4.5, §4.1.5)."""

from __future__ import annotations

from typing import Any

import pytest

from .. import layout as at
from .. import pci_layout as pci
from .bench import Bench
from .plugin import Rules, shows

ADDRESS = 0xFEE0_1000
FIELDS = (pci.COMMON_CONFIG_MSIX_VECTOR, pci.COMMON_QUEUE_MSIX_VECTOR)


@pytest.fixture
def card(split: Bench) -> Bench:
    """A bench with a PCI function that is used through its modern interface."""
    if split.device.function is None:
        pytest.skip("for devices on PCI")
    split.need_modern()
    return split


@pytest.fixture
def msix(card: Bench) -> Bench:
    """The same with MSI-X switched on and the first vectors filled."""
    function: Any = card.device.function
    if function.msix() is None or card.device.messages is None:
        pytest.skip("no MSI-X")
    vectors = function.set_msix(enabled=True)
    for vector in range(min(vectors, 4)):
        function.set_vector(vector, ADDRESS + 16 * vector, 0x30 + vector)
    return card


def read_one(bench: Bench, driver: Any) -> None:
    """Have the device use a buffer."""
    driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=bench.unit)
    driver.kick()
    assert bench.until(lambda: driver.ring.has_used)
    bench.settle()
    driver.ring.collect()


def status_bit(bench: Bench) -> bool:
    """The Interrupt Status bit of PCI's status register."""
    function: Any = bench.device.function
    return bool(function.bus.config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT)


def start_mapped(bench: Bench, config: int, queue: int) -> Any:
    """A started driver whose events are mapped to these vectors."""
    driver = bench.before_driver_ok()
    registers = bench.registers
    registers.store(pci.COMMON_CONFIG_MSIX_VECTOR, 2, config)
    registers.select_queue(0)
    registers.store(pci.COMMON_QUEUE_MSIX_VECTOR, 2, queue)
    registers.status |= at.STATUS_DRIVER_OK
    return driver


@shows("PCI-73", "PCI-74", "PCI-75")
def test_isr_without_msix(card: Bench, rule: Rules) -> None:
    driver = card.start()
    card.registers.take_interrupt()
    with rule("PCI-74"):
        assert not status_bit(card), "Interrupt Status without an interrupt"
    read_one(card, driver)
    with rule("PCI-74"):
        found = card.until(lambda: status_bit(card))
        assert found, "Interrupt Status is clear with an interrupt"
    with rule("PCI-73"):
        assert card.registers.take_interrupt() & 1
    with rule("PCI-75"):
        assert card.registers.take_interrupt() == 0, "reading did not reset it"
    with rule("PCI-74"):
        assert not status_bit(card), "Interrupt Status after the ISR was read"


@shows("PCI-72")
def test_isr_of_a_configuration_change(card: Bench) -> None:
    driver = card.start()
    card.registers.take_interrupt()
    card.resize(driver.capacity + 8)
    assert card.interrupted(2)


@shows("PCI-108", "PCI-109")
def test_table_size(msix: Bench, rule: Rules) -> None:
    function: Any = msix.device.function
    capability = function.msix()
    count = (function.bus.config_read(capability.offset + 2, 2) & 0x7FF) + 1
    with rule("PCI-108"):
        assert 2 <= count <= 0x800
    with rule("PCI-109"):
        table = function.bus.config_read(capability.offset + 4, 4)
        assert (table & ~7) + 16 * count <= function.bar_size(table & 7)
        function.set_vector(count - 1, ADDRESS, 0x1234)
        start = (table & ~7) + 16 * (count - 1)
        assert function.bus.bar_read(table & 7, start + 8, 4) == 0x1234


@shows("PCI-111", "PCI-112", "PCI-113", "PCI-115", "PCI-116")
def test_mapping(msix: Bench, rule: Rules) -> None:
    registers: Any = msix.registers
    function: Any = msix.device.function
    count = function.set_msix(enabled=True)
    driver = msix.driver()
    driver.identify()
    driver.negotiate()
    registers.select_queue(0)
    for field in FIELDS:
        for vector in range(min(count, 8)):
            registers.store(field, 2, vector)
            with rule("PCI-115"):  # a device may lack resources, and say so (PCI-116)
                assert registers.load(field, 2) != pci.NO_VECTOR
            with rule("PCI-111", "PCI-113"):
                assert registers.load(field, 2) == vector
        registers.store(field, 2, pci.NO_VECTOR)
        with rule("PCI-112"):
            assert registers.load(field, 2) == pci.NO_VECTOR
        with rule("PCI-116"):
            registers.store(field, 2, count)
            assert registers.load(field, 2) == pci.NO_VECTOR, "a vector that is none was mapped"


@shows("PCI-111")
def test_events_arrive_by_their_vector(msix: Bench) -> None:
    messages: Any = msix.device.messages
    function: Any = msix.device.function
    if function.set_msix(enabled=True) < 2:
        pytest.skip("one vector for all events")
    for vector in (0, 1):
        driver = start_mapped(msix, 1 - vector, vector)
        messages.clear()
        read_one(msix, driver)
        assert msix.until(lambda: bool(messages))
        assert set(messages) == {(ADDRESS + 16 * vector, 0x30 + vector)}


@shows("PCI-114")
def test_a_reset_unmaps(msix: Bench) -> None:
    start_mapped(msix, 0, 1)
    msix.registers.status = 0
    assert msix.until(lambda: msix.registers.status == 0)
    msix.registers.select_queue(0)
    assert [msix.registers.load(field, 2) for field in FIELDS] == [pci.NO_VECTOR] * 2


@shows("PCI-129")
def test_a_queue_without_a_vector_is_silent(msix: Bench) -> None:
    messages: Any = msix.device.messages
    driver = start_mapped(msix, 0, pci.NO_VECTOR)
    messages.clear()
    read_one(msix, driver)
    assert not messages
    assert not status_bit(msix)


@shows("PCI-130")
def test_a_configuration_change_without_a_vector_is_silent(msix: Bench) -> None:
    messages: Any = msix.device.messages
    driver = start_mapped(msix, pci.NO_VECTOR, 1)
    messages.clear()
    msix.resize(driver.capacity + 8)
    msix.settle()
    assert not messages
    assert not status_bit(msix)
