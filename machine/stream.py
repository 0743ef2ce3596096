"""The stream that the state of a machine is kept in: named sections, each with a checksum.

All numbers are little-endian, nothing is padded. A checksum is the CRC-32 of zlib and stands right
behind the bytes it covers.

    header    8    magic: 93 "pyvmst" 0A
              4    version of the stream: 1
              4    checksum of the 12 bytes before
    section   4    "SECT"
              2    length of the name, in bytes: 1 to 255
              4    version of the section
              8    length of the payload, in bytes
              …    name, UTF-8
              4    checksum of the section so far
              …    payload
              4    checksum of the payload
    …         further sections; no two have one name
    end       4    "ENDS"
              4    number of sections
              8    length of the whole stream, in bytes, header and end included
              4    checksum of the 16 bytes before

What comes after the end is no part of the stream (a cluster of an image may have room left).

A reader takes every section or none: one whose name it does not know, or whose version is newer
than the one it knows, is refused by its name. The same holds for the version of the stream; the
header stays what it is in any.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..backend.buffers import as_views, split
from ..errors import ImageError, UnsupportedError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["Known", "Section", "Source", "StreamReader", "StreamWriter", "Target", "scattered"]

MAGIC = b"\x93pyvmst\n"
VERSION = 1
MAX_NAME = 255

_HEADER = struct.Struct("<8sI")
_SECTION = struct.Struct("<4sHIQ")
_END = struct.Struct("<4sIQ")
_CHECKSUM = struct.Struct("<I")
_SECTION_TAG = b"SECT"
_END_TAG = b"ENDS"
CHUNK = 1 << 20
"""Bytes that are written or checked at a time."""


class Target(Protocol):
    """Where a stream is written to: a ``disk.vmstate``, or any Disk that is long enough."""

    def writev(self, position: int, buffers: Iterable[ReadableBuffer], /) -> None:
        """Write ``buffers`` to byte ``position`` on."""


class Source(Protocol):
    """Where a stream is read from: a ``vmstate``, or any Disk."""

    @property
    def size(self) -> int:
        """Bytes that there are."""

    def readv(self, position: int, buffers: Iterable[WriteableBuffer], /) -> None:
        """Read from byte ``position`` on into ``buffers``."""


class Known(NamedTuple):
    """What a reader takes under a section's name."""

    version: int
    """The newest one."""
    max_length: int
    """Bytes; no payload is longer."""


@dataclass(frozen=True, slots=True)
class Section:
    """Where a section's payload lies in the stream."""

    name: str
    version: int
    position: int
    length: int
    checksum: int


