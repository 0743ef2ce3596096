"""Who a snapshot came from: the section ``lineage`` of its stream.

    16   the snapshot's UUID
    1    number of ancestors that follow: at most 32
    …    their UUIDs, 16 bytes each: its parent, the parent's parent, …

Deleting a snapshot leaves those after it with a nearest ancestor that is still there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import ImageError, UnsupportedError
from .stream import Known, Source, StreamReader

__all__ = [
    "LINEAGE",
    "LINEAGE_VERSION",
    "Lineage",
    "known_lineage",
    "parse_lineage",
    "read_lineage",
]

LINEAGE = "lineage"
LINEAGE_VERSION = 1
MAX_ANCESTORS = 32
_UUID = 16


@dataclass(frozen=True, slots=True)
class Lineage:
    """A snapshot's UUID, and those of its ancestors, the nearest first."""

    uuid: bytes
    ancestors: tuple[bytes, ...] = ()

    def child(self) -> Lineage:
        """Of a new snapshot that comes from this one."""
        return Lineage(os.urandom(_UUID), (self.uuid, *self.ancestors)[:MAX_ANCESTORS])

    @classmethod
    def root(cls) -> Lineage:
        """Of a new snapshot that comes from none."""
        return cls(os.urandom(_UUID))

    def pack(self) -> bytes:
        """The section's payload."""
        return self.uuid + bytes([len(self.ancestors)]) + b"".join(self.ancestors)


def known_lineage() -> Known:
    """The section that a stream can have."""
    return Known(LINEAGE_VERSION, _UUID + 1 + MAX_ANCESTORS * _UUID)


def parse_lineage(data: bytes) -> Lineage:
    """The payload, decoded. Raises ImageError."""
    if len(data) <= _UUID or len(data) != _UUID + 1 + data[_UUID] * _UUID:
        raise ImageError("The lineage in the VM state has a wrong length", field=LINEAGE)
    uuids = [data[at : at + _UUID] for at in range(_UUID + 1, len(data), _UUID)]
    return Lineage(data[:_UUID], tuple(uuids))


def read_lineage(source: Source) -> Lineage | None:
    """The lineage in a stream, where it is the first section; None if it has none.

    Nothing else is read. Raises ImageError for what is no stream.
    """
    try:
        reader = StreamReader(source, {LINEAGE: known_lineage()}, most=1)
    except UnsupportedError:
        return None
    return parse_lineage(reader.read(LINEAGE)) if LINEAGE in reader.sections else None
