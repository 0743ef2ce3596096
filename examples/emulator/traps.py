"""Entering a trap: what the hart does when an instruction cannot be carried out.

Privileged specification, 3.1.6 to 3.1.16 and 4.1. Interrupts are not here: Unicorn enters those by
itself as soon as ``mip`` shows them. Exceptions it only reports.
"""

from __future__ import annotations

from enum import IntEnum

from .state import MACHINE, SUPERVISOR, HartState

__all__ = ["Cause", "enter_exception"]


class Cause(IntEnum):
    """Exception codes of ``mcause`` and ``scause``."""

    FETCH_MISALIGNED = 0
    FETCH_ACCESS = 1
    ILLEGAL_INSTRUCTION = 2
    BREAKPOINT = 3
    LOAD_MISALIGNED = 4
    LOAD_ACCESS = 5
    STORE_MISALIGNED = 6
    STORE_ACCESS = 7
    ECALL_FROM_USER = 8
    ECALL_FROM_SUPERVISOR = 9
    ECALL_FROM_MACHINE = 11
    FETCH_PAGE_FAULT = 12
    LOAD_PAGE_FAULT = 13
    STORE_PAGE_FAULT = 15


_SIE, _MIE, _SPIE, _MPIE, _SPP = 1 << 1, 1 << 3, 1 << 5, 1 << 7, 1 << 8
_MPP_SHIFT = 11


def enter_exception(state: HartState, cause: int, value: int, pc: int) -> None:
    """Have the instruction at ``pc`` trap with ``cause``; ``value`` goes to ``mtval``/``stval``.

    Exceptions from user and supervisor mode that ``medeleg`` names go to supervisor mode. Direct
    or vectored, exceptions always enter at the base of the vector.
    """
    status = state.mstatus
    if state.priv <= SUPERVISOR and state.medeleg >> cause & 1:
        state.scause, state.sepc, state.stval = cause, pc, value
        status &= ~(_SPP | _SPIE)
        status |= _SPP if state.priv == SUPERVISOR else 0
        status |= _SPIE if status & _SIE else 0
        state.mstatus = status & ~_SIE
        state.priv = SUPERVISOR
        state.pc = state.stvec & ~3
    else:
        state.mcause, state.mepc, state.mtval = cause, pc, value
        status &= ~(3 << _MPP_SHIFT | _MPIE)
        status |= state.priv << _MPP_SHIFT
        status |= _MPIE if status & _MIE else 0
        state.mstatus = status & ~_MIE
        state.priv = MACHINE
        state.pc = state.mtvec & ~3
