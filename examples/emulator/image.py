"""Programs to be started: ELF files, or plain bytes that run where they are put."""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["ImageFileError", "load_program"]

_LOAD = 1
_RISCV = 243


class ImageFileError(ValueError):
    """This file cannot be loaded."""


def load_program(path: Path, ram: memoryview, base: int, address: int) -> int:
    """Put the program into ``ram`` (which starts at ``base``); the address to start it at.

    An ELF file says itself where it goes (its segments' physical addresses), anything else goes to
    ``address``. Raises ImageFileError if it does not fit or is for another processor.
    """
    data = path.read_bytes()
    if not data.startswith(b"\x7fELF"):
        _place(path, ram, address - base, data, len(data))
        return address
    if (
        len(data) < 64
        or data[4:6] != b"\x02\x01"
        or struct.unpack_from("<H", data, 18) != (_RISCV,)
    ):
        raise ImageFileError(f"{path}: not a program for 64-bit RISC-V")
    entry, table = struct.unpack_from("<QQ", data, 24)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    for index in range(count):
        where = table + index * entry_size
        if where + 56 > len(data):
            raise ImageFileError(f"{path}: the program headers lie outside the file")
        kind, _, offset, _, physical, in_file, in_memory = struct.unpack_from(
            "<IIQQQQQ", data, where
        )
        if kind == _LOAD:
            _place(path, ram, physical - base, data[offset : offset + in_file], in_memory)
    return int(entry)


def _place(path: Path, ram: memoryview, start: int, data: bytes, size: int) -> None:
    if start < 0 or start + max(size, len(data)) > len(ram):
        raise ImageFileError(f"{path}: does not fit into the board's memory")
    ram[start : start + len(data)] = data
    ram[start + len(data) : start + size] = bytes(max(0, size - len(data)))
