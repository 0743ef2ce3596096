"""The header cluster: fixed fields, header extensions, and the backing file's name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..backend.disk import Disk
from ..errors import BackendError, ImageError, UnsupportedError
from . import layout
from .bitmap_directory import BitmapsExtension, check_extension_length
from .geometry import Geometry
from .layout import Autoclear, CompressionType, CryptMethod, ExtensionType, Incompatible

__all__ = ["Header", "packed_extensions", "probe", "read_header"]


@dataclass(slots=True)
class Header:
    """Everything in the header cluster, decoded. Offsets and sizes are bytes."""

    version: int
    cluster_bits: int
    size: int
    crypt_method: CryptMethod = CryptMethod.NONE
    l1_size: int = 0
    """Entries."""
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = layout.HEADER_LENGTH
    compression_type: CompressionType = CompressionType.DEFLATE
    unknown_fields: bytes = b""
    """Header bytes past those that we know; kept when the header is rewritten."""
    backing_file: str | None = None
    backing_format: str | None = None
    bitmaps: BitmapsExtension | None = None
    """Where the bitmap directory is, if what it says is to be believed."""
    stale_bitmaps: bool = False
    """There is a bitmaps extension that somebody who knows no bitmaps left out of date."""
    data_file: str | None = None
    """The name of the external data file, as it stands in the image."""
    crypto_header: tuple[int, int] | None = None
    """Offset and length of the area with the LUKS header."""
    unknown_extensions: list[tuple[int, bytes]] = field(default_factory=list)
    """(type, data) of header extensions that we do not know; kept when rewritten."""

    @property
    def geometry(self) -> Geometry:
        """The sizes that follow from these fields."""
        extended = bool(self.incompatible_features & Incompatible.EXTENDED_L2)
        return Geometry(self.version, self.cluster_bits, self.refcount_order, extended)

    def pack(self) -> bytes:
        """The header cluster's contents, up to the end of the backing file's name.

        Raises ImageError if they do not fit one cluster. The feature name table, which only
        serves messages, is left out where it is what does not fit.
        """
        for names in (True, False):
            data = self._pack(names and self.version >= 3)
            if len(data) <= 1 << self.cluster_bits:
                return data
        raise ImageError(
            "The header with its extensions and the backing file name does not fit one cluster",
            field="header",
            value=len(data),
            limit=1 << self.cluster_bits,
        )

    def _pack(self, feature_names: bool) -> bytes:
        extensions = bytearray()
        if self.backing_format:
            extensions += _extension(ExtensionType.BACKING_FORMAT, self.backing_format.encode())
        if self.data_file is not None:
            extensions += _extension(ExtensionType.DATA_FILE, os.fsencode(self.data_file))
        if self.crypto_header is not None:
            area = layout.ENCRYPTION_HEADER.pack(*self.crypto_header)
            extensions += _extension(ExtensionType.ENCRYPTION, area)
        if feature_names:
            table = b"".join(
                layout.FEATURE_NAME.pack(kind, bit, name.encode())
                for kind, bit, name in layout.FEATURE_NAMES
            )
            extensions += _extension(ExtensionType.FEATURE_NAMES, table)
        if self.bitmaps is not None:
            extensions += _extension(ExtensionType.BITMAPS, self.bitmaps.pack())
        for kind, data in self.unknown_extensions:
            extensions += _extension(kind, data)
        extensions += _extension(ExtensionType.END, b"")
        name = b"" if self.backing_file is None else os.fsencode(self.backing_file)
        fields = self._pack_fields(name, len(extensions))
        return fields + bytes(extensions) + name

    def _pack_fields(self, name: bytes, extensions_length: int) -> bytes:
        length = layout.HEADER_V2_LENGTH
        if self.version >= 3:
            length = layout.HEADER_LENGTH + len(self.unknown_fields)
        fields = layout.HEADER_V2.pack(
            layout.MAGIC,
            self.version,
            length + extensions_length if name else 0,
            len(name),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version >= 3:
            fields += layout.HEADER_V3.pack(
                self.incompatible_features,
                self.compatible_features,
                self.autoclear_features,
                self.refcount_order,
                length,
            )
            fields += bytes([self.compression_type]) + bytes(7) + self.unknown_fields
        return fields


def _extension(kind: int, data: bytes) -> bytes:
    return layout.EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)


def probe(start: bytes) -> int:
    """100 if a file that starts with these bytes is a qcow2 image of version 2 or later."""
    if len(start) < 8:
        return 0
    magic = int.from_bytes(start[:4])
    return 100 if magic == layout.MAGIC and int.from_bytes(start[4:8]) >= 2 else 0


def read_header(file: Disk, *, for_check: bool = False) -> Header:
    """The header of the image in ``file``, with every check that concerns it alone.

    ``for_check`` lets pass what a check can still look at (no refcount table, too many snapshots).
    Raises ImageError naming the field, or UnsupportedError naming the feature.
    """
    data = _read(file, layout.HEADER_V2_LENGTH, "Could not read qcow2 header")
    (
        magic,
        version,
        backing_file_offset,
        backing_file_size,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_table_offset,
        refcount_table_offset,
        refcount_table_clusters,
        nb_snapshots,
        snapshots_offset,
    ) = layout.HEADER_V2.unpack(data)
    if magic != layout.MAGIC:
        raise ImageError("Image is not in qcow2 format", field="magic", value=magic)
    if version not in (2, 3):
        raise UnsupportedError(f"Unsupported qcow2 version {version}", feature="version")
    if not layout.MIN_CLUSTER_BITS <= cluster_bits <= layout.MAX_CLUSTER_BITS:
        raise ImageError(
            f"Unsupported cluster size: 2^{cluster_bits}",
            field="cluster_bits",
            value=cluster_bits,
            limit=layout.MAX_CLUSTER_BITS,
        )
    cluster = _read(file, 1 << cluster_bits, "Could not read qcow2 header")
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=l1_size,
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        nb_snapshots=nb_snapshots,
        snapshots_offset=snapshots_offset,
        header_length=layout.HEADER_V2_LENGTH,
    )
    if version >= 3:
        _read_v3_fields(header, cluster)
    if backing_file_offset > len(cluster):
        raise ImageError(
            "Invalid backing file offset",
            field="backing_file_offset",
            value=backing_file_offset,
            limit=len(cluster),
        )
    extensions_end = backing_file_offset or len(cluster)
    _refuse_unknown_features(header, cluster, extensions_end)
    _check_compression_type(header)
    _check_subclusters(header)
    _check_encryption(header, crypt_method)
    _check_tables(header, for_check)
    for kind, contents in _extensions(cluster, header.header_length, extensions_end):
        _take_extension(header, kind, contents)
    if backing_file_offset:
        header.backing_file = _backing_file(cluster, backing_file_offset, backing_file_size)
    return header


def _read(file: Disk, length: int, message: str) -> bytes:
    """The first ``length`` bytes; zeroes past the end of the file, as in a sparse one."""
    try:
        data = file.read(0, min(length, file.size))
    except BackendError as error:
        raise BackendError.wrap(error, message, file.filename) from error
    return data.ljust(length, b"\0")


def _read_v3_fields(header: Header, cluster: bytes) -> None:
    (
        header.incompatible_features,
        header.compatible_features,
        header.autoclear_features,
        header.refcount_order,
        header.header_length,
    ) = layout.HEADER_V3.unpack_from(cluster, layout.HEADER_V2_LENGTH)
    if header.header_length < layout.HEADER_V3_LENGTH:
        raise ImageError(
            "qcow2 header too short",
            field="header_length",
            value=header.header_length,
            limit=layout.HEADER_V3_LENGTH,
        )
    if header.header_length > len(cluster):
        raise ImageError(
            "qcow2 header exceeds cluster size",
            field="header_length",
            value=header.header_length,
            limit=len(cluster),
        )
    if header.refcount_order > layout.MAX_REFCOUNT_ORDER:
        raise ImageError(
            "Reference count entry width too large; may not exceed 64 bits",
            field="refcount_order",
            value=header.refcount_order,
            limit=layout.MAX_REFCOUNT_ORDER,
        )
    if header.header_length > layout.COMPRESSION_TYPE_OFFSET:
        number = cluster[layout.COMPRESSION_TYPE_OFFSET]
        try:
            header.compression_type = CompressionType(number)
        except ValueError:
            raise ImageError(
                f"qcow2: unknown compression type: {number}",
                field="compression_type",
                value=number,
                limit=max(CompressionType),
            ) from None
    header.unknown_fields = cluster[layout.HEADER_LENGTH : header.header_length]


def _refuse_unknown_features(header: Header, cluster: bytes, extensions_end: int) -> None:
    # In plain integers: the complement of an IntFlag has none of the bits it does not define.
    known = sum(int(bit) for bit in Incompatible)
    unknown = header.incompatible_features & ~known
    if not unknown:
        return
    names = {}
    for kind, contents in _extensions(cluster, header.header_length, extensions_end):
        if kind == ExtensionType.FEATURE_NAMES:
            names = _incompatible_names(contents)
    known_names = [names[bit] for bit in range(64) if unknown >> bit & 1 and bit in names]
    nameless = sum(1 << bit for bit in range(64) if unknown >> bit & 1 and bit not in names)
    if nameless:
        known_names.append(f"Unknown incompatible feature: {nameless:x}")
    text = ", ".join(known_names)
    raise UnsupportedError(f"Unsupported qcow2 feature(s): {text}", feature=text)


def _incompatible_names(table: bytes) -> dict[int, str]:
    # As QEMU does: the last entry may be cut short, and one without a name ends the table.
    padded = table + bytes(-len(table) % layout.FEATURE_NAME.size)
    names: dict[int, str] = {}
    for kind, bit, name in layout.FEATURE_NAME.iter_unpack(padded):
        text = name.split(b"\0")[0].decode(errors="replace")
        if not text:
            break
        if kind == 0:
            names.setdefault(bit, text)
    return names


def _check_compression_type(header: Header) -> None:
    flagged = bool(header.incompatible_features & Incompatible.COMPRESSION)
    number = header.compression_type
    if number != CompressionType.DEFLATE and not flagged:
        raise ImageError(
            "qcow2: Compression type incompatible feature bit must be set",
            field="compression_type",
            value=int(number),
        )
    if number == CompressionType.DEFLATE and flagged:
        raise ImageError(
            "qcow2: Compression type incompatible feature bit must not be set",
            field="compression_type",
            value=int(number),
        )


def _check_subclusters(header: Header) -> None:
    geometry = header.geometry
    if geometry.subcluster_size < layout.SECTOR:
        raise ImageError(
            f"Unsupported subcluster size: {geometry.subcluster_size}",
            field="cluster_bits",
            value=header.cluster_bits,
            limit=layout.MIN_EXTENDED_CLUSTER_BITS,
        )


def _check_encryption(header: Header, crypt_method: int) -> None:
    try:
        header.crypt_method = CryptMethod(crypt_method)
    except ValueError:
        raise ImageError(
            f"Unsupported encryption method {crypt_method}",
            field="crypt_method",
            value=crypt_method,
            limit=max(CryptMethod),
        ) from None


def _check_tables(header: Header, for_check: bool) -> None:
    """Sizes and places of the tables that the header names (QEMU's qcow2_validate_table)."""
    if header.refcount_table_clusters == 0 and not for_check:
        raise ImageError(
            "Image does not contain a reference count table",
            field="refcount_table_clusters",
            value=0,
        )
    cluster_size = 1 << header.cluster_bits

    def check(
        name: str, size_field: str, offset_field: str, entries: int, entry_size: int, limit: int
    ) -> None:
        offset = getattr(header, offset_field)
        if entries * entry_size > limit:
            raise ImageError(
                f"{name} too large", field=size_field, value=entries, limit=limit // entry_size
            )
        beyond = offset + entries * entry_size > layout.INT64_MAX
        if beyond or offset % cluster_size:
            raise ImageError(
                f"{name} offset invalid", field=offset_field, value=offset, limit=cluster_size
            )

    check(
        "Reference count table",
        "refcount_table_clusters",
        "refcount_table_offset",
        header.refcount_table_clusters,
        cluster_size,
        layout.MAX_REFCOUNT_TABLE_SIZE,
    )
    if not for_check:  # it is looked at, and repaired, later
        check(
            "Snapshot table",
            "nb_snapshots",
            "snapshots_offset",
            header.nb_snapshots,
            layout.SNAPSHOT_HEADER.size,
            layout.SNAPSHOT_HEADER.size * layout.MAX_SNAPSHOTS,
        )
    check("Active L1 table", "l1_size", "l1_table_offset", header.l1_size, 8, layout.MAX_L1_SIZE)
    needed = header.geometry.l1_entries(header.size)
    if needed > 0x7FFF_FFFF:
        raise ImageError("Image is too big", field="size", value=header.size)
    if header.l1_size < needed:
        raise ImageError(
            "L1 table is too small", field="l1_size", value=header.l1_size, limit=needed
        )


def _extensions(cluster: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Type and data of every header extension, in order."""
    for kind, offset, length in packed_extensions(cluster, start, end):
        yield kind, cluster[offset : offset + length]


def packed_extensions(cluster: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Type of every header extension and where its data stands: offset and length, in order."""
    offset = start
    padded = cluster + bytes(layout.EXTENSION.size)
    while offset < end:
        kind, length = layout.EXTENSION.unpack_from(padded, offset)
        offset += layout.EXTENSION.size
        if offset > end or length > end - offset:
            raise ImageError(
                "Header extension too large",
                field="header extension length",
                value=length,
                limit=max(0, end - offset),
            )
        if kind == ExtensionType.END:
            break
        yield kind, offset, length
        offset += length + -length % 8


def _take_extension(header: Header, kind: int, data: bytes) -> None:
    if kind == ExtensionType.BACKING_FORMAT:
        if len(data) > layout.MAX_BACKING_FORMAT_NAME:
            raise ImageError(
                f"ERROR: ext_backing_format: len={len(data)} too large "
                f"(>={layout.MAX_BACKING_FORMAT_NAME + 1})",
                field="backing format length",
                value=len(data),
                limit=layout.MAX_BACKING_FORMAT_NAME,
            )
        header.backing_format = data.split(b"\0")[0].decode(errors="replace") or None
    elif kind == ExtensionType.BITMAPS:
        check_extension_length(data)
        if header.autoclear_features & Autoclear.BITMAPS:
            header.bitmaps = BitmapsExtension.unpack(data, 1 << header.cluster_bits)
        else:
            header.stale_bitmaps = True
    elif kind == ExtensionType.DATA_FILE:
        header.data_file = os.fsdecode(data.split(b"\0")[0])
    elif kind == ExtensionType.ENCRYPTION:
        header.crypto_header = _crypto_header(header, data)
    elif kind != ExtensionType.FEATURE_NAMES:
        header.unknown_extensions.append((kind, data))


def _crypto_header(header: Header, data: bytes) -> tuple[int, int]:
    if header.crypt_method is not CryptMethod.LUKS:
        raise ImageError(
            "CRYPTO header extension only expected with LUKS encryption method",
            field="crypt_method",
            value=int(header.crypt_method),
            limit=int(CryptMethod.LUKS),
        )
    expected = layout.ENCRYPTION_HEADER.size
    if len(data) != expected:
        raise ImageError(
            f"CRYPTO header extension size {len(data)}, but expected size {expected}",
            field="encryption header extension length",
            value=len(data),
            limit=expected,
        )
    offset, length = layout.ENCRYPTION_HEADER.unpack(data)
    cluster_size = 1 << header.cluster_bits
    if offset % cluster_size:
        raise ImageError(
            f"Encryption header offset '{offset}' is not a multiple of cluster size "
            f"'{cluster_size}'",
            field="encryption header offset",
            value=offset,
            limit=cluster_size,
        )
    if length > layout.MAX_ENCRYPTION_HEADER:
        raise ImageError(
            "Encryption header too large",
            field="encryption header length",
            value=length,
            limit=layout.MAX_ENCRYPTION_HEADER,
        )
    if offset + length > layout.INT64_MAX:
        raise ImageError(
            "Encryption header offset invalid",
            field="encryption header offset",
            value=offset,
            limit=layout.INT64_MAX - length,
        )
    return offset, length


def _backing_file(cluster: bytes, offset: int, length: int) -> str | None:
    limit = min(layout.MAX_BACKING_NAME, len(cluster) - offset)
    if length > limit:
        raise ImageError(
            "Backing file name too long", field="backing_file_size", value=length, limit=limit
        )
    return os.fsdecode(cluster[offset : offset + length].split(b"\0")[0]) or None
