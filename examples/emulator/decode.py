"""What a load, a store or an atomic instruction is about, found from its encoding.

Needed only where an access has failed and the engine does not say enough about it.
"""

from __future__ import annotations

from .state import HartState

__all__ = ["changes_memory", "data_address"]

_LOAD, _LOAD_FP, _STORE, _STORE_FP, _AMO = 0x03, 0x07, 0x23, 0x27, 0x2F
_STACK_POINTER = 2
_LOAD_RESERVED = 2


def changes_memory(word: int) -> bool:
    """True for the atomic instructions, but for ``lr``, which only loads."""
    return word & 0x7F == _AMO and word >> 27 != _LOAD_RESERVED


def data_address(state: HartState, word: int) -> int:
    """Where instruction ``word`` reads or writes; 0 if it does neither."""
    decoded = _compressed(word) if word & 3 != 3 else _full(word)
    if decoded is None:
        return 0
    register, offset = decoded
    return (state.words[register] + offset) & ((1 << 64) - 1)


def _full(word: int) -> tuple[int, int] | None:
    opcode = word & 0x7F
    register = word >> 15 & 31
    if opcode in (_LOAD, _LOAD_FP):
        return register, _signed12(word >> 20)
    if opcode in (_STORE, _STORE_FP):
        return register, _signed12(word >> 25 << 5 | word >> 7 & 31)
    return (register, 0) if opcode == _AMO else None


def _compressed(word: int) -> tuple[int, int] | None:
    """RVC, chapter "Load and Store Instructions": funct3 2 and 6 move words, 1, 3, 5, 7 doubles."""
    quadrant, function = word & 3, word >> 13
    if function & 3 == 0:
        return None
    is_word = function & 3 == 2
    if quadrant == 0:
        offset = _bits(word, 12, 10, 3)
        offset |= _bits(word, 6, 6, 2) | _bits(word, 5, 5, 6) if is_word else _bits(word, 6, 5, 6)
        return 8 + (word >> 7 & 7), offset
    if quadrant != 2:
        return None
    if function < 4:
        offset = _bits(word, 12, 12, 5)
        if is_word:
            offset |= _bits(word, 6, 4, 2) | _bits(word, 3, 2, 6)
        else:
            offset |= _bits(word, 6, 5, 3) | _bits(word, 4, 2, 6)
    elif is_word:
        offset = _bits(word, 12, 9, 2) | _bits(word, 8, 7, 6)
    else:
        offset = _bits(word, 12, 10, 3) | _bits(word, 9, 7, 6)
    return _STACK_POINTER, offset


def _bits(word: int, high: int, low: int, to: int) -> int:
    """Bits ``high`` to ``low`` of ``word``, moved so that the lowest is bit ``to``."""
    return (word >> low & ((1 << (high - low + 1)) - 1)) << to


def _signed12(value: int) -> int:
    return (value & 0xFFF ^ 0x800) - 0x800
