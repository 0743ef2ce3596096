"""The log of guest memory that was written, for migration ("Migration").

One bit for each page of 4 KiB, in memory shared with the front-end and perhaps with other back-ends
of it. Bits have to be set atomically; CPython cannot do that to one bit, but a whole byte is stored
at once: so a write sets the bits of all eight pages around it. What is copied too much is little,
and no page that was written is ever left out.
"""

from __future__ import annotations

from .layout import LOG_PAGE
from .memory import Mapping

__all__ = ["DirtyLog"]

_BYTE = 8 * LOG_PAGE
"""Guest memory per byte of the log."""


class DirtyLog:
    """The log in ``mapping``, which is its to close."""

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._bytes = mapping.buffer
        self._size = len(mapping.buffer)

    def mark(self, guest: int, length: int) -> None:
        """These bytes of guest memory *have been* written: after the data, so that a page that is
        copied meanwhile is copied again."""
        first, last = guest // _BYTE, (guest + max(length, 1) - 1) // _BYTE
        # What is beyond the log is memory that the front-end does not migrate.
        for index in range(first, min(last + 1, self._size)):
            self._bytes[index] = 0xFF

    def close(self) -> None:
        """Unmap it."""
        self._mapping.close()
