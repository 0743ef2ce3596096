"""Virtual to physical, as the hart's own page-table walk does it (Sv39, Sv48, Sv57)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .state import HartState

__all__ = ["fetch_word", "tables_are_missing", "translate"]

_LEVELS = {8: 3, 9: 4, 10: 5}
"""satp.MODE: levels of page tables."""
_VALID, _READ, _WRITE, _EXECUTE = 1, 2, 4, 8
_MACHINE = 3


def translate(state: HartState, ram: memoryview, base: int, address: int) -> int | None:
    """The physical address an instruction fetch at ``address`` goes to; None if it faults.

    Permissions are not looked at: the caller knows already what the hart made of them.
    ``ram`` is the guest's memory, which starts at physical address ``base``.
    """
    levels = _LEVELS.get(state.satp >> 60)
    if state.priv == _MACHINE or levels is None:
        return address
    found, _ = _walk(state.satp, levels, ram, base, address)
    return found


def tables_are_missing(state: HartState, ram: memoryview, base: int, address: int) -> bool:
    """True if the walk for ``address`` needs a page table outside memory."""
    levels = _LEVELS.get(state.satp >> 60)
    return levels is not None and not _walk(state.satp, levels, ram, base, address)[1]


def _walk(
    satp: int, levels: int, ram: memoryview, base: int, address: int
) -> tuple[int | None, bool]:
    """The physical address, None where there is none; and whether all tables are in memory."""
    table = (satp & ((1 << 44) - 1)) << 12
    for level in range(levels - 1, -1, -1):
        shift = 12 + 9 * level
        where = table + 8 * (address >> shift & 0x1FF) - base
        if not 0 <= where <= len(ram) - 8:
            return None, False
        entry = int.from_bytes(ram[where : where + 8], "little")
        if not entry & _VALID:
            return None, True
        table = (entry >> 10 & ((1 << 44) - 1)) << 12
        if entry & (_READ | _WRITE | _EXECUTE):
            offset = address & ((1 << shift) - 1)
            return table & ~((1 << shift) - 1) | offset, True
    return None, True


def fetch_word(state: HartState, ram: memoryview, base: int, pc: int) -> int | None:
    """The instruction at ``pc``: 16 bits if it is a compressed one, else 32. None if not in RAM."""
    where = _place(state, ram, base, pc)
    if where is None:
        return None
    if pc & 0xFFF == 0xFFE:
        # The other half lies in another page.
        word = int.from_bytes(ram[where : where + 2], "little")
        if word & 3 != 3:
            return word
        where = _place(state, ram, base, pc + 2)
        if where is None:
            return None
        return word | int.from_bytes(ram[where : where + 2], "little") << 16
    word = int.from_bytes(ram[where : where + 4], "little")
    return word if word & 3 == 3 else word & 0xFFFF


def _place(state: HartState, ram: memoryview, base: int, pc: int) -> int | None:
    """Where in ``ram`` the code at ``pc`` lies."""
    physical = translate(state, ram, base, pc)
    if physical is None or not 0 <= physical - base <= len(ram) - 2:
        return None
    return physical - base
