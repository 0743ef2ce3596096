"""The guest's RAM, as a device sees it: by guest physical address.

:class:`GuestMemory` is one interface over two kinds of RAM:

- **buffers** (:meth:`GuestMemory.from_buffer`, :meth:`GuestMemory.from_regions`): anything with the
  buffer protocol, as bytearray, mmap, ctypes arrays, numpy arrays, in one or several regions with
  holes between. A request's data are memoryviews of it: nothing is copied.
- **callbacks** (:meth:`GuestMemory.from_callbacks`): RAM known only through ``read(pa, n)`` and
  ``write(pa, data)``. Data goes through bounce buffers of bounded size.

Every access is checked; one that leaves RAM raises :class:`GuestError`. No view is held between
requests: what :meth:`~GuestMemory.map` and :meth:`~GuestMemory.words` give out is released when the
request (or round of service) ends, so that an mmap can be closed.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import GuestError
from .layout import DATA_BYTES_MAX, ByteOrder

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["BufferMemory", "CallbackMemory", "GuestMemory", "Segment", "SlowWords", "Words"]

ADDRESS_LIMIT = 1 << 64
BOUNCE_SIZE = 1 << 20
"""Most bytes of guest data that callback memory holds a copy of at one time."""

Segment = tuple[int, int]
"""A piece of guest memory: physical address, length in bytes."""

WriteListener = Callable[[int, int], None]


class Words(Protocol):
    """Guest memory as an array of 16-bit words; each is read and written as one unit."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...

    def release(self) -> None: ...


class GuestMemory(ABC):
    """Guest RAM by physical address. Make one with one of the three ``from_`` methods."""

    map_limit: int = DATA_BYTES_MAX
    """Bytes that may be mapped at one time; longer transfers are done in pieces."""

    @staticmethod
    def from_buffer(
        buffer: ReadableBuffer, base: int = 0, *, on_write: WriteListener | None = None
    ) -> BufferMemory:
        """RAM that is one buffer, whose first byte is at physical address ``base``.

        ``on_write(pa, length)`` is called after every write by the device (dirty pages, code that
        a translator has cached).
        """
        return BufferMemory([(base, buffer)], on_write=on_write)

    @staticmethod
    def from_regions(
        regions: Iterable[tuple[int, ReadableBuffer]], *, on_write: WriteListener | None = None
    ) -> BufferMemory:
        """RAM in several regions, each ``(physical address, buffer)``; they may not overlap.

        A buffer that is read-only is ROM: a device that is told to write there reports an error.
        """
        return BufferMemory(regions, on_write=on_write)

    @staticmethod
    def from_callbacks(
        read: Callable[[int, int], ReadableBuffer], write: Callable[[int, bytes], object]
    ) -> CallbackMemory:
        """RAM behind ``read(pa, n) -> bytes`` and ``write(pa, data)``.

        Both should raise for an address that is no RAM; whatever they raise counts as the guest's
        error, as does a ``read`` that gives another number of bytes.
        """
        return CallbackMemory(read, write)

    @abstractmethod
    def read(self, pa: int, length: int) -> bytes:
        """A copy of ``length`` bytes. Raises GuestError if they are not all RAM."""

    @abstractmethod
    def write(self, pa: int, data: ReadableBuffer) -> None:
        """Store ``data``. Raises GuestError if it does not all go to writable RAM."""

    @abstractmethod
    def loader(self, struct: Struct) -> Callable[[int], tuple[Any, ...]]:
        """A function that gives the fields of the structure at an address, read once."""

    @abstractmethod
    def store_byte(self, pa: int, value: int) -> None:
        """Write one byte."""

    @abstractmethod
    def check(self, segments: Iterable[Segment], writable: bool) -> None:
        """Raise GuestError unless all of ``segments`` can be mapped."""

    @abstractmethod
    def map(self, segments: Iterable[Segment], writable: bool) -> list[memoryview]:
        """Views of the segments, in their order; each to be released after use.

        Together at most ``map_limit`` bytes. Raises GuestError if any is not RAM, or ``writable``
        and not writable RAM.
        """

    commits: bool = True
    """Whether :meth:`commit` does anything."""

    @abstractmethod
    def commit(self, segments: Iterable[Segment], views: Sequence[memoryview]) -> None:
        """The views of a writable :meth:`map` now hold what the guest is to see."""

    def plain_region(self) -> tuple[int, int, Any] | None:
        """A piece of RAM that can be used without the methods here: start, end, buffer of bytes.

        None if there is none, or if somebody wants to hear of writes.
        """
        return None

    def slice(self, pa: int, length: int, writable: bool = False) -> list[memoryview]:
        """:meth:`map` of a single segment."""
        return self.map([(pa, length)], writable)

    @abstractmethod
    def reader(
        self, struct: Struct, pa: int, length: int
    ) -> tuple[Callable[[int], tuple[Any, ...]], int]:
        """A quick way to read structures inside a fixed piece of memory: ``(read, origin)``.

        ``read(origin + offset)`` gives the fields of the one at ``pa + offset``. The piece is
        checked once, here; the caller keeps ``offset`` inside it.
        """

    @abstractmethod
    def writer(self, struct: Struct, pa: int, length: int) -> tuple[Callable[..., None], int]:
        """The same for writing: ``write(origin + offset, *fields)``."""

    @abstractmethod
    def words(self, pa: int, length: int, order: ByteOrder) -> tuple[Callable[[], Words], int]:
        """``(open, first)``: 16-bit words inside a fixed piece of writable memory.

        ``open()`` gives the words, to be released after use; the piece's first word is number
        ``first`` of them.
        """


