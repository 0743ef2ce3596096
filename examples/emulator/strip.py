"""Makes kernel modules small: what ``strip --strip-unneeded`` does, for 64-bit RISC-V.

Compilers for RISC-V leave hundreds of thousands of local symbols in an object file, because the
linker might move any code. The kernel looks through all of them when it loads a module, which takes
an emulated one seconds. Kept are global symbols, and those that a relocation refers to; notes for
the linker (R_RISCV_RELAX) go, too.
"""

from __future__ import annotations

import struct

__all__ = ["StripError", "strip"]

_SYMTAB, _RELA, _NOBITS, _GROUP = 2, 4, 8, 17
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_RISCV, _RELOCATABLE, _RELAX = 243, 1, 51


class StripError(ValueError):
    """This is no object file of the kind known here."""


def strip(data: bytes) -> bytes:
    """The object file without what loading it does not need. Raises StripError."""
    if len(data) < _HEADER.size or data[:6] != b"\x7fELF\x02\x01":
        raise StripError("not a 64-bit ELF file")
    header = list(_HEADER.unpack_from(data))
    if header[1] != _RELOCATABLE or header[2] != _RISCV or header[11] != _SECTION.size:
        raise StripError("not an object file for RISC-V")
    try:
        sections = [
            list(_SECTION.unpack_from(data, header[6] + index * _SECTION.size))
            for index in range(header[12])
        ]
        contents = [_contents(data, section) for section in sections]
        _drop_symbols(sections, contents, header[13])
    except (struct.error, IndexError) as error:
        raise StripError(f"damaged: {error}") from None
    return _assemble(header, sections, contents)


def _contents(data: bytes, section: list[int]) -> bytes:
    kind, offset, size = section[1], section[4], section[5]
    if kind in (0, _NOBITS):
        return b""
    if offset + size > len(data):
        raise StripError("a section lies outside the file")
    return data[offset : offset + size]


def _drop_symbols(sections: list[list[int]], contents: list[bytes], sections_names: int) -> None:
    tables = [index for index, section in enumerate(sections) if section[1] == _SYMTAB]
    if len(tables) != 1:
        raise StripError(f"{len(tables)} symbol tables")
    table = tables[0]
    names = sections[table][6]
    if names == sections_names:
        raise StripError("symbols and sections share their names")
    symbols = list(_SYMBOL.iter_unpack(contents[table]))
    used = {0}
    relocations: dict[int, list[tuple[int, int, int]]] = {}
    for index, section in enumerate(sections):
        if section[1] == _RELA and section[6] == table:
            kept = [
                entry
                for entry in _RELOCATION.iter_unpack(contents[index])
                if entry[1] & 0xFFFF_FFFF != _RELAX
            ]
            relocations[index] = kept
            used.update(entry[1] >> 32 for entry in kept)
        elif section[1] == _GROUP:
            used.add(section[7])
    first_global = sections[table][7]
    number: dict[int, int] = {}
    text, places = bytearray(b"\0"), {b"": 0}
    packed = bytearray()
    for index, (name, *rest) in enumerate(symbols):
        if index < first_global and index not in used:
            continue
        number[index] = len(number)
        string = contents[names][name : contents[names].index(b"\0", name)]
        if string.startswith(b".L"):
            string = b""
        if string not in places:
            places[string] = len(text)
            text += string + b"\0"
        packed += _SYMBOL.pack(places[string], *rest)
    sections[table][7] = sum(index < first_global for index in number)
    contents[table] = bytes(packed)
    contents[names] = bytes(text)
    for index, kept in relocations.items():
        contents[index] = b"".join(
            _RELOCATION.pack(offset, number[info >> 32] << 32 | info & 0xFFFF_FFFF, addend)
            for offset, info, addend in kept
        )
    for section in sections:
        if section[1] == _GROUP:
            section[7] = number[section[7]]


def _assemble(header: list[int], sections: list[list[int]], contents: list[bytes]) -> bytes:
    out = bytearray(_HEADER.size)
    for section, content in zip(sections, contents, strict=True):
        out += bytes(-len(out) % max(1, section[8]))
        section[4] = len(out)
        if section[1] != _NOBITS:
            section[5] = len(content)
        out += content
    out += bytes(-len(out) % 8)
    header[6] = len(out)
    for section in sections:
        out += _SECTION.pack(*section)
    _HEADER.pack_into(out, 0, *header)
    return bytes(out)
