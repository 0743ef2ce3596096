"""The bitmaps extension and the bitmap directory, decoded and packed (spec, "Bitmaps")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from . import layout
from .geometry import Geometry
from .layout import BitmapFlags

__all__ = [
    "BitmapsExtension",
    "DirectoryEntry",
    "check_extension_length",
    "encode_name",
    "pack_directory",
    "read_directory",
    "table_size",
]


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """The header extension that names the bitmap directory."""

    count: int
    """Bitmaps in the directory."""
    directory_size: int
    """Bytes."""
    directory_offset: int

    def pack(self) -> bytes:
        """The extension's data."""
        return layout.BITMAPS_EXTENSION.pack(
            self.count, 0, self.directory_size, self.directory_offset
        )

    @classmethod
    def unpack(cls, data: bytes, cluster_size: int) -> BitmapsExtension:
        """Decode and check it. Raises ImageError with QEMU's messages."""
        check_extension_length(data)
        count, reserved, size, offset = layout.BITMAPS_EXTENSION.unpack(data)
        if reserved:
            raise _refusal("bitmaps_ext: Reserved field is not zero", "bitmaps reserved", reserved)
        if count > layout.MAX_BITMAPS:
            raise _refusal(
                f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of "
                f"{layout.MAX_BITMAPS}",
                "nb_bitmaps",
                count,
                layout.MAX_BITMAPS,
            )
        if not count:
            raise _refusal("found bitmaps extension with zero bitmaps", "nb_bitmaps", 0)
        if offset % cluster_size or offset > layout.INT64_MAX - layout.MAX_BITMAP_DIRECTORY_SIZE:
            raise _refusal(
                "bitmaps_ext: invalid bitmap directory offset", "bitmap_directory_offset", offset
            )
        if size > layout.MAX_BITMAP_DIRECTORY_SIZE:
            raise _refusal(
                f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size "
                f"({layout.MAX_BITMAP_DIRECTORY_SIZE})",
                "bitmap_directory_size",
                size,
                layout.MAX_BITMAP_DIRECTORY_SIZE,
            )
        return cls(count, size, offset)


def check_extension_length(data: bytes) -> None:
    """Raise ImageError if this cannot be a bitmaps extension."""
    if len(data) != layout.BITMAPS_EXTENSION.size:
        raise _refusal(
            "bitmaps_ext: Invalid extension length",
            "bitmaps extension length",
            len(data),
            layout.BITMAPS_EXTENSION.size,
        )


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One bitmap of the directory."""

    name: str
    table_offset: int
    """Host byte offset of the bitmap table."""
    table_size: int
    """Entries."""
    flags: BitmapFlags
    granularity_bits: int

    def pack(self) -> bytes:
        """The entry, padded to a multiple of 8 bytes."""
        name = encode_name(self.name)
        entry = layout.BITMAP_ENTRY.pack(
            self.table_offset,
            self.table_size,
            self.flags,
            layout.DIRTY_TRACKING,
            self.granularity_bits,
            len(name),
            0,
        )
        entry += name
        return entry + bytes(-len(entry) % 8)


def encode_name(name: str) -> bytes:
    """A bitmap's name as it stands in the file."""
    return name.encode(errors="surrogateescape")


def pack_directory(entries: Sequence[DirectoryEntry]) -> bytes:
    """The whole directory. Raises ValueError where it exceeds QEMU's limits."""
    if len(entries) > layout.MAX_BITMAPS:
        raise ValueError("Maximum number of persistent bitmaps is already reached")
    directory = b"".join(entry.pack() for entry in entries)
    if len(directory) > layout.MAX_BITMAP_DIRECTORY_SIZE:
        raise ValueError("Not enough space in the bitmap directory")
    return directory


def table_size(geometry: Geometry, disk_size: int, granularity_bits: int) -> int:
    """Entries of the table of a bitmap for ``disk_size`` bytes."""
    return geometry.clusters(-(-disk_size >> (granularity_bits + 3)))


def read_directory(
    file: Disk, extension: BitmapsExtension, geometry: Geometry, disk_size: int
) -> list[DirectoryEntry]:
    """The bitmaps of the directory. Raises ImageError with QEMU's messages."""
    size = extension.directory_size
    if not size:
        raise _refusal("Requested bitmap directory size is zero", "bitmap_directory_size", 0)
    longest = layout.BITMAP_ENTRY.size + layout.MAX_BITMAP_NAME
    longest += -longest % 8
    try:
        # More would hold more bitmaps than there are to be, and is not looked at.
        directory = file.read(extension.directory_offset, min(size, longest * extension.count + 8))
    except BackendError as error:
        raise BackendError.wrap(error, "Failed to read bitmap directory", file.filename) from error
    entries: list[DirectoryEntry] = []
    at = 0
    while at < size:
        if at + layout.BITMAP_ENTRY.size > size:
            raise _refusal("Broken bitmap directory", "bitmap_directory_size", size)
        if len(entries) == extension.count:
            raise _refusal(
                "More bitmaps found than specified in header extension",
                "nb_bitmaps",
                extension.count,
            )
        entry, at = _read_entry(directory, at, size, geometry, disk_size)
        entries.append(entry)
    if len(entries) != extension.count:
        raise _refusal(
            "Less bitmaps found than specified in header extension", "nb_bitmaps", extension.count
        )
    return entries


def _read_entry(
    directory: bytes, at: int, size: int, geometry: Geometry, disk_size: int
) -> tuple[DirectoryEntry, int]:
    """The entry at byte ``at``, and where the next one is."""
    try:
        table_offset, entries, flags, kind, granularity_bits, name_length, extra = (
            layout.BITMAP_ENTRY.unpack_from(directory, at)
        )
    except struct.error:
        raise _refusal("Broken bitmap directory", "bitmap_directory_size", size) from None
    length = layout.BITMAP_ENTRY.size + name_length + extra
    length += -length % 8
    if at + length > size:
        raise _refusal("Broken bitmap directory", "bitmap_directory_size", size)
    if extra:
        raise _refusal("Bitmap extra data is not supported", "extra_data_size", extra, 0)
    start = at + layout.BITMAP_ENTRY.size
    text = directory[start : start + name_length].decode(errors="surrogateescape")
    stored = entries << geometry.cluster_bits
    valid = (
        0 < entries <= layout.MAX_BITMAP_TABLE_SIZE
        and table_offset
        and not table_offset % geometry.cluster_size
        and table_offset <= layout.INT64_MAX - 8 * entries
        and layout.MIN_GRANULARITY_BITS <= granularity_bits <= layout.MAX_GRANULARITY_BITS
        and not flags & layout.BITMAP_FLAGS_RESERVED
        and name_length <= layout.MAX_BITMAP_NAME
        and kind == layout.DIRTY_TRACKING
        and stored <= layout.MAX_BITMAP_SIZE
        and (flags & BitmapFlags.IN_USE or disk_size <= (8 * stored) << granularity_bits)
    )
    if not valid:
        raise _refusal(f"Bitmap '{text}' doesn't satisfy the constraints", "bitmap", text)
    entry = DirectoryEntry(text, table_offset, entries, BitmapFlags(flags), granularity_bits)
    return entry, at + length


def _refusal(message: str, field: str, value: object, limit: object = None) -> ImageError:
    return ImageError(message, field=field, value=value, limit=limit)
