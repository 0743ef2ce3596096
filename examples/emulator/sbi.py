"""The firmware below a kernel in supervisor mode: RISC-V SBI 2.0, answered by the host.

A board that is started with :meth:`.board.Board.start_supervisor` has no firmware in its memory. An
``ecall`` from supervisor mode ends up here instead: the extension is in a7, the function in a6, the
arguments from a0 on; the answer is an error in a0 and a value in a1. The chapters' extensions are
methods; at the end are the legacy calls (chapter 5), which answer in a0 alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

from .cpu import Cpu
from .csr import ExtraCsrs
from .mmu import translate
from .state import SUPERVISOR, HartState
from .syscon import Power, TestFinisher
from .uart import Uart

__all__ = ["Sbi"]

_SUCCESS, _FAILED, _NOT_SUPPORTED, _INVALID_PARAM = 0, -1, -2, -3
_INVALID_ADDRESS, _ALREADY_AVAILABLE = -5, -6
_VERSION = 2 << 24
_IMPLEMENTATION = 0x7079_7669
"""Not a registered number: this is nobody else's firmware."""
_ALL_BITS = (1 << 64) - 1
_SIE = 1 << 1
_MOST_READ = 4096

_Answer = tuple[int, int]
_Call = Callable[[HartState, int, list[int]], _Answer]


