"""The event log: what came into a machine from outside, and when, so that a run can be repeated.

A deterministic machine does the same again if it is given the same inputs at the same moments. The
log knows nothing of either: a moment is a number that never falls (instructions, slices, whatever
the emulator can count and come back to), an input is a kind and bytes. As a stream, all numbers
little-endian:

    header   8    magic: 93 "pyvlog" 0A
             4    version: 1
             4    CRC-32 of the 12 bytes before
    event    8    position
             2    kind
             4    length of the data, in bytes
             …    data
             4    CRC-32 of the event so far, begun with that of the event before (or the header)

So an event that is missing, doubled or moved is noticed, and the log of a program that died is good
up to its last whole event.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_left
from typing import BinaryIO, NamedTuple

from ..errors import ImageError, UnsupportedError

__all__ = ["Cursor", "Event", "EventLog", "ReplayError"]

MAGIC = b"\x93pyvlog\n"
VERSION = 1
MAX_DATA = 64 << 20
"""Bytes in one event."""

_HEADER = struct.Struct("<8sI")
_EVENT = struct.Struct("<QHI")
_CHECKSUM = struct.Struct("<I")


class ReplayError(Exception):
    """The machine does not do what it did when the log was written."""


class Event(NamedTuple):
    """Something that came in."""

    position: int
    kind: int
    data: bytes


class EventLog:
    """Events in the order of their positions."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def __len__(self) -> int:
        return len(self._events)

    def __getitem__(self, index: int) -> Event:
        return self._events[index]

    @property
    def end(self) -> int:
        """The position of the last event; 0 if there is none."""
        return self._events[-1].position if self._events else 0

    def append(self, position: int, kind: int, data: bytes = b"") -> None:
        """Something has come in. Raises ValueError for a position before that of the last event."""
        if position < self.end or not 0 <= kind < 1 << 16 or len(data) > MAX_DATA:
            raise ValueError(f"no event for a log at {self.end}: position {position}, kind {kind}")
        self._events.append(Event(position, kind, bytes(data)))

    def index(self, position: int) -> int:
        """How many events come before ``position``."""
        return bisect_left(self._events, position, key=lambda event: event.position)

    def cursor(self, position: int = 0) -> Cursor:
        """A reader that stands before the first event at or after ``position``."""
        return Cursor(self, self.index(position))

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` events: the run takes another way from there."""
        del self._events[length:]

    # -- as a stream ---------------------------------------------------------------------------

    def write(self, file: BinaryIO) -> None:
        """Write the log to ``file``."""
        header = _HEADER.pack(MAGIC, VERSION)
        checksum = zlib.crc32(header)
        file.write(header + _CHECKSUM.pack(checksum))
        for event in self._events:
            packed = _EVENT.pack(event.position, event.kind, len(event.data)) + event.data
            checksum = zlib.crc32(packed, checksum)
            file.write(packed + _CHECKSUM.pack(checksum))

    @classmethod
    def read(cls, file: BinaryIO) -> EventLog:
        """Read a log up to its last whole event.

        Raises ImageError for a file that is none, or damaged; UnsupportedError for a newer one.
        """
        header = file.read(_HEADER.size + _CHECKSUM.size)
        if len(header) < _HEADER.size + _CHECKSUM.size or not header.startswith(MAGIC):
            raise ImageError("This is no event log", field="magic", value=header[:8])
        (checksum,) = _CHECKSUM.unpack_from(header, _HEADER.size)
        if checksum != zlib.crc32(header[: _HEADER.size]):
            raise ImageError("The event log has a damaged header", field="header")
        _, version = _HEADER.unpack_from(header)
        if version > VERSION:
            raise UnsupportedError(
                f"The event log is of version {version}, known are up to {VERSION}",
                feature=f"event log version {version}",
            )
        log = cls()
        while len(head := file.read(_EVENT.size)) == _EVENT.size:
            position, kind, length = _EVENT.unpack(head)
            if length > MAX_DATA:
                raise log._damaged("is too long", length)
            rest = file.read(length + _CHECKSUM.size)
            if len(rest) < length + _CHECKSUM.size:
                break
            checksum = zlib.crc32(rest[:length], zlib.crc32(head, checksum))
            if _CHECKSUM.unpack_from(rest, length) != (checksum,):
                raise log._damaged("has a wrong checksum", None)
            if position < log.end:
                raise log._damaged("goes back", position)
            log._events.append(Event(position, kind, rest[:length]))
        return log

    def _damaged(self, reason: str, value: object) -> ImageError:
        number = len(self._events)
        return ImageError(
            f"Event {number} of the log {reason}", field=f"event {number}", value=value
        )


class Cursor:
    """Gives events back in their order. Events that come after it is made are seen, too."""

    def __init__(self, log: EventLog, index: int) -> None:
        self._log = log
        self.index = index

    def peek(self) -> Event | None:
        """The next event; None at the end."""
        return self._log[self.index] if self.index < len(self._log) else None

    def take(self, position: int, kind: int) -> bytes:
        """The data of the next event, which must be of this kind and position.

        Raises ReplayError if it is not: the run has gone another way than the one recorded.
        """
        event = self.peek()
        if event is None or (event.position, event.kind) != (position, kind):
            raise ReplayError(f"kind {kind} is wanted at {position}, the log has {event!r:.80}")
        self.index += 1
        return event.data
