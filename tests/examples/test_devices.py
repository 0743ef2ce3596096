"""The board's devices one by one, without a CPU."""

from __future__ import annotations

import struct

import pytest

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.clint import NEVER, Clint
from examples.emulator.clock import InstructionClock
from examples.emulator.fdt import Node, flatten, wide
from examples.emulator.image import ImageFileError, load_program
from examples.emulator.plic import Plic
from examples.emulator.syscon import Power, TestFinisher
from examples.emulator.uart import Uart

# -- PLIC ------------------------------------------------------------------------------------

CLAIM_M, CLAIM_S = 0x200004, 0x201004


class Lines(list):
    """Two lines to a hart."""

    def __init__(self):
        super().__init__([False, False])

    def line(self, index):
        return lambda level: self.__setitem__(index, level)


@pytest.fixture
def lines():
    return Lines()


@pytest.fixture
def plic(lines):
    """Sources 1 to 40, all of priority 1, all enabled for the first context."""
    plic = Plic((lines.line(0), lines.line(1)), 40)
    for source in range(1, 41):
        plic.write(4 * source, 4, 1)
    plic.write(0x2000, 4, 0xFFFFFFFF)
    plic.write(0x2004, 4, 0xFFFFFFFF)
    return plic


def test_plic_gives_a_source_once_until_it_is_completed(plic, lines):
    plic.set(10, True)
    assert lines == [True, False]
    assert plic.read(CLAIM_M, 4) == 10
    assert lines[0] is False
    assert plic.read(CLAIM_M, 4) == 0


def test_plic_raises_a_line_that_is_still_high_again_after_completion(plic, lines):
    plic.set(10, True)
    plic.read(CLAIM_M, 4)
    plic.write(CLAIM_M, 4, 10)
    assert lines[0] is True
    plic.set(10, False)
    assert lines[0] is False


def test_plic_tells_of_a_pulse_once(plic, lines):
    plic.pulse(10, True)
    assert plic.read(CLAIM_M, 4) == 10
    plic.write(CLAIM_M, 4, 10)
    assert lines[0] is False


def test_plic_keeps_a_pulse_that_comes_while_the_source_is_claimed(plic, lines):
    plic.pulse(10, True)
    plic.read(CLAIM_M, 4)
    plic.pulse(10, True)
    assert lines[0] is False
    plic.write(CLAIM_M, 4, 10)
    assert lines[0] is True


def test_plic_gives_the_highest_priority_first_then_the_lowest_number(plic):
    plic.write(4 * 30, 4, 7)
    for source in (5, 3, 30):
        plic.set(source, True)
    assert [plic.read(CLAIM_M, 4) for _ in range(4)] == [30, 3, 5, 0]


def test_plic_threshold_masks_its_own_priority_and_those_below(plic, lines):
    plic.write(0x200000, 4, 1)
    plic.set(3, True)
    assert lines[0] is False
    plic.write(12, 4, 2)
    assert lines[0] is True


def test_plic_priority_zero_is_never(plic, lines):
    plic.write(12, 4, 0)
    plic.set(3, True)
    assert lines[0] is False


def test_plic_contexts_have_enables_and_claims_of_their_own(plic, lines):
    plic.write(0x2084, 4, 1 << 3)
    plic.set(35, True)
    assert lines == [True, True]
    assert plic.read(CLAIM_S, 4) == 35
    assert lines == [False, False]


def test_plic_ignores_completion_of_a_source_that_the_context_has_not_enabled(plic, lines):
    plic.set(3, True)
    plic.read(CLAIM_M, 4)
    plic.write(CLAIM_S, 4, 3)
    assert lines[0] is False


def test_plic_shows_pending_sources_and_what_was_written(plic):
    plic.set(33, True)
    assert (plic.read(0x1000, 4), plic.read(0x1004, 4)) == (0, 2)
    assert plic.read(0x2000, 4) == 0xFFFFFFFE, "source 0 does not exist"
    assert plic.read(4 * 33, 4) == 1


def test_plic_answers_zero_outside_its_registers(plic):
    for offset in (4 * 1000, 0x1FFC, 0x2100, 0x1FFFFC, 0x202000, 0x203004, 0x5FFFFC):
        plic.write(offset, 4, 0xFFFFFFFF)
        assert plic.read(offset, 4) == 0


# -- UART ------------------------------------------------------------------------------------


