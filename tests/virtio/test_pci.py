"""Virtio over PCI (§4.1): configuration space, BARs, common configuration, interrupts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyvirtio
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.virtio import layout as at
from pyvirtio.virtio import pci_layout as pci
from pyvirtio.virtio.driver import (
    Arena,
    BlockDriver,
    LegacyPciRegisters,
    PciFunction,
    PciRegisters,
)

BASE = 0x8000_0000
MSI = 0xFEE0_0000


class Board:
    """RAM, a disk, a virtio-blk on PCI and a driver for it."""

    def __init__(
        self,
        disk: Any,
        *,
        msix: bool = True,
        legacy: bool = False,
        vectors: int | None = None,
        driver: dict[str, Any] | None = None,
        bus: dict[str, Any] | None = None,
        **device: Any,
    ) -> None:
        self.disk = disk
        self.ram = bytearray(1 << 21)
        memory = pyvirtio.GuestMemory.from_buffer(self.ram, BASE)
        self.levels: list[bool] = []
        self.messages: list[tuple[int, int]] = []
        self.maps: list[tuple[int, int | None]] = []
        device.setdefault("queue_size", 16)
        self.blk = pyvirtio.VirtioBlk(disk, **device)
        self.pci = pyvirtio.VirtioPci(
            self.blk,
            memory,
            self.levels.append,
            (lambda *message: self.messages.append(message)) if msix else None,
            vectors=vectors,
            transitional=legacy,
            on_map=lambda *mapped: self.maps.append(mapped),
            **(bus or {}),
        )
        self.function = PciFunction(self.pci)
        self.function.map_bars()
        order = (bus or {}).get("order", "little")
        self.registers: Any = (
            LegacyPciRegisters(self.function, order) if legacy else PciRegisters(self.function)
        )
        self.arena = Arena(BASE, len(self.ram))
        self.driver = BlockDriver(
            self.registers, memory, self.arena, queue_size=16, wait=self.pci.poll, **(driver or {})
        )

    def start_with_msix(self) -> int:
        """Vector 0 for the configuration, 1 for the queue; the number of vectors."""
        vectors = self.function.set_msix(enabled=True)
        for vector in range(min(vectors, 4)):
            self.function.set_vector(vector, MSI + 16 * vector, 0x40 + vector)
        self.driver.identify()
        self.driver.negotiate()
        self.registers.store(pci.COMMON_CONFIG_MSIX_VECTOR, 2, 0)
        self.registers.select_queue(0)
        self.registers.store(pci.COMMON_QUEUE_MSIX_VECTOR, 2, 1)
        self.driver.set_up_queue()
        self.registers.status |= at.STATUS_DRIVER_OK
        return vectors

    def flush(self) -> None:
        self.driver.submit(at.VIRTIO_BLK_T_FLUSH)
        self.driver.kick()


@pytest.fixture
def make_board(make_disk: Any) -> Any:
    def make(**options: Any) -> Board:
        return Board(make_disk(1 << 20), **options)

    return make


@pytest.fixture
def board(make_board: Any) -> Board:
    return make_board()


# -- configuration space ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("legacy", "ids"),
    [
        (False, (0x1AF4, 0x1042, 1, 0x010000, 0x1AF4, 0x1100)),
        (True, (0x1AF4, 0x1001, 0, 0x010000, 0x1AF4, 0x0002)),
    ],
)
def test_identity_pci_02_pci_03_pci_05_to_07_pci_12_to_14(
    make_board: Any, legacy: bool, ids: Any
) -> None:
    read = make_board(legacy=legacy).pci.config_read
    found = [read(0, 2), read(2, 2), read(8, 1), read(8, 4) >> 8, read(0x2C, 2), read(0x2E, 2)]
    assert tuple(found) == ids
    assert (read(0x0E, 1), read(0x3D, 1)) == (0, 1)


def test_bars_size_themselves(make_board: Any) -> None:
    function = make_board(legacy=True).function
    assert [function.bar_size(index) for index in range(5)] == [128, 0x1000, 0, 0, 0x4000]
    read = function.bus.config_read
    assert [read(0x10 + 4 * index, 4) & 0xF for index in (0, 1, 4)] == [1, 0, 0xC]


def test_read_only_fields_ignore_writes(board: Board) -> None:
    for offset in (0x00, 0x08, 0x2C, 0x34, 0x40, 0x44, 0x48, 0xFC):
        before = board.pci.config_read(offset, 4)
        board.pci.config_write(offset, 4, ~before & 0xFFFF_FFFF)
        assert board.pci.config_read(offset, 4) == before


def test_outside_of_configuration_space_there_are_ones(board: Board) -> None:
    assert board.pci.config_read(0x100, 4) == 0xFFFF_FFFF
    assert board.pci.config_read(0xFE, 4) >> 16 == 0xFFFF
    board.pci.config_write(0x100, 4, 0)


def test_the_bus_hears_where_bars_are(board: Board) -> None:
    assert board.maps[-2:] == [(1, 0xE000_0000), (4, 0xE000_4000)]
    assert board.pci.find(0xE000_4010) == (4, 0x10)
    assert board.pci.find(0xE000_1000) is None
    assert board.pci.find(0xE000_0000, io=True) is None
    board.function.disable(pci.PCI_COMMAND_MEMORY)
    assert board.maps[-2:] == [(1, None), (4, None)]
    assert board.pci.find(0xE000_4010) is None


def test_bars_that_are_not_enabled_do_not_answer(board: Board) -> None:
    board.driver.start()
    board.function.disable(pci.PCI_COMMAND_MEMORY)
    assert board.registers.status == 0xFF
    board.registers.status = 0
    board.function.enable(pci.PCI_COMMAND_MEMORY)
    assert board.registers.status == 15


# -- capabilities ----------------------------------------------------------------------------


def test_capabilities_pci_26_pci_31_pci_60_to_71_pci_77_pci_88(make_board: Any) -> None:
    board = make_board(num_queues=3)
    found = {each.kind: each for each in board.function.capabilities() if each.ident == 9}
    assert [found[kind].length for kind in (1, 2, 3, 4, 5)] == [16, 20, 16, 16, 20]
    assert {found[kind].bar for kind in (1, 2, 3, 4)} == {4}
    assert found[1].start % 4 == found[2].start % 4 == found[4].start % 4 == 0
    assert (found[1].size, found[3].size) == (64, 1)
    multiplier = board.pci.config_read(found[2].offset + 16, 4)
    assert multiplier == 4
    for index in range(3):
        board.registers.select_queue(index)
        offset = board.registers.load(pci.COMMON_QUEUE_NOTIFY_OFF, 2) * multiplier
        assert offset + 4 <= found[2].size


def test_window_reads_and_writes_pci_89_pci_90(board: Board) -> None:
    window = board.function.find(5).offset
    common = board.registers.common
    read, write = board.pci.config_read, board.pci.config_write
    board.function.disable(pci.PCI_COMMAND_MEMORY)  # the window needs no mapping
    write(window + 4, 1, common.bar)
    write(window + 8, 4, common.start + pci.COMMON_DEVICE_STATUS)
    write(window + 12, 4, 1)
    write(window + 16, 1, 3)
    assert read(window + 16, 1) == 3
    assert board.blk.status == 3
    write(window + 8, 4, board.registers.device.start)
    write(window + 12, 4, 4)
    assert read(window + 16, 4) == 2048
    write(window + 8, 4, board.registers.device.start + 2)  # not aligned: nothing happens
    write(window + 16, 4, 7)
    assert read(window + 16, 4) == 7
    write(window + 12, 4, 3)
    assert read(window + 16, 4) == 7


# -- common configuration ----------------------------------------------------------------------


def test_features_by_word_pci_33_pci_34(board: Board) -> None:
    registers = board.registers
    for word, expected in (
        (0, board.blk.offered_features & 0xFFFF_FFFF),
        (1, board.blk.offered_features >> 32),
        (2, 0),
        (0xFFFF_FFFF, 0),
    ):
        registers.store(pci.COMMON_DEVICE_FEATURE_SELECT, 4, word)
        assert registers.load(pci.COMMON_DEVICE_FEATURE, 4) == expected
    registers.accept_features(0x1_0000_0040)
    for word, expected in ((0, 0x40), (1, 1), (2, 0)):
        registers.store(pci.COMMON_DRIVER_FEATURE_SELECT, 4, word)
        assert registers.load(pci.COMMON_DRIVER_FEATURE, 4) == expected


def test_reads_of_any_width_agree(board: Board) -> None:
    board.driver.start()
    size = pci.COMMON_SIZE
    board.registers.select_queue(0)
    whole = bytes(board.registers.load(offset, 1) for offset in range(size))
    for width in (2, 4, 8):
        parts = [board.registers.load(offset, width) for offset in range(0, size, width)]
        assert b"".join(each.to_bytes(width, "little") for each in parts) == whole
    assert int.from_bytes(whole[32:40], "little") == board.driver.ring.descriptors


def test_queue_fields_pci_39_pci_45_pci_46(make_board: Any) -> None:
    registers = make_board(num_queues=2).registers
    assert registers.load(pci.COMMON_NUM_QUEUES, 2) == 2
    for index, size in ((0, 16), (1, 16), (2, 0), (0xFFFF, 0)):
        assert registers.select_queue(index) == size
        assert registers.load(pci.COMMON_QUEUE_ENABLE, 2) == 0
        registers.store(pci.COMMON_QUEUE_ENABLE, 2, 1 if index > 1 else 0)
        registers.store(pci.COMMON_QUEUE_RESET, 2, 1)
    assert registers.status == 0


def test_halves_of_addresses_in_either_order_pci_17(board: Board) -> None:
    registers = board.registers
    registers.select_queue(0)
    for field in (32, 40, 48):
        registers.store(field + 4, 4, 0x1234)
        registers.store(field, 4, 0x5678_0000)
        assert registers.load(field, 8) == 0x1234_5678_0000
        registers.store(field, 8, 0x9_0000_0010)
        assert (registers.load(field, 4), registers.load(field + 4, 4)) == (0x10, 9)


def test_an_enabled_queue_cannot_be_changed(board: Board) -> None:
    board.driver.start()
    registers = board.registers
    registers.select_queue(0)
    before = registers.load(24, 8), registers.load(32, 8)
    registers.store(24, 2, 8)
    registers.store(32, 4, 0)
    registers.store(28, 2, 0)
    assert (registers.load(24, 8), registers.load(32, 8)) == before


def test_reset_pci_37_to_41_pci_114(board: Board) -> None:
    board.start_with_msix()
    board.registers.status = 0
    registers = board.registers
    assert registers.status == 0
    registers.select_queue(0)
    fields = (pci.COMMON_QUEUE_ENABLE, pci.COMMON_QUEUE_RESET)
    assert [registers.load(field, 2) for field in fields] == [0, 0]
    vectors = (pci.COMMON_CONFIG_MSIX_VECTOR, pci.COMMON_QUEUE_MSIX_VECTOR)
    assert [registers.load(field, 2) for field in vectors] == [0xFFFF, 0xFFFF]


def test_queue_reset_pci_42_pci_44(board: Board) -> None:
    driver, registers = board.driver, board.registers
    driver.start()
    driver.flush()
    registers.select_queue(0)
    assert registers.reset_queue()
    assert registers.load(24, 2) == 16
    driver.queue_size = 8
    driver.set_up_queue()
    driver.write(3, b"x" * 512)
    assert driver.read(3, 1) == b"x" * 512


def test_generation_moves_at_reads_of_what_changed_pci_36(board: Board) -> None:
    board.driver.start()
    registers = board.registers
    board.driver.registers.read_config(0, 4)
    before = registers.generation()
    for size in range(256):
        board.disk.truncate((4096 + size) * 512)
    assert board.driver.capacity == 4096 + 255
    assert registers.generation() != before
    same = registers.generation()
    assert (board.driver.capacity, registers.generation()) == (4096 + 255, same)


# -- requests, interrupts --------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("notify", ["inline", "deferred"])
@pytest.mark.parametrize("data", [False, True])
def test_requests(make_board: Any, packed: bool, notify: str, data: bool) -> None:
    board = make_board(packed=packed, bus={"notify": notify, "notification_data": data})
    board.driver.start()
    assert board.blk.accepted(at.VIRTIO_F_NOTIFICATION_DATA) == data
    board.driver.write(7, b"p" * 1024)
    assert board.driver.read(7, 2) == b"p" * 1024


def test_every_queue_has_its_notification(make_board: Any) -> None:
    board = make_board(num_queues=3, driver={"queue_index": 2})
    board.driver.start()
    board.driver.write(7, b"p" * 512)
    assert board.driver.read(7, 1) == b"p" * 512


def test_intx_and_isr_pci_73_pci_74_pci_75(board: Board) -> None:
    board.driver.start()
    assert not board.pci.config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT
    board.flush()
    assert board.levels == [True]
    assert board.pci.config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT
    assert [board.registers.take_interrupt() for _ in range(2)] == [1, 0]
    assert board.levels == [True, False]
    board.disk.truncate(1 << 21)
    assert board.registers.take_interrupt() == 2


def test_where_notifications_are(make_board: Any) -> None:
    card = make_board(legacy=True, num_queues=2).pci
    assert [card.notifies(*at) for at in ((4, 0x3000), (4, 0x3004), (0, 16))] == [True] * 3
    assert [card.notifies(*at) for at in ((4, 0x2FFC), (1, 0x3000), (0, 18))] == [False] * 3
    assert not make_board().pci.notifies(0, 16)


def test_intx_can_be_disabled(board: Board) -> None:
    board.driver.start()
    board.function.enable(pci.PCI_COMMAND_INTX_DISABLE)
    board.flush()
    assert board.levels == []
    assert board.pci.config_read(pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT
    board.function.disable(pci.PCI_COMMAND_INTX_DISABLE)
    assert board.levels == [True]


def test_messages_by_vector(board: Board) -> None:
    assert board.start_with_msix() == 2
    board.flush()
    assert board.messages == [(MSI + 16, 0x41)]
    board.disk.truncate(1 << 21)
    assert board.messages == [(MSI + 16, 0x41), (MSI, 0x40)]
    assert board.registers.take_interrupt() == 2  # PCI-72; not for the queue
    assert board.levels == []


def test_unmapped_events_are_silent_pci_129_pci_130(board: Board) -> None:
    board.function.set_msix(enabled=True)
    board.driver.start()
    board.flush()
    board.disk.truncate(1 << 21)
    assert (board.messages, board.levels) == ([], [])


@pytest.mark.parametrize("by", ["vector", "function", "bus master"])
def test_masked_messages_are_pending(board: Board, by: str) -> None:
    board.start_with_msix()
    function = board.function
    board.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    if by == "vector":
        function.set_vector(1, MSI + 16, 0x41, masked=True)
    elif by == "function":
        function.set_msix(enabled=True, masked=True)
    board.driver.kick()
    if by == "bus master":
        board.messages.clear()
        function.disable(pci.PCI_COMMAND_MASTER)
        board.pci.queue_interrupt(0)
    assert (board.messages, function.pending_bits()) == ([], 2)
    if by == "vector":
        function.set_vector(1, MSI + 16, 0x41)
    elif by == "function":
        function.set_msix(enabled=True)
    else:
        function.enable(pci.PCI_COMMAND_MASTER)
    assert (board.messages, function.pending_bits()) == ([(MSI + 16, 0x41)], 0)


def test_what_was_pending_is_forgotten_by_a_reset(board: Board) -> None:
    board.start_with_msix()
    board.function.set_msix(enabled=True, masked=True)
    board.flush()
    board.registers.status = 0
    board.function.set_msix(enabled=True)
    assert board.messages == []


def test_vectors_that_are_none_pci_112_pci_113_pci_116(make_board: Any) -> None:
    board = make_board(vectors=5)
    board.registers.select_queue(0)
    for field in (pci.COMMON_CONFIG_MSIX_VECTOR, pci.COMMON_QUEUE_MSIX_VECTOR):
        for value, expected in ((4, 4), (5, 0xFFFF), (0, 0), (0xFFFF, 0xFFFF)):
            board.registers.store(field, 2, value)
            assert board.registers.load(field, 2) == expected


@pytest.mark.parametrize("vectors", [1, 2, 129, 2048])
def test_msix_tables_of_any_size(make_board: Any, vectors: int) -> None:
    board = make_board(vectors=vectors)
    assert board.function.set_msix(enabled=True) == vectors
    table, pending = (board.function._msix_part(where) for where in (4, 8))
    assert table == (1, 0)
    assert 16 * vectors <= pending[1]
    assert pending[1] + -(-vectors // 8) <= board.function.bar_size(1)
    assert board.pci.bar_read(1, 16 * (vectors - 1) + 12, 4) == 1  # masked


def test_without_a_msi_callable_there_is_no_msix(make_board: Any) -> None:
    board = make_board(msix=False)
    assert board.function.msix() is None
    assert board.function.bar_size(1) == 0
    board.driver.start()
    board.driver.flush()


def test_bus_mastering_holds_kicks_and_the_start(board: Board) -> None:
    board.function.disable(pci.PCI_COMMAND_MASTER)
    board.driver.start()
    assert board.registers.status == 15
    before = bytes(board.ram)
    board.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    board.driver.ring.publish()
    before = bytes(board.ram)
    board.registers.notify(0)
    assert bytes(board.ram) == before
    board.function.enable(pci.PCI_COMMAND_MASTER)
    assert len(board.driver.collect()) == 1


def test_needs_reset_is_told_bf_08(board: Board) -> None:
    board.driver.start()
    board.driver.ring.offer(99)
    board.driver.kick()
    assert board.registers.status & at.STATUS_NEEDS_RESET
    assert board.registers.take_interrupt() & 2


# -- resets and saving -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bus", "function"])
def test_a_reset_of_the_function_is_a_power_on(board: Board, how: str) -> None:
    board.start_with_msix()
    board.flush()
    if how == "bus":
        board.pci.reset()
    else:
        af = next(each for each in board.function.capabilities() if each.ident == 0x13)
        assert board.pci.config_read(af.offset + 3, 1) == 3
        board.pci.config_write(af.offset + 4, 1, 1)
    assert board.pci.config_read(pci.PCI_COMMAND, 2) == 0
    assert board.pci.find(0xE000_4000) is None
    assert board.blk.status == 0
    board.function.map_bars()
    assert board.pci.bar_read(1, 12, 4) == 1
    assert board.start_with_msix() == 2


def state_of(part: Any) -> bytes:
    stream = StateWriter()
    part.save_state(stream)
    return bytes(stream)


def load(part: Any, state: bytes) -> None:
    stream = StateReader(state, name="disk", version=1)
    adopt = part.load_state(stream)
    stream.end()
    adopt()


@pytest.mark.parametrize("legacy", [False, True])
def test_saved_and_loaded_elsewhere(make_board: Any, legacy: bool) -> None:
    board = make_board(legacy=legacy)
    if legacy:
        board.driver.start()
    else:
        board.start_with_msix()
    board.driver.write(9, b"s" * 512)
    state = state_of(board.pci)
    other = make_board(legacy=legacy)
    other.ram[:] = board.ram
    other.disk.content[:] = board.disk.content
    load(other.pci, state)
    assert state_of(other.pci) == state
    driver = board.driver
    driver.registers = other.registers
    driver.memory = driver.ring.memory = other.driver.memory
    assert driver.read(9, 1) == b"s" * 512
    if not legacy:
        assert other.messages[-1] == (MSI + 16, 0x41)
    else:
        assert other.pci.bar_address(0) == 0xC000


def test_state_of_another_function_is_refused(make_board: Any) -> None:
    state = state_of(make_board(num_queues=2).pci)
    other = make_board()
    before = state_of(other.pci)
    with pytest.raises(pyvirtio.ImageError, match="another PCI function"):
        load(other.pci, state)
    assert state_of(other.pci) == before
    with pytest.raises(pyvirtio.ImageError, match="ends too soon"):
        load(other.pci, before[:-3])


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(["config", 0, 1, 4, 5]),
        st.booleans(),
        st.one_of(st.integers(0, 0x110), st.integers(0, 0x4FFF)),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.integers(0, 16), st.integers(0, (1 << 64) - 1)),
    ),
    max_size=60,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(accesses=ACCESSES, legacy=st.booleans())
def test_no_access_raises_and_a_reset_mends_all(
    make_board: Any, accesses: list[tuple[Any, bool, int, int, int]], legacy: bool
) -> None:
    board = make_board(legacy=legacy)
    for where, is_read, offset, size, value in accesses:
        value &= (1 << 8 * size) - 1
        if where == "config":
            if is_read:
                assert 0 <= board.pci.config_read(offset, size) < 1 << 8 * size
            else:
                board.pci.config_write(offset, size, value)
        elif is_read:
            assert 0 <= board.pci.bar_read(where, offset, size) < 1 << 8 * size
        else:
            board.pci.bar_write(where, offset, size, value)
    board.pci.reset()
    board.function.map_bars()
    board.driver.start()
    board.driver.flush()


# -- the legacy interface --------------------------------------------------------------------


@pytest.mark.parametrize("order", ["little", "big"])
def test_legacy_driver_pci_94_to_97(make_board: Any, order: str) -> None:
    board = make_board(legacy=True, bus={"order": order})
    board.driver.start()
    assert not board.registers.offered_features() >> 32
    assert board.driver.capacity == 2048
    assert bytes(board.registers.read_config(place, 1) for place in range(8)) == (2048).to_bytes(
        8, order
    )
    board.driver.write(5, b"l" * 512)
    assert board.driver.read(5, 1) == b"l" * 512
    assert board.levels[:2] == [True, False]


def test_legacy_configuration_moves_with_msix_pci_96(make_board: Any) -> None:
    board = make_board(legacy=True)
    board.driver.start()
    board.function.set_msix(enabled=True)
    assert board.registers.read_config(0, 4) == 2048
    assert board.pci.bar_read(0, 24, 4) == 2048
    board.function.set_vector(1, MSI, 5)
    board.registers.store(pci.LEGACY_QUEUE_VECTOR, 2, 1)
    assert board.registers.load(pci.LEGACY_QUEUE_VECTOR, 2) == 1
    board.flush()
    assert board.messages == [(MSI, 5)]


def test_a_transitional_device_serves_modern_drivers_too(make_board: Any) -> None:
    board = make_board(legacy=True)
    board.driver.start()
    board.driver.write(1, b"1" * 512)
    modern = PciRegisters(board.function)
    modern.status = 0  # the reset works through either
    driver = BlockDriver(modern, board.driver.memory, board.arena)
    driver.start()
    assert driver.features >> at.VIRTIO_F_VERSION_1 & 1
    assert driver.read(1, 1) == b"1" * 512
    board.registers.load(0, 4)  # the other interface, in the middle: no effect
    assert driver.read(1, 1) == b"1" * 512
    board.registers.status = 0
    board.driver.start()
    assert board.driver.read(1, 1) == b"1" * 512


def test_vendor_data_pci_83_to_85(make_board: Any) -> None:
    board = make_board(bus={"vendor_data": (0x1AF5, b"mine!")})
    found = [
        each
        for each in board.function.capabilities()
        if each.ident == pci.PCI_CAP_ID_VENDOR and each.kind == pci.VIRTIO_PCI_CAP_VENDOR_CFG
    ]
    assert [each.length for each in found] == [12]
    read = board.pci.config_read
    assert read(found[0].offset + 4, 2) == 0x1AF5
    data = bytes(read(found[0].offset + 6 + place, 1) for place in range(6))
    assert data == b"mine!\0"


@pytest.mark.parametrize("data", [(0x1AF4, b""), (0x1AF5, bytes(250))])
def test_vendor_data_that_cannot_be(make_board: Any, data: tuple[int, bytes]) -> None:
    with pytest.raises(ValueError, match="vendor"):
        make_board(bus={"vendor_data": data})
