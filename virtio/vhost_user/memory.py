"""Guest memory as a front-end shares it: regions of files, by guest and by user address.

A region is mapped as it was described, after everything that was said of it is checked: sizes that
overflow, regions that overlap, a file that is smaller than its region. A front-end that shrinks a
file *later* still can end this process (SIGBUS, when memory that is gone is touched), unless the
file is sealed against that, as QEMU's memory-backend-memfd is; nothing in user space can prevent
it. It harms itself alone: an image is as after a power failure then, with all that was flushed.
"""

from __future__ import annotations

import mmap
import os
import stat
from typing import Any

from ..memory import GuestMemory, WriteListener
from .channel import VhostUserError

__all__ = ["MAX_SLOTS", "MemoryTable", "Region", "map_file"]

MAX_SLOTS = 509
"""Regions of guest memory: as many as QEMU has slots for."""
_LIMIT = 1 << 64


class Mapping:
    """Part of a file in this process: ``buffer`` is ``length`` bytes of it from ``offset`` on."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        """Raises VhostUserError for what cannot be mapped. ``fd`` stays the caller's."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise VhostUserError("memory that is no regular file")
        if length <= 0 or offset < 0 or offset + length > status.st_size:
            raise VhostUserError(
                f"{length} bytes at {offset} of a file of {status.st_size} for memory"
            )
        # Huge pages have to be mapped from a multiple of their size on.
        block = max(mmap.ALLOCATIONGRANULARITY, os.fstatvfs(fd).f_bsize)
        start = offset - offset % block
        try:
            self._map = mmap.mmap(fd, offset - start + length, offset=start)
        except (OSError, ValueError, OverflowError) as error:
            raise VhostUserError(f"{length} bytes of memory cannot be mapped: {error}") from error
        self._view: memoryview | None = None
        self.buffer: Any = self._map
        if offset != start:
            self._view = self.buffer = memoryview(self._map)[offset - start :]

    def close(self) -> None:
        """Unmap it; nothing may have a view of it any more."""
        if self._view is not None:
            self._view.release()
        self._map.close()


def map_file(fd: int, offset: int, length: int) -> Mapping:
    """Map part of a file that a front-end has sent, and close the file."""
    try:
        return Mapping(fd, offset, length)
    finally:
        os.close(fd)


class Region:
    """A piece of guest memory. Making one maps it and closes ``fd``, whatever comes of it."""

    def __init__(self, guest: int, size: int, user: int, offset: int, fd: int) -> None:
        if size <= 0 or guest + size > _LIMIT or user + size > _LIMIT:
            os.close(fd)
            raise VhostUserError(f"a region of {size} bytes at {guest:#x}, {user:#x}")
        self.guest = guest
        self.user = user
        self.size = size
        self._mapping = map_file(fd, offset, size)
        self.buffer = self._mapping.buffer

    def overlaps(self, other: Region) -> bool:
        """They have addresses in common, guest or user."""
        return any(
            a < b + other.size and b < a + self.size
            for a, b in ((self.guest, other.guest), (self.user, other.user))
        )

    def close(self) -> None:
        """Unmap it."""
        self._mapping.close()


class MemoryTable:
    """All regions that there are."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, region: Region) -> None:
        """One more, which is the table's to close. Raises VhostUserError if it cannot be."""
        if len(self.regions) >= MAX_SLOTS:
            reason = f"more than {MAX_SLOTS} regions"
        elif any(region.overlaps(other) for other in self.regions):
            reason = f"the region at {region.guest:#x} overlaps another"
        else:
            self.regions.append(region)
            return
        region.close()
        raise VhostUserError(reason)

    def find(self, guest: int, size: int, user: int) -> Region:
        """The region that was added with these. Raises VhostUserError."""
        for region in self.regions:
            if (region.guest, region.size, region.user) == (guest, size, user):
                return region
        raise VhostUserError(f"no region of {size} bytes at {guest:#x}, {user:#x}")

    def to_guest(self, user: int) -> int:
        """The guest address of a user address. Raises VhostUserError if it is not in memory."""
        for region in self.regions:
            if region.user <= user < region.user + region.size:
                return region.guest + user - region.user
        raise VhostUserError(f"user address {user:#x} is not in guest memory")

    def guest_memory(self, on_write: WriteListener | None) -> GuestMemory:
        """Guest memory as a device has it."""
        if not self.regions:
            return GuestMemory.from_buffer(b"")
        regions = [(region.guest, region.buffer) for region in self.regions]
        return GuestMemory.from_regions(regions, on_write=on_write)

    def close(self) -> None:
        """Unmap everything."""
        while self.regions:
            self.regions.pop().close()