class Port:
    """A serial port with what it did."""

    def __init__(self):
        self.sent = bytearray()
        self.level = False
        self.events = []
        self.uart = Uart(
            self.sent.append, lambda level: setattr(self, "level", level), self.events.append
        )

    def __getattr__(self, name):
        return getattr(self.uart, name)


@pytest.fixture
def port():
    return Port()


def test_uart_sends_what_is_written(port):
    for byte in b"hi":
        port.write(0, 1, byte)
    assert port.sent == b"hi"
    assert port.read(5, 1) == 0x60


def test_uart_gives_what_was_typed_in_order_and_loses_nothing(port):
    port.write(2, 1, 1)
    text = bytes(range(100))
    port.receive(text)
    got = bytearray()
    while port.read(5, 1) & 1:
        got.append(port.read(0, 1))
    assert got == text


def test_uart_interrupts_for_received_data_only_if_enabled(port):
    port.receive(b"x")
    assert port.level is False
    port.write(1, 1, 1)
    assert port.level is True
    assert port.read(2, 1) == 4
    port.read(0, 1)
    assert port.level is False
    assert port.read(2, 1) == 1


def test_uart_with_fifo_tells_data_below_the_trigger_level_as_timed_out(port):
    port.write(2, 1, 0x81)  # 8 bytes
    port.write(1, 1, 1)
    port.receive(b"abc")
    assert port.read(2, 1) == 0xCC
    port.receive(b"defgh")
    assert port.read(2, 1) == 0xC4


def test_uart_tells_that_the_transmitter_is_empty_when_that_is_enabled_and_after_each_byte(port):
    port.write(1, 1, 2)
    assert port.events == [True]
    port.write(0, 1, 65)
    assert port.events == [True, True]
    assert port.level is False


def test_uart_reading_iir_takes_the_transmitter_event_back(port):
    port.write(1, 1, 2)
    assert port.read(2, 1) == 2
    assert port.events == [True, False]
    assert port.read(2, 1) == 1


def test_uart_data_come_before_the_transmitter_in_iir_and_do_not_clear_it(port):
    port.write(1, 1, 3)
    port.receive(b"x")
    assert port.read(2, 1) == 4
    port.read(0, 1)
    assert port.read(2, 1) == 2


def test_uart_divisor_is_behind_dlab(port):
    port.write(3, 1, 0x83)
    port.write(0, 1, 0x34)
    port.write(1, 1, 0x12)
    assert (port.read(0, 1), port.read(1, 1)) == (0x34, 0x12)
    port.write(3, 1, 3)
    assert (port.read(1, 1), port.sent) == (0, b"")


def test_uart_loopback_returns_bytes_and_modem_lines(port):
    port.write(4, 1, 0x1A)
    port.write(0, 1, 0x55)
    assert (port.sent, port.read(0, 1)) == (b"", 0x55)
    assert port.read(6, 1) & 0xF0 == 0x90


def test_uart_overrun_in_loopback_is_a_line_status_that_reading_clears(port):
    port.write(1, 1, 4)
    port.write(4, 1, 0x10)
    port.write(0, 1, 1)
    port.write(0, 1, 2)
    assert (port.level, port.read(2, 1)) == (True, 6)
    assert port.read(5, 1) & 2
    assert (port.level, port.read(5, 1) & 2) == (False, 0)


def test_uart_scratch_register_keeps_a_byte(port):
    port.write(7, 1, 0x1A5)
    assert port.read(7, 1) == 0xA5


# -- CLINT and clock -------------------------------------------------------------------------


@pytest.fixture
def clint(lines):
    clock = InstructionClock(rate=10, cost=1)
    return Clint(clock, lines.line(0), lines.line(1)), clock


def test_clint_timer_is_pending_from_its_tick_on(clint, lines):
    clint, clock = clint
    clint.write(0x4000, 4, 100)
    clint.write(0x4004, 4, 0)
    clock.ran(999)
    clint.update()
    assert lines[0] is False
    clock.ran(1)
    clint.update()
    assert lines[0] is True
    clint.write(0x4000, 8, NEVER)
    assert lines[0] is False


def test_clint_registers_can_be_had_by_halves_that_belong_together(clint):
    clint, clock = clint
    clock.sleep_until((1 << 32) - 2)
    low = clint.read(0xBFF8, 4)
    clock.sleep_until(1 << 33)
    assert (low, clint.read(0xBFFC, 4)) == ((1 << 32) - 1, 0)
    assert clint.read(0xBFFC, 4) == 2
    clint.write(0x4004, 4, 7)
    assert clint.read(0x4004, 4) == 7


