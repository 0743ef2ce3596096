"""The format ``raw``: the guest's disk is the file, or a window of it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, ImageError, UnsupportedError
from .buffers import gather, split
from .disk import Disk, DiskInfo, Extent
from .options import Options
from .registry import PROBE_SIZE, Format, Measurement, formats

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["FORMAT", "RawDisk"]

_SECTOR = 512


class RawDisk(Disk):
    """``size`` bytes of ``file`` from byte ``offset`` on; without a size, all the rest of it.

    The size of a guest's disk is a whole number of sectors: a file that ends inside one is
    rounded up, as in QEMU, and reads as zeroes behind its end.

    ``guarded`` is for a disk that is raw only by guess: nothing may be written to it that would
    have it guessed to be another format next time. (Otherwise a guest could write a qcow2 header
    that names any file of the host as its backing file, and read that after the next start.)

    The disk owns ``file`` and closes it.
    """

    format_name = "raw"

    def __init__(
        self,
        file: Disk,
        *,
        offset: int = 0,
        size: int | None = None,
        read_only: bool = False,
        guarded: bool = False,
    ) -> None:
        self.file = file
        self.offset = offset
        self._fixed_size = size is not None
        self._guarded = guarded and offset == 0
        self._header_lock = threading.Lock()
        super().__init__(
            _window(file, offset, size),
            read_only=read_only or file.read_only,
            limits=file.limits,
        )
        self._aim()

    # -- reading and writing -------------------------------------------------------------------

    def readv(self, offset: int, buffers: Iterable[WriteableBuffer]) -> None:
        """See :meth:`Disk.readv`; overridden for speed, as in FileDisk."""
        if (
            type(buffers) is list
            and len(buffers) == 1
            and type(view := buffers[0]) is memoryview
            and 0 <= offset <= self._straight_end - view.nbytes
        ):
            self.file.readv(self.offset + offset, buffers)
        else:
            super().readv(offset, buffers)

    def writev(self, offset: int, buffers: Iterable[ReadableBuffer], *, fua: bool = False) -> None:
        """See :meth:`Disk.writev`."""
        if (
            type(buffers) is list
            and len(buffers) == 1
            and type(view := buffers[0]) is memoryview
            and self._straight_write_start <= offset <= self._straight_write_end - view.nbytes
            and self.detect_zeroes == "off"
        ):
            self.file.writev(self.offset + offset, buffers, fua=fua)
        else:
            super().writev(offset, buffers, fua=fua)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        if offset + length > self._straight_end:
            views, length = self.file._clear_past_end(self.offset + offset, views, length)
        if length:
            self.file.readv(self.offset + offset, views)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        if offset + length > self._straight_end:
            raise BackendError(
                errno.ENOSPC, "The file below ends inside the last sector", self.filename
            )
        if self._guarded and offset < PROBE_SIZE:
            with self._header_lock:
                part = min(length, PROBE_SIZE - offset)
                head = gather(split(views, 0, part))  # a copy: the guest may change its own
                self._check_header(offset, head)
                rest = split(views, part, length - part)
                self.file.writev(self.offset + offset, [memoryview(head), *rest])
        else:
            self.file.writev(self.offset + offset, views)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if self._guarded and offset < PROBE_SIZE:
            with self._header_lock:
                self._check_header(offset, bytes(min(length, PROBE_SIZE - offset)))
                self._write_zeroes_below(offset, length, unmap)
        else:
            self._write_zeroes_below(offset, length, unmap)

    def _write_zeroes_below(self, offset: int, length: int, unmap: bool) -> None:
        self.file.write_zeroes(self.offset + offset, length, unmap=unmap, fallback=False)

    def _discard(self, offset: int, length: int) -> None:
        if self._guarded and offset < PROBE_SIZE:
            with self._header_lock:
                self._check_header(offset, bytes(min(length, PROBE_SIZE - offset)))
                self.file.discard(self.offset + offset, length)
        else:
            self.file.discard(self.offset + offset, length)

    def _check_header(self, offset: int, data: bytes) -> None:
        """Refuse a write of ``data`` that would make the disk look like another format."""
        header = bytearray(self.file.read(self.offset, min(PROBE_SIZE, self.size)))
        header[offset : offset + len(data)] = data
        start = bytes(header)
        if any(kind.name != FORMAT.name and kind.probe(start) > 1 for kind in formats()):
            raise BackendError(
                errno.EPERM,
                "a write would turn this disk, raw by guess, into one of another format "
                "(specify the 'raw' format explicitly to allow it)",
                self.filename,
            )

    def _flush(self) -> None:
        self.file.flush()

    # -- asking --------------------------------------------------------------------------------

    def _block_status(self, offset: int, length: int) -> Extent:
        inside = min(length, self.file.size - self.offset - offset)
        if inside <= 0:
            return Extent(length, data=False, zero=True, allocated=True)
        below = self.file.block_status(self.offset + offset, inside)
        run = below.length
        if run == inside:
            run = length  # the last sector, if the file ends inside it, is all of one kind
        return Extent(
            run,
            data=below.data,
            zero=below.zero,
            allocated=below.data or below.zero,
            host_offset=self.offset + offset,
            file=self.file,
        )

    @property
    def has_zero_init(self) -> bool:
        """As the file."""
        return self.file.has_zero_init

    @property
    def children(self) -> Mapping[str, Disk]:
        """The file."""
        return {"file": self.file}

    def info(self) -> DiskInfo:
        """Facts about the disk."""
        below = self.file.info()
        name = None if self.strong_options else self.filename
        return DiskInfo(self.format_name, self.size, below.actual_size, name)

    # -- life ----------------------------------------------------------------------------------

    def _truncate(self, size: int, preallocation: str) -> None:
        if self._fixed_size:
            raise UnsupportedError("Cannot resize fixed-size raw disks", feature="truncate")
        if size > (1 << 63) - 1 - self.offset:
            raise ValueError("Disk size too large for the chosen offset")
        self.file.truncate(self.offset + size, preallocation=preallocation, shrink=True)
        self._set_size(_window(self.file, self.offset, None))

    def drain(self) -> None:
        """Wait until no request is under way below."""
        self.file.drain()

    def reopen(self, *, read_only: bool) -> None:
        """Reopen the file, too."""
        self.file.reopen(read_only=read_only)
        self.read_only = read_only
        self._aim()

    def invalidate(self) -> None:
        """Take note of a size that somebody else has changed."""
        self.file.invalidate()
        if not self._fixed_size:
            self._set_size(_window(self.file, self.offset, None))

    def debug_event(self, name: str) -> None:
        """Passed on."""
        self.file.debug_event(name)

    def _close(self) -> None:
        self._straight_end = self._straight_write_end = -1
        self.file.close()

    def _set_size(self, size: int) -> None:
        super()._set_size(size)
        self._aim()

    def _aim(self) -> None:
        """Note which requests are the file's own matter: it may end inside the last sector."""
        growable = self.file.growable
        self._straight_end = self.size if growable else min(self.size, self.file.size - self.offset)
        self._straight_write_start = PROBE_SIZE if self._guarded else 0
        self._straight_write_end = -1 if self.read_only else self._straight_end


