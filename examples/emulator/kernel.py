"""Linux kernels as files: the Image format, plain or in one of its wrappings.

Documentation/arch/riscv/boot-image-header.rst, and for compressed EFI images
drivers/firmware/efi/libstub/zboot-header.S, both in Linux's sources.
"""

from __future__ import annotations

import gzip
import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from .image import ImageFileError

__all__ = ["is_linux", "load_linux"]

_MAGIC_AT, _MAGIC = 0x38, b"RSC\x05"
_GZIP, _ZBOOT = b"\x1f\x8b", b"MZ\0\0zimg"
_ALIGNMENT = 2 << 20
_SMALLEST = 64
_UNPACK: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.decompress,
    b"xzkern": lzma.decompress,
    b"lzma": lzma.decompress,
}


def is_linux(path: Path) -> bool:
    """Whether the file is a Linux kernel for RISC-V (or, compressed, looks like one)."""
    with path.open("rb") as file:
        head = file.read(_SMALLEST)
    return _is_image(head) or head.startswith((_GZIP, _ZBOOT))


def load_linux(path: Path, ram: memoryview, base: int) -> int:
    """Put the kernel into ``ram``, which starts at ``base``; the address to start it at.

    Raises ImageFileError if it is none, or does not fit.
    """
    data = _unpack(path, path.read_bytes())
    if not _is_image(data):
        raise ImageFileError(f"{path}: not a Linux kernel for RISC-V")
    offset, size = struct.unpack_from("<QQ", data, 8)
    # Kernels before 4.20 tell no size; the file then is all there is.
    needed = max(size, len(data))
    if offset % _ALIGNMENT:
        raise ImageFileError(f"{path}: wants to be at {offset:#x}, which is no multiple of 2 MiB")
    if offset + needed > len(ram):
        raise ImageFileError(f"{path}: needs {offset + needed} bytes of memory")
    ram[offset : offset + len(data)] = data
    return base + int(offset)


def _is_image(data: bytes) -> bool:
    return len(data) >= _SMALLEST and data[_MAGIC_AT : _MAGIC_AT + 4] == _MAGIC


def _unpack(path: Path, data: bytes) -> bytes:
    unpack: Callable[[bytes], bytes] | None
    if data.startswith(_GZIP):
        unpack = gzip.decompress
    elif data.startswith(_ZBOOT) and len(data) >= _SMALLEST:
        start, size = struct.unpack_from("<II", data, 8)
        kind = data[24:56].partition(b"\0")[0]
        unpack = _UNPACK.get(kind)
        if unpack is None:
            raise ImageFileError(f"{path}: compressed by {kind.decode(errors='replace')}")
        data = data[start : start + size]
    else:
        return data
    try:
        return unpack(data)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ImageFileError(f"{path}: cannot be unpacked: {error}") from None