def test_clint_time_can_be_set(clint):
    clint, clock = clint
    clock.sleep_until(1000)
    clint.write(0xBFF8, 8, 50)
    clint.write(0x4000, 8, 60)
    assert clint.mtime() == 51
    assert clint.deadline() == 1010


def test_clint_software_interrupt_is_bit_zero(clint, lines):
    clint, _ = clint
    clint.write(0, 4, 0xFFFFFFFF)
    assert (clint.read(0, 4), lines[1]) == (1, True)
    clint.write(0, 4, 0xFFFFFFFE)
    assert (clint.read(0, 4), lines[1]) == (0, False)


def test_clock_lets_as_many_instructions_run_as_fit_before_an_event():
    clock = InstructionClock(rate=10)
    clock.ran(95)
    assert clock.now() == 9
    assert clock.budget(12, 1000) == 25
    assert clock.budget(1000, 500) == 500


# -- the rest --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "power", "code"),
    [
        (0x5555, Power.OFF, 0),
        (0x7777, Power.RESET, 0),
        (0x0042_3333, Power.FAILED, 0x42),
        (0x1234, None, 0),
    ],
)
def test_finisher_understands_sifives_commands(value, power, code):
    finisher = TestFinisher()
    finisher.write(0, 4, value)
    assert (finisher.power, finisher.code) == (power, code)


def test_device_tree_is_laid_out_as_the_specification_says():
    root = Node(compatible=["one", "two"])
    root["#address-cells"] = 2
    child = root.add("memory@80000000")
    child["reg"] = wide(0x80000000, 1 << 32)
    child["empty"] = True
    blob = flatten(root)
    magic, total, structure, strings, reservations, version = struct.unpack_from(">6I", blob)
    assert (magic, total, version) == (0xD00DFEED, len(blob), 17)
    assert blob[reservations : reservations + 16] == bytes(16)
    assert blob[structure : structure + 8] == bytes.fromhex("0000000100000000")
    assert blob[strings:] == b"compatible\0#address-cells\0reg\0empty\0"
    assert b"one\0two\0" in blob
    assert struct.pack(">4I", 0, 0x80000000, 1, 0) in blob
    assert blob[strings - 4 : strings] == struct.pack(">I", 9)


def elf(segments, entry=0x80000004, machine=243):
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack(
        "<HHIQQQIHHHHHH", 2, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    offset = 64 + 56 * len(segments)
    table = data = b""
    for address, contents, size in segments:
        table += struct.pack(
            "<IIQQQQQQ", 1, 7, offset + len(data), 0x1234, address, len(contents), size, 4096
        )
        data += contents
    return header + table + data


def test_elf_segments_go_to_their_physical_addresses_and_the_rest_is_zero(tmp_path):
    path = tmp_path / "kernel"
    path.write_bytes(elf([(0x80000000, b"code", 4), (0x80000010, b"da", 6)]))
    ram = bytearray(b"\xff" * 64)
    assert load_program(path, memoryview(ram), 0x80000000, 0) == 0x80000004
    assert ram[:4] == b"code"
    assert ram[16:24] == b"da\0\0\0\0\xff\xff"


def test_plain_program_goes_where_it_is_told(tmp_path):
    path = tmp_path / "firmware.bin"
    path.write_bytes(b"bytes")
    ram = bytearray(64)
    assert load_program(path, memoryview(ram), 0x80000000, 0x80000008) == 0x80000008
    assert ram[8:13] == b"bytes"


@pytest.mark.parametrize(
    "contents",
    [
        elf([(0x7FFFFFFF, b"code", 4)]),
        elf([(0x8000003E, b"code", 4)]),
        elf([(0x80000000, b"code", 100)]),
        elf([], machine=62),
        elf([(0x80000000, b"", 0)])[:70],
        b"\x7fELF",
        bytes(65),
    ],
    ids=["below", "behind", "zeroes behind", "x86", "cut off", "only magic", "too large"],
)
def test_program_that_does_not_fit_is_refused(tmp_path, contents):
    path = tmp_path / "bad"
    path.write_bytes(contents)
    with pytest.raises(ImageFileError, match="bad"):
        load_program(path, memoryview(bytearray(64)), 0x80000000, 0x80000000)