def _window(file: Disk, offset: int, size: int | None) -> int:
    """The size of the disk. Raises ImageError, with QEMU's words, for a window that is not one."""
    if offset < 0 or (size is not None and size < 0):
        raise ValueError("raw: offset and size cannot be negative")
    if offset > file.size:
        raise ImageError(
            f"Offset ({offset}) cannot be greater than size of the containing file ({file.size})",
            field="offset",
            value=offset,
            limit=file.size,
        )
    if size is None:
        return -(-(file.size - offset) // _SECTOR) * _SECTOR
    if size > file.size - offset:
        raise ImageError(
            f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
            f" actual size of the containing file ({file.size})",
            field="size",
            value=size,
            limit=file.size - offset,
        )
    if size % _SECTOR:
        raise ImageError(
            f"Specified size is not multiple of {_SECTOR}", field="size", value=size, limit=_SECTOR
        )
    return size


def _probe(data: bytes) -> int:
    return 1  # what anything is that nothing else is


def _open(
    file: Disk,
    *,
    read_only: bool = False,
    policy: object = None,
    probed: bool = False,
    no_io: bool = False,
    for_check: bool = False,
    **options: Any,
) -> Disk:
    values = Options(options)
    offset, size = values.size("offset") or 0, values.size("size")
    for name in values.left:
        raise ValueError(f"Block format 'raw' does not support the option '{name}'")
    return RawDisk(file, offset=offset, size=size, read_only=read_only, guarded=probed)


def _create(file: Disk, size: int, *, preallocation: str = "off", **options: Any) -> None:
    if options:
        raise ValueError(f"raw: unknown option {sorted(options)[0]!r}")
    rounded = -(-size // _SECTOR) * _SECTOR
    file.truncate(rounded, preallocation=preallocation, shrink=True)


def _measure(size: int, source: Disk | None, *, preallocation: str = "off") -> Measurement:
    size = -(-size // _SECTOR) * _SECTOR
    return Measurement(size, size)


FORMAT = Format("raw", _probe, _open, _create, _measure, strong_options=("offset", "size"))
