"""Writing an overlay's data into its backing file (``qemu-img commit``)."""

from __future__ import annotations

from .chain import as_overlay, depth_of, is_above
from .disk import Disk
from .pace import Pace
from .progress import Progress, silent

__all__ = ["commit"]

_CHUNK = 2 << 20


def commit(
    overlay: Disk,
    base: Disk | None = None,
    *,
    keep: bool = False,
    rate_limit: int = 0,
    progress: Progress = silent,
) -> None:
    """Have ``base``, a disk in the overlay's backing chain, hold what the overlay reads as.

    Without ``base`` it is the backing file itself, and the overlay is emptied afterwards unless
    ``keep`` is set. Layers between the two are skipped: with a base further down the overlay
    stays as it is. A base that is smaller grows; one that was opened read-only is reopened for the
    time. Nobody else may write to the overlay meanwhile. Other overlays of the base change their
    contents; this one does not, at no moment. ``rate_limit`` is in bytes written per second.
    """
    target = overlay.backing if base is None else base
    if target is None:
        raise ValueError("Image does not have a backing file")
    depth = depth_of(overlay, target)
    if overlay.read_only and not keep and depth == 1:
        raise ValueError("The overlay is read-only and cannot be emptied")
    was_read_only = target.read_only
    if was_read_only:
        target.reopen(read_only=False)
    try:
        if target.size < overlay.size:
            target.truncate(overlay.size)
        _copy(overlay, target, depth, Pace(rate_limit), progress)
        target.flush()
        if not keep and depth == 1:
            as_overlay(overlay).make_empty()
    finally:
        if was_read_only:
            target.reopen(read_only=True)


def _copy(overlay: Disk, target: Disk, depth: int, pace: Pace, progress: Progress) -> None:
    size = overlay.size
    offset = 0
    while offset < size:
        extent = overlay.block_status(offset, size - offset)
        length = extent.length
        if is_above(extent, depth):
            if extent.zero:
                target.write_zeroes(offset, length, unmap=True)
            else:
                length = min(length, _CHUNK)
                pace.wait(length)
                target.write(offset, overlay.read(offset, length))
        offset += length
        progress(offset, size)
