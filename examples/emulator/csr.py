"""Control and status registers that Unicorn's hart lacks, served from the illegal-instruction trap.

``time``; the supervisor timer of the Sstc extension (``stimecmp``, switched on by
``menvcfg.STCE``); those of the AIA, on a board that has it (:mod:`.imsic`); and the few registers
of the privileged specification 1.12 that software may touch without asking first. All others raise
the illegal-instruction exception for real.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvirtio.backend.state import StateReader, StateWriter

from .clint import NEVER, Clint
from .clock import Clock
from .imsic import Imsic
from .state import MACHINE, SUPERVISOR, USER, HartState

__all__ = ["ExtraCsrs"]

_TIME, _STIMECMP, _MENVCFG, _SENVCFG = 0xC01, 0x14D, 0x30A, 0x10A
_MCOUNTINHIBIT, _MCONFIGPTR = 0x320, 0xF15
_STCE = 1 << 63
_FIOM = 1
_COUNTEREN_TIME = 2


class ExtraCsrs:
    """``timer(level)`` is the supervisor timer interrupt of Sstc."""

    def __init__(
        self,
        clint: Clint,
        clock: Clock,
        timer: Callable[[bool], None],
        imsic: Imsic | None = None,
    ) -> None:
        self._imsic = imsic
        self._clint = clint
        self._clock = clock
        self._timer = timer
        self._menvcfg = 0
        self._senvcfg = 0
        self._stimecmp = NEVER

    @property
    def has_timer(self) -> bool:
        """True while ``stimecmp`` decides about the supervisor timer interrupt."""
        return bool(self._menvcfg & _STCE)

    def delegate_timer(self) -> None:
        """Hand the supervisor its timer, as machine-mode firmware does."""
        self._menvcfg |= _STCE
        self.update()

    def set_timer(self, mtime: int) -> None:
        """Have the supervisor's timer go off at that time, if it has one."""
        self._stimecmp = mtime
        self.update()

    def deadline(self) -> int:
        """When the supervisor timer goes off next, in ticks of the clock."""
        if not self.has_timer or self._stimecmp == NEVER:
            return NEVER
        return self._clint.to_clock(self._stimecmp)

    def update(self) -> None:
        """Set the timer's line to what the time says."""
        if self.has_timer:
            self._timer(self._stimecmp != NEVER and self._clock.now() >= self.deadline())

    def execute(self, state: HartState, instruction: int) -> bool:
        """Carry out a CSR instruction on the registers in ``state``. False: it is illegal."""
        function = instruction >> 12 & 7
        if instruction & 0x7F != 0x73 or function in (0, 4):
            return False
        csr = instruction >> 20
        source = instruction >> 15 & 31
        target = instruction >> 7 & 31
        writes = function & 3 == 1 or source != 0
        if (csr >> 8 & 3) > state.priv or (writes and csr >> 10 == 3):
            return False
        old = self._read(state, csr)
        if old is None:
            return False
        if writes:
            operand = source if function & 4 else state.words[source]
            new = (operand, old | operand, old & ~operand)[(function & 3) - 1]
            self._write(csr, new & NEVER)
        if target:
            state.words[target] = old
        return True

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write the registers."""
        for value in (self._menvcfg, self._senvcfg, self._stimecmp):
            stream.u64(value)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read them; returns how to put them in force. The hart has its wires already."""
        menvcfg, senvcfg, stimecmp = stream.u64(), stream.u64(), stream.u64()

        def adopt() -> None:
            self._menvcfg, self._senvcfg = menvcfg & (_STCE | _FIOM), senvcfg & _FIOM
            self._stimecmp = stimecmp

        return adopt

    def _read(self, state: HartState, csr: int) -> int | None:
        if csr == _TIME:
            return self._clint.mtime() if _may_see_time(state) else None
        if csr == _STIMECMP:
            enabled = self.has_timer and state.mcounteren & _COUNTEREN_TIME
            return self._stimecmp if state.priv == MACHINE or enabled else None
        if csr == _MENVCFG:
            return self._menvcfg
        if csr == _SENVCFG:
            return self._senvcfg
        if csr in (_MCOUNTINHIBIT, _MCONFIGPTR):
            return 0
        return None if self._imsic is None else self._imsic.read_csr(state, csr)

    def _write(self, csr: int, value: int) -> None:
        if csr == _STIMECMP:
            self.set_timer(value)
            return
        if self._imsic is not None and self._imsic.write_csr(csr, value):
            return
        if csr == _MENVCFG:
            self._menvcfg = value & (_STCE | _FIOM)
            if not self.has_timer:
                self._timer(False)
        elif csr == _SENVCFG:
            self._senvcfg = value & _FIOM
        self.update()


def _may_see_time(state: HartState) -> bool:
    """Counter-enable registers: privileged specification, 3.1.11 and 4.1.5."""
    if state.priv <= SUPERVISOR and not state.mcounteren & _COUNTEREN_TIME:
        return False
    return state.priv != USER or bool(state.scounteren & _COUNTEREN_TIME)
