"""Giving an overlay another backing file (``qemu-img rebase``)."""

from __future__ import annotations

from .chain import as_overlay
from .disk import Disk
from .progress import Progress, silent
from .zeroes import first_nonzero, units

__all__ = ["rebase"]

_CHUNK = 2 << 20


def rebase(
    overlay: Disk,
    backing: Disk | None,
    *,
    name: str | None = None,
    format: str | None = None,
    unsafe: bool = False,
    sparse: bool = True,
    progress: Progress = silent,
) -> None:
    """Have the overlay lie over ``backing`` (None: over nothing) and still read the same.

    What differs between the old backing file and the new one is copied into the overlay first.
    ``unsafe`` copies nothing: for a backing file that was moved, or holds the same data. ``name``
    and ``format`` are what the image shall call it (default: its file name and format). The
    overlay owns ``backing`` then; the former backing file is closed. Nobody may write meanwhile.
    Without ``sparse``, zeroes are copied as data, as QEMU does it.
    If it is interrupted, the old backing file is still the one.
    """
    image = as_overlay(overlay)
    if backing is not None:
        name = name if name is not None else backing.filename
        format = format if format is not None else backing.format_name
        if not name:
            raise ValueError("The new backing file has no name that the image could hold")
    if not unsafe:
        _copy_differences(overlay, backing, sparse, progress)
        overlay.flush()
    image.change_backing_file(name, format)
    former = image.replace_backing(backing)
    if former is not None and former is not backing:
        former.close()


def _copy_differences(
    overlay: Disk, backing: Disk | None, sparse: bool, progress: Progress
) -> None:
    size = overlay.size
    unit = overlay.info().cluster_size or 65536
    chunk = max(_CHUNK, unit)
    end = 0 if overlay.backing is None else overlay.backing.size
    offset = 0
    while offset < size:
        extent = overlay.block_status(offset, size - offset)
        length = extent.length
        if extent.depth or not extent.allocated:
            zero, run = _zeroes(backing, offset, length) if extent.zero else (False, length)
            length = run
            if not zero:
                length = min(length, chunk - offset % chunk)
                _keep(overlay, backing, offset, length, unit, sparse or offset >= end)
        offset += length
        progress(offset, size)


def _zeroes(backing: Disk | None, offset: int, length: int) -> tuple[bool, int]:
    """Whether the new backing file is known to be zeroes from ``offset`` on, and how far that is
    so, at most ``length`` bytes; past its end it is."""
    if backing is None or offset >= backing.size:
        return True, length
    extent = backing.block_status(offset, min(length, backing.size - offset))
    return extent.zero, extent.length


def _keep(
    overlay: Disk, backing: Disk | None, offset: int, length: int, unit: int, sparse: bool
) -> None:
    """Write to the overlay what the new backing file would show otherwise."""
    old, new = overlay.read(offset, length), _padded(backing, offset, length)
    if old == new:
        return
    start = None
    for at, end in units(offset, length, unit):
        differs = old[at:end] != new[at:end]
        if differs and start is None:
            start = at
        elif not differs and start is not None:
            _write(overlay, offset + start, old[start:at], sparse)
            start = None
    if start is not None:
        _write(overlay, offset + start, old[start:], sparse)


def _padded(backing: Disk | None, offset: int, length: int) -> bytes:
    if backing is None:
        return bytes(length)
    there = max(0, min(length, backing.size - offset))
    return (backing.read(offset, there) if there else b"").ljust(length, b"\0")


def _write(overlay: Disk, offset: int, data: bytes, sparse: bool) -> None:
    if sparse and first_nonzero(data) < 0:
        overlay.write_zeroes(offset, len(data))
    else:
        overlay.write(offset, data)
