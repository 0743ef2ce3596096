"""The few C library calls that the standard library lacks."""

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
def _fallocate() -> Any:
    """The C library's fallocate, found at the first call."""
    # Not by cffi: parsing a declaration there costs more than all the rest of opening a disk.
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    # glibc has both, and on 32-bit machines only the second takes 64-bit offsets; musl has one.
    function = getattr(library, "fallocate64", None) or library.fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function, ctypes.get_errno


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError; EINTR is retried."""
    function, last_error = _fallocate()
    while function(fd, mode, offset, length):
        number = last_error()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


@cache
def _ffi() -> Any:
    from cffi import FFI

    return FFI()


def address_of(buffer: ReadableBuffer) -> int:
    """The address in memory where a contiguous buffer begins."""
    ffi = _ffi()
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))
