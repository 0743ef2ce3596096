"""Facts of an image as ``info`` and ``snapshot -l`` print them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..qjson import described

__all__ = ["human_size", "info_lines", "snapshot_lines"]

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def human_size(size: int) -> str:
    """A size with three digits and a unit: ``1.5 GiB``."""
    _, exponent = math.frexp(size / (1000.0 / 1024.0))
    power = max(0, (exponent - 1) // 10)
    return f"{size / (1 << 10 * power):.3g} {_UNITS[power]}B"


def snapshot_lines(snapshots: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The table of snapshots, with its head."""
    yield _row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    for snapshot in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
        seconds = snapshot["vm-clock-sec"]
        clock = (
            f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            f".{snapshot['vm-clock-nsec'] // 1_000_000:03}"
        )
        icount = str(snapshot.get("icount", ""))
        size = human_size(snapshot["vm-state-size"])
        yield _row(snapshot["id"], snapshot["name"], size, date, clock, icount)


def _row(id: str, name: str, size: str, date: str, clock: str, icount: str) -> str:
    # The columns are counted in bytes.
    id += " " * (9 - len(id.encode(errors="surrogateescape")))
    name += " " * (16 - len(name.encode(errors="surrogateescape")))
    return f"{id} {name} {size:>8}{date:>20}{clock:>13}{icount:>11}"


def info_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """``ImageInfo`` for people."""
    yield f"image: {facts['filename']}"
    yield f"file format: {facts['format']}"
    size = facts["virtual-size"]
    yield f"virtual size: {human_size(size)} ({size} bytes)"
    actual = facts.get("actual-size")
    yield f"disk size: {'unavailable' if actual is None else human_size(actual)}"
    if facts.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in facts:
        yield f"cluster_size: {facts['cluster-size']}"
    if facts.get("dirty-flag"):
        yield "cleanly shut down: no"
    backing = facts.get("backing-filename")
    if backing is not None:
        full = facts.get("full-backing-filename")
        actual_path = "" if full == backing else f" (actual path: {full})"
        if full is None:
            actual_path = " (cannot determine actual path)"
        yield f"backing file: {backing}{actual_path}"
        if "backing-filename-format" in facts:
            yield f"backing file format: {facts['backing-filename-format']}"
    if facts.get("snapshots"):
        yield "Snapshot list:"
        yield from snapshot_lines(facts["snapshots"])
    if "format-specific" in facts:
        yield "Format specific information:"
        yield from described(facts["format-specific"]["data"], 1)
