"""Zone requests (virtio 1.4 §5.2.6): reports, management, append. The rules are the disk's own.

A disk's :class:`~..backend.zones.ZoneError` becomes the status that the specification has for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..backend.zoned import ZonedDisk
from ..backend.zones import Zone, ZoneFault
from . import layout as at
from .blk_commands import BlockCommands, RefusedError
from .layout import SECTOR_SIZE
from .request import BlockRequest

if TYPE_CHECKING:
    from .blk import VirtioBlk

__all__ = ["ZONE_STATUS", "ZoneRequests"]

ZONE_STATUS: Final = {
    ZoneFault.INVALID: at.VIRTIO_BLK_S_ZONE_INVALID_CMD,
    ZoneFault.UNALIGNED: at.VIRTIO_BLK_S_ZONE_UNALIGNED_WP,
    ZoneFault.OPEN: at.VIRTIO_BLK_S_ZONE_OPEN_RESOURCE,
    ZoneFault.ACTIVE: at.VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE,
    ZoneFault.UNSUPPORTED: at.VIRTIO_BLK_S_UNSUPP,
}
_REPORT_MAX: Final = 1 << 20
"""Bytes of a report that are answered; a driver with more room asks again."""


class ZoneRequests:
    """The handlers, as in :class:`~.blk_commands.BlockCommands`."""

    def __init__(self, blk: VirtioBlk, disk: ZonedDisk, commands: BlockCommands) -> None:
        self._blk = blk
        self._disk = disk
        self._commands = commands
        self.handlers: dict[int, Callable[[BlockRequest], int]] = {
            at.VIRTIO_BLK_T_ZONE_APPEND: self._append,
            at.VIRTIO_BLK_T_ZONE_REPORT: self._report,
            at.VIRTIO_BLK_T_ZONE_OPEN: self._manage(disk.open_zone),
            at.VIRTIO_BLK_T_ZONE_CLOSE: self._manage(disk.close_zone),
            at.VIRTIO_BLK_T_ZONE_FINISH: self._manage(disk.finish_zone),
            at.VIRTIO_BLK_T_ZONE_RESET: self._manage(disk.reset_zone),
            at.VIRTIO_BLK_T_ZONE_RESET_ALL: self._reset_all,
        }

    def _needs(self) -> None:
        """BLK-81."""
        self._commands.needs(at.VIRTIO_BLK_F_ZONED, "a zone request")

    def _zone(self, request: BlockRequest) -> Zone:
        """The zone that the request's sector is in."""
        if request.sector >= self._blk.capacity:
            raise RefusedError(
                f"no zone at sector {request.sector}", at.VIRTIO_BLK_S_ZONE_INVALID_CMD
            )
        return self._disk.zone_at(request.sector * SECTOR_SIZE)

    def _manage(self, action: Callable[[Zone], None]) -> Callable[[BlockRequest], int]:
        """A request that does ``action`` to the zone that starts at its sector (BLK-55, BLK-82)."""

        def handle(request: BlockRequest) -> int:
            self._needs()
            self._blk.check_writable()
            zone = self._zone(request)
            if zone.start != request.sector * SECTOR_SIZE:
                raise RefusedError(
                    f"sector {request.sector} starts no zone", at.VIRTIO_BLK_S_ZONE_INVALID_CMD
                )
            action(zone)
            if not self._blk.writeback:
                self._disk.flush()
            return 0

        return handle

    def _reset_all(self, request: BlockRequest) -> int:
        self._needs()
        self._blk.check_writable()
        self._disk.reset_all()
        return 0

    def _report(self, request: BlockRequest) -> int:
        """As many zones as there is room for, from the one on that the sector is in (BLK-110)."""
        self._needs()
        structs = self._blk.structs
        head, each = structs.zone_report, structs.zone_descriptor
        room = min(sum(length for _, length in request.incoming), _REPORT_MAX)
        if room < head.size:
            raise RefusedError(
                f"{room} bytes of room for a zone report", at.VIRTIO_BLK_S_ZONE_INVALID_CMD
            )
        first = self._zone(request).index
        zones = self._disk.zones[first : first + (room - head.size) // each.size]
        data = bytearray(head.pack(len(zones)))
        for zone in zones:
            data += each.pack(
                zone.capacity // SECTOR_SIZE,
                zone.start // SECTOR_SIZE,
                zone.pointer // SECTOR_SIZE,
                zone.type,
                zone.state,
            )
        return self._commands.answer(request.incoming, bytes(data))

    def _append(self, request: BlockRequest) -> int:
        """Data goes to the zone's write pointer; the sector that this was is the answer."""
        self._needs()
        blk = self._blk
        blk.check_writable()
        struct = blk.structs.zone_append
        if sum(length for _, length in request.incoming) != struct.size:
            raise RefusedError("no room for the sector of an append")
        length = sum(size for _, size in request.outgoing)
        if length % SECTOR_SIZE:
            raise RefusedError(f"{length} bytes of data are no whole sectors")
        most = blk.traits.max_append
        if length > most:  # BLK-94, BLK-95
            status = at.VIRTIO_BLK_S_ZONE_INVALID_CMD if most else at.VIRTIO_BLK_S_UNSUPP
            raise RefusedError(f"an append of {length} bytes", status)
        self._zone(request)
        blk.memory.check(request.incoming, True)
        views = blk.memory.map(request.outgoing, False)
        try:
            place = self._disk.append(request.sector * SECTOR_SIZE, views, fua=not blk.writeback)
        finally:
            for view in views:
                view.release()
        return self._commands.answer(request.incoming, struct.pack(place // SECTOR_SIZE))
