"""Holes of the host file inside data clusters, as preallocated images have them.

Asking the host about every cluster costs much and mostly tells nothing. It is done for images
with many more clusters in use than the host has space for: their metadata were preallocated.
"""

from __future__ import annotations

from ..errors import BackendError
from .corruption import CorruptionError
from .metadata import Metadata

__all__ = ["HostHoles"]


class HostHoles:
    """Says of data clusters whether they are holes in the image file."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._worth_asking: bool | None = None

    def look(self, host: int, length: int) -> tuple[bool, int]:
        """Whether host bytes of a data cluster are known to be zeroes, and how far that is so."""
        if self._worth_asking is None:
            self._worth_asking = False  # where nobody knows; the data can be had all the same
            try:
                self._worth_asking = self._detect()
            except BackendError:
                pass
            except CorruptionError as error:
                error.report()
        if not self._worth_asking:
            return False, length
        file = self._metadata.file
        if host >= file.size:
            return True, length
        there = min(length, file.size - host)
        extent = file.block_status(host, there)
        if extent.zero and extent.length == there == file.size - host:
            return True, length
        return extent.zero, extent.length

    def _detect(self) -> bool:
        """More clusters in use than there is space for (QEMU's measure of it)."""
        metadata = self._metadata
        actual = metadata.file.info().actual_size
        if actual is None:
            return False
        real = actual >> metadata.cluster_bits
        threshold = max(real * 10 // 9, real + 2)
        used, end = 0, metadata.geometry.clusters(metadata.file.size)
        bits = metadata.geometry.refcount_block_bits
        with metadata.lock:
            for block, entry in enumerate(metadata.refcounts.table):
                first = block << bits
                if first >= end:
                    break
                if not entry:  # a sparse file may be so long that its clusters cannot be gone over
                    continue
                for values in metadata.refcounts.counts(first, min(1 << bits, end - first)):
                    used += sum(map(bool, values))
                    if used >= threshold:
                        return True
        return False
