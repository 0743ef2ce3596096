"""The incoming MSI controller of one hart's supervisor level (RISC-V AIA 1.0, chapters 2, 3 and 5).

A device that *writes a number* to the controller's page, a message, makes the external interrupt
with that number pending; while one that is enabled is, the hart's external interrupt is. All else
is done by CSRs, which Unicorn does not know and which so end in :mod:`.csr`:

=========  ==============================================================================
CSR        what
=========  ==============================================================================
siselect   which of the registers below ``sireg`` is
sireg      0x70 delivery, 0x72 threshold, 0x80 and on pending, 0xC0 and on enable bits
stopei     the lowest number that is pending and enabled; writing takes it off
stopi      the most urgent of the hart's own interrupts: external, software, timer
=========  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from pyvirtio.backend.state import StateReader, StateWriter

from .state import HartState

__all__ = ["IDENTITIES", "Imsic"]

IDENTITIES = 255
"""Numbers of interrupts, from 1 on; the driver wants them to be a multiple of 64, less 1."""
_IMPLEMENTED = (1 << IDENTITIES + 1) - 2
_SISELECT, _SIREG, _STOPEI, _STOPI = 0x150, 0x151, 0x15C, 0xDB0
_DELIVERY, _THRESHOLD, _PENDING, _ENABLE, _END = 0x70, 0x72, 0x80, 0xC0, 0x100
_SET_LITTLE, _SET_BIG = 0, 4
"""Registers of the page: writing the number in one byte order, and in the other."""
_WORD = (1 << 64) - 1
_MOST_URGENT = (9, 1, 5)
"""The supervisor's major interrupts in their order: external, software, timer."""
_PRIORITY = 1


class Imsic:
    """``line(level)`` is the supervisor's external interrupt."""

    def __init__(self, line: Callable[[bool], None]) -> None:
        self._line = line
        self._pending = 0
        self._enabled = 0
        self._delivery = 0
        self._threshold = 0
        self._select = 0

    def deliver(self, identity: int) -> None:
        """A message has come; numbers that there are not are ignored."""
        self._pending |= 1 << identity & _IMPLEMENTED if identity <= IDENTITIES else 0
        self._update()

    def _top(self) -> int:
        """The number of the most urgent one that waits, 0 if none does."""
        waiting = self._pending & self._enabled
        if self._threshold:
            waiting &= (1 << self._threshold) - 1
        return (waiting & -waiting).bit_length() - 1 if waiting else 0

    def _update(self) -> None:
        self._line(self._delivery == 1 and self._top() != 0)

    # -- the page, where messages arrive -------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Nothing can be read there."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A message; only whole words of 32 bits are."""
        if size == 4 and offset == _SET_LITTLE:
            self.deliver(value)
        elif size == 4 and offset == _SET_BIG:
            self.deliver(int.from_bytes(value.to_bytes(4, "little"), "big"))

    # -- the CSRs ------------------------------------------------------------------------------

    def read_csr(self, state: HartState, csr: int) -> int | None:
        """A register of the hart; None if it is none of these."""
        if csr == _SISELECT:
            return self._select
        if csr == _SIREG:
            return self._read_selected()
        if csr == _STOPEI:
            return self._top() << 16 | self._top()
        if csr == _STOPI:
            waiting = state.mip & state.mie & state.mideleg
            best = next((major for major in _MOST_URGENT if waiting >> major & 1), 0)
            return best << 16 | _PRIORITY if best else 0
        return None

    def write_csr(self, csr: int, value: int) -> bool:
        """Write a register that could be read; whether it is one of these."""
        if csr == _SISELECT:
            self._select = value & 0xFFF
        elif csr == _SIREG:
            self._write_selected(value)
        elif csr == _STOPEI:
            self._pending &= ~(1 << self._top())
        else:
            return False
        self._update()
        return True

    def _read_selected(self) -> int | None:
        select = self._select
        if select == _DELIVERY:
            return self._delivery
        if select == _THRESHOLD:
            return self._threshold
        if not _PENDING <= select < _END or select % 2:
            return None
        bits = self._pending if select < _ENABLE else self._enabled
        return bits >> 32 * (select % (_ENABLE - _PENDING)) & _WORD

    def _write_selected(self, value: int) -> None:
        select = self._select
        if select == _DELIVERY:
            self._delivery = value & 1
        elif select == _THRESHOLD:
            self._threshold = min(value, IDENTITIES)
        else:
            shift = 32 * (select % (_ENABLE - _PENDING))
            old = self._pending if select < _ENABLE else self._enabled
            new = (old & ~(_WORD << shift) | value << shift) & _IMPLEMENTED
            if select < _ENABLE:
                self._pending = new
            else:
                self._enabled = new

    # -- snapshots -----------------------------------------------------------------------------

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write the registers."""
        for bits in (self._pending, self._enabled):
            stream.data(bits.to_bytes(IDENTITIES // 8 + 1, "little"))
        stream.u8(self._delivery)
        stream.u8(self._threshold)
        stream.u16(self._select)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read them; returns how to put them in force. The hart has its wires already."""
        pending, enabled = (
            int.from_bytes(stream.data(), "little") & _IMPLEMENTED for _ in range(2)
        )
        delivery, threshold, select = stream.u8() & 1, stream.u8(), stream.u16() & 0xFFF

        def adopt() -> None:
            self._pending, self._enabled = pending, enabled
            self._delivery, self._threshold, self._select = delivery, threshold, select

        return adopt
