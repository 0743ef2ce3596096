"""A disk that keeps nothing (QEMU's ``null-co``): to measure what lies above it."""

from __future__ import annotations

from .buffers import clear
from .disk import Disk, Extent

__all__ = ["NullDisk"]


class NullDisk(Disk):
    """``size`` bytes that forget what is written to them.

    A read gives zeroes with ``read_zeroes``; without, it leaves the buffers as they are (which is
    the quickest, but shows a guest what its memory held before; QEMU's ``read-zeroes=off``).
    """

    format_name = "null-co"

    def __init__(
        self, size: int = 1 << 30, *, read_only: bool = False, read_zeroes: bool = False
    ) -> None:
        if size < 0:
            raise ValueError(f"null-co: a disk cannot have {size} bytes")
        super().__init__(size, read_only=read_only)
        self.read_zeroes = read_zeroes

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        if self.read_zeroes:
            clear(views)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        pass

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        pass

    def _block_status(self, offset: int, length: int) -> Extent:
        return Extent(
            length,
            data=False,
            zero=self.read_zeroes,
            allocated=True,
            host_offset=offset,
            file=self,
        )

    @property
    def has_zero_init(self) -> bool:
        """Whether reads give zeroes."""
        return self.read_zeroes

    def _truncate(self, size: int, preallocation: str) -> None:
        self._set_size(size)
