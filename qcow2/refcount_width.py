"""Changing the width of refcounts: all refcount structures are made anew beside the old ones.

The order: the new table and its blocks, which count themselves and the old ones, stable | the
header, by one write of its first sector | the old ones are given up, in the new counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from ..errors import ImageError
from . import layout
from .header_update import update_header
from .metadata import Metadata
from .refcount_codec import codec_for
from .refcounts import pack_table

__all__ = ["change_refcount_width"]


def change_refcount_width(
    metadata: Metadata, bits: int, progress: Callable[[int, int], None]
) -> None:
    """Have refcounts of ``bits`` bits, a power of two up to 64 (exclusively; version 3 only).

    ``progress(done, total)`` is called as it goes on. Raises ImageError where a refcount does not
    fit; nothing has changed then.
    """
    order = bits.bit_length() - 1
    size_bits = metadata.cluster_bits
    block_bits = size_bits + 3 - order
    _check_fit(metadata, order)
    first, total, blocks = _allocate(metadata, block_bits)
    try:
        table = array("Q", bytes(total - len(blocks) << size_bits))
        for i, block in enumerate(blocks):
            _write_block(metadata, block, order, first + i)
            table[block] = (first + i) << size_bits
            progress(i, len(blocks))
        offset = (first + len(blocks)) << size_bits
        metadata.file.write(offset, pack_table(table))
        metadata.settle()
    except BaseException:
        _free(metadata, first, total)
        raise
    old = _structures(metadata)

    def adopt() -> None:
        metadata.adopt_geometry()
        metadata.renew_refcounts()
        for start, count in old:
            for part in metadata.refcounts.slices(start, count):
                metadata.refcounts.add(*part, -1)

    update_header(
        metadata,
        adopt=adopt,
        refcount_table_offset=offset,
        refcount_table_clusters=total - len(blocks),
        refcount_order=order,
    )
    metadata.settle()
    progress(len(blocks), len(blocks))


def _check_fit(metadata: Metadata, order: int) -> None:
    most = codec_for(order).max
    refcounts = metadata.refcounts
    per_block = 1 << metadata.geometry.refcount_block_bits
    with metadata.lock:
        for block, entry in enumerate(refcounts.table):
            if not entry:
                continue
            cluster = block * per_block
            for values in refcounts.counts(cluster, per_block):
                if max(values) > most:
                    index = next(i for i, value in enumerate(values) if value > most)
                    raise ImageError(
                        f"Cannot decrease refcount entry width to {1 << order} bits: Cluster at "
                        f"offset {cluster + index << metadata.cluster_bits:#x} has a refcount of "
                        f"{values[index]}",
                        field="refcount",
                        value=values[index],
                        limit=most,
                    )
                cluster += len(values)


def _allocate(metadata: Metadata, block_bits: int) -> tuple[int, int, list[int]]:
    """Room for the new structures: (first cluster, clusters, the blocks needed).

    The blocks come first, the table, in all the rest, after them.
    """
    entries = metadata.cluster_bits - 3
    total = 1
    while True:
        with metadata.lock:
            first = metadata.refcounts.allocate_area(total)
            blocks = _blocks_in_use(metadata, block_bits)
        needed = len(blocks) + (-(-(blocks[-1] + 1) >> entries))
        if needed <= total:
            break
        _free(metadata, first, total)
        total = needed
    if total - len(blocks) << metadata.cluster_bits > layout.MAX_REFCOUNT_TABLE_SIZE:
        _free(metadata, first, total)
        raise ImageError(
            "The refcount table would exceed QEMU's limit",
            field="refcount_table_clusters",
            value=total - len(blocks),
            limit=layout.MAX_REFCOUNT_TABLE_SIZE >> metadata.cluster_bits,
        )
    return first, total, blocks


def _blocks_in_use(metadata: Metadata, block_bits: int) -> list[int]:
    """The numbers of the new blocks that count something."""
    refcounts = metadata.refcounts
    per_block = 1 << metadata.geometry.refcount_block_bits
    used: set[int] = set()
    for block, entry in enumerate(refcounts.table):
        if not entry:
            continue
        cluster = block * per_block
        for values in refcounts.counts(cluster, per_block):
            if any(values):
                low, high = cluster >> block_bits, (cluster + len(values) - 1) >> block_bits
                for number in range(low, high + 1):
                    start = max(number << block_bits, cluster) - cluster
                    stop = min((number + 1) << block_bits, cluster + len(values)) - cluster
                    if any(values[start:stop]):
                        used.add(number)
            cluster += len(values)
    return sorted(used)


def _write_block(metadata: Metadata, block: int, order: int, place: int) -> None:
    codec = codec_for(order)
    contents = bytearray(metadata.cluster_size)
    count = 8 * metadata.cluster_size >> order
    at = 0
    with metadata.lock:
        for values in metadata.refcounts.counts(block * count, count):
            if any(values):
                codec.store(memoryview(contents), at, values)
            at += len(values)
    metadata.file.write(place << metadata.cluster_bits, contents)


def _structures(metadata: Metadata) -> list[tuple[int, int]]:
    """Where the present refcount structures lie: (first cluster, count) each."""
    header, bits = metadata.header, metadata.cluster_bits
    refcounts = metadata.refcounts
    blocks = [block for block, entry in enumerate(refcounts.table) if entry]
    found = [(refcounts.block_offset(block) >> bits, 1) for block in blocks]
    return [*found, (header.refcount_table_offset >> bits, header.refcount_table_clusters)]


def _free(metadata: Metadata, first: int, count: int) -> None:
    with metadata.lock:
        for part in metadata.refcounts.slices(first, count):
            metadata.refcounts.add(*part, -1)
