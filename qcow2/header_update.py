"""Rewriting the header cluster: other fields, extensions or another backing file, all or nothing.

Only the first sector of a write is sure to be atomic. A header that fits it, or differs from what
is there in it alone, takes one write. Of a longer one, what lies past the first sector is first
written to a part of the header cluster that the present header does not use; the first sector
then switches to it. Header extensions follow each other without a gap, so the way over what lies
between is the feature name table, which only serves messages and is made long enough. The same
way leads back into the plain order, in which other tools write a header, and which they expect.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import ImageError, UnsupportedError
from . import layout
from .header import Header, packed_extensions
from .layout import ExtensionType
from .metadata import Metadata

__all__ = ["change_backing_file", "update_header"]

_SECTOR = layout.SECTOR
_BACKING_FILE_OFFSET = 8
_JUMP_NAMES = 3
"""Entries of the feature name table in a header whose table serves as the way over a gap."""


def update_header(
    metadata: Metadata, *, adopt: Callable[[], object] = lambda: None, **changes: Any
) -> None:
    """Give fields of the header (Header's own names) other values, on stable storage.

    In an exclusive operation. What the fields name must be on stable storage already. A cut
    leaves the old header or the new one; in the same step ``adopt()`` is called (lock held), for
    what in memory goes by them. Raises ImageError, with nothing changed, if it does not fit the
    header cluster.
    """
    metadata.check_writable()
    new = replace(metadata.header, **changes)
    packed = new.pack()
    if new.version >= 3:
        new.header_length = int.from_bytes(packed[100:104])
    else:
        new.header_length = layout.HEADER_V2_LENGTH
    with metadata.lock, metadata.health.step("Rewriting the header"):
        _write(metadata, packed)
        for name in Header.__slots__:
            setattr(metadata.header, name, getattr(new, name))
        adopt()


def change_backing_file(metadata: Metadata, name: str | None, format: str | None) -> None:
    """Have the image name another backing file, or none (in an exclusive operation).

    Nothing is opened, nothing is compared. Raises ValueError for what the header cannot hold.
    """
    name = os.fsdecode(name) if name else None
    if name is None and format is not None:
        raise ValueError("Backing format cannot be used without backing file")
    if name is not None and len(os.fsencode(name)) > layout.MAX_BACKING_NAME:
        raise ValueError("Backing file name too long")
    if name is not None and "\0" in name:
        raise ValueError("Invalid backing file name")
    if format is not None and len(format.encode()) > layout.MAX_BACKING_FORMAT_NAME:
        raise ValueError("Backing format name too long")
    if name is not None and metadata.header.autoclear_features & layout.Autoclear.RAW_DATA:
        raise UnsupportedError(
            "data-file-raw requires that there is no backing file", feature="backing file"
        )
    update_header(metadata, backing_file=name, backing_format=format or None)


def _write(metadata: Metadata, packed: bytes) -> None:
    """Replace the header cluster's contents by ``packed``, a header in plain order."""
    file = metadata.file
    size = metadata.cluster_size
    present = file.read(0, min(size, file.size)).ljust(size, b"\0")
    rest = packed[_SECTOR:]
    if rest and present[_SECTOR : len(packed)] != rest:
        start, end = _in_use(present)
        if start < end and start < len(packed):
            moved = _rearranged(packed, start, end, size)
            if moved is not None:
                first, place, aside = moved
                file.write(place, aside)
                file.flush()
                file.write(0, first)
                file.flush()
                if place < len(packed):
                    return  # no room to put it back into the plain order
            # Else, without room for both: as everybody else does it.
        file.write(_SECTOR, rest)
        file.flush()
    # A cluster is never shorter than a sector. Zeroes behind: no remains of the old header.
    file.write(0, packed[:_SECTOR].ljust(_SECTOR, b"\0"))
    file.flush()


def _in_use(cluster: bytes) -> tuple[int, int]:
    """The part past the first sector that the header in ``cluster`` uses: (start, end)."""
    name, length = layout.HEADER_V2.unpack_from(cluster)[2:4]
    places = [(name, name + length)] if name else []
    at, end = _extensions_start(cluster), name or len(cluster)
    try:
        for kind, start, size in packed_extensions(cluster, at, end):
            at = start + size + -size % 8
            if kind != ExtensionType.FEATURE_NAMES:
                places.append((start - layout.EXTENSION.size, at))
    except ImageError:
        return _SECTOR, len(cluster)
    places.append((at, at + layout.EXTENSION.size))
    used = [(max(start, _SECTOR), stop) for start, stop in places if stop > _SECTOR]
    return min((s for s, _ in used), default=_SECTOR), max((e for _, e in used), default=_SECTOR)


def _extensions_start(cluster: bytes) -> int:
    version = int.from_bytes(cluster[4:8])
    if version == 2:
        return layout.HEADER_V2_LENGTH
    return int.from_bytes(cluster[100:104])


def _rearranged(packed: bytes, start: int, end: int, size: int) -> tuple[bytes, int, bytes] | None:
    """``packed`` with what lies past its first sector outside bytes ``start`` to ``end``.

    Returns (first sector, offset of the rest, the rest), or None if it cannot be done.
    """
    first = _extensions_start(packed)
    name_at, name_length = layout.HEADER_V2.unpack_from(packed)[2:4]
    name = packed[name_at : name_at + name_length] if name_at else b""
    head = bytearray(packed[:first])
    tail = bytearray()
    jump = bytearray()
    for kind, at, length in packed_extensions(packed, first, name_at or len(packed)):
        whole = packed[at - layout.EXTENSION.size : at + length + -length % 8]
        if kind == ExtensionType.FEATURE_NAMES:
            continue
        if not tail and len(head) + len(whole) + layout.EXTENSION.size <= _SECTOR:
            head += whole
        else:
            tail += whole
    for kind, bit, text in layout.FEATURE_NAMES[:_JUMP_NAMES]:
        if len(head) + layout.EXTENSION.size + len(jump) + 2 * layout.FEATURE_NAME.size <= _SECTOR:
            jump += layout.FEATURE_NAME.pack(kind, bit, text.encode())
    tail += layout.EXTENSION.pack(ExtensionType.END, 0)
    if len(head) + layout.EXTENSION.size > _SECTOR:
        return None
    place = _place(start, max(end, len(packed)), end, size, len(tail) + len(name))
    if place is None:
        return None
    gap = place - len(head) - layout.EXTENSION.size
    head += layout.EXTENSION.pack(ExtensionType.FEATURE_NAMES, gap) + jump
    if name:
        head[_BACKING_FILE_OFFSET : _BACKING_FILE_OFFSET + 8] = layout.U64.pack(place + len(tail))
    return bytes(head), place, bytes(tail) + name


def _place(start: int, behind: int, end: int, size: int, length: int) -> int | None:
    """Where ``length`` bytes go past the first sector, outside ``start`` to ``end``; from
    ``behind`` on, if there is room."""
    for place in (behind + -behind % 8, max(_SECTOR, end + -end % 8)):
        if place + length <= size:
            return place
    return _SECTOR if _SECTOR + length <= start else None
