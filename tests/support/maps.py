"""What of a disk is allocated, as we and as QEMU tell it, in a form that can be compared."""

from __future__ import annotations

import difflib
from pathlib import Path

from pyvirtio import Disk

from .qemu import qemu_img_json

__all__ = ["Extents", "changes", "our_map", "qemu_map", "states"]

Extents = list[tuple[int, int, int, str, int | None]]
"""(start, length, depth, state, host offset)"""


def qemu_map(path: Path) -> Extents:
    """What ``qemu-img map`` says."""
    found = []
    for entry in qemu_img_json("map", "-U", "-f", "qcow2", path):
        # A hole in the file below makes QEMU add "zero" to stored data.
        state = "data" if entry["data"] else "zero" if entry["zero"] else "nothing"
        host = entry.get("offset")
        found.append((entry["start"], entry["length"], entry["depth"], state, host))
    return joined(found)


def our_map(disk: Disk) -> Extents:
    """The same from our ``block_status``."""
    found = []
    start = 0
    for extent in disk.extents():
        state = "data" if extent.data else "zero" if extent.zero else "nothing"
        host = extent.host_offset
        found.append((start, extent.length, extent.depth, state, host))
        start += extent.length
    return joined(found)


def joined(extents: Extents) -> Extents:
    """Neighbours in one state as one."""
    found: Extents = []
    for start, length, depth, state, host in extents:
        if found:
            first, before, last_depth, last_state, last_host = found[-1]
            follows = host == last_host if host is None or last_host is None else (
                host == last_host + before
            )  # fmt: skip
            if (depth, state) == (last_depth, last_state) and follows:
                found[-1] = (first, before + length, depth, state, last_host)
                continue
        found.append((start, length, depth, state, host))
    return found


def states(extents: Extents) -> Extents:
    """Without the host offsets, which each is free to choose."""
    return joined(
        [(start, length, depth, state, None) for start, length, depth, state, _ in extents]
    )


def changes(one: Extents, other: Extents) -> str:
    """Where two maps differ."""
    lines = [[str(extent) for extent in extents] for extents in (one, other)]
    return "\n".join(difflib.unified_diff(*lines, lineterm="", n=0))
