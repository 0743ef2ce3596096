"""The one interface that everything speaks: formats, filters and protocols are all Disks.

A Disk is an array of ``size`` bytes. Requests are synchronous and may come from any number of
threads at once; each is either done whole or raises. They come from one process: after a fork only
one of the two may go on with a disk, closing it included. What a class of disks has to provide are
the methods with a leading underscore; the public ones check the request and call them.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import index
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias

from ..errors import BackendError, UnsupportedError
from .buffers import as_views, clear, is_zero, split

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["Disk", "DiskInfo", "Extent", "Limits", "Run"]

_MAX_SIZE = (1 << 63) - 1
"""No host file is longer (``off_t``), so no disk grows beyond it."""

_ZERO_CHUNK = 1 << 20
"""Bytes of zeroes written at a time where zero clusters cannot be used."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests a disk likes; all in bytes. Requests beyond them still work, only slower."""

    request_alignment: int = 1
    """Reads and writes aligned to this need no bounce buffer and no read-modify-write."""
    write_zeroes_alignment: int = 1
    """Only a range aligned to this becomes zeroes without being written."""
    discard_alignment: int = 1
    """Only a range aligned to this is discarded; the rest of the request is ignored."""
    max_transfer: int = 0
    """Largest read or write done in one piece; 0 is no limit."""
    optimal_io_size: int = 0
    """Reads and writes of this size do best; 0 is unknown."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in one state (QEMU's ``BDRV_BLOCK_*``, ``qemu-img map``)."""

    length: int
    """Bytes, never more than was asked for."""
    data: bool
    """Reads come from stored data (possibly stored zeroes)."""
    zero: bool
    """Reads give zeroes."""
    allocated: bool
    """The contents come from this layer, not from one below it in the backing chain."""
    compressed: bool = False
    depth: int = 0
    """Which layer of the backing chain answers: 0 is the disk asked, 1 its backing file, …"""
    host_offset: int | None = None
    """Where the run starts in ``file``, in bytes, if it lies there contiguously as it is read."""
    file: Disk | None = None


Run: TypeAlias = "tuple[int, bool, bool, bool, bool, int, int | None, Disk | None]"
"""The fields of an Extent, in their order."""


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """What a disk says of itself (``qemu-img info``)."""

    format: str
    virtual_size: int
    """Bytes."""
    actual_size: int | None = None
    """Bytes that the host's storage really uses, if it can tell."""
    filename: str | None = None
    cluster_size: int | None = None
    specific: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the format's own, under QEMU's names (``ImageInfoSpecific``)."""
    dirty: bool = False
    """The image was not closed, and must be repaired before it is written."""
    encrypted: bool = False
    backing_filename: str | None = None
    """As it stands in the image."""
    backing_format: str | None = None
    vm_state_offset: int | None = None
    """Guest byte at which VM state would begin."""
    snapshots: tuple[Mapping[str, Any], ...] = ()
    """Of each internal snapshot, facts under QEMU's names (``SnapshotInfo``)."""


class OutsideError(ValueError):
    """A request leaves the disk: a caller's mistake, unless the disk has become smaller."""


