"""The few C library calls that the standard library lacks, by cffi without a compiler."""

from __future__ import annotations

import errno
import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "FALLOC_FL_KEEP_SIZE",
    "FALLOC_FL_PUNCH_HOLE",
    "FALLOC_FL_ZERO_RANGE",
    "address_of",
    "fallocate",
]

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10


@cache
def _libc() -> tuple[Any, Any]:
    """cffi's FFI and the C library's fallocate, set up at the first call."""
    from cffi import FFI  # costs more than all the rest of opening a disk

    ffi = FFI()
    ffi.cdef(
        """
        int fallocate(int fd, int mode, int64_t offset, int64_t length);
        int fallocate64(int fd, int mode, int64_t offset, int64_t length);
        """
    )
    library: Any = ffi.dlopen(None)
    # glibc has both, and on 32-bit machines only the second takes 64-bit offsets; musl has one.
    return ffi, getattr(library, "fallocate64", None) or library.fallocate


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError; EINTR is retried."""
    ffi, function = _libc()
    while function(fd, mode, offset, length):
        number = ffi.errno
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def address_of(buffer: ReadableBuffer) -> int:
    """The address in memory where a contiguous buffer begins."""
    ffi = _libc()[0]
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))
