"""Backing chains: which layer is how deep, and what a layer must offer to have another below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from ..errors import UnsupportedError
from .disk import Disk, Extent

__all__ = ["Overlay", "as_overlay", "depth_of", "is_above", "layers", "name_for"]


@runtime_checkable
class Overlay(Protocol):
    """What a format offers whose images name a backing file."""

    @property
    def backing_file(self) -> str | None:
        """The backing file's name as it stands in the image."""

    def change_backing_file(self, name: str | None, format: str | None = None) -> None:
        """Name another one in the image, or none, without looking at either."""

    def replace_backing(self, backing: Disk | None) -> Disk | None:
        """Read from another one, which the overlay then owns; returns the former."""

    def ignore_backing(self) -> None:
        """Read zeroes where the backing file's data would show, though the image names one."""

    def make_empty(self) -> None:
        """Forget all data of this layer."""


def as_overlay(disk: Disk) -> Overlay:
    """The disk as an overlay. Raises UnsupportedError if its format has no backing files."""
    if not isinstance(disk, Overlay):
        raise UnsupportedError(
            f"Format '{disk.format_name}' does not support backing files", feature="backing file"
        )
    return disk


def layers(disk: Disk) -> Iterator[Disk]:
    """The disk, its backing file, that one's, and so on."""
    layer: Disk | None = disk
    while layer is not None:
        yield layer
        layer = layer.backing


def depth_of(disk: Disk, base: Disk) -> int:
    """How deep ``base`` lies in the chain of ``disk``. Raises ValueError if it is not in it."""
    for depth, layer in enumerate(layers(disk)):
        if layer is base and depth:
            return depth
    raise ValueError(f"{base!r} is not in the backing chain of {disk!r}")


def is_above(extent: Extent, depth: int) -> bool:
    """True if an extent's contents come from a layer above that of ``depth``.

    That includes the zeroes which a layer above it has behind the end of a short backing file.
    """
    return extent.depth < depth and (extent.allocated or extent.depth < depth - 1)


def name_for(overlay: Disk, parent: Disk, base: Disk) -> str | None:
    """The name by which ``overlay`` can name ``base``, which is the backing file of ``parent``."""
    name = as_overlay(parent).backing_file
    folders = [os.path.dirname(os.path.abspath(d.filename or "")) for d in (overlay, parent)]
    if name is None or os.path.isabs(name) or folders[0] == folders[1]:
        return name
    return None if base.filename is None else os.path.abspath(base.filename)
