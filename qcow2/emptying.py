"""Making an overlay empty again: everything shows the backing file's data.

An image with nothing in it but its active disk is made anew in place, as QEMU does, however much
it holds. The order: the image is marked dirty, for its refcounts will be wrong | an L1 table that
names nothing, so that from here on every reader sees the backing file | the new tables, at the
file's start, over whatever was there | the header. A cut leaves an empty image, or the old one,
that is repaired when it is opened for writing.

Any other image gives up its clusters one by one. The L1 entries go first and are off the disk
before any refcount falls, so a cut leaves an image in which each L2 table is there whole or not at
all, and leaks.
"""

from __future__ import annotations

from array import array
from contextlib import suppress

from ..errors import BackendError, UnsupportedError
from . import layout
from .layout import CryptMethod
from .metadata import Metadata
from .quarantine import DiscardKind
from .refcount_codec import codec_for
from .sharing import lower_references
from .state import mark_clean, mark_dirty

__all__ = ["make_empty"]


def make_empty(metadata: Metadata, *, alone: bool) -> None:
    """Forget every cluster of the disk (in an exclusive operation); internal snapshots stay.

    ``alone``: nobody holds clusters that nothing in the image refers to yet.
    """
    metadata.check_writable()
    header, geometry = metadata.header, metadata.geometry
    l1_clusters = geometry.clusters(8 * header.l1_size)
    if (
        alone
        and header.version >= 3
        and not header.nb_snapshots
        and header.bitmaps is None
        and header.crypt_method is not CryptMethod.LUKS
        and metadata.data_file is None
        and 3 + l1_clusters <= 1 << geometry.refcount_block_bits
    ):
        with metadata.health.step("Emptying the image"):
            _make_anew(metadata, l1_clusters)
    else:
        _give_up_all(metadata)


def _make_anew(metadata: Metadata, l1_clusters: int) -> None:
    """Header, refcount table, one refcount block and the L1 table, and nothing else."""
    file, header, size = metadata.file, metadata.header, metadata.cluster_size
    mark_dirty(file, header)
    file.debug_event("l1_update")
    if l1_clusters:
        file.write_zeroes(header.l1_table_offset, l1_clusters * size)
        file.flush()
    file.debug_event("empty_image_prepare")
    file.write_zeroes(size, (2 + l1_clusters) * size)
    file.debug_event("l1_update")
    file.debug_event("reftable_update")
    places = layout.U64.pack(3 * size) + layout.REFCOUNT_TABLE_FIELDS.pack(size, 1)
    file.write(layout.L1_TABLE_OFFSET_OFFSET, places)
    file.flush()
    file.debug_event("refblock_alloc")
    block = bytearray(size)
    codec_for(header.refcount_order).store(memoryview(block), 0, [1] * (3 + l1_clusters))
    file.write(2 * size, block)
    file.write(size, layout.U64.pack(2 * size))
    file.flush()
    header.l1_table_offset = 3 * size
    header.refcount_table_offset, header.refcount_table_clusters = size, 1
    metadata.reload()
    metadata.vm_state_end = 0
    mark_clean(file, header)
    if file.growable:
        with suppress(BackendError, UnsupportedError):  # it stays as long as it is, then
            file.truncate((3 + l1_clusters) * size, shrink=True)
            metadata.refcounts.fresh = 3 + l1_clusters


def _give_up_all(metadata: Metadata) -> None:
    metadata.file.debug_event("empty_image_prepare")
    tables = metadata.tables
    entries = metadata.geometry.l1_entries(metadata.header.size)
    former = array("Q", tables.l1[:entries])
    with metadata.lock:
        for index, entry in enumerate(former):
            if entry:
                tables.set_l1(index, 0)
    metadata.flush_alone()
    with metadata.lock, metadata.health.step("Emptying the image"):
        lower_references(metadata, former, DiscardKind.REQUEST)
