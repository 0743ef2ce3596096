"""Bringing a backing chain's data into its overlay (QEMU's ``block-stream``)."""

from __future__ import annotations

from .chain import as_overlay, depth_of, is_above, layers, name_for
from .disk import Disk
from .progress import Progress, silent

__all__ = ["stream"]

_CHUNK = 2 << 20


def stream(
    overlay: Disk,
    base: Disk | None = None,
    *,
    name: str | None = None,
    format: str | None = None,
    progress: Progress = silent,
) -> None:
    """Copy what the layers between the overlay and ``base`` hold into the overlay, and drop them.

    ``base``, a disk of the backing chain, becomes the overlay's backing file; without it nothing
    is below any more. ``name`` and ``format`` are what the image shall call the base (default: as
    the layer above it does). The layers dropped are closed. Nobody else may write to the
    overlay meanwhile. If it is interrupted, the chain is still as it was.
    """
    image = as_overlay(overlay)
    if overlay.backing is None:
        return
    chain = list(layers(overlay))
    depth = len(chain) if base is None else depth_of(overlay, base)
    if depth == 1:
        return
    if base is not None:
        name = name if name is not None else name_for(overlay, chain[depth - 1], base)
        format = format if format is not None else base.format_name
        if not name:
            raise ValueError("The base has no name that the image could hold")
    _copy(overlay, depth, base is None, progress)
    overlay.flush()
    if base is None:
        image.change_backing_file(None)
    else:
        image.change_backing_file(name, format)
        as_overlay(chain[depth - 1]).replace_backing(None)
    former = image.replace_backing(base)
    if former is not None:
        former.close()


def _copy(overlay: Disk, depth: int, to_the_end: bool, progress: Progress) -> None:
    size = overlay.size
    offset = 0
    while offset < size:
        extent = overlay.block_status(offset, size - offset)
        length = extent.length
        own = extent.allocated and not extent.depth
        if not own and is_above(extent, depth):
            if not extent.zero:
                length = min(length, _CHUNK)
                overlay.write(offset, overlay.read(offset, length))
            elif not to_the_end:  # with nothing below it is zero by itself
                overlay.write_zeroes(offset, length)
        offset += length
        progress(offset, size)
