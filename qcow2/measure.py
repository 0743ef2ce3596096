"""How large a file an image takes (QEMU's ``qcow2_measure``)."""

from __future__ import annotations

from typing import Any

from ..backend.disk import Disk
from ..backend.registry import Measurement
from . import layout
from .create import CreateOptions
from .geometry import Geometry

__all__ = ["measure"]


def measure(size: int, source: Disk | None, **options: Any) -> Measurement:
    """What an image of ``size`` bytes takes that is made with these options for creating.

    ``required`` assumes that the source's data are in as many clusters as they touch, and, where
    the image gets a backing file, that it shares nothing with the source's.
    """
    preallocation = options.pop("preallocation", "off")
    chosen = CreateOptions.of(**options)
    geometry = chosen.header(size).geometry
    size = geometry.clusters(size) << geometry.cluster_bits
    if 8 * geometry.l1_entries(size) > layout.MAX_L1_SIZE:
        raise ValueError("The image size is too large (try using a larger cluster size)")
    if preallocation in ("falloc", "full") or (source is not None and chosen.backing_file):
        data = size
    else:
        data = 0 if source is None else _data(source, geometry)
    metadata = _metadata(geometry, size)
    if chosen.encrypt_format == "luks":
        metadata += geometry.clusters(_luks_size(chosen)) << geometry.cluster_bits
    has_bitmaps = geometry.version >= 3 and source is not None and _may_have_bitmaps(source)
    bitmaps = _bitmaps(source, geometry) if has_bitmaps else None
    return Measurement(metadata + data, metadata + size, bitmaps)


def _luks_size(options: CreateOptions) -> int:
    """Bytes of a LUKS header with its key material: eight slots of 4000 stripes, in units of 4 KiB
    (LUKS1 on-disk format)."""
    key = {"aes-128": 16, "aes-192": 24}.get(options.encrypt_cipher_alg, 32)
    if options.encrypt_cipher_mode == "xts":
        key *= 2
    return 4096 * (1 + 8 * -(-key * 4000 // 4096))


def _bitmaps(source: Disk | None, geometry: Geometry) -> int:
    """Bytes that the source's bitmaps take: their bits, tables and directory, with every cluster
    stored."""
    cluster = geometry.cluster_size
    total = directory = 0
    for bitmap in getattr(source, "bitmaps", ()):
        bits = -(-bitmap.disk_size >> bitmap.granularity_bits)
        clusters = geometry.clusters(-(-bits // 8))
        total += (clusters + geometry.clusters(8 * clusters)) * cluster
        directory += -(-(24 + len(bitmap.name.encode())) // 8) * 8
    return total + geometry.clusters(directory) * cluster


def _may_have_bitmaps(source: Disk) -> bool:
    return source.format_name == "qcow2" and source.info().specific.get("compat") == "1.1"


def _data(source: Disk, geometry: Geometry) -> int:
    """Bytes in all clusters that the source's data touch."""
    cluster = geometry.cluster_size
    data = offset = 0
    while offset < source.size:
        extent = source.block_status(offset, source.size - offset)
        length = extent.length
        if not extent.zero and extent.data and extent.allocated:
            length = -(-(offset + length) // cluster) * cluster - offset
            data += offset % cluster + length
        offset += length
    return data


def _metadata(geometry: Geometry, size: int) -> int:
    """Bytes of the header, the tables and the refcounts of an image with data everywhere."""
    cluster = geometry.cluster_size
    l2_tables = geometry.l1_entries(size)
    clusters = 1 + l2_tables + geometry.clusters(8 * l2_tables)
    others = clusters + (size >> geometry.cluster_bits)
    blocks = table = 0
    while True:
        counted = others + blocks + table
        need_blocks = -(-counted >> geometry.refcount_block_bits)
        need_table = geometry.clusters(8 * need_blocks)
        if (need_blocks, need_table) == (blocks, table):
            return (clusters + blocks + table) * cluster
        blocks, table = need_blocks, need_table
