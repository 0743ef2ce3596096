"""Guest memory behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM, §6): addresses are I/O virtual.

The emulator gives ``translate(address, length, write)``, which answers with the pieces of physical
memory that lie there, in order: ``[(physical address, length), …]``, together ``length`` bytes. It
raises GuestError where the device has no access. It is asked for every access, rings included, so
that it alone decides what it caches and when that is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any

from ..errors import GuestError
from .layout import ByteOrder
from .memory import ADDRESS_LIMIT, GuestMemory, Segment, SlowWords, Words

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Translate", "TranslatedMemory"]

Translate = Callable[[int, int, bool], Iterable[Segment]]


class _Views(list[memoryview]):
    """Views, and the physical memory that they are of."""

    def __init__(self, views: Iterable[memoryview], pieces: list[Segment]) -> None:
        super().__init__(views)
        self.pieces = pieces


class TranslatedMemory(GuestMemory):
    """``memory`` as seen through ``translate``."""

    def __init__(self, memory: GuestMemory, translate: Translate) -> None:
        self._memory = memory
        self._translate = translate
        self.map_limit = memory.map_limit
        self.commits = memory.commits

    def pieces(self, address: int, length: int, writable: bool) -> list[Segment]:
        """The physical memory there. Raises GuestError unless all of it can be accessed so."""
        if address < 0 or length < 0 or address + length > ADDRESS_LIMIT:
            raise GuestError(f"{length} bytes at {address:#x} are outside the address space")
        if length == 0:
            return []
        pieces = list(self._translate(address, length, writable))
        if sum(size for _, size in pieces) != length or min(size for _, size in pieces) < 0:
            raise GuestError(f"{length} bytes at {address:#x} are not all translated")
        return pieces

    def _flat(self, segments: Iterable[Segment], writable: bool) -> list[Segment]:
        return [piece for segment in segments for piece in self.pieces(*segment, writable)]

    def read(self, pa: int, length: int) -> bytes:
        return b"".join(self._memory.read(*piece) for piece in self.pieces(pa, length, False))

    def write(self, pa: int, data: ReadableBuffer) -> None:
        raw = bytes(data)
        start = 0
        for address, length in self.pieces(pa, len(raw), True):
            self._memory.write(address, raw[start : start + length])
            start += length

    def loader(self, struct: Struct) -> Callable[[int], tuple[Any, ...]]:
        size = struct.size
        return lambda pa: struct.unpack(self.read(pa, size))

    def store_byte(self, pa: int, value: int) -> None:
        self.write(pa, bytes((value,)))

    def check(self, segments: Iterable[Segment], writable: bool) -> None:
        self._memory.check(self._flat(segments, writable), writable)

    def map(self, segments: Iterable[Segment], writable: bool) -> list[memoryview]:
        pieces = self._flat(segments, writable)
        return _Views(self._memory.map(pieces, writable), pieces)

    def commit(self, segments: Iterable[Segment], views: Sequence[memoryview]) -> None:
        """What was mapped is where it was then, whatever the translation is by now."""
        pieces = views.pieces if isinstance(views, _Views) else self._flat(segments, True)
        self._memory.commit(pieces, views)

    def reader(
        self, struct: Struct, pa: int, length: int
    ) -> tuple[Callable[[int], tuple[Any, ...]], int]:
        self.check([(pa, length)], False)
        return self.loader(struct), pa

    def writer(self, struct: Struct, pa: int, length: int) -> tuple[Callable[..., None], int]:
        self.check([(pa, length)], True)

        def write(address: int, *fields: int) -> None:
            self.write(address, struct.pack(*fields))

        return write, pa

    def words(self, pa: int, length: int, order: ByteOrder) -> tuple[Callable[[], Words], int]:
        self.check([(pa, length)], True)
        return lambda: SlowWords(self, pa, order), 0
