"""The filter ``blklogwrites``: a log of every write, in the format of Linux's ``dm-log-writes``."""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping

from ..errors import ImageError
from .buffers import gather
from .disk import Disk
from .filter import FilterDisk
from .node import Node, Role
from .registry import Driver

__all__ = ["DRIVER", "BlklogwritesDisk"]

_MAGIC = 0x6A736677736872
_VERSION = 1
_SUPER = struct.Struct("<QQQI")
"""magic, version, number of entries, sector size"""
_ENTRY = struct.Struct("<QQQQ")
"""sector, number of sectors, flags, length of the data (0: as the sectors say)"""
_FLUSH, _DISCARD = 1, 4
_SECTOR_SIZES = (512, 1024, 2048, 4096)


class BlklogwritesDisk(FilterDisk):
    """Notes what it hands on in the disk ``log``: one sector for each request, and its data.

    ``append`` goes on with a log that is there; the number of entries is written every
    ``super_interval`` requests and with each flush.
    """

    format_name = "blklogwrites"

    def __init__(
        self,
        below: Disk,
        log: Disk,
        *,
        sector_size: int = 512,
        append: bool = False,
        super_interval: int = 4096,
    ) -> None:
        super().__init__(below)
        self.log = log
        self._sector = sector_size
        self._interval = super_interval
        self._entries = 0
        self._at = 1
        self._lock = threading.Lock()
        if append:
            self._find_end()
        else:
            self._write_super()

    @property
    def children(self) -> Mapping[str, Disk]:
        """The disk itself and its log."""
        return {"file": self.below, "log": self.log}

    def _find_end(self) -> None:
        """Go on behind the entries that are there."""
        magic, version, entries, sector = _SUPER.unpack(self.log.read(0, _SUPER.size))
        if magic != _MAGIC:
            raise ImageError("Invalid log superblock magic", field="magic", value=magic)
        if version != _VERSION:
            raise ImageError("Unsupported log version", field="version", value=version)
        if sector not in _SECTOR_SIZES:
            raise ImageError(f"Invalid log sector size {sector}", field="sector size", value=sector)
        self._sector = sector
        for _ in range(entries):
            place = self._at * sector
            if place + _ENTRY.size > self.log.size:
                raise ImageError("Log entry past the end of the log", field="log", value=place)
            _, sectors, flags, _ = _ENTRY.unpack(self.log.read(place, _ENTRY.size))
            self._at += 1 + (0 if flags & _DISCARD else sectors)
        self._entries = entries

    def _write_super(self) -> None:
        block = _SUPER.pack(_MAGIC, _VERSION, self._entries, self._sector)
        self.log.write(0, block.ljust(self._sector, b"\0"))

    def _note(self, offset: int, length: int, flags: int, data: bytes = b"") -> None:
        """Add an entry."""
        sector = self._sector
        first, last = offset // sector, -(-(offset + length) // sector)
        with self._lock:
            head = _ENTRY.pack(first, last - first, flags, 0).ljust(sector, b"\0")
            if data:  # a log has whole sectors: what lies around the request is as it is now
                start = first * sector
                around = bytearray((last - first) * sector)
                inside = min(len(around), self.below.size - start)
                self.below.readv(start, [memoryview(around)[:inside]])
                around[offset - start : offset - start + length] = data
                head += bytes(around)
            self.log.write(self._at * sector, head)
            self._at += len(head) // sector
            self._entries += 1
            if flags & _FLUSH or self._entries % self._interval == 0:
                self._write_super()
            if flags & _FLUSH:
                self.log.flush()

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        data = gather(views)
        super()._writev(offset, [memoryview(data)], length)
        self._note(offset, length, 0, data)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        super()._write_zeroes(offset, length, unmap)
        for at in range(offset, offset + length, 1 << 20):
            part = min(1 << 20, offset + length - at)
            self._note(at, part, 0, bytes(part))

    def _discard(self, offset: int, length: int) -> None:
        super()._discard(offset, length)
        self._note(offset, length, _DISCARD)

    def _flush(self) -> None:
        super()._flush()
        self._note(0, 0, _FLUSH)

    def _close(self) -> None:
        try:
            if not self.read_only:
                self._write_super()
        finally:
            try:
                super()._close()
            finally:
                self.log.close()


def _open(node: Node) -> Disk:
    options = node.options
    append = options.boolean("log-append", False)
    sector = options.size("log-sector-size")
    interval = options.number("log-super-update-interval", 4096)
    below = node.required("file", Role.FILE, filename=node.filename)
    log = node.required("log", Role.FILE)
    if append and sector is not None:
        raise ValueError("log-append and log-sector-size are mutually exclusive")
    sector = 512 if sector is None else sector
    if sector not in _SECTOR_SIZES:
        raise ValueError(f"Invalid log sector size {sector}")
    if not interval:
        raise ValueError("Invalid log superblock update interval 0")
    log.growable = True
    return BlklogwritesDisk(below, log, sector_size=sector, append=append, super_interval=interval)


DRIVER = Driver("blklogwrites", _open, filtering=True)
