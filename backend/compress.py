"""The filter ``compress``: everything that is written is written compressed."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UnsupportedError
from .disk import Disk
from .filter import AlignedFilter
from .node import Node, Role
from .registry import Driver

__all__ = ["DRIVER", "CompressDisk"]


class CompressDisk(AlignedFilter):
    """Writes whole clusters, compressed. Raises UnsupportedError if the format below cannot."""

    format_name = "compress"

    def __init__(self, below: Disk) -> None:
        if type(below)._write_compressed is Disk._write_compressed:
            raise UnsupportedError(
                f"Compression is not supported for underlying format: {below.format_name}",
                feature="compression",
            )
        unit = below.info().cluster_size or below.limits.request_alignment
        super().__init__(below, limits=replace(below.limits, request_alignment=unit))

    def _write_aligned(self, offset: int, views: list[memoryview], length: int) -> None:
        self.below.write_compressed(offset, views)


def _open(node: Node) -> Disk:
    return CompressDisk(node.required("file", Role.FILTERED, filename=node.filename))


DRIVER = Driver("compress", _open, filtering=True)