class StreamWriter:
    """Writes a stream from byte 0 of ``target`` on, each write at a multiple of 1 MiB."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._pending = bytearray()
        self._written = 0
        self._names: set[str] = set()
        self._put_checked(_HEADER.pack(MAGIC, VERSION))

    def section(
        self, name: str, version: int, length: int, pieces: Iterable[ReadableBuffer]
    ) -> None:
        """Write a section whose payload, ``length`` bytes, is the ``pieces`` in turn."""
        encoded = name.encode()
        if not 0 < len(encoded) <= MAX_NAME or name in self._names:
            raise ValueError(f"{name!r} is no name for a section, or there is one already")
        self._names.add(name)
        self._put_checked(_SECTION.pack(_SECTION_TAG, len(encoded), version, length) + encoded)
        checksum = total = 0
        for piece in pieces:
            flat = memoryview(piece).cast("B")
            checksum = zlib.crc32(flat, checksum)
            total += len(flat)
            self._put(flat)
        if total != length:
            raise ValueError(f"section {name!r} was to have {length} bytes and has {total}")
        self._put(_CHECKSUM.pack(checksum))

    def finish(self) -> int:
        """Write the end; how many bytes the stream has."""
        length = self._written + len(self._pending) + _END.size + _CHECKSUM.size
        self._put_checked(_END.pack(_END_TAG, len(self._names), length))
        self._target.writev(self._written, [self._pending])
        return length

    def _put_checked(self, data: bytes) -> None:
        self._put(data + _CHECKSUM.pack(zlib.crc32(data)))

    def _put(self, data: bytes | memoryview) -> None:
        pending = self._pending
        pending += data
        if len(pending) >= CHUNK:
            whole = len(pending) // CHUNK * CHUNK
            with memoryview(pending) as view:
                self._target.writev(self._written, [view[:whole]])
            self._written += whole
            del pending[:whole]


class StreamReader:
    """Reads a stream from byte 0 of ``source`` on.

    Making one reads and checks all of it, with 1 MiB of memory; ``known`` says by name which
    sections may be there. Raises ImageError for a stream that is none, or damaged; UnsupportedError
    names the section that is unknown or too new. With ``most`` only so many sections are looked at.
    """

    def __init__(
        self, source: Source, known: Mapping[str, Known], *, most: int | None = None
    ) -> None:
        self._source = source
        self._position = 0
        self._buffer = memoryview(bytearray(CHUNK))
        self._check_header()
        self.sections: dict[str, Section] = {}
        """By name, in the order of the stream."""
        while most is None or len(self.sections) < most:
            section = self._next_section(known)
            if section is None:
                break
            if section.name in self.sections:
                raise self._damaged(f"has two sections {section.name!r}")
            self.sections[section.name] = section
        self.length = self._position
        """Bytes that were looked at: of the whole stream, without ``most``."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A part of a section's payload, or (without ``length``) what follows ``start``."""
        section = self.sections[name]
        data = bytearray(section.length - start if length is None else length)
        self.readv(name, start, [data])
        return bytes(data)

    def readv(self, name: str, start: int, buffers: Iterable[WriteableBuffer]) -> None:
        """Read a section's payload, from its byte ``start`` on, into ``buffers``."""
        section = self.sections[name]
        views, length = as_views(buffers)
        if start < 0 or start + length > section.length:
            raise ImageError(f"Section {name!r} of the VM state ends too soon", field=name)
        self._source.readv(section.position + start, views)

    # -- the first pass ------------------------------------------------------------------------

    def _check_header(self) -> None:
        magic, version = _HEADER.unpack(self._take_checked(_HEADER.size, "header"))
        if magic != MAGIC:
            raise self._damaged("does not begin like one", magic)
        if version > VERSION:
            raise UnsupportedError(
                f"The VM state is a stream of version {version}, known are up to {VERSION}",
                feature=f"stream version {version}",
            )

    def _next_section(self, known: Mapping[str, Known]) -> Section | None:
        """Check the section that comes next; None at the end."""
        start = self._position
        tag = self._take(4)
        self._position = start
        if tag == _END_TAG:
            _, count, length = _END.unpack(self._take_checked(_END.size, "end"))
            if count != len(self.sections) or length != self._position:
                raise self._damaged("has an end that is not its own")
            return None
        if tag != _SECTION_TAG:
            raise self._damaged(f"has no section at byte {start}", tag)
        _, name_length, version, length = _SECTION.unpack(self._take(_SECTION.size))
        self._position = start
        header = self._take_checked(_SECTION.size + name_length, "header of a section")
        try:
            name = header[_SECTION.size :].decode()
        except UnicodeDecodeError:
            raise self._damaged(f"has a section at byte {start} whose name is no UTF-8") from None
        what = known.get(name)
        if what is None:
            raise UnsupportedError(f"The VM state has an unknown section {name!r}", feature=name)
        if version > what.version:
            raise UnsupportedError(
                f"Section {name!r} of the VM state is of version {version}, "
                f"known are up to {what.version}",
                feature=name,
            )
        if length > what.max_length:
            raise ImageError(
                f"Section {name!r} of the VM state is too long",
                field=name,
                value=length,
                limit=what.max_length,
            )
        position = self._position
        checksum = self._checksum(length)
        if _CHECKSUM.unpack(self._take(_CHECKSUM.size)) != (checksum,):
            raise self._damaged(f"has a wrong checksum in section {name!r}")
        return Section(name, version, position, length, checksum)

    def _checksum(self, length: int) -> int:
        """The checksum of the next ``length`` bytes."""
        self._check_there(length)
        checksum = 0
        while length:
            part = self._buffer[: min(length, CHUNK)]
            self._source.readv(self._position, [part])
            checksum = zlib.crc32(part, checksum)
            self._position += len(part)
            length -= len(part)
        return checksum

    def _take(self, length: int) -> bytes:
        self._check_there(length)
        data = bytearray(length)
        self._source.readv(self._position, [data])
        self._position += length
        return bytes(data)

    def _take_checked(self, length: int, what: str) -> bytes:
        data = self._take(length + _CHECKSUM.size)
        if _CHECKSUM.unpack(data[length:]) != (zlib.crc32(data[:length]),):
            raise self._damaged(f"has a wrong checksum in its {what}")
        return data[:length]

    def _check_there(self, length: int) -> None:
        if self._position + length > self._source.size:
            raise self._damaged("ends too soon")

    def _damaged(self, reason: str, value: object = None) -> ImageError:
        return ImageError(f"The VM state {reason}", field="VM state", value=value)


def scattered(views: Iterable[memoryview], most: int = CHUNK) -> Iterator[list[memoryview]]:
    """``views`` in lists of at most ``most`` bytes each, cut where they are longer."""
    batch: list[memoryview] = []
    room = most
    for view in views:
        while len(view) > room:
            yield [*batch, *split([view], 0, room)]
            view, batch, room = view[room:], [], most
        batch.append(view)
        room -= len(view)
    if batch:
        yield batch
