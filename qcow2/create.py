"""Creating an empty image."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from operator import index
from typing import Any

from ..backend.disk import Disk
from ..backend.file import FileDisk
from . import layout
from .data_file import MissingDataFile, create_data_file, map_everything
from .encryption_options import EncryptionOptions
from .geometry import Geometry
from .header import Header, read_header
from .layout import (
    COMPRESSION_NAMES,
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    Incompatible,
)
from .metadata import CacheSizes, Metadata
from .preallocate import check_mode, preallocate
from .refcount_codec import codec_for
from .refcounts import structure_size
from .table_io import pack_table

__all__ = ["CreateOptions", "create"]

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


@dataclass(frozen=True, slots=True)
class CreateOptions(EncryptionOptions):
    """How an image shall be; the names are those of ``qemu-img create -o``."""

    compat: str = "1.1"
    cluster_size: int = 65536
    """Bytes: a power of two from 512 to 2 MiB."""
    refcount_bits: int = 16
    """Width of a refcount: 1, 2, 4, 8, 16, 32 or 64."""
    lazy_refcounts: bool = False
    compression_type: str = "zlib"
    """For clusters that are written compressed: ``zlib`` or ``zstd``."""
    extended_l2: bool = False
    """L2 entries with 32 subclusters each; needs clusters of 16 KiB or more."""
    backing_file: str | os.PathLike[str] | None = None
    """The name to be stored; it is not opened here."""
    backing_fmt: str | None = None
    preallocation: str = "off"
    """``off``, ``metadata``, ``falloc`` or ``full``."""
    nocow: bool = False
    """Ask a copy-on-write file system (btrfs) to write in place. It may decline."""
    data_file: str | os.PathLike[str] | None = None
    """The name of an external data file to be stored."""
    data_file_raw: bool = False
    """The data file shall be usable as a raw disk."""

    @classmethod
    def of(cls, **options: Any) -> CreateOptions:
        """From keyword arguments. Raises ValueError for names that are none."""
        known = {option.name for option in fields(cls)}
        for name in options:
            if name not in known:
                raise ValueError(f"Invalid parameter '{name}'")
        return cls(**options)

    def header(self, size: int) -> Header:
        """The header of such an image with no tables yet. Raises ValueError (QEMU's texts)."""
        index(self.cluster_size), index(self.refcount_bits)  # or TypeError
        version = _VERSIONS.get(self.compat)
        if version is None:
            raise ValueError(f"Parameter 'version' does not accept value '{self.compat}'")
        bits = self.cluster_size.bit_length() - 1
        allowed = layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS
        if not allowed or self.cluster_size != 1 << bits:
            raise ValueError(
                f"Cluster size must be a power of two between {1 << layout.MIN_CLUSTER_BITS} "
                f"and {1 << (layout.MAX_CLUSTER_BITS - 10)}k"
            )
        width = self.refcount_bits
        if not 1 <= width <= 64 or width & (width - 1):
            raise ValueError("Refcount width must be a power of two and may not exceed 64 bits")
        if version < 3 and width != 16:
            raise ValueError(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                "(use version=v3 or greater)"
            )
        if version < 3 and self.lazy_refcounts:
            raise ValueError(
                "Lazy refcounts only supported with compatibility level 1.1 and above "
                "(use version=v3 or greater)"
            )
        compression = next(
            (n for n, t in COMPRESSION_NAMES.items() if t == self.compression_type), None
        )
        if compression is None:
            raise ValueError(
                f"Parameter 'compression-type' does not accept value '{self.compression_type}'"
            )
        if version < 3 and compression is not CompressionType.DEFLATE:
            raise ValueError(
                "Non-zlib compression type is only supported with compatibility level 1.1 and "
                "above (use version=v3 or greater)"
            )
        if self.extended_l2 and version < 3:
            raise ValueError(
                "Extended L2 entries are only supported with compatibility level 1.1 and above "
                "(use version=v3 or greater)"
            )
        if self.extended_l2 and bits < layout.MIN_EXTENDED_CLUSTER_BITS:
            raise ValueError(
                "Extended L2 entries are only supported with cluster sizes of at least "
                f"{1 << layout.MIN_EXTENDED_CLUSTER_BITS} bytes"
            )
        check_mode(self.preallocation)
        backed = self.backing_file is not None
        if backed and self.preallocation != "off" and not self.extended_l2:
            raise ValueError(
                "Backing file and preallocation can only be used at the same time if "
                "extended_l2 is on"
            )
        if self.backing_fmt is not None and self.backing_file is None:
            raise ValueError("Backing format cannot be used without backing file")
        name = None if self.backing_file is None else os.fspath(self.backing_file)
        if name is not None and len(os.fsencode(name)) > layout.MAX_BACKING_NAME:
            raise ValueError("Backing file name too long")
        if name is not None and "\0" in name:
            raise ValueError("Invalid backing file name")
        if self.backing_fmt and len(self.backing_fmt) > layout.MAX_BACKING_FORMAT_NAME:
            raise ValueError("Backing format name too long")
        data_file = self._data_file(version)
        return Header(
            version=version,
            cluster_bits=bits,
            size=size,
            crypt_method=self.crypt_method,
            refcount_order=width.bit_length() - 1,
            compression_type=compression,
            incompatible_features=(Incompatible.COMPRESSION if compression else 0)
            | (Incompatible.EXTENDED_L2 if self.extended_l2 else 0)
            | (Incompatible.DATA_FILE if data_file is not None else 0),
            compatible_features=Compatible.LAZY_REFCOUNTS if self.lazy_refcounts else 0,
            backing_file=name,
            backing_format=self.backing_fmt,
            data_file=data_file,
            autoclear_features=Autoclear.RAW_DATA if self.data_file_raw else 0,
        )

    def _data_file(self, version: int) -> str | None:
        """The name of the data file. Raises ValueError where it is not to be had."""
        if self.data_file is None:
            if self.data_file_raw:
                raise ValueError("data-file-raw requires data-file")
            return None
        if self.backing_file is not None and self.data_file_raw:
            raise ValueError("Backing file and data-file-raw cannot be used at the same time")
        if version < 3:
            raise ValueError(
                "External data files are only supported with compatibility level 1.1 and above "
                "(use version=v3 or greater)"
            )
        name = os.fspath(self.data_file)
        if not name or "\0" in name:
            raise ValueError("Invalid data file name")
        return name


def create(file: Disk, size: int, options: CreateOptions, data_disk: Disk | None = None) -> None:
    """Write an image of ``size`` bytes (a multiple of 512) into the empty disk ``file``.

    The header is written last: until then the file is no image. A data file is made as well, beside
    the image, unless ``data_disk`` is to be it (whoever opens the image has to give it again).
    """
    if size % layout.SECTOR:
        raise ValueError("The image size must be a multiple of 512 bytes")
    header = options.header(size)
    geometry = header.geometry
    header.l1_size = geometry.l1_entries(size)
    if 8 * header.l1_size > layout.MAX_L1_SIZE:
        raise ValueError(
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
        )
    luks = _luks_area(header, options)
    # Header, refcount table, refcount blocks, L1 table, LUKS area: in this order from cluster 0.
    l1_clusters = geometry.clusters(8 * header.l1_size)
    luks_clusters = geometry.clusters(len(luks))
    blocks, table_clusters = structure_size(geometry, 1 + l1_clusters + luks_clusters)
    header.refcount_table_offset = geometry.cluster_size
    header.refcount_table_clusters = table_clusters
    blocks_at = 1 + table_clusters
    header.l1_table_offset = (blocks_at + blocks) << geometry.cluster_bits if l1_clusters else 0
    if data_disk is not None:
        data_disk.truncate(size, shrink=True)
    elif header.data_file is not None:
        reserve = options.preallocation if options.preallocation in ("falloc", "full") else "off"
        create_data_file(file, header.data_file, size, reserve)
    used = blocks_at + blocks + l1_clusters
    luks_offset = used << geometry.cluster_bits
    if luks:
        header.crypto_header = luks_offset, len(luks)
        used += luks_clusters
    packed = header.pack()
    file.truncate(0, shrink=True)
    if options.nocow and isinstance(file, FileDisk):
        file.set_nocow()
    end = used << geometry.cluster_bits
    if l1_clusters and not luks and options.preallocation == "off":
        end = header.l1_table_offset + 8 * header.l1_size  # QEMU's files end with the last entry
    file.truncate(end)
    _write_refcounts(file, geometry, blocks_at, blocks, used)
    entries = [(blocks_at + block) << geometry.cluster_bits for block in range(blocks)]
    table = pack_table(entries).ljust(table_clusters << geometry.cluster_bits, b"\0")
    file.write(header.refcount_table_offset, table)
    # The whole cluster takes space: what uses less than its clusters passes for preallocated.
    file.write(len(packed), bytes(geometry.cluster_size - len(packed)))
    if luks:
        file.write(luks_offset, luks)
    file.flush()
    file.write(0, packed)
    file.flush()
    if header.data_file is not None:
        if options.data_file_raw or options.preallocation != "off":
            _map_data_file(file, header)
    elif options.preallocation != "off":
        _preallocate(file, size, options.preallocation)


def _preallocate(file: Disk, size: int, mode: str) -> None:
    metadata = Metadata(file, read_header(file), CacheSizes(), read_only=False)
    try:
        preallocate(metadata, 0, size, mode)
        with metadata.gate.exclusive():
            metadata.settle()
    finally:
        metadata.close()


def _map_data_file(file: Disk, header: Header) -> None:
    """Map every cluster: a raw data file has to read the same through the tables."""
    absent = MissingDataFile(header.data_file)
    metadata = Metadata(file, header, CacheSizes(), read_only=False, data_file=absent)
    try:
        map_everything(metadata, 0, header.size)
        with metadata.gate.exclusive():
            metadata.settle()
    finally:
        metadata.close()


def _luks_area(header: Header, options: CreateOptions) -> bytes:
    """What LUKS stores for itself; empty if the image is not encrypted that way."""
    if header.crypt_method is CryptMethod.NONE:
        return b""
    from .encryption import new_luks_area  # cryptography takes long to load

    return new_luks_area(options)


def _write_refcounts(file: Disk, geometry: Geometry, at: int, blocks: int, used: int) -> None:
    """Write ``blocks`` refcount blocks at cluster ``at`` that count the first ``used`` clusters."""
    codec = codec_for(geometry.refcount_order)
    per_block = 1 << geometry.refcount_block_bits
    for block in range(blocks):
        contents = bytearray(geometry.cluster_size)
        count = max(0, min(per_block, used - block * per_block))
        codec.store(memoryview(contents), 0, [1] * count)
        file.write((at + block) << geometry.cluster_bits, contents)
