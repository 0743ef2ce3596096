"""The snapshot table: its entries, decoded and packed (spec, "Snapshots")."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..backend.disk import Disk
from ..errors import ImageError
from . import layout
from .header import Header

__all__ = ["Snapshot", "TableRepair", "check_l1", "check_size", "read_snapshots"]


_INT_MAX = (1 << 31) - 1


@dataclass(slots=True)
class Snapshot:
    """An internal snapshot."""

    id: str
    name: str
    l1_table_offset: int
    """Host byte offset."""
    l1_size: int
    """Entries."""
    disk_size: int
    """Bytes: the size the disk had."""
    vm_state_size: int = 0
    """Bytes of VM state kept with it."""
    date_sec: int = 0
    """When it was taken: seconds since the epoch."""
    date_nsec: int = 0
    """Nanoseconds within that second."""
    vm_clock_nsec: int = 0
    """The guest's run time, in nanoseconds."""
    icount: int | None = None
    """The guest's instruction count, if it was counted."""
    unknown_extra_data: bytes = b""
    """Extra data past what we know; kept."""
    extra_data_size: int = layout.SNAPSHOT_EXTRA_DATA.size
    """Bytes of extra data that the entry has in the file."""

    def pack(self) -> bytes:
        """The table entry, padded to a multiple of 8 bytes."""
        identity, name = (
            self.id.encode(errors="surrogateescape"),
            self.name.encode(errors="surrogateescape"),
        )
        icount = layout.NO_ICOUNT if self.icount is None else self.icount
        extra = layout.SNAPSHOT_EXTRA_DATA.pack(self.vm_state_size, self.disk_size, icount)
        extra += self.unknown_extra_data
        small_size = self.vm_state_size if self.vm_state_size < 1 << 32 else 0
        entry = layout.SNAPSHOT_HEADER.pack(
            self.l1_table_offset,
            self.l1_size,
            len(identity),
            len(name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            small_size,
            len(extra),
        )
        entry += extra + identity + name
        return entry + bytes(-len(entry) % 8)


def check_size(count: int, length: int) -> None:
    """Raise ImageError if QEMU does not read a table of so many snapshots, or bytes."""
    if count > layout.MAX_SNAPSHOTS:
        raise ImageError(
            "Too many snapshots",
            field="nb_snapshots",
            value=count,
            limit=layout.MAX_SNAPSHOTS,
        )
    if length > layout.MAX_SNAPSHOT_TABLE_SIZE:
        raise ImageError(
            "Snapshot table is too big",
            field="snapshot table",
            value=length,
            limit=layout.MAX_SNAPSHOT_TABLE_SIZE,
        )


@dataclass(slots=True)
class TableRepair:
    """What was done to a table that a reader without mercy refuses."""

    extra_data_dropped: int = 0
    """Entries that have lost extra data."""
    messages: list[str] = field(default_factory=list)
    """What is lost, in QEMU's words."""


def read_snapshots(
    file: Disk, header: Header, count: int | None = None, repair: TableRepair | None = None
) -> tuple[list[Snapshot], int]:
    """The snapshots of an image, and the length of their table in bytes.

    ``count``: only so many of them. With ``repair`` entries with too much extra data lose what is
    too much, and a table that is too long ends with the last entry inside the limit.
    """
    if count is None:
        count = header.nb_snapshots
    reader = _TableReader(file, header.snapshots_offset)
    snapshots: list[Snapshot] = []
    kept = 0
    for number in range(count):
        start = reader.position
        snapshot, length = _read_entry(reader, header, number, repair)
        kept += -kept % 8 + length
        if kept > layout.MAX_SNAPSHOT_TABLE_SIZE or reader.position > _INT_MAX:
            left = count - number
            if repair is None:
                raise ImageError(
                    f"Snapshot table is too big\nYou can force-remove all {left} overhanging "
                    "snapshots with qemu-img check -r all",
                    field="snapshot table",
                    value=kept,
                    limit=layout.MAX_SNAPSHOT_TABLE_SIZE,
                )
            repair.messages.append(
                f"Discarding {left} overhanging snapshots (snapshot table is too big)"
            )
            return snapshots, start
        snapshots.append(snapshot)
    return snapshots, reader.position


def _read_entry(
    reader: _TableReader, header: Header, number: int, repair: TableRepair | None
) -> tuple[Snapshot, int]:
    """An entry, and its length in bytes (without the extra data that it has lost)."""
    reader.align()
    (
        l1_table_offset,
        l1_size,
        id_length,
        name_length,
        date_sec,
        date_nsec,
        vm_clock_nsec,
        vm_state_size,
        extra_size,
    ) = layout.SNAPSHOT_HEADER.unpack(reader.take(layout.SNAPSHOT_HEADER.size))
    if extra_size > layout.MAX_SNAPSHOT_EXTRA_DATA and repair is None:
        raise ImageError(
            f"Too much extra metadata in snapshot table entry {number}\n"
            "You can force-remove this extra metadata with qemu-img check -r all",
            field="extra_data_size",
            value=extra_size,
            limit=layout.MAX_SNAPSHOT_EXTRA_DATA,
        )
    extra = reader.take(min(extra_size, layout.MAX_SNAPSHOT_EXTRA_DATA))
    if repair is not None and extra_size > len(extra):
        repair.messages.append(
            f"Discarding too much extra metadata in snapshot table entry {number} "
            f"({extra_size} > {layout.MAX_SNAPSHOT_EXTRA_DATA})"
        )
        repair.extra_data_dropped += 1
        reader.position += extra_size - len(extra)
    known = layout.SNAPSHOT_EXTRA_DATA
    large, disk_size, icount = known.unpack(extra[: known.size].ljust(known.size, b"\0"))
    snapshot = Snapshot(
        id=_text(reader.take(id_length)),
        name=_text(reader.take(name_length)),
        l1_table_offset=l1_table_offset,
        l1_size=l1_size,
        disk_size=disk_size if extra_size >= 16 else header.size,
        vm_state_size=large if extra_size >= 8 else vm_state_size,
        date_sec=date_sec,
        date_nsec=date_nsec,
        vm_clock_nsec=vm_clock_nsec,
        icount=icount if extra_size >= 24 and icount != layout.NO_ICOUNT else None,
        unknown_extra_data=extra[known.size :],
        extra_data_size=extra_size,
    )
    return snapshot, layout.SNAPSHOT_HEADER.size + len(extra) + id_length + name_length


def _text(data: bytes) -> str:
    """A text as QEMU sees it, which keeps it as one of C's: a NUL ends it."""
    return data.split(b"\0")[0].decode(errors="surrogateescape")


def check_l1(header: Header, snapshot: Snapshot) -> None:
    """Raise ImageError unless the place and size of a snapshot's L1 table make sense."""
    if 8 * snapshot.l1_size > layout.MAX_L1_SIZE:
        raise ImageError(
            "Snapshot L1 table too large",
            field="snapshot l1_size",
            value=snapshot.l1_size,
            limit=layout.MAX_L1_SIZE // 8,
        )
    end = snapshot.l1_table_offset + 8 * snapshot.l1_size
    if end > layout.INT64_MAX or snapshot.l1_table_offset % (1 << header.cluster_bits):
        raise ImageError(
            "Snapshot L1 table offset invalid",
            field="snapshot l1_table_offset",
            value=snapshot.l1_table_offset,
        )


class _TableReader:
    """Reads the table from its start on, in pieces."""

    _CHUNK = 1 << 16

    def __init__(self, file: Disk, offset: int) -> None:
        self._file = file
        self._offset = offset
        self._data = b""
        self._start = 0
        self.position = 0
        """Bytes taken so far."""

    def align(self) -> None:
        """Go on at the next multiple of 8."""
        self.position += -self.position % 8

    def take(self, length: int) -> bytes:
        """The next bytes."""
        at = self.position - self._start
        if at < 0 or at + length > len(self._data):
            self._start = self.position
            self._data = self._read(self.position, max(length, self._CHUNK))
            at = 0
        self.position += length
        return self._data[at : at + length]

    def _read(self, position: int, length: int) -> bytes:
        start = self._offset + position
        there = min(max(self._file.size - start, 0), length)
        return self._file.read(start, there).ljust(length, b"\0") if there else bytes(length)