class _Region:
    """One buffer at one address."""

    __slots__ = ("base", "buffer", "end", "flat", "readonly")

    def __init__(self, base: int, buffer: ReadableBuffer) -> None:
        with memoryview(buffer) as view:
            if not view.c_contiguous:
                raise TypeError("guest RAM must be contiguous memory")
            self.readonly = view.readonly
            self.flat = view.format == "B" and view.ndim == 1
            size = view.nbytes
        self.base = base
        self.end = base + size
        self.buffer: Any = buffer
        if base < 0 or self.end > ADDRESS_LIMIT:
            raise ValueError(f"RAM of {size} bytes at {base:#x} is outside the address space")

    def bytes_view(self) -> memoryview:
        view = memoryview(self.buffer)
        return view if self.flat else view.cast("B")

    def open_words(self) -> Words:
        return memoryview(self.buffer).cast("H")


class BufferMemory(GuestMemory):
    """Guest RAM in buffers: zero-copy."""

    def __init__(
        self,
        regions: Iterable[tuple[int, ReadableBuffer]],
        *,
        on_write: WriteListener | None = None,
    ) -> None:
        self._regions = sorted((_Region(*each) for each in regions), key=lambda each: each.base)
        for lower, upper in zip(self._regions, self._regions[1:], strict=False):
            if lower.end > upper.base:
                raise ValueError(f"regions of RAM overlap at {upper.base:#x}")
        if not self._regions:
            raise ValueError("no RAM")
        self._bases = [region.base for region in self._regions]
        self.on_write = on_write
        self.commits = on_write is not None
        # The quick way: the largest plain, writable region.
        plain = [each for each in self._regions if each.flat and not each.readonly]
        main = max(plain, key=lambda each: each.end - each.base, default=None)
        self._main: tuple[int, int, Any] = (
            (0, 0, b"") if main is None else (main.base, main.end, main.buffer)
        )

    def plain_region(self) -> tuple[int, int, Any] | None:
        base, end, buffer = self._main
        return None if self.on_write is not None or base == end else (base, end, buffer)

    def _pieces(self, pa: int, length: int, writable: bool) -> list[tuple[_Region, int, int]]:
        """The parts of regions that make up a piece of memory: (region, start, end) in each."""
        pieces: list[tuple[_Region, int, int]] = []
        end = pa + length
        index = bisect_right(self._bases, pa) - 1
        while True:
            region = self._regions[index] if 0 <= index < len(self._regions) else None
            if region is None or not region.base <= pa < region.end or length < 0:
                if length == 0:
                    return pieces
                raise GuestError(f"{length} bytes at {pa:#x} are not all RAM")
            if writable and region.readonly:
                raise GuestError(f"{length} bytes at {pa:#x} are not all writable")
            stop = min(end, region.end)
            pieces.append((region, pa - region.base, stop - region.base))
            if stop == end:
                return pieces
            pa = stop
            index += 1

    def _single(self, pa: int, length: int, writable: bool) -> _Region | None:
        """The region that holds all of a piece of memory; None if it lies in several."""
        pieces = self._pieces(pa, length, writable)
        return pieces[0][0] if len(pieces) == 1 else None

    def read(self, pa: int, length: int) -> bytes:
        base, end, buffer = self._main
        if base <= pa and pa + length <= end:
            return bytes(buffer[pa - base : pa - base + length])
        parts = []
        for region, start, end in self._pieces(pa, length, False):
            with region.bytes_view() as view, view[start:end] as part:
                parts.append(bytes(part))
        return b"".join(parts)

    def write(self, pa: int, data: ReadableBuffer) -> None:
        with memoryview(data) as raw, raw.cast("B") as source:
            length = len(source)
            done = 0
            for region, start, end in self._pieces(pa, length, True):
                with region.bytes_view() as view:
                    view[start:end] = source[done : done + end - start]
                done += end - start
        if self.on_write is not None:
            self.on_write(pa, length)

    def loader(self, struct: Struct) -> Callable[[int], tuple[Any, ...]]:
        base, end, buffer = self._main
        size = struct.size
        last = end - size
        unpack_from = struct.unpack_from

        def load(pa: int) -> tuple[Any, ...]:
            if base <= pa <= last:
                return unpack_from(buffer, pa - base)
            return struct.unpack(self.read(pa, size))

        return load

    def store_byte(self, pa: int, value: int) -> None:
        base, end, buffer = self._main
        if base <= pa < end and self.on_write is None:
            buffer[pa - base] = value
        else:
            self.write(pa, bytes((value,)))

    def check(self, segments: Iterable[Segment], writable: bool) -> None:
        for pa, length in segments:
            self._pieces(pa, length, writable)

    def map(self, segments: Iterable[Segment], writable: bool) -> list[memoryview]:
        views: list[memoryview] = []
        base, end, buffer = self._main
        try:
            for pa, length in segments:
                if base <= pa and pa + length <= end:
                    pa -= base
                    views.append(memoryview(buffer)[pa : pa + length])
                else:
                    for region, start, stop in self._pieces(pa, length, writable):
                        views.append(region.bytes_view()[start:stop])
        except GuestError:
            for view in views:
                view.release()
            raise
        return views

    def commit(self, segments: Iterable[Segment], views: Sequence[memoryview]) -> None:
        if self.on_write is not None:
            for pa, length in segments:
                self.on_write(pa, length)

    def reader(
        self, struct: Struct, pa: int, length: int
    ) -> tuple[Callable[[int], tuple[Any, ...]], int]:
        region = self._single(pa, length, False)
        if region is None:
            return self.loader(struct), pa
        return partial(struct.unpack_from, region.buffer), pa - region.base

    def writer(self, struct: Struct, pa: int, length: int) -> tuple[Callable[..., None], int]:
        region = self._single(pa, length, True)
        if region is None or self.on_write is not None:
            return partial(_write_struct, self, struct), pa
        return partial(struct.pack_into, region.buffer), pa - region.base

    def words(self, pa: int, length: int, order: ByteOrder) -> tuple[Callable[[], Words], int]:
        region = self._single(pa, length, True)
        if (
            region is None
            or not region.flat
            or order != sys.byteorder
            or (region.end - region.base) % 2
            or (pa - region.base) % 2
            or self.on_write is not None
        ):
            return partial(SlowWords, self, pa, order), 0
        return region.open_words, (pa - region.base) // 2


