"""RAM inside the stream: version 1 of a section ``ram/NAME``, the pages that are not zero.

    8    bytes of RAM
    4    bytes of a page: 4096
    …    bitmap: page n is bit n % 8 of byte n // 8; 1 is stored, 0 is zeroes; unused bits are 0
    …    the stored pages in order; the last of the RAM may be short

A page stored may hold zeroes as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import groupby

from ..backend.buffers import clear
from ..backend.zeroes import zero_runs
from ..errors import ImageError
from .dirty import PAGE
from .stream import CHUNK, StreamReader, StreamWriter, scattered

__all__ = ["RAM_VERSION", "check_ram", "load_ram", "packed_length", "save_ram"]

RAM_VERSION = 1
_HEAD = struct.Struct("<QI")


def packed_length(size: int) -> int:
    """The most bytes that the section for so many bytes of RAM can have."""
    return _HEAD.size + _bitmap_length(size) + size


def save_ram(writer: StreamWriter, name: str, ram: memoryview) -> None:
    """Write ``ram`` as the section ``name``. It must hold still, or its pages are torn."""
    bitmap = _used_pages(ram)
    stored = sum(end - start for start, end, used in _runs(bitmap, len(ram)) if used)

    def pieces() -> Iterator[bytes | memoryview]:
        yield _HEAD.pack(len(ram), PAGE)
        yield bytes(bitmap)
        for start, end, used in _runs(bitmap, len(ram)):
            if used:
                for at in range(start, end, CHUNK):
                    yield ram[at : min(at + CHUNK, end)]

    writer.section(name, RAM_VERSION, _HEAD.size + len(bitmap) + stored, pieces())


def check_ram(reader: StreamReader, name: str, ram: memoryview) -> None:
    """Raise ImageError unless the section can be loaded into ``ram``."""
    size, page = _HEAD.unpack(reader.read(name, 0, _HEAD.size))
    if size != len(ram):
        raise ImageError(
            f"Section {name!r} of the VM state is for another size of RAM",
            field=name,
            value=size,
            limit=len(ram),
        )
    if page != PAGE:
        raise ImageError(f"Section {name!r} of the VM state has pages of {page} bytes", field=name)
    bitmap = _read_bitmap(reader, name, size)
    pages = -(-size // PAGE)
    stored = sum(end - start for start, end, used in _runs(bitmap, size) if used)
    spare = bitmap[-1] >> (pages % 8) if pages % 8 else 0
    if spare or reader.sections[name].length != _HEAD.size + len(bitmap) + stored:
        raise ImageError(f"Section {name!r} of the VM state has a wrong bitmap", field=name)


def load_ram(reader: StreamReader, name: str, ram: memoryview) -> None:
    """Fill ``ram`` from the section, which :func:`check_ram` has seen."""
    bitmap = _read_bitmap(reader, name, len(ram))
    used_runs = []
    for start, end, used in _runs(bitmap, len(ram)):
        if used:
            used_runs.append(ram[start:end])
        else:
            clear([ram[start:end]])
    position = _HEAD.size + len(bitmap)
    for views in scattered(used_runs):
        reader.readv(name, position, views)
        position += sum(map(len, views))


def _bitmap_length(size: int) -> int:
    return -(-size // (8 * PAGE))


def _read_bitmap(reader: StreamReader, name: str, size: int) -> bytes:
    return reader.read(name, _HEAD.size, _bitmap_length(size))


def _used_pages(ram: memoryview) -> bytearray:
    """The bitmap of the pages that are not zero."""
    bitmap = bytearray(_bitmap_length(len(ram)))
    for at in range(0, len(ram), CHUNK):
        for start, end, zero in zero_runs(bytes(ram[at : at + CHUNK]), 0, PAGE):
            if not zero:
                for page in range((at + start) // PAGE, -(-(at + end) // PAGE)):
                    bitmap[page >> 3] |= 1 << (page & 7)
    return bitmap


def _runs(bitmap: bytes | bytearray, size: int) -> Iterator[tuple[int, int, bool]]:
    """Runs (start, end, stored) of the RAM, in bytes."""
    pages = -(-size // PAGE)
    start = 0
    for used, run in groupby(bitmap[page >> 3] >> (page & 7) & 1 for page in range(pages)):
        end = min(start + PAGE * sum(1 for _ in run), size)
        yield start, end, bool(used)
        start = end
