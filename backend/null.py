"""A disk that keeps nothing (QEMU's ``null-co``): to measure what lies above it."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from .buffers import clear
from .disk import Disk, Extent
from .registry import Driver

if TYPE_CHECKING:
    from .node import Node

__all__ = ["NULL_AIO", "NULL_CO", "NullDisk"]


class NullDisk(Disk):
    """``size`` bytes that forget what is written to them.

    A read gives zeroes with ``read_zeroes``; without, it leaves the buffers as they are (which is
    the quickest, but shows a guest what its memory held before; QEMU's ``read-zeroes=off``).
    """

    format_name = "null-co"

    def __init__(
        self,
        size: int = 1 << 30,
        *,
        read_only: bool = False,
        read_zeroes: bool = False,
        latency_ns: int = 0,
    ) -> None:
        if size < 0:
            raise ValueError(f"null-co: a disk cannot have {size} bytes")
        super().__init__(size, read_only=read_only)
        self.read_zeroes = read_zeroes
        self.latency_ns = latency_ns
        """Nanoseconds that each request takes at least."""

    def _wait(self) -> None:
        if self.latency_ns:
            time.sleep(self.latency_ns / 1e9)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self._wait()
        if self.read_zeroes:
            clear(views)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._wait()

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._wait()

    def _flush(self) -> None:
        self._wait()

    def _block_status(self, offset: int, length: int) -> Extent:
        return Extent(
            length,
            data=False,
            zero=self.read_zeroes,
            allocated=self.read_zeroes,
            host_offset=offset,
            file=self,
        )

    @property
    def filename(self) -> str:
        """QEMU's name for such a disk."""
        return f"{self.format_name}://"

    @property
    def has_zero_init(self) -> bool:
        """Whether reads give zeroes."""
        return self.read_zeroes

    def _truncate(self, size: int, preallocation: str) -> None:
        self._set_size(size)


def _parse_filename(driver: str, name: str, options: dict[str, Any]) -> None:
    if name != f"{driver}://":
        raise ValueError(f"The only allowed filename for this driver is '{driver}://'")


def _open(driver: str, node: Node) -> Disk:
    size = node.options.size("size")
    disk = NullDisk(
        1 << 30 if size is None else size,
        read_only=node.context.read_only,
        latency_ns=_latency(node),
        read_zeroes=node.options.boolean("read-zeroes", False),
    )
    disk.format_name = driver
    return disk


def _latency(node: Node) -> int:
    latency = node.options.number("latency-ns")
    if latency >= 1 << 63:
        raise ValueError("latency-ns is invalid")
    return latency


def _driver(name: str) -> Driver:
    return Driver(
        name,
        partial(_open, name),
        protocol=True,
        parse_filename=partial(_parse_filename, name),
    )


NULL_CO = _driver("null-co")
NULL_AIO = _driver("null-aio")
