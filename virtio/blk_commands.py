"""The block requests that are not reads and writes (virtio 1.4 §5.2.6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..backend.disk import Disk
from ..errors import GuestError
from . import layout as at
from .blk_config import (
    MAX_DISCARD_SEGMENTS,
    MAX_RANGE_SECTORS,
    MAX_SECURE_ERASE_SEGMENTS,
    MAX_WRITE_ZEROES_SEGMENTS,
)
from .layout import SECTOR_SIZE
from .memory import Segment
from .request import BlockRequest

if TYPE_CHECKING:
    from .blk import VirtioBlk

__all__ = ["BlockCommands", "RefusedError"]

_ZEROES = memoryview(bytes(1 << 20))


class RefusedError(GuestError):
    """The driver broke a rule, and the answer to that is a status.

    ``forgiven``: what a driver may try without being told off (``strict``).
    """

    def __init__(
        self, reason: str, status: int = at.VIRTIO_BLK_S_IOERR, *, forgiven: bool = False
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.forgiven = forgiven


class BlockCommands:
    """Each takes a request and gives the number of bytes written into its room for data."""

    def __init__(self, blk: VirtioBlk) -> None:
        self._blk = blk
        self.handlers: dict[int, Callable[[BlockRequest], int]] = {
            at.VIRTIO_BLK_T_FLUSH: self._flush,
            at.VIRTIO_BLK_T_FLUSH_OUT: self._flush,  # BLK-118
            at.VIRTIO_BLK_T_GET_ID: self._get_id,
            at.VIRTIO_BLK_T_GET_LIFETIME: self._get_lifetime,
            at.VIRTIO_BLK_T_DISCARD: self._discard,
            at.VIRTIO_BLK_T_WRITE_ZEROES: self._write_zeroes,
            at.VIRTIO_BLK_T_SECURE_ERASE: self._secure_erase,
        }

    def needs(self, feature: int, name: str) -> None:
        """Raise RefusedError with UNSUPP unless ``feature`` was accepted."""
        if not self._blk.accepted(feature):
            raise RefusedError(f"{name}, which was not negotiated", at.VIRTIO_BLK_S_UNSUPP)

    def answer(self, segments: list[Segment], data: bytes) -> int:
        """Write ``data`` into ``segments``, as much as goes; how much that was."""
        left = data
        for address, length in segments:
            part = left[:length]
            if part:
                self._blk.memory.write(address, part)
            left = left[length:]
        return len(data) - len(left)

    def _flush(self, request: BlockRequest) -> int:
        self._blk.disk.flush()
        return 0

    def _get_id(self, request: BlockRequest) -> int:
        """BLK-108; into a shorter buffer (BLK-43) as much as goes."""
        return self.answer(request.incoming, self._blk.serial.ljust(at.VIRTIO_BLK_ID_BYTES, b"\0"))

    def _get_lifetime(self, request: BlockRequest) -> int:
        """BLK-109."""
        source = self._blk.traits.lifetime
        self.needs(at.VIRTIO_BLK_F_LIFETIME, "a request for the lifetime")
        if source is None:
            raise RefusedError("no lifetime is known", at.VIRTIO_BLK_S_UNSUPP)
        life = source()
        data = self._blk.structs.blk_lifetime.pack(life.pre_eol_info, life.type_a, life.type_b)
        if sum(length for _, length in request.incoming) < len(data):
            raise RefusedError("no room for a lifetime")
        return self.answer(request.incoming, data)

    # -- ranges ------------------------------------------------------------------------------

    def _ranges(self, request: BlockRequest, most: int, sectors: int) -> list[tuple[int, int, int]]:
        """The (offset, length, flags) of the request's segments, in bytes; all are checked."""
        blk = self._blk
        blk.check_writable()
        struct = blk.structs.blk_segment
        total = sum(length for _, length in request.outgoing)
        if total % struct.size or total > most * struct.size:  # BLK-42, BLK-44, BLK-46
            raise RefusedError(f"{total} bytes of ranges, at most {most} are allowed")
        data = b"".join(blk.memory.read(*segment) for segment in request.outgoing)
        ranges = []
        unmap = at.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        for sector, count, flags in struct.iter_unpack(data):
            if flags & ~unmap or (flags and request.kind != at.VIRTIO_BLK_T_WRITE_ZEROES):
                raise RefusedError(f"flags {flags:#x}", at.VIRTIO_BLK_S_UNSUPP)  # BLK-68, BLK-69
            if count > sectors or sector + count > blk.capacity:
                raise RefusedError(f"{count} sectors at {sector} of {blk.capacity}")
            ranges.append((sector * SECTOR_SIZE, count * SECTOR_SIZE, flags))
        return ranges

    def _discard(self, request: BlockRequest) -> int:
        self.needs(at.VIRTIO_BLK_F_DISCARD, "a discard")
        for offset, length, _ in self._ranges(request, MAX_DISCARD_SEGMENTS, MAX_RANGE_SECTORS):
            self._blk.disk.discard(offset, length)
        return 0

    def _write_zeroes(self, request: BlockRequest) -> int:
        self.needs(at.VIRTIO_BLK_F_WRITE_ZEROES, "write zeroes")
        disk = self._blk.disk
        ranges = self._ranges(request, MAX_WRITE_ZEROES_SEGMENTS, MAX_RANGE_SECTORS)
        for offset, length, flags in ranges:
            disk.write_zeroes(offset, length, unmap=bool(flags))
            if not self._blk.writeback:
                disk.flush()
        return 0

    def _secure_erase(self, request: BlockRequest) -> int:
        """Overwrite with zeroes, really, and flush; zones are reset instead (BLK-105).

        What is gone is what this disk can read. Copies in snapshots and backing files, and what
        the host's own storage keeps, are not its to erase.
        """
        self.needs(at.VIRTIO_BLK_F_SECURE_ERASE, "a secure erase")
        traits = self._blk.traits
        disk, zoned = self._blk.disk, traits.zoned
        ranges = self._ranges(request, MAX_SECURE_ERASE_SEGMENTS, traits.erase_sectors)
        for offset, length, _ in ranges:
            if zoned is not None:
                if offset % zoned.zone_size or (
                    length % zoned.zone_size and offset + length != disk.size
                ):
                    raise RefusedError("a secure erase of no whole zones")  # BLK-104
                for zone in zoned.zones[offset // zoned.zone_size :][
                    : -(-length // zoned.zone_size)
                ]:
                    if zone.sequential:
                        zoned.reset_zone(zone)
                        self._overwrite(zoned.below, zone.start, zone.length)
                    else:
                        self._overwrite(disk, zone.start, zone.length)
            else:
                self._overwrite(disk, offset, length)
            disk.flush()
        return 0

    def _overwrite(self, disk: Disk, offset: int, length: int) -> None:
        while length:
            part = min(length, len(_ZEROES))
            disk.writev(offset, [_ZEROES[:part]])
            offset += part
            length -= part
