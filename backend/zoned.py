"""A zoned disk on any other: sequential zones that are written at their write pointer only.

The data lies where it would without zones. The states of the zones (states and write pointers)
are kept in a second disk, ``store``: a small file beside the image, for example ::

    data = open_disk("disk.qcow2")
    store = FileDisk("disk.zones", growable=True)     # or MemoryDisk(growable=True): forgotten
    disk = ZonedDisk(data, zone_size=256 << 20, conventional=4, store=store)

A store that is empty is begun: all sequential zones are empty, and read as zeroes. It is 64 bytes
of header, then 16 bytes per zone (little-endian: written bytes u64, state u8, 7 zero bytes).
It is written at each flush, after the data is stable, and at once where a zone is reset or filled.
After a power failure a write pointer is therefore where the last flush (or a later moment) had it,
and zones that were open are closed, as on a real drive. What lies beyond a zone's data reads as
zeroes, whatever the disk below has there.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping
from typing import Final

from ..errors import ImageError, UnsupportedError
from .buffers import clear
from .disk import Disk, Extent
from .memory import MemoryDisk
from .zones import (
    Zone,
    ZoneError,
    ZoneFault,
    ZoneModel,
    Zones,
    ZoneState,
    ZoneType,
)

__all__ = ["ZonedDisk"]

_MAGIC: Final = b"pvzones1"
_HEADER: Final = struct.Struct("<8sIIQQQQ16x")
"""magic, model, conventional zones, zone size, zone capacity, size of the disk, number of zones."""
_ENTRY: Final = struct.Struct("<QB7x")
_MAX_ZONES: Final = 1 << 24
_SECTOR: Final = 512


class ZonedDisk(Disk):
    """``disk`` with zones of ``zone_size`` bytes, of which ``zone_capacity`` can be written.

    The first ``conventional`` zones are written anywhere. ``max_open`` and ``max_active`` limit
    zones in those states, 0 is no limit; zones open implicitly are closed to make room for others.
    ``max_append`` is the largest append in bytes (None: the capacity of a zone; 0: none).
    ``write_granularity`` is the unit of writes to sequential zones, in bytes. The last zone may be
    smaller. Both disks are closed with this one.

    Raises ValueError for zones that cannot be, ImageError for a store of other ones.
    """

    format_name = "zoned"

    def __init__(
        self,
        disk: Disk,
        *,
        zone_size: int,
        zone_capacity: int | None = None,
        conventional: int = 0,
        max_open: int = 0,
        max_active: int = 0,
        max_append: int | None = None,
        write_granularity: int = _SECTOR,
        model: ZoneModel = ZoneModel.HOST_MANAGED,
        store: Disk | None = None,
    ) -> None:
        capacity = zone_size if zone_capacity is None else zone_capacity
        size = disk.size // _SECTOR * _SECTOR
        append = capacity if max_append is None else max_append
        granularity = write_granularity
        _check(size, zone_size, capacity, granularity, append)
        if model == ZoneModel.NONE:
            raise ValueError("a zoned disk is HOST_MANAGED or HOST_AWARE")
        if not 0 <= max_open <= (max_active or max_open) or conventional < 0:
            raise ValueError("max_open may not be above max_active, and no number negative")
        super().__init__(size, read_only=disk.read_only, limits=disk.limits)
        self.model = model
        self.zone_size = zone_size
        self.max_append = append
        self.write_granularity = write_granularity
        self._disk = disk
        self._store = MemoryDisk(growable=True) if store is None else store
        self._header = _HEADER.pack(
            _MAGIC, model, conventional, zone_size, capacity, size, -(-size // zone_size)
        )
        sequential = (
            ZoneType.SEQUENTIAL_REQUIRED
            if model == ZoneModel.HOST_MANAGED
            else ZoneType.SEQUENTIAL_PREFERRED
        )
        zones = []
        for index, start in enumerate(range(0, size, zone_size)):
            length = min(zone_size, size - start)
            kind = ZoneType.CONVENTIONAL if index < conventional else sequential
            state = ZoneState.NOT_WP if index < conventional else ZoneState.EMPTY
            whole = kind == ZoneType.CONVENTIONAL
            zones.append(
                Zone(
                    index, start, length, length if whole else min(capacity, length), kind, state, 0
                )
            )
        self._begun = self._has_begun(len(zones))
        self._load(zones)
        self._zones = Zones(zones, max_open=max_open, max_active=max_active)
        self._lock = threading.Lock()
        """Over the table of zones."""
        self._writers = [threading.Lock() for _ in range(min(len(zones), 64))]
        """Writes to one zone are done one after the other; the table is not locked meanwhile."""
        self._store_lock = threading.Lock()
        """Over the store; taken before the lock of the table."""
        self._changed: set[int] = set() if self._begun else set(range(len(zones)))
        if self._changed and not self.read_only:
            self._flush()

    # -- zones -------------------------------------------------------------------------------

    @property
    def zones(self) -> list[Zone]:
        """All of them; to be looked at only."""
        return self._zones.zones

    @property
    def max_open(self) -> int:
        """Zones that may be open at a time, 0 is no limit."""
        return self._zones.max_open

    @property
    def max_active(self) -> int:
        """Zones that may be open or closed at a time, 0 is no limit."""
        return self._zones.max_active

    @property
    def below(self) -> Disk:
        """The disk with the data, zones or not."""
        return self._disk

    def zone_at(self, offset: int) -> Zone:
        """The zone that byte ``offset`` is in."""
        if not 0 <= offset < self.size:
            raise ValueError(f"zoned: no zone at {offset} of {self.size} bytes")
        return self.zones[offset // self.zone_size]

    def open_zone(self, zone: Zone) -> None:
        """Open explicitly. Raises ZoneError, as the next ones, where the zone's state forbids it;
        all of them ValueError on a disk that is closed or read-only."""
        self._check_writable()
        with self._writer(zone), self._lock:
            self._zones.open(zone)
            self._changed.add(zone.index)

    def close_zone(self, zone: Zone) -> None:
        """Close."""
        self._check_writable()
        with self._writer(zone), self._lock:
            self._zones.close(zone)
            self._changed.add(zone.index)

    def finish_zone(self, zone: Zone) -> None:
        """Let nothing more be written."""
        self._check_writable()
        with self._writer(zone):
            with self._lock:
                self._zones.finish(zone)
                self._changed.add(zone.index)
            self._flush()

    def reset_zone(self, zone: Zone) -> None:
        """Empty: its data is gone, and its space may be given back."""
        self._check_writable()
        with self._writer(zone):
            with self._lock:
                self._zones.reset(zone)
                self._changed.add(zone.index)
            # Stable before anything is written there: or old data would come back with new.
            self._flush()
            self._disk.discard(zone.start, zone.length)

    def reset_all(self) -> None:
        """Empty every sequential zone that can be (BLK-89)."""
        for zone in self.zones:
            if zone.sequential and zone.state not in (
                ZoneState.EMPTY,
                ZoneState.READ_ONLY,
                ZoneState.OFFLINE,
            ):
                self.reset_zone(zone)

    def append(self, offset: int, views: list[memoryview], *, fua: bool = False) -> int:
        """Write to the write pointer of the zone that starts at ``offset``; gives where that was.

        Raises ZoneError (BLK-83, BLK-91, BLK-92, BLK-94, BLK-95).
        """
        self._check_writable()
        length = sum(len(view) for view in views)
        if length and not self.max_append:
            raise ZoneError(ZoneFault.UNSUPPORTED, "append")
        zone = self.zone_at(offset)
        if (
            zone.type != ZoneType.SEQUENTIAL_REQUIRED
            or offset != zone.start
            or length > self.max_append
        ):
            raise ZoneError(ZoneFault.INVALID, "append")
        with self._writer(zone):
            place = zone.pointer
            if length:
                self._write_in(zone, place, views, length)
        if fua:
            self.flush()
        return place

    def fail_zone(self, zone: Zone, state: ZoneState) -> None:
        """Have the medium fail there: READ_ONLY or OFFLINE from now on."""
        with self._writer(zone):
            with self._lock:
                self._zones.fail(zone, state)
                self._changed.add(zone.index)
            self._flush()

    def _writer(self, zone: Zone) -> threading.Lock:
        return self._writers[zone.index % len(self._writers)]

    def _check_writable(self) -> None:
        if self.closed or self.read_only:
            self._refuse(0, 0, writing=True)

    # -- Disk --------------------------------------------------------------------------------

    def check_request(self, offset: int, length: int, *, writing: bool) -> None:
        """Raise the ZoneError of a request of so many bytes: for who does it in pieces."""
        if not writing:
            self._check_read(offset, length)
            return
        zone = self.zones[offset // self.zone_size]
        last = self.zones[(offset + length - 1) // self.zone_size]
        if not zone.sequential and not last.sequential:
            self._check_conventional(zone, last)
        else:
            with self._lock:
                self._zones.check_write(zone, offset, length, self.write_granularity)

    def _check_read(self, offset: int, length: int) -> list[Zone]:
        """The zones that a read touches, if it may."""
        last = (offset + length - 1) // self.zone_size
        touched = self.zones[offset // self.zone_size : last + 1]
        if any(zone.state == ZoneState.OFFLINE for zone in touched) or (
            len(touched) > 1 and any(zone.type == ZoneType.SEQUENTIAL_REQUIRED for zone in touched)
        ):
            raise ZoneError(ZoneFault.INVALID, "read")  # BLK-96, BLK-100
        return touched

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        touched = self._check_read(offset, length)
        if all(not zone.sequential for zone in touched):
            self._disk.readv(offset, views)
            return
        for view in views:
            done = 0
            while done < len(view):
                zone = self.zones[offset // self.zone_size]
                count = min(len(view) - done, zone.start + zone.length - offset)
                data = count
                if zone.sequential:
                    data = max(0, min(count, zone.start + zone.written - offset))
                with view[done : done + data] as part:
                    if data:
                        self._disk.readv(offset, [part])
                with view[done + data : done + count] as part:
                    clear([part])
                done += count
                offset += count

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        zone = self.zones[offset // self.zone_size]
        last = self.zones[(offset + length - 1) // self.zone_size]
        if not zone.sequential and not last.sequential:
            self._check_conventional(zone, last)
            self._disk.writev(offset, views)
            return
        with self._writer(zone):
            self._write_in(zone, offset, views, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        zone = self.zones[offset // self.zone_size]
        last = self.zones[(offset + length - 1) // self.zone_size]
        if zone.sequential or last.sequential:
            raise UnsupportedError("zoned: zeroes are written", feature="zeroes")
        self._check_conventional(zone, last)
        self._disk.write_zeroes(offset, length, unmap=unmap)

    def _check_conventional(self, zone: Zone, last: Zone) -> None:
        for each in self.zones[zone.index : last.index + 1]:
            if each.state != ZoneState.NOT_WP:
                raise ZoneError(ZoneFault.INVALID, "write")

    def _write_in(self, zone: Zone, offset: int, views: list[memoryview], length: int) -> None:
        """Write to one zone, whose lock is held."""
        with self._lock:
            self._zones.check_write(zone, offset, length, self.write_granularity)
            gap = zone.start + zone.written
        if gap < offset:  # host-aware
            self._disk.write_zeroes(gap, offset - gap)
        self._disk.writev(offset, views)
        with self._lock:
            self._zones.wrote(zone, offset + length)
            self._changed.add(zone.index)

    def _discard(self, offset: int, length: int) -> None:
        zone = self.zones[offset // self.zone_size]
        last = self.zones[(offset + length - 1) // self.zone_size]
        if not zone.sequential and not last.sequential:
            self._disk.discard(offset, length)

    def _block_status(self, offset: int, length: int) -> Extent:
        zone = self.zone_at(offset)
        count = min(length, zone.start + zone.length - offset)
        if zone.sequential:
            data = zone.start + zone.written - offset
            if data <= 0:
                return Extent(count, data=False, zero=True, allocated=True)
            count = min(count, data)
        return self._disk.block_status(offset, count)

    def _flush(self) -> None:
        with self._store_lock:
            with self._lock:
                changed, self._changed = self._changed, set()
                entries = [(index, self._entry(index)) for index in sorted(changed)]
            try:
                self._disk.flush()  # data before the pointers to its end
                if entries:
                    self._put(entries)
                    self._store.flush()
            except BaseException:
                with self._lock:
                    self._changed |= changed
                raise

    def _close(self) -> None:
        try:
            self._disk.close()
        finally:
            self._store.close()

    @property
    def children(self) -> Mapping[str, Disk]:
        """``file`` is the data, ``zones`` the store."""
        return {"file": self._disk, "zones": self._store}

    # -- the store ---------------------------------------------------------------------------

    def _entry(self, index: int) -> bytes:
        zone = self.zones[index]
        return _ENTRY.pack(zone.written, zone.state)

    def _put(self, entries: list[tuple[int, bytes]]) -> None:
        if not self._begun:  # the header last: a store that is begun has all its zones
            self._store.write(_HEADER.size, b"".join(entry for _, entry in entries))
            self._store.flush()
            self._store.write(0, self._header)
            self._begun = True
            return
        for index, entry in entries:
            self._store.write(_HEADER.size + _ENTRY.size * index, entry)

    def _has_begun(self, zones: int) -> bool:
        """False for a store that is empty, or was begun and has no header yet, nor any data."""
        if any(self._store.read(0, min(self._store.size, _HEADER.size))):
            return True
        count = min(max(0, self._store.size - _HEADER.size) // _ENTRY.size, zones)
        entries = self._store.read(_HEADER.size, count * _ENTRY.size) if count else b""
        return any(written for written, _ in _ENTRY.iter_unpack(entries))

    def _load(self, zones: list[Zone]) -> None:
        """Take the states over from the store; open zones are closed ones."""
        if not self._begun:
            return
        length = _HEADER.size + _ENTRY.size * len(zones)
        if self._store.size < length or self._store.read(0, _HEADER.size) != self._header:
            raise ImageError("The zone store belongs to other zones", field="zones")
        data = self._store.read(_HEADER.size, length - _HEADER.size)
        for zone, (written, number) in zip(zones, _ENTRY.iter_unpack(data), strict=True):
            try:
                state = ZoneState(number)
            except ValueError:
                raise _damaged(zone.index, number) from None
            if state in (ZoneState.IMPLICIT_OPEN, ZoneState.EXPLICIT_OPEN, ZoneState.CLOSED):
                state = ZoneState.CLOSED if written else ZoneState.EMPTY
            failed = state in (ZoneState.READ_ONLY, ZoneState.OFFLINE)
            if (
                written > zone.capacity
                or (state == ZoneState.EMPTY and written)
                or not (failed or (state == ZoneState.NOT_WP) != zone.sequential)
            ):
                raise _damaged(zone.index, number)
            zone.state, zone.written = state, written


def _damaged(index: int, number: int) -> ImageError:
    return ImageError(
        f"The zone store has a zone {index} that cannot be", field=f"zone {index}", value=number
    )


def _check(size: int, zone_size: int, capacity: int, granularity: int, append: int) -> None:
    """Raise ValueError for zones that cannot be."""
    for name, value in (("zone_size", zone_size), ("zone_capacity", capacity)):
        if value <= 0 or value % granularity or value % _SECTOR:
            raise ValueError(f"{name} is {value}, must be a multiple of the write granularity")
    if granularity < _SECTOR or granularity & (granularity - 1):
        raise ValueError(f"write_granularity is {granularity}, must be a power of two from 512 on")
    if capacity > zone_size or not 0 <= append <= capacity:
        raise ValueError("a zone's capacity may not be above its size, an append not above that")
    if not size or -(-size // zone_size) > _MAX_ZONES:
        raise ValueError(f"{size} bytes in zones of {zone_size} are no zoned disk")