class CallbackMemory(GuestMemory):
    """Guest RAM behind two functions."""

    map_limit = BOUNCE_SIZE

    def __init__(
        self, read: Callable[[int, int], ReadableBuffer], write: Callable[[int, bytes], object]
    ) -> None:
        self._read = read
        self._write = write

    def read(self, pa: int, length: int) -> bytes:
        if pa < 0 or length < 0 or pa + length > ADDRESS_LIMIT:
            raise GuestError(f"{length} bytes at {pa:#x} are outside the address space")
        if not length:
            return b""
        try:
            data = bytes(self._read(pa, length))
        except Exception as error:
            raise GuestError(f"{length} bytes at {pa:#x} cannot be read: {error}") from error
        if len(data) != length:
            raise GuestError(f"{length} bytes at {pa:#x} are not all RAM")
        return data

    def write(self, pa: int, data: ReadableBuffer) -> None:
        data = bytes(data)
        if pa < 0 or pa + len(data) > ADDRESS_LIMIT:
            raise GuestError(f"{len(data)} bytes at {pa:#x} are outside the address space")
        if not data:
            return
        try:
            self._write(pa, data)
        except Exception as error:
            raise GuestError(f"{len(data)} bytes at {pa:#x} cannot be written: {error}") from error

    def loader(self, struct: Struct) -> Callable[[int], tuple[Any, ...]]:
        size = struct.size
        return lambda pa: struct.unpack(self.read(pa, size))

    def store_byte(self, pa: int, value: int) -> None:
        self.write(pa, bytes((value,)))

    def check(self, segments: Iterable[Segment], writable: bool) -> None:
        """What is RAM shows only when it is used; what can be told is the address space."""
        for pa, length in segments:
            if pa < 0 or length < 0 or pa + length > ADDRESS_LIMIT:
                raise GuestError(f"{length} bytes at {pa:#x} are outside the address space")

    def map(self, segments: Iterable[Segment], writable: bool) -> list[memoryview]:
        segments = list(segments)
        if sum(length for _, length in segments) > self.map_limit:
            raise ValueError(f"more than {self.map_limit} bytes to be mapped at one time")
        self.check(segments, writable)
        if writable:
            return [memoryview(bytearray(length)) for _, length in segments]
        return [memoryview(self.read(pa, length)) for pa, length in segments]

    def commit(self, segments: Iterable[Segment], views: Sequence[memoryview]) -> None:
        for (pa, _), view in zip(segments, views, strict=True):
            self.write(pa, view)

    def reader(
        self, struct: Struct, pa: int, length: int
    ) -> tuple[Callable[[int], tuple[Any, ...]], int]:
        self.read(pa, length)
        return self.loader(struct), pa

    def writer(self, struct: Struct, pa: int, length: int) -> tuple[Callable[..., None], int]:
        self.read(pa, length)
        return partial(_write_struct, self, struct), pa

    def words(self, pa: int, length: int, order: ByteOrder) -> tuple[Callable[[], Words], int]:
        self.read(pa, length)
        return partial(SlowWords, self, pa, order), 0


def _write_struct(memory: GuestMemory, struct: Struct, pa: int, *values: int) -> None:
    memory.write(pa, struct.pack(*values))


class SlowWords:
    """Words of memory that is not one plain buffer in the host's byte order."""

    __slots__ = ("_memory", "_order", "_pa")

    def __init__(self, memory: GuestMemory, pa: int, order: ByteOrder) -> None:
        self._memory = memory
        self._pa = pa
        self._order: ByteOrder = order

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(self._memory.read(self._pa + 2 * index, 2), self._order)

    def __setitem__(self, index: int, value: int) -> None:
        self._memory.write(self._pa + 2 * index, value.to_bytes(2, self._order))

    def release(self) -> None:
        """Nothing is held."""
