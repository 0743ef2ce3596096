"""Creating an empty image."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..backend.disk import Disk
from . import layout
from .geometry import Geometry
from .header import Header
from .layout import Compatible, Incompatible
from .refcount_codec import codec_for
from .refcounts import pack_table

__all__ = ["CreateOptions", "create"]

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """How an image shall be; the names are those of ``qemu-img create -o``."""

    compat: str = "1.1"
    cluster_size: int = 65536
    """Bytes: a power of two from 512 to 2 MiB."""
    refcount_bits: int = 16
    """Width of a refcount: 1, 2, 4, 8, 16, 32 or 64."""
    lazy_refcounts: bool = False
    extended_l2: bool = False
    """L2 entries with 32 subclusters each; needs clusters of 16 KiB or more."""
    backing_file: str | os.PathLike[str] | None = None
    """The name to be stored; it is not opened here."""
    backing_fmt: str | None = None

    def header(self, size: int) -> Header:
        """The header of such an image with no tables yet. Raises ValueError (QEMU's texts)."""
        version = _VERSIONS.get(self.compat)
        if version is None:
            raise ValueError(f"Invalid compatibility level: '{self.compat}'")
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
        if self.backing_fmt is not None and self.backing_file is None:
            raise ValueError("Backing format cannot be used without backing file")
        name = None if self.backing_file is None else os.fspath(self.backing_file)
        if name is not None and len(os.fsencode(name)) > layout.MAX_BACKING_NAME:
            raise ValueError("Backing file name too long")
        if self.backing_fmt and len(self.backing_fmt) > layout.MAX_BACKING_FORMAT_NAME:
            raise ValueError("Backing format name too long")
        return Header(
            version=version,
            cluster_bits=bits,
            size=size,
            refcount_order=width.bit_length() - 1,
            incompatible_features=Incompatible.EXTENDED_L2 if self.extended_l2 else 0,
            compatible_features=Compatible.LAZY_REFCOUNTS if self.lazy_refcounts else 0,
            backing_file=name,
            backing_format=self.backing_fmt,
        )


def create(file: Disk, size: int, options: CreateOptions) -> None:
    """Write an image of ``size`` bytes (a multiple of 512) into the empty disk ``file``.

    The header is written last: until then the file is no image.
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
    # Header, refcount table, refcount blocks, L1 table, in this order, from cluster 0 on.
    l1_clusters = geometry.clusters(8 * header.l1_size)
    blocks, table_clusters = _refcount_clusters(geometry, 1 + l1_clusters)
    header.refcount_table_offset = geometry.cluster_size
    header.refcount_table_clusters = table_clusters
    blocks_at = 1 + table_clusters
    header.l1_table_offset = (blocks_at + blocks) << geometry.cluster_bits if l1_clusters else 0
    packed = header.pack()
    used = blocks_at + blocks + l1_clusters
    file.truncate(0, shrink=True)
    file.truncate(used << geometry.cluster_bits)
    _write_refcounts(file, geometry, blocks_at, blocks, used)
    entries = [(blocks_at + block) << geometry.cluster_bits for block in range(blocks)]
    file.write(header.refcount_table_offset, pack_table(entries))
    file.flush()
    file.write(0, packed)
    file.flush()


def _refcount_clusters(geometry: Geometry, others: int) -> tuple[int, int]:
    """Refcount blocks and refcount table clusters needed to count themselves and ``others``."""
    blocks = table_clusters = 1
    while True:
        used = others + blocks + table_clusters
        need_blocks = -(-used >> geometry.refcount_block_bits)
        need_table = geometry.clusters(8 * need_blocks)
        if need_blocks <= blocks and need_table <= table_clusters:
            return blocks, table_clusters
        blocks, table_clusters = max(blocks, need_blocks), max(table_clusters, need_table)


def _write_refcounts(file: Disk, geometry: Geometry, at: int, blocks: int, used: int) -> None:
    """Write ``blocks`` refcount blocks at cluster ``at`` that count the first ``used`` clusters."""
    codec = codec_for(geometry.refcount_order)
    per_block = 1 << geometry.refcount_block_bits
    for block in range(blocks):
        contents = bytearray(geometry.cluster_size)
        count = max(0, min(per_block, used - block * per_block))
        codec.store(memoryview(contents), 0, [1] * count)
        file.write((at + block) << geometry.cluster_bits, contents)
