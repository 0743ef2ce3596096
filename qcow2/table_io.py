"""Tables of 64-bit entries, and fields of the header that name them, from the file and to it."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..backend.disk import Disk
from ..errors import BackendError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["load_table", "pack_table", "switch_fields", "unpack_table"]

_SWAP = sys.byteorder == "little"


def unpack_table(data: ReadableBuffer) -> array[int]:
    """The 64-bit entries, or pairs of words, of a table as it is in the file."""
    entries = array("Q", bytes(data))
    if _SWAP:
        entries.byteswap()
    return entries


def load_table(file: Disk, offset: int, entries: int) -> array[int]:
    """A table of big-endian 64-bit entries (L1, refcount table) from the file."""
    return unpack_table(file.read(offset, 8 * entries))


def pack_table(entries: Sequence[int]) -> bytes:
    """The bytes of a table of 64-bit entries."""
    table = array("Q", entries)
    if _SWAP:
        table.byteswap()
    return table.tobytes()


def switch_fields(file: Disk, place: int, new: bytes, old: bytes) -> BackendError | None:
    """Put other values in fields of the header that one write changes, stable at once.

    Returns the error if that failed and the ``old`` values stand there, stable, all the same.
    Raises BackendError where nobody knows what stands there.
    """
    try:
        file.write(place, new)
        file.flush()
    except BackendError as error:
        file.write(place, old)
        file.flush()
        return error
    return None
