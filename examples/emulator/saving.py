"""The board in a snapshot: its hart as a component, and all its parts as a ``machine.Machine``.

Devices save and load themselves, each in its own file. What a stranger's snapshot says is checked
before anything changes: only registers that software may set are taken from it, never what the
engine keeps beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from unicorn import riscv_const as rv

from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.machine.state import Component, Machine

from .state import MACHINE, SUPERVISOR, USER

if TYPE_CHECKING:
    from .board import Board
    from .cpu import Cpu

__all__ = ["SavedHart", "components_of", "machine_of"]

_REGISTERS = (*range(69), 74, 78, 79, 81, 82, *range(84, 94), *range(119, 123))
"""Words of the state (see :mod:`.state`): x, f, pc, the reservation of lr, frm, badaddr; priv,
mstatus, mip, mie, mideleg, satp, the registers of traps, counter enables, scratch."""
_PMP = range(126, 191)
"""16 pairs of address and configuration, 16 ranges that follow from them, and how many count."""
_PMP_RULES = 190
_LOCKED = 0x80
_FS_ON = 3 << 13
_SATP_MODES = (0, 8, 9, 10)


class SavedHart:
    """The registers of ``cpu``."""

    state_version = 1

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def save_state(self, stream: StateWriter) -> None:
        """Write the registers; what the engine caches of memory is no state."""
        state = self._cpu.state
        fflags = self._fflags()
        state.load()
        for index in (*_REGISTERS, *_PMP):
            stream.u64(state.words[index])
        stream.u8(fflags)
        stream.u64(self._cpu.lines)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read them again; returns how to put them in force. Raises ImageError."""
        words = {index: stream.u64() for index in (*_REGISTERS, *_PMP)}
        fflags, lines = stream.u8() & 0x1F, stream.u64()
        state = self._cpu.state
        if words[state.index_of("priv")] not in (USER, SUPERVISOR, MACHINE):
            raise stream.malformed("is in no mode that there is")
        if words[state.index_of("satp")] >> 60 not in _SATP_MODES:
            raise stream.malformed("translates addresses in no way that there is")
        if words[_PMP_RULES] & 0xFFFF_FFFF > 16:
            raise stream.malformed("has too many rules of memory protection")

        def adopt() -> None:
            state.load()
            for index, value in words.items():
                state.words[index] = value
            wanted, state.mip = state.mip, 0
            state.store()
            self._set_fflags(fflags)
            self._cpu.resume(wanted, lines)

        return adopt

    def _fflags(self) -> int:
        """The floating-point flags, which the engine keeps in a shape of its own."""
        state = self._cpu.state
        state.load()
        priv, status = state.priv, state.mstatus
        state.priv, state.mstatus = MACHINE, status | _FS_ON
        state.store()
        flags = int(self._cpu.uc.reg_read(rv.UC_RISCV_REG_FFLAGS))
        state.priv, state.mstatus = priv, status
        state.store()
        return flags & 0x1F

    def _set_fflags(self, flags: int) -> None:
        state = self._cpu.state
        state.load()
        priv, status, frm = state.priv, state.mstatus, state.words[67]
        state.priv, state.mstatus = MACHINE, status | _FS_ON
        state.store()
        self._cpu.uc.reg_write(rv.UC_RISCV_REG_FRM, frm & 7)
        self._cpu.uc.reg_write(rv.UC_RISCV_REG_FFLAGS, flags)
        state.load()
        state.priv, state.mstatus = priv, status
        state.store()


def components_of(board: Board) -> dict[str, Component]:
    """All parts of the board but its memory, in the order in which they are to be put in force."""
    components: dict[str, Component] = {
        "clock": board.clock,
        "hart": SavedHart(board.cpu),
        "csrs": board.csrs,
        "clint": board.clint,
        "plic": board.plic,
        **({} if board.imsic is None else {"imsic": board.imsic}),
        "serial": board.uart,
        "finisher": board.finisher,
        "board": board,
    }
    return components | {f"slot{index}": slot for index, slot in enumerate(board.slots)}


def machine_of(board: Board) -> Machine:
    """All that a snapshot of the board consists of, for ``machine.MachineSnapshots``."""
    return Machine(components_of(board), {"memory": board.ram})
