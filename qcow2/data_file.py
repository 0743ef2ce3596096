"""The external data file: guest data outside the image (spec, "incompatible bit 2").

The image keeps the metadata alone. With the autoclear bit "raw external data" the data file may be
used as a raw disk by others, so it always holds what the guest sees: what becomes zeroes is zeroed
there as well, and every cluster is mapped from the start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from ..backend.disk import Disk, Extent
from ..backend.file import FileDisk
from ..backend.references import FileReference
from ..errors import BackendError, ImageError, UnsupportedError
from . import layout
from .cache import CacheFull
from .header import Header
from .layout import Autoclear, Incompatible
from .metadata import Metadata
from .quarantine import DiscardKind

if TYPE_CHECKING:
    from _typeshed import StrPath

__all__ = [
    "MissingDataFile",
    "create_data_file",
    "data_file_info",
    "is_raw",
    "map_everything",
    "open_data_file",
    "refuse_with_data_file",
    "resize_data_file",
    "zero_data_file",
]

_MAP_AT_ONCE = 1 << 16
"""Guest clusters mapped between two flushes, so that the cache never fills with dirty tables."""


class MissingDataFile(Disk):
    """Stands in for a data file that was not opened: whatever needs it is refused."""

    format_name = "missing"
    growable = True

    def __init__(self, name: str | None) -> None:
        super().__init__(0)
        self._name = name

    @property
    def filename(self) -> str | None:
        """The name in the image."""
        return self._name

    def reopen(self, *, read_only: bool) -> None:
        """There is nothing to open."""

    def _refuse_data(self) -> NoReturn:
        raise ImageError(
            f"The data is in the data file '{self._name or ''}', which was not opened",
            field="data file",
            value=self._name,
        )

    def _refuse(self, offset: int, length: int, *, writing: bool = False) -> None:
        if not self.closed:
            self._refuse_data()
        super()._refuse(offset, length, writing=writing)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self._refuse_data()

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._refuse_data()

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._refuse_data()

    def _block_status(self, offset: int, length: int) -> Extent:
        self._refuse_data()

    def _truncate(self, size: int, preallocation: str) -> None:
        self._refuse_data()


# -- opening and creating ----------------------------------------------------------------------


def is_raw(header: Header) -> bool:
    """True if the data file has to be right as a raw disk, too."""
    return bool(header.autoclear_features & Autoclear.RAW_DATA)


def data_file_info(header: Header) -> dict[str, object]:
    """The data file's part of what an image says of itself, under QEMU's names."""
    if not header.incompatible_features & Incompatible.DATA_FILE:
        return {}
    name = {} if header.data_file is None else {"data-file": header.data_file}
    return {**name, "data-file-raw": is_raw(header)}


def open_data_file(
    header: Header,
    policy: Callable[[FileReference], Disk | None] | None,
    given: Disk | StrPath | None,
    read_only: bool,
) -> Disk | None:
    """The data file of an image, None if it has none.

    ``given`` is what the caller wants instead of the file that the image names, which ``policy``
    opens. Raises ImageError with QEMU's messages where the image and that do not go together.
    """
    if not header.incompatible_features & Incompatible.DATA_FILE:
        if given is not None:
            raise ValueError("'data-file' can only be set for images with an external data file")
        if is_raw(header):
            raise ImageError(
                "data-file-raw requires a data file",
                field="autoclear_features",
                value=header.autoclear_features,
            )
        return None
    disk: Disk | StrPath | None
    if given is not None:
        disk = given
        if not isinstance(disk, Disk):
            disk = FileDisk(disk, read_only=read_only, growable=True)
    elif policy is None:
        disk = None
    elif not header.data_file:
        raise ImageError("'data-file' is required for this image", field="data file")
    else:
        disk = policy(FileReference(header.data_file, None, "data-file"))
    if disk is None:
        return MissingDataFile(header.data_file)
    if not disk.growable and disk.size < header.size:
        size = disk.size
        if disk is not given:
            disk.close()
        raise ImageError(
            "The data file is shorter than the disk",
            field="data file",
            value=size,
            limit=header.size,
        )
    disk.bounded = not disk.growable
    return disk


def create_data_file(image: Disk, name: str, size: int, preallocation: str = "off") -> None:
    """Make the data file ``name`` of ``size`` zero bytes for an image in the disk ``image``.

    A relative name is relative to the current folder, not to the image: so it is in QEMU.
    """
    same = image.filename is not None and os.path.realpath(name) == os.path.realpath(image.filename)
    if same:
        raise ValueError("An image cannot be its own data file")
    FileDisk.create(name, size, preallocation=preallocation).close()


# -- at work -------------------------------------------------------------------------------------


def refuse_with_data_file(metadata: Metadata, message: str) -> None:
    """Raise UnsupportedError for what cannot be done with a data file, if there is one."""
    if metadata.data_file is not None:
        raise UnsupportedError(message, feature="external data file")


def zero_data_file(metadata: Metadata, offset: int, length: int, *, unmap: bool) -> None:
    """Guest bytes are about to be mapped as zeroes: zero them in the data file first.

    In a raw one that has to succeed. Else it only gives space back, if ``unmap`` and the policy for
    discards want it.
    """
    data = metadata.data_file
    if data is None:
        return
    metadata.check_writable()
    if is_raw(metadata.header):
        length = min(length, metadata.header.size - offset)
        if length > 0:
            data.write_zeroes(offset, length, unmap=unmap)
    elif unmap and metadata.discards[DiscardKind.REQUEST]:
        length = min(length, data.size - offset)
        if length > 0:
            # A hint. Zeroes, not a discard, which may leave anything: until the next flush is done
            # the entries on the disk may still map the bytes.
            with suppress(BackendError, UnsupportedError, ImageError):
                data.write_zeroes(offset, length, unmap=True, fallback=False)


def map_everything(metadata: Metadata, start: int, end: int) -> None:
    """Map guest bytes ``start`` to ``end`` to the data file, where they are not mapped yet.

    The L1 table has to reach that far; the disk may be shorter. What is mapped reads as what the
    data file has there.
    """
    bits, tables = metadata.cluster_bits, metadata.tables
    mapped_flags = layout.COPIED
    if metadata.geometry.extended_l2:
        mapped_flags |= layout.ALL_ALLOCATED << 64
    cluster, last = start >> bits, -(-end >> bits)
    mapped = 0
    while cluster < last:
        try:
            with metadata.lock:
                metadata.gate.enter()
                count = min(last - cluster, tables.left_in_slice(cluster))
                if metadata.gate.wait_for_allocations(cluster, count):
                    continue
                position = metadata.prepare(cluster)
                try:
                    old = tables.entries_at(position, count)
                    new = [
                        entry or (cluster + i) << bits | mapped_flags for i, entry in enumerate(old)
                    ]
                    with metadata.health.step("Mapping the data file"):
                        tables.set_entries(position, new)
                finally:
                    metadata.unpin(position)
            cluster += count
            mapped += count
        except CacheFull:
            mapped = _MAP_AT_ONCE
        finally:
            metadata.gate.leave()
        if mapped >= _MAP_AT_ONCE:
            metadata.flush()
            mapped = 0


def resize_data_file(metadata: Metadata, old_size: int, size: int, preallocation: str) -> None:
    """Make the data file as long as a disk of ``size`` bytes, which was ``old_size`` bytes long.

    What the file has behind the old end, left by others, is not to be seen.
    """
    data = metadata.data_file
    if data is None:
        return
    if data.size > old_size and size > old_size:
        data.truncate(old_size, shrink=True)
    data.truncate(size, preallocation=preallocation, shrink=True)
