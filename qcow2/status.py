"""The state of guest bytes, through the backing chain (``qemu-img map``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..backend.disk import Extent
from .layout import ClusterKind
from .reading import Reader

__all__ = ["block_status"]


def block_status(reader: Reader, offset: int, length: int) -> Extent:
    """The run that starts at guest byte ``offset``, as :meth:`Disk.block_status` wants it."""
    reader, depth, kind, host, run = reader.map_chain(offset, length)
    place: dict[str, Any] = {"host_offset": host, "file": reader.file}
    if reader.encryption is not None:
        place = {}  # it does not stand there as it is read
    if kind is ClusterKind.NORMAL:
        zero = False
        if reader.encryption is None:
            zero, run = reader.holes.look(host, run)
        return Extent(run, True, zero, True, depth=depth, **place)
    if kind is ClusterKind.ZERO_ALLOCATED:
        return Extent(run, False, True, True, depth=depth, **place)
    if kind is ClusterKind.ZERO_PLAIN:
        return Extent(run, False, True, True, depth=depth)
    if kind is ClusterKind.COMPRESSED:
        return Extent(run, True, False, True, compressed=True, depth=depth)
    backing = reader.backing
    if backing is None or offset >= backing.size:
        if not host:
            place = {}
        return Extent(run, False, reader.backing_known, False, depth=depth, **place)
    below = backing.block_status(offset, min(run, backing.size - offset))
    return replace(below, depth=depth + 1 + below.depth)
