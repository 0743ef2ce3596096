"""The registers of a hart, as Unicorn keeps them.

Unicorn gives registers out one at a time, machine-mode CSRs only while the hart is in machine mode,
and some not at all: the address of a page fault, and the machine bits of ``mip``. Saving the whole
CPU into a context and looking inside is quicker and shows everything. The layout is that of
``CPURISCVState`` in Unicorn 2.1.4; :class:`HartState` proves it on the engine it is given.
"""

from __future__ import annotations

import ctypes

from unicorn import Uc
from unicorn import riscv_const as rv

__all__ = ["MACHINE", "SUPERVISOR", "USER", "HartState"]

USER, SUPERVISOR, MACHINE = 0, 1, 3

_HEADER = 40
"""Bytes of ``struct uc_context`` before the CPU's own state."""
_WORDS = 191
"""64-bit words of state from ``x0`` to the rules of memory protection (PMP)."""


class _Word:
    """One 64-bit register at a fixed place in the saved state."""

    def __init__(self, offset: int) -> None:
        self.index = offset // 8

    def __get__(self, state: HartState, owner: type[HartState]) -> int:
        return state.words[self.index]

    def __set__(self, state: HartState, value: int) -> None:
        state.words[self.index] = value


class HartState:
    """A copy of a hart's registers: :meth:`load` it, read and change it, :meth:`store` it.

    Usable between two runs of the engine and inside its hooks. In a memory hook the program counter
    and the registers may lag behind, but what is stored back unchanged does no harm.
    ``words[n]`` is register ``xn``.
    """

    pc = _Word(512)
    badaddr = _Word(544)
    """The address that the last page fault, access fault or misaligned access was about."""
    priv = _Word(592)
    mstatus = _Word(624)
    mip = _Word(632)
    mie = _Word(648)
    mideleg = _Word(656)
    satp = _Word(672)
    stval = _Word(680)
    mtval = _Word(688)
    medeleg = _Word(696)
    stvec = _Word(704)
    sepc = _Word(712)
    scause = _Word(720)
    mtvec = _Word(728)
    mepc = _Word(736)
    mcause = _Word(744)
    scounteren = _Word(952)
    mcounteren = _Word(960)
    sscratch = _Word(968)
    mscratch = _Word(976)

    def __init__(self, uc: Uc) -> None:
        self._uc = uc
        self._context = uc.context_save()
        address = ctypes.cast(self._context.context, ctypes.c_void_p).value
        if address is None:
            raise RuntimeError("Unicorn gave an empty context")
        self.words = (ctypes.c_uint64 * _WORDS).from_address(address + _HEADER)
        self._prove_layout()

    @staticmethod
    def index_of(name: str) -> int:
        """Which of the words a register is."""
        word: _Word = HartState.__dict__[name]
        return word.index

    def load(self) -> None:
        """Copy the registers out of the engine."""
        self._uc.context_update(self._context)

    def store(self) -> None:
        """Copy the registers back into the engine."""
        self._uc.context_restore(self._context)

    def _prove_layout(self) -> None:
        """Write known values through Unicorn's front door and find them in the copy."""
        uc = self._uc
        self.load()
        original = bytes(self.words)
        uc.reg_write(rv.UC_RISCV_REG_PRIV, MACHINE)
        marks = {
            "pc": (rv.UC_RISCV_REG_PC, 0x1122334455667788),
            "mstatus": (rv.UC_RISCV_REG_MSTATUS, 0x88),
            "mie": (rv.UC_RISCV_REG_MIE, 0xA2),
            "mip": (rv.UC_RISCV_REG_MIP, 0x22),
            "mideleg": (rv.UC_RISCV_REG_MIDELEG, 0x202),
            "medeleg": (rv.UC_RISCV_REG_MEDELEG, 0x105),
            "stval": (rv.UC_RISCV_REG_STVAL, 0x1234567801),
            "mtval": (rv.UC_RISCV_REG_MTVAL, 0x1234567802),
            "stvec": (rv.UC_RISCV_REG_STVEC, 0x1234567804),
            "sepc": (rv.UC_RISCV_REG_SEPC, 0x1234567806),
            "scause": (rv.UC_RISCV_REG_SCAUSE, 0x1234567807),
            "mtvec": (rv.UC_RISCV_REG_MTVEC, 0x1234567808),
            "mepc": (rv.UC_RISCV_REG_MEPC, 0x123456780A),
            "mcause": (rv.UC_RISCV_REG_MCAUSE, 0x123456780B),
            "scounteren": (rv.UC_RISCV_REG_SCOUNTEREN, 5),
            "mcounteren": (rv.UC_RISCV_REG_MCOUNTEREN, 3),
            "satp": (rv.UC_RISCV_REG_SATP, (8 << 60) | 0x12345),
            "sscratch": (rv.UC_RISCV_REG_SSCRATCH, 0x123456780C),
            "mscratch": (rv.UC_RISCV_REG_MSCRATCH, 0x123456780D),
        }
        for register, value in marks.values():
            uc.reg_write(register, value)
        self.load()
        wrong = [name for name, (_, value) in marks.items() if getattr(self, name) != value]
        if wrong or self.priv != MACHINE:
            raise RuntimeError(
                f"this Unicorn keeps {', '.join(wrong)} elsewhere: 2.1.4 is the version known"
            )
        ctypes.memmove(self.words, original, len(original))
        self.store()
