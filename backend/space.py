"""Space on the host: zeroing, giving back and reserving parts of a file or a block device.

File systems differ in what they can do. What one has refused once is not asked of it again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

from ..errors import UnsupportedError
from .libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, fallocate

__all__ = ["Run", "Space", "device_sector_size"]

# linux/fs.h, as most architectures number ioctls (mips, powerpc and sparc do not: there these are
# answered with ENOTTY, and zeroes are written).
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F

_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

_NOT_THERE = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.ENODEV}
)
"""Answers that mean "not on this file", not "this failed". EINVAL is what some file systems say."""

_FILL_CHUNK = 1 << 20


class Run(NamedTuple):
    """A run of bytes in a file that is all data or all hole."""

    data: bool
    end: int


class Space:
    """The space of one open file."""

    def __init__(self, fd: int, *, block_device: bool) -> None:
        self._fd = fd
        self._block_device = block_device
        self._refused: set[str] = set()

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeroes without writing them.

        Without ``unmap`` the space is reserved, and a file that ends before grows to hold it;
        ``unmap`` prefers giving the space back, inside the file. Raises UnsupportedError if it
        cannot be done here, OSError if it failed.
        """
        if self._block_device:
            done = self._try("zero-out", self._ioctl, _BLKZEROOUT, offset, length)
        else:
            done = (
                (unmap and self._try("punch", self._fallocate, _PUNCH, offset, length))
                or self._try("zero", self._fallocate, FALLOC_FL_ZERO_RANGE, offset, length)
                or self._punch_and_reserve(offset, length)
            )
        if not done:
            raise UnsupportedError("the host cannot zero a part of this file", feature="zeroes")

    def discard(self, offset: int, length: int) -> None:
        """Give the space of a range back, where that can be done."""
        if self._block_device:
            self._try("discard", self._ioctl, _BLKDISCARD, offset, length)
        else:
            self._try("punch", self._fallocate, _PUNCH, offset, length)

    def reserve(self, offset: int, length: int) -> None:
        """Reserve space; the file grows to hold it. Raises OSError."""
        os.posix_fallocate(self._fd, offset, length)

    def fill(self, offset: int, length: int) -> None:
        """Write zeroes to all of a range. Raises OSError."""
        zeroes = bytes(min(length, _FILL_CHUNK))
        while length > 0:
            done = os.pwrite(self._fd, memoryview(zeroes)[: min(length, len(zeroes))], offset)
            offset += done
            length -= done

    def run_at(self, offset: int, size: int) -> Run:
        """The run that starts at ``offset`` < ``size``; all of it is data if the host won't say."""
        if "seek" in self._refused:
            return Run(True, size)
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            if start > offset:
                return Run(False, min(start, size))
            end = os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return Run(False, size)
            self._refused.add("seek")
            return Run(True, size)
        # A hole that starts where the data was said to: the file changed in between.
        return Run(True, min(end, size)) if end > offset else Run(True, size)

    def _punch_and_reserve(self, offset: int, length: int) -> bool:
        """What ext4 and others could do before they had FALLOC_FL_ZERO_RANGE."""
        return self._try("punch", self._fallocate, _PUNCH, offset, length) and self._try(
            "reserve", self._fallocate, 0, offset, length
        )

    def _try(
        self, what: str, call: Callable[[int, int, int], None], code: int, offset: int, length: int
    ) -> bool:
        """True if ``call`` did it; False if it cannot be done on this file (and never will)."""
        if what in self._refused:
            return False
        try:
            call(code, offset, length)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            self._refused.add(what)
            return False
        return True

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        fallocate(self._fd, mode, offset, length)

    def _ioctl(self, request: int, offset: int, length: int) -> None:
        fcntl.ioctl(self._fd, request, struct.pack("=QQ", offset, length))


def device_sector_size(fd: int) -> int:
    """Bytes in a logical sector of a block device: what requests must be aligned to."""
    try:
        answer = fcntl.ioctl(fd, _BLKSSZGET, bytes(4))
    except OSError:
        return 512
    return max(512, int.from_bytes(answer, "little" if struct.pack("=H", 1)[0] else "big"))
