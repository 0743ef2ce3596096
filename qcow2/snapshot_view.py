"""A snapshot as a disk of its own, read-only, beside the image that goes on running.

What a snapshot's tables refer to is never written in place: its refcounts are above 1 as long as
the disk uses it too, and its own when it does not. So the view needs caches of its own, but no lock
of the image's. It keeps its snapshot from being deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..backend.disk import Disk, DiskInfo, Extent, Limits
from . import layout
from .info import specific_facts
from .metadata import CacheSizes, Metadata
from .reading import Reader
from .snapshot_table import Snapshot, check_l1
from .status import block_status
from .vmstate import VmState

__all__ = ["SnapshotDisk"]

_CACHE = CacheSizes(l2=4 << 20, refcount=1)


class SnapshotDisk(Disk):
    """What a snapshot holds (the reference driver's ``load_tmp``). It shares the image's file."""

    format_name = "qcow2"

    def __init__(
        self,
        image: Metadata,
        snapshot: Snapshot,
        make_reader: Callable[[Metadata], Reader],
        released: Callable[[SnapshotDisk], None],
    ) -> None:
        check_l1(image.header, snapshot)
        header = replace(
            image.header,
            size=snapshot.disk_size,
            l1_size=snapshot.l1_size,
            l1_table_offset=snapshot.l1_table_offset,
        )
        super().__init__(
            snapshot.disk_size // layout.SECTOR * layout.SECTOR,
            read_only=True,
            limits=Limits(
                request_alignment=image.file.limits.request_alignment,
                optimal_io_size=image.cluster_size,
            ),
        )
        self.snapshot = snapshot
        self._metadata = Metadata(image.file, header, _CACHE, read_only=True)
        self._metadata.encryption = image.encryption
        self._metadata.vm_state_end = snapshot.vm_state_size
        self.reader = make_reader(self._metadata)
        self.vmstate = VmState(self._metadata, self.reader, None)
        """The VM state kept with the snapshot, to read."""
        self._released = released

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.reader.read(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._metadata.check_writable()

    def _block_status(self, offset: int, length: int) -> Extent:
        return block_status(self.reader, offset, length)

    @property
    def children(self) -> Mapping[str, Disk]:
        children = {"file": self._metadata.file}
        if self.reader.backing is not None:
            children["backing"] = self.reader.backing
        return children

    def info(self) -> DiskInfo:
        return replace(
            super().info(),
            cluster_size=self._metadata.cluster_size,
            specific=specific_facts(self._metadata.header),
        )

    def _close(self) -> None:
        self._metadata.gate.end()
        self._metadata.close()
        self._released(self)
