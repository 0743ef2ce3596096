"""RAM at fixed places behind the stream: version 2 of a section ``ram/NAME``.

    8    bytes of RAM
    4    bytes of a page: 4096
    8    position of page 0, in bytes from the start of the stream
    …    the CRC-32 of each page, 4 bytes each; the last page may be short

Page n lies at that position + 4096 * n, whatever it holds, so a snapshot of an image that differs
in some pages shares the clusters of all others.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ImageError
from .dirty import PAGE, pages_of
from .stream import Source, StreamReader

__all__ = [
    "PLACED_VERSION",
    "WINDOW",
    "Placed",
    "check_placed",
    "load_placed",
    "payload_length",
    "read_placed",
]

PLACED_VERSION = 2
_HEAD = struct.Struct("<QIQ")
WINDOW = 1 << 28
"""Bytes that are read at a time, and that are kept at most: an image is read the faster, the longer
it is."""


@dataclass(slots=True)
class Placed:
    """Where a RAM lies, and the checksum of each page."""

    size: int
    position: int
    checksums: array[int]

    def pack(self) -> bytes:
        """The section's payload."""
        table = array("I", self.checksums)
        if sys.byteorder == "big":
            table.byteswap()
        return _HEAD.pack(self.size, PAGE, self.position) + table.tobytes()


def payload_length(size: int) -> int:
    """Bytes of the section for so many bytes of RAM."""
    return _HEAD.size + 4 * pages_of(size)


def read_placed(reader: StreamReader, name: str, size: int) -> Placed:
    """The section ``name``, which must be for ``size`` bytes of RAM. Raises ImageError."""
    found, page, position = _HEAD.unpack(reader.read(name, 0, _HEAD.size))
    if found != size:
        raise ImageError(
            f"Section {name!r} of the VM state is for another size of RAM",
            field=name,
            value=found,
            limit=size,
        )
    if page != PAGE:
        raise ImageError(f"Section {name!r} of the VM state has pages of {page} bytes", field=name)
    data = reader.read(name, _HEAD.size)
    if len(data) != 4 * pages_of(size):
        raise ImageError(f"Section {name!r} of the VM state has a wrong length", field=name)
    checksums = array("I", data)
    if sys.byteorder == "big":
        checksums.byteswap()
    return Placed(size, position, checksums)


def check_placed(placed: Placed, name: str, source: Source) -> memoryview:
    """Read every page. Raises ImageError unless all are there and have their checksums.

    Returns the last :data:`WINDOW` of them that was read: the whole RAM, if it is no longer.
    """
    if placed.position + placed.size > source.size:
        raise ImageError(f"Section {name!r} of the VM state has pages past its end", field=name)
    buffer = memoryview(bytearray(min(placed.size, WINDOW)))
    for start in range(0, placed.size, WINDOW):
        part = buffer[: min(WINDOW, placed.size - start)]
        source.readv(placed.position + start, [part])
        wrong = _first_wrong(part, placed.checksums[start // PAGE :])
        if wrong is not None:
            raise ImageError(
                f"The VM state has a wrong checksum in page {start // PAGE + wrong} of {name!r}",
                field=name,
                value=start // PAGE + wrong,
            )
    return buffer


def _first_wrong(data: memoryview, checksums: Sequence[int]) -> int | None:
    crc32 = zlib.crc32
    for page, at in enumerate(range(0, len(data), PAGE)):
        if crc32(data[at : at + PAGE]) != checksums[page]:
            return page
    return None


def load_placed(placed: Placed, source: Source, ram: memoryview) -> None:
    """Fill ``ram``; :func:`check_placed` has seen it."""
    for start in range(0, placed.size, WINDOW):
        source.readv(placed.position + start, [ram[start : start + WINDOW]])
