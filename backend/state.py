"""The state of one component (a CPU, a device) as typed values in bytes.

Values follow each other without names or padding; whoever reads them knows their order, by the
version that the state was saved under. Integers are little-endian; ``data`` and ``text`` have their
length (32 bits, bytes) in front of them, text is UTF-8; a flag is a byte, 0 or 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ImageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["StateReader", "StateWriter"]


class StateWriter:
    """Collects the values of a component. An integer out of range raises OverflowError."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __bytes__(self) -> bytes:
        return bytes(self._bytes)

    def u8(self, value: int) -> None:
        """An unsigned integer of 8 bits; the next ones of as many as they say."""
        self._bytes += value.to_bytes(1, "little")

    def u16(self, value: int) -> None:
        self._bytes += value.to_bytes(2, "little")

    def u32(self, value: int) -> None:
        self._bytes += value.to_bytes(4, "little")

    def u64(self, value: int) -> None:
        self._bytes += value.to_bytes(8, "little")

    def flag(self, value: bool) -> None:
        """True or False."""
        self.u8(int(bool(value)))

    def data(self, value: ReadableBuffer) -> None:
        """Bytes, up to 4 GiB of them."""
        view = memoryview(value).cast("B")
        self.u32(len(view))
        self._bytes += view

    def text(self, value: str) -> None:
        """Any string that UTF-8 can say."""
        self.data(value.encode())


class StateReader:
    """Gives back what a :class:`StateWriter` was given, in the same order.

    Raises ImageError where the bytes are none that it could have written. ``version`` is the one
    that the state was saved under.
    """

    def __init__(self, data: bytes, *, name: str, version: int) -> None:
        self._data = data
        self._position = 0
        self._name = name
        self.version = version

    def _take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise self.malformed("ends too soon")
        part = self._data[self._position : end]
        self._position = end
        return part

    def malformed(self, reason: str) -> ImageError:
        """The error for state that cannot be; for components, too, to raise."""
        return ImageError(f"The saved state of {self._name!r} {reason}", field=self._name)

    def u8(self) -> int:
        """An unsigned integer of 8 bits; the next ones of as many as they say."""
        return int.from_bytes(self._take(1), "little")

    def u16(self) -> int:
        return int.from_bytes(self._take(2), "little")

    def u32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def flag(self) -> bool:
        """True or False."""
        value = self.u8()
        if value > 1:
            raise self.malformed(f"has {value} for a flag")
        return bool(value)

    def data(self) -> bytes:
        """Bytes."""
        return self._take(self.u32())

    def text(self) -> str:
        """A string."""
        try:
            return self.data().decode()
        except UnicodeDecodeError:
            raise self.malformed("has text that is no UTF-8") from None

    def end(self) -> None:
        """Raise ImageError unless everything was read."""
        left = len(self._data) - self._position
        if left:
            raise self.malformed(f"has {left} bytes too many")