class Sbi:
    """Firmware for the one hart of ``cpu``, whose memory ``ram`` starts at address ``base``.

    The console is the serial port ``uart``; ``send(byte)`` is where that sends to.
    """

    def __init__(
        self,
        cpu: Cpu,
        csrs: ExtraCsrs,
        ram: mmap.mmap,
        base: int,
        *,
        uart: Uart,
        send: Callable[[int], None],
        finisher: TestFinisher,
    ) -> None:
        self._cpu = cpu
        self._csrs = csrs
        self._ram = ram
        self._base = base
        self._uart = uart
        self._send = send
        self._finisher = finisher
        self._extensions: dict[int, _Call] = {
            0x10: self._about,
            0x5449_4D45: self._timer,
            0x73_5049: self._interrupt,
            0x5246_4E43: self._fence,
            0x48_534D: self._hart,
            0x5352_5354: self._reset,
            0x4442_434E: self._console,
        }
        self._legacy: dict[int, Callable[[HartState], int]] = {
            0: self._old_set_timer,
            1: self._old_putchar,
            2: self._old_getchar,
            3: self._old_clear_ipi,
            4: self._old_send_ipi,
            5: self._old_fence,
            6: self._old_fence,
            7: self._old_fence,
            8: self._old_shutdown,
        }

    def handle(self, state: HartState) -> bool:
        """Answer the call that is in the registers. Always True: there is no one else to ask."""
        words = state.words
        extension, function = words[17], words[16] & 0xFFFF_FFFF
        old = self._legacy.get(extension)
        if old is not None:
            words[10] = old(state) & _ALL_BITS
            return True
        call = self._extensions.get(extension)
        arguments = list(words[10:16])
        error, value = call(state, function, arguments) if call is not None else (_NOT_SUPPORTED, 0)
        if error is not _RESUMED:
            words[10], words[11] = error & _ALL_BITS, value & _ALL_BITS
        return True

    # -- chapter 4: base -----------------------------------------------------------------------

    def _about(self, state: HartState, function: int, arguments: list[int]) -> _Answer:
        if function == 3:
            return _SUCCESS, int(arguments[0] in self._extensions or arguments[0] in self._legacy)
        # Version, implementation and its version; vendor, architecture and number of the hart.
        answers = (_VERSION, _IMPLEMENTATION, 1, 0, 0, 0, 0)
        return (_SUCCESS, answers[function]) if function < 7 else (_NOT_SUPPORTED, 0)

    # -- chapters 6 to 8: timer, interrupts and fences between harts ---------------------------

    def _timer(self, state: HartState, function: int, arguments: list[int]) -> _Answer:
        if function != 0:
            return _NOT_SUPPORTED, 0
        self._csrs.set_timer(arguments[0])
        return _SUCCESS, 0

    def _interrupt(self, state: HartState, function: int, arguments: list[int]) -> _Answer:
        if function != 0:
            return _NOT_SUPPORTED, 0
        chosen = _chosen(arguments)
        if chosen:
            self._cpu.interrupt_software()
        return (_INVALID_PARAM, 0) if chosen is None else (_SUCCESS, 0)

    def _fence(self, state: HartState, function: int, arguments: list[int]) -> _Answer:
        if function > 2:  # the rest is for hypervisors
            return _NOT_SUPPORTED, 0
        chosen = _chosen(arguments)
        # The engine itself sees to code that its own hart has changed (FENCE.I).
        if chosen and function != 0:
            self._cpu.forget_translations()
        return (_INVALID_PARAM, 0) if chosen is None else (_SUCCESS, 0)

    # -- chapter 9: hart state management ------------------------------------------------------

    def _hart(self, state: HartState, function: int, arguments: list[int]) -> _Answer:
        if function == 0:
            return (_INVALID_PARAM if arguments[0] else _ALREADY_AVAILABLE), 0
        if function == 1:
            # Stopped, the only hart could not be started by anybody.
            return _FAILED, 0
        if function == 2:
            return (_INVALID_PARAM, 0) if arguments[0] else (_SUCCESS, 0)
        if function == 3:
            return self._suspend(state, arguments)
        return _NOT_SUPPORTED, 0

    def _suspend(self, state: HartState, arguments: list[int]) -> _Answer:
        kind, address, opaque = arguments[0] & 0xFFFF_FFFF, arguments[1], arguments[2]
        if kind == 0:
            self._cpu.wait_here()
            return _SUCCESS, 0
        if kind != 1 << 31:
            return _INVALID_PARAM, 0
        if address & 1 or not 0 <= address - self._base < len(self._ram):
            return _INVALID_ADDRESS, 0
        self._cpu.wait_here()
        state.pc, state.priv, state.satp = address, SUPERVISOR, 0
        state.mstatus &= ~_SIE
        state.words[10], state.words[11] = 0, opaque
        return _RESUMED, 0

    # -- chapter 10: system reset --------------------------------------------------------------

    def _reset(self, state: HartState, function: int, arguments: list[int]) -> _Answer:
        kind, reason = arguments[0] & 0xFFFF_FFFF, arguments[1] & 0xFFFF_FFFF
        if function != 0:
            return _NOT_SUPPORTED, 0
        if kind > 2 or reason > 1:
            return _INVALID_PARAM, 0
        if kind:
            self._finisher.power = Power.RESET
        else:
            self._finisher.power = Power.FAILED if reason else Power.OFF
        self._cpu.wait_here()
        return _SUCCESS, 0

    # -- chapter 12: debug console -------------------------------------------------------------

    def _console(self, state: HartState, function: int, arguments: list[int]) -> _Answer:
        if function == 2:
            self._send(arguments[0] & 0xFF)
            return _SUCCESS, 0
        if function > 2:
            return _NOT_SUPPORTED, 0
        length, low, high = arguments[:3]
        start = low - self._base
        if high or start < 0 or start + length > len(self._ram):
            return _INVALID_PARAM, 0
        if function == 0:
            for byte in self._ram[start : start + length]:
                self._send(byte)
            return _SUCCESS, length
        data = self._uart.take(min(length, _MOST_READ))
        self._ram[start : start + len(data)] = data
        return _SUCCESS, len(data)

    # -- chapter 5: legacy ---------------------------------------------------------------------

    def _old_set_timer(self, state: HartState) -> int:
        self._csrs.set_timer(state.words[10])
        return _SUCCESS

    def _old_putchar(self, state: HartState) -> int:
        self._send(state.words[10] & 0xFF)
        return _SUCCESS

    def _old_getchar(self, state: HartState) -> int:
        data = self._uart.take(1)
        return data[0] if data else -1

    def _old_clear_ipi(self, state: HartState) -> int:
        self._cpu.interrupt_software(False)
        return _SUCCESS

    def _old_send_ipi(self, state: HartState) -> int:
        if self._old_mask(state):
            self._cpu.interrupt_software()
        return _SUCCESS

    def _old_fence(self, state: HartState) -> int:
        if self._old_mask(state) and state.words[17] != 5:
            self._cpu.forget_translations()
        return _SUCCESS

    def _old_shutdown(self, state: HartState) -> int:
        self._finisher.power = Power.OFF
        self._cpu.wait_here()
        return _SUCCESS

    def _old_mask(self, state: HartState) -> bool:
        """Whether hart 0 is in the bit mask that a0 points to (a virtual address; 0 is all)."""
        pointer = state.words[10]
        if pointer == 0:
            return True
        with memoryview(self._ram) as ram:
            where = translate(state, ram, self._base, pointer)
        if where is None or not 0 <= where - self._base < len(self._ram):
            return False
        return bool(self._ram[where - self._base] & 1)


_RESUMED = 1
"""No error: the registers are those that the hart resumes with."""


def _chosen(arguments: list[int]) -> bool | None:
    """Whether a hart mask and its base (chapter 3.1) name hart 0; None if they name another."""
    mask, base = arguments[:2]
    if base == _ALL_BITS:
        return True
    if base == 0:
        return None if mask & ~1 else bool(mask & 1)
    return None if mask else False