class Disk(ABC):
    """A guest's disk, or a layer of one."""

    format_name: str = "disk"
    """The name QEMU's ``-f`` knows it by."""

    growable: bool = False
    """True for a file below a format: a write past the end makes it longer, and what a read finds
    past the end is zeroes, so that a format may use any offset. Whoever opens the file for a format
    asks for it; disks that guests see never grow by themselves."""

    bounded: bool = False
    """True for a file below a format that cannot grow (a block device). Formats set it: what a read
    finds past the end is zeroes, too, and a write there finds no space (ENOSPC)."""

    def __init__(self, size: int, *, read_only: bool = False, limits: Limits | None = None) -> None:
        self.size = size
        """Bytes. Changes only by :meth:`truncate`, :meth:`invalidate`, or writing if growable."""
        self.read_only = read_only
        self.limits = limits if limits is not None else Limits()
        self.closed = False
        self.discards = True
        """False if discards are ignored, and zeroes never give space back (``discard=ignore``)."""
        self.detect_zeroes = "off"
        """``on`` if written data that are all zeroes become zero clusters, ``unmap`` if those may
        give space back."""
        self._resize_listeners: list[Callable[[int], None]] = []

    # -- reading and writing -----------------------------------------------------------------

    def readv(self, offset: int, buffers: Iterable[WriteableBuffer]) -> None:
        """Read from byte ``offset`` on into ``buffers``, all of them, whole.

        Raises ValueError where the request leaves the disk, BackendError or ImageError where the
        data cannot be had; the buffers' contents are then undefined.
        """
        views, length = as_views(buffers)
        if self.closed or offset < 0 or offset + length > self.size:
            self._refuse(offset, length)
            views, length = self._clear_past_end(offset, views, length)
        if length:
            self._readv(offset, views, length)

    def writev(self, offset: int, buffers: Iterable[ReadableBuffer], *, fua: bool = False) -> None:
        """Write ``buffers`` to byte ``offset`` on; with ``fua`` they are on stable storage then."""
        views, length = as_views(buffers)
        if self.closed or self.read_only or offset < 0 or offset + length > self.size:
            self._refuse(offset, length, writing=True)
        if self.detect_zeroes != "off" and is_zero(views):
            self.write_zeroes(offset, length, unmap=self.detect_zeroes == "unmap")
        elif length:
            self._writev(offset, views, length)
        if fua:
            self._flush()

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from byte ``offset`` on, as one bytes object."""
        if self.closed or offset < 0 or length < 0 or offset + length > self.size:
            self._refuse(offset, length)
        data = bytearray(length)
        self.readv(offset, (data,))
        return bytes(data)

    def write(self, offset: int, data: ReadableBuffer, *, fua: bool = False) -> None:
        """Write one buffer; see :meth:`writev`."""
        self.writev(offset, (data,), fua=fua)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fallback: bool = True
    ) -> None:
        """Make ``length`` bytes from ``offset`` on read as zeroes.

        The part aligned to ``limits.write_zeroes_alignment`` is done without writing data where
        the disk can; the rest is written, unless the disk knows better. ``unmap`` allows the space
        to be given back.
        ``fallback=False`` raises UnsupportedError instead of writing zeroes for the aligned part.
        """
        if self.closed or self.read_only or offset < 0 or length < 0 or offset + length > self.size:
            self._refuse(offset, length, writing=True)
        unmap = unmap and self.discards
        start, end = self._aligned(offset, length, self.limits.write_zeroes_alignment)
        stop = offset + length
        head = min(start, stop)
        if offset < head:
            self._write_zeroes_in_part(offset, head - offset, unmap)
        if start < end:
            try:
                self._write_zeroes(start, end - start, unmap)
            except UnsupportedError:
                if not fallback:
                    raise
                self._write_zero_bytes(start, end - start)
        tail = max(head, end)
        if tail < stop:
            self._write_zeroes_in_part(tail, stop - tail, unmap)

    def discard(self, offset: int, length: int) -> None:
        """Say that these bytes are no longer needed: a hint.

        Only the part aligned to ``limits.discard_alignment`` is acted on. What a read gives
        afterwards is what the format says (zeroes, the backing file's data, or the old data).
        """
        if self.closed or self.read_only or offset < 0 or length < 0 or offset + length > self.size:
            self._refuse(offset, length, writing=True)
            length = self.size - offset
        start, end = self._aligned(offset, length, self.limits.discard_alignment)
        if start < end and self.discards:
            self._discard(start, end - start)

    def flush(self) -> None:
        """Bring everything written before to stable storage."""
        if self.closed:
            self._refuse(0, 0)
        self._flush()

    def write_compressed(self, offset: int, buffers: Iterable[ReadableBuffer]) -> None:
        """Write whole clusters compressed, where the format can. Raises UnsupportedError else."""
        views, length = as_views(buffers)
        if self.closed or self.read_only or offset < 0 or offset + length > self.size:
            self._refuse(offset, length, writing=True)
        if length:
            self._write_compressed(offset, views, length)

    # -- asking ------------------------------------------------------------------------------

    def block_status(self, offset: int, length: int) -> Extent:
        """The state of the run that starts at ``offset``, at most ``length`` (> 0) bytes long."""
        if length <= 0:
            raise ValueError(f"{self.format_name}: the state of {length} bytes was asked for")
        if self.closed or offset < 0 or offset + length > self.size:
            self._refuse(offset, length)
            if offset >= self.size:
                return Extent(length, data=False, zero=True, allocated=True)
            length = self.size - offset
        return self._block_status(offset, length)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Every run from ``offset`` on, one after the other, without a gap."""
        for run in self.runs(offset, length):
            yield Extent(*run)

    def runs(self, offset: int = 0, length: int | None = None) -> Iterator[Run]:
        """:meth:`extents` as plain tuples, for walks through millions of them."""
        end = self.size if length is None else offset + length
        if self.closed or offset < 0 or end > self.size:
            self._refuse(offset, end - offset)
        return self._runs(offset, end)

    @property
    def has_zero_init(self) -> bool:
        """True if a disk of this kind just created reads as zeroes everywhere."""
        return False

    @property
    def children(self) -> Mapping[str, Disk]:
        """The disks below this one by role (``file``, ``backing``, ``data-file``, …)."""
        return {}

    @property
    def volatile(self) -> bool:
        """Some of what was written is in no file yet: it would be lost with this process, not only
        with the machine. A flush ends that."""
        return any(child.volatile for child in self.children.values())

    @property
    def backing(self) -> Disk | None:
        """The backing file, if there is one."""
        return self.children.get("backing")

    strong_options: Mapping[str, Any] = MappingProxyType({})
    """Options it was opened with that decide what it holds: its file's name does not say all."""

    @property
    def filename(self) -> str | None:
        """The path or URL this disk was opened by, if there is one."""
        file = self.children.get("file")
        return None if file is None else file.filename

    def info(self) -> DiskInfo:
        """Facts about the disk."""
        file = self.children.get("file")
        return DiskInfo(
            format=self.format_name,
            virtual_size=self.size,
            actual_size=None if file is None else file.info().actual_size,
            filename=None if self.strong_options else self.filename,
        )

    # -- life --------------------------------------------------------------------------------

    def truncate(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        """Change the size to ``size`` bytes; new space reads as zeroes.

        ``preallocation`` is ``off``, ``metadata``, ``falloc`` or ``full``. Making a disk smaller
        loses data and must be asked for with ``shrink``.
        """
        if self.closed or self.read_only:
            self._refuse(0, 0, writing=True)
        size = index(size)
        if size < 0:
            raise ValueError(f"{self.format_name}: a disk cannot have {size} bytes")
        if size < self.size and not shrink:
            raise ValueError("shrinking a disk loses data and must be asked for (shrink=True)")
        self._truncate(size, preallocation)

    def on_resize(self, listener: Callable[[int], None]) -> Callable[[], None]:
        """Have ``listener(size)`` called after every change of size; returns how to stop that."""
        self._resize_listeners.append(listener)
        return lambda: self._resize_listeners.remove(listener)

    def drain(self) -> None:
        """Wait until no request is under way."""

    def reopen(self, *, read_only: bool) -> None:
        """Change between read-only and read-write without losing what was written."""
        if read_only != self.read_only:
            raise UnsupportedError(f"{self.format_name}: cannot be reopened", feature="reopen")

    def invalidate(self) -> None:
        """Forget everything cached: somebody else has changed what lies below."""

    def debug_event(self, name: str) -> None:
        """A named point inside a driver above has been reached (QEMU's ``BLKDBG_*`` events).

        Drivers call this on the disk below them; a fault-injecting filter acts on it.
        """

    def close(self) -> None:
        """Flush, and give up the disk and what it opened. A second call does nothing."""
        if self.closed:
            return
        try:
            if not self.read_only:
                self._flush()
        finally:
            self.closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as error:
            if value is not None:
                error.__context__ = value  # which an ExitStack on the way has forgotten
            raise

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled; open it again")

    def __repr__(self) -> str:
        name = f" {self.filename!r}" if self.filename else ""
        state = " closed" if self.closed else " read-only" if self.read_only else ""
        return f"<{type(self).__name__}{name} {self.size} bytes{state}>"

    # -- what a class of disks provides --------------------------------------------------------
    # Offsets and lengths are checked: inside the disk, length > 0. Views are flat bytes. Only where
    # ``growable`` is set may a write (of data or zeroes) pass the end; it then raises ``size``.

    @abstractmethod
    def _readv(self, offset: int, views: list[memoryview], length: int) -> None: ...

    @abstractmethod
    def _writev(self, offset: int, views: list[memoryview], length: int) -> None: ...

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Aligned to the limits, but for an end at the end of the disk."""
        raise UnsupportedError(f"{self.format_name}: no zeroes without writing", feature="zeroes")

    def _write_zeroes_in_part(self, offset: int, length: int, unmap: bool) -> None:
        """A part of what lies between two multiples of ``write_zeroes_alignment``."""
        self._write_zero_bytes(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        """Aligned to the limits, but for an end at the end of the disk."""

    def _flush(self) -> None:
        """Everything written before is on stable storage after."""

    def _write_compressed(self, offset: int, views: list[memoryview], length: int) -> None:
        raise UnsupportedError(f"{self.format_name}: no compression", feature="compression")

    def _block_status(self, offset: int, length: int) -> Extent:
        return Extent(length, data=True, zero=False, allocated=True)

    def _runs(self, offset: int, end: int) -> Iterator[Run]:
        while offset < end:
            extent = self.block_status(offset, end - offset)
            yield (
                extent.length,
                extent.data,
                extent.zero,
                extent.allocated,
                extent.compressed,
                extent.depth,
                extent.host_offset,
                extent.file,
            )
            offset += extent.length

    def _truncate(self, size: int, preallocation: str) -> None:
        raise UnsupportedError("Image format driver does not support resize", feature="truncate")

    def _close(self) -> None:
        """Release what the disk holds; ``closed`` is set, the flush is done."""

    # -- help for the above --------------------------------------------------------------------

    def _set_size(self, size: int) -> None:
        """Note a new size and tell the listeners."""
        if size != self.size:
            self.size = size
            for listener in list(self._resize_listeners):
                listener(size)

    def _aligned(self, offset: int, length: int, alignment: int) -> tuple[int, int]:
        """The aligned part of a range as (start, end); the end of the disk counts as aligned."""
        start = -(-offset // alignment) * alignment
        end = offset + length
        if end != self.size:
            end = end // alignment * alignment
        return start, end

    def _clear_past_end(
        self, offset: int, views: list[memoryview], length: int
    ) -> tuple[list[memoryview], int]:
        """Fill what lies past the end of a growable disk with zeroes; the rest is left to read."""
        inside = max(0, min(length, self.size - offset))
        clear(split(views, inside, length - inside))
        return split(views, 0, inside), inside

    def _write_zero_bytes(self, offset: int, length: int) -> None:
        while length > 0:
            part = min(length, _ZERO_CHUNK)
            self._writev(offset, [memoryview(bytes(part))], part)
            offset += part
            length -= part

    def _refuse(self, offset: int, length: int, *, writing: bool = False) -> None:
        """Raise for a request that failed a check; returns if it only passes a growable's end, or
        reads past that of a bounded one."""
        if self.closed:
            raise ValueError(f"{self.format_name}: the disk is closed")
        if writing and self.read_only:
            raise BackendError(errno.EPERM, "the disk is read-only", self.filename)
        may_pass = self.growable or self.bounded
        if may_pass and offset >= 0 and length >= 0 and offset + length <= _MAX_SIZE:
            if writing and not self.growable:
                raise BackendError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.filename)
            return
        raise OutsideError(
            f"{self.format_name}: {length} bytes at {offset} are not inside the disk "
            f"of {self.size} bytes"
        )
