"""The zones of a zoned disk: their states and what may follow what (virtio 1.4 §5.2.6, ZBC, ZNS).

    EMPTY → implicitly open (written) or explicitly open → CLOSED → … → FULL → reset → EMPTY

Only the table of states is here, no data. All offsets are bytes. The caller holds a lock.

Where the virtio text says nothing, ZBC is followed: FINISH of an EMPTY or CLOSED zone fills it,
CLOSE of an EMPTY zone succeeds without change.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum, IntEnum

from ..errors import BackendError

__all__ = ["Zone", "ZoneError", "ZoneFault", "ZoneModel", "ZoneState", "ZoneType", "Zones"]


class ZoneModel(IntEnum):
    """What a disk asks of those who write it; numbered as virtio does (and ``zbc`` tools)."""

    NONE = 0
    HOST_MANAGED = 1
    """Sequential zones can only be written at their write pointer."""
    HOST_AWARE = 2
    """They had better be."""


class ZoneType(IntEnum):
    """Of one zone, numbered as in ZBC."""

    CONVENTIONAL = 1
    SEQUENTIAL_REQUIRED = 2
    SEQUENTIAL_PREFERRED = 3


class ZoneState(IntEnum):
    """Of one zone, numbered as in ZBC."""

    NOT_WP = 0
    """Conventional: it has no write pointer."""
    EMPTY = 1
    IMPLICIT_OPEN = 2
    EXPLICIT_OPEN = 3
    CLOSED = 4
    READ_ONLY = 13
    FULL = 14
    OFFLINE = 15


class ZoneFault(Enum):
    """Why a request to a zone cannot be."""

    INVALID = "the zone's state or type forbids it"
    UNALIGNED = "it is not at the write pointer"
    OPEN = "too many zones are open"
    ACTIVE = "too many zones are active"
    UNSUPPORTED = "the disk does not do that"


class ZoneError(BackendError):
    """A request that the rules of zones forbid; ``fault`` says why. Nothing was changed."""

    def __init__(self, fault: ZoneFault, what: str) -> None:
        super().__init__(errno.EIO, f"{what}: {fault.value}")
        self.fault = fault


_OPEN = (ZoneState.IMPLICIT_OPEN, ZoneState.EXPLICIT_OPEN)
_ACTIVE = (*_OPEN, ZoneState.CLOSED)
_WRITABLE = (ZoneState.EMPTY, *_ACTIVE)
_FAILED = (ZoneState.READ_ONLY, ZoneState.OFFLINE)


@dataclass(slots=True)
class Zone:
    """One zone."""

    index: int
    start: int
    length: int
    capacity: int
    """Bytes from its start that can be written."""
    type: ZoneType
    state: ZoneState
    written: int
    """Bytes from its start that hold data; the rest reads as zeroes."""

    @property
    def pointer(self) -> int:
        """The write pointer, an offset on the disk."""
        return self.start + (self.capacity if self.state == ZoneState.FULL else self.written)

    @property
    def sequential(self) -> bool:
        """It has a write pointer."""
        return self.type != ZoneType.CONVENTIONAL


class Zones:
    """All zones of a disk, with limits on how many may be open and active (0: no limit)."""

    def __init__(self, zones: list[Zone], *, max_open: int, max_active: int) -> None:
        self.zones = zones
        self.max_open = max_open
        self.max_active = max_active
        self._open = sum(zone.state in _OPEN for zone in zones)
        self._active = sum(zone.state in _ACTIVE for zone in zones)
        self._implicit: dict[int, Zone] = {}
        """Those open implicitly, the one that was written longest ago first."""

    def move(self, zone: Zone, state: ZoneState) -> None:
        """Give ``zone`` another state; all changes of state come through here."""
        self._open += (state in _OPEN) - (zone.state in _OPEN)
        self._active += (state in _ACTIVE) - (zone.state in _ACTIVE)
        self._implicit.pop(zone.index, None)
        if state == ZoneState.IMPLICIT_OPEN:
            self._implicit[zone.index] = zone
        zone.state = state

    def _make_room(self, zone: Zone, what: str) -> None:
        """Have the resources for ``zone`` to be open (BLK-85, BLK-90, BLK-98, BLK-115)."""
        if self.max_active and zone.state not in _ACTIVE and self._active >= self.max_active:
            raise ZoneError(ZoneFault.ACTIVE, what)
        if self.max_open and zone.state not in _OPEN and self._open >= self.max_open:
            if not self._implicit:
                raise ZoneError(ZoneFault.OPEN, what)
            self.move(next(iter(self._implicit.values())), ZoneState.CLOSED)  # BLK-98

    def _check(self, zone: Zone, allowed: tuple[ZoneState, ...], what: str) -> None:
        if not zone.sequential or zone.state not in allowed:
            raise ZoneError(ZoneFault.INVALID, what)

    # -- the guest's commands ------------------------------------------------------------------

    def open(self, zone: Zone) -> None:
        """Open ``zone`` explicitly."""
        self._check(zone, _WRITABLE, "open")
        self._make_room(zone, "open")
        self.move(zone, ZoneState.EXPLICIT_OPEN)

    def close(self, zone: Zone) -> None:
        """Close it; without data it is empty again (BLK-114)."""
        self._check(zone, _WRITABLE, "close")
        if zone.state in _OPEN:
            self.move(zone, ZoneState.CLOSED if zone.written else ZoneState.EMPTY)

    def finish(self, zone: Zone) -> None:
        """Let nothing more be written to it."""
        self._check(zone, (*_WRITABLE, ZoneState.FULL), "finish")
        self.move(zone, ZoneState.FULL)

    def reset(self, zone: Zone) -> None:
        """Empty it."""
        self._check(zone, (*_WRITABLE, ZoneState.FULL), "reset")
        self.move(zone, ZoneState.EMPTY)
        zone.written = 0

    # -- data --------------------------------------------------------------------------------

    def check_write(self, zone: Zone, offset: int, length: int, granularity: int) -> None:
        """Whether a write to a sequential zone may be, and have the zone open for it.

        Looked at in this order: a zone that failed; the zone's end; granularity; the write pointer;
        the capacity; open and active zones (BLK-90, BLK-92, BLK-96, BLK-97, BLK-99).
        """
        end = offset + length
        if zone.state in _FAILED or end > zone.start + zone.length:
            raise ZoneError(ZoneFault.INVALID, "write")
        if zone.type == ZoneType.SEQUENTIAL_REQUIRED:
            if zone.state == ZoneState.FULL:
                raise ZoneError(ZoneFault.INVALID, "write to a full zone")
            if offset % granularity or length % granularity or offset != zone.pointer:
                raise ZoneError(ZoneFault.UNALIGNED, "write")
        if end > zone.start + zone.capacity:
            raise ZoneError(ZoneFault.INVALID, "write beyond the zone's capacity")
        if zone.state == ZoneState.FULL:
            return  # host-aware: written over
        self._make_room(zone, "write")
        if zone.state != ZoneState.EXPLICIT_OPEN:
            self.move(zone, ZoneState.IMPLICIT_OPEN)

    def wrote(self, zone: Zone, end: int) -> None:
        """A write that :meth:`check_write` let pass has put data up to ``end``."""
        zone.written = max(zone.written, end - zone.start)
        if zone.written >= zone.capacity and zone.state not in _FAILED:
            self.move(zone, ZoneState.FULL)

    def fail(self, zone: Zone, state: ZoneState) -> None:
        """The medium has failed there: READ_ONLY or OFFLINE from now on."""
        if state not in _FAILED:
            raise ValueError(f"a zone fails to READ_ONLY or OFFLINE, not to {state.name}")
        if zone.state != ZoneState.OFFLINE:
            self.move(zone, state)
