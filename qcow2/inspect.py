"""How an offset of an image is mapped, step by step, without using the image. Nothing is cached or
locked, damaged entries are told, not followed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..backend.disk import Disk
from . import layout
from .geometry import Geometry
from .header import Header, read_header
from .refcount_codec import codec_for

__all__ = ["Step", "explain", "refcount_steps"]


@dataclass(frozen=True, slots=True)
class Step:
    """A step on the way from a guest's offset to the bytes."""

    what: str
    """The table, or the end of the way."""
    index: int | None
    at: int | None
    """Host offset of the entry."""
    raw: int | None
    """The entry as it stands there."""
    meaning: str


def explain(file: Disk, offset: int) -> Iterator[Step]:
    """Every step of the mapping of a guest offset, in this image alone."""
    header = read_header(file, for_check=True)
    geometry = header.geometry
    l1_index = offset // geometry.l2_coverage
    l1_at = header.l1_table_offset + 8 * l1_index
    if l1_index >= header.l1_size:
        yield Step("L1 table", l1_index, None, None, "past the end of the table: unallocated")
        return
    l1_entry = _word(file, l1_at)
    table = l1_entry & layout.OFFSET_MASK
    yield Step("L1 table", l1_index, l1_at, l1_entry, _pointer("L2 table", l1_entry, geometry))
    if not table or table % geometry.cluster_size:
        return
    index = (offset >> geometry.cluster_bits) & ((1 << geometry.l2_bits) - 1)
    at = table + (index << geometry.l2_entry_bits)
    entry = _word(file, at)
    yield Step("L2 table", index, at, entry, _l2_meaning(entry, geometry, header))
    inside = offset & (geometry.cluster_size - 1)
    if geometry.extended_l2:
        states = _word(file, at + 8)
        number = inside >> geometry.subcluster_bits
        allocated, zero = states >> number & 1, states >> (32 + number) & 1
        words = "reads as zeroes" if zero else "allocated" if allocated else "unallocated"
        yield Step("subclusters", number, at + 8, states, f"subcluster {number}: {words}")
    if entry & layout.COMPRESSED:
        start, length = geometry.compressed_extent(entry)
        last = start + length - 1
        for cluster in range(start >> geometry.cluster_bits, (last >> geometry.cluster_bits) + 1):
            yield from refcount_steps(file, header, cluster)
        return
    host = entry & layout.OFFSET_MASK
    if host:
        yield Step("host file", None, host + inside, None, f"byte {inside} of its cluster")
        if not header.incompatible_features & layout.Incompatible.DATA_FILE:
            yield from refcount_steps(file, header, host >> geometry.cluster_bits)


def refcount_steps(file: Disk, header: Header, cluster: int) -> Iterator[Step]:
    """The way to the refcount of a host cluster."""
    geometry = header.geometry
    index = cluster >> geometry.refcount_block_bits
    if index >= header.refcount_table_clusters << geometry.cluster_bits >> 3:
        yield Step("refcount table", index, None, None, "past the end of the table: 0 references")
        return
    entry_at = header.refcount_table_offset + 8 * index
    entry = _word(file, entry_at)
    block = entry & layout.OFFSET_MASK
    if not block:
        yield Step("refcount table", index, entry_at, entry, "no refcount block: 0 references")
        return
    where = f"refcount block at {block:#x}"
    if block % geometry.cluster_size or block >= file.size:
        yield Step("refcount table", index, entry_at, entry, where + ", NOT a cluster of the file")
        return
    yield Step("refcount table", index, entry_at, entry, where)
    position = cluster & ((1 << geometry.refcount_block_bits) - 1)
    contents = memoryview(file.read(block, geometry.cluster_size))
    (value,) = codec_for(geometry.refcount_order).load(contents, position, 1)
    at = block + (position << geometry.refcount_order >> 3)
    yield Step("refcount", position, at, int(value), f"{value} reference{'s' * (value != 1)}")


def _word(file: Disk, offset: int) -> int:
    return int.from_bytes(file.read(offset, 8))


def _pointer(what: str, entry: int, geometry: Geometry) -> str:
    offset = entry & layout.OFFSET_MASK
    if not offset:
        return f"no {what}: unallocated"
    words = [f"{what} at {offset:#x}", "used once" if entry & layout.COPIED else "shared"]
    if offset % geometry.cluster_size:
        words.append("NOT ALIGNED to a cluster")
    return ", ".join(words)


def _l2_meaning(entry: int, geometry: Geometry, header: Header) -> str:
    if entry & layout.COMPRESSED:
        offset, length = geometry.compressed_extent(entry)
        return f"compressed, {length} bytes at {offset:#x}"
    words = []
    if entry & layout.ZERO and not geometry.extended_l2:
        words.append("reads as zeroes")
    if entry & layout.OFFSET_MASK:
        words.append(_pointer("cluster", entry, geometry))
    elif not words:
        external = header.incompatible_features & layout.Incompatible.DATA_FILE
        copied = external and entry & layout.COPIED
        words.append("the data file's first cluster" if copied else "unallocated")
    return ", ".join(words)
