"""Dirty bitmaps on the way from one image to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import PyvirtioError
from ..messages import Failure, program_name, text_of, warn

if TYPE_CHECKING:
    from ...backend.disk import Disk
    from ...qcow2.bitmaps import Bitmaps

__all__ = ["bitmaps_of", "check_bitmaps", "copy_bitmaps"]


def bitmaps_of(disk: Disk) -> Bitmaps | None:
    """The persistent bitmaps of an image; None if its format has none."""
    bitmaps: Bitmaps | None = getattr(disk, "bitmaps", None)
    return bitmaps


def check_bitmaps(disk: Disk, *, skip_broken: bool) -> None:
    """Raises Failure if the bitmaps of an image cannot be copied."""
    bitmaps = bitmaps_of(disk)
    if bitmaps is None or disk.info().specific.get("compat") == "0.10":
        raise Failure("Source lacks bitmap support")
    for bitmap in bitmaps:
        if bitmap.inconsistent and not skip_broken:
            raise Failure(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'",
                hint="Try --skip-broken-bitmaps, or use "
                f"'{program_name()} bitmap --remove' to delete it\n",
            )


def copy_bitmaps(source: Disk, target: Disk, *, skip_broken: bool) -> None:
    """Copy all of them into an image that is open for writing. Raises Failure."""
    old, new = bitmaps_of(source), bitmaps_of(target)
    if old is None or new is None:
        return
    for bitmap in old:
        if skip_broken and bitmap.inconsistent:
            warn(f"Skipping inconsistent bitmap '{bitmap.name}'")
            continue
        try:
            new.add(bitmap.name, granularity=bitmap.granularity, enabled=bitmap.enabled)
        except (PyvirtioError, ValueError, OSError) as error:
            message = f"Failed to create bitmap {bitmap.name}: {text_of(error)}"
            raise Failure(message) from error
        try:
            new.merge(bitmap.name, [bitmap])
        except (PyvirtioError, ValueError, OSError) as error:
            new.remove(bitmap.name)
            message = f"Failed to populate bitmap {bitmap.name}: {text_of(error)}"
            raise Failure(message) from error
