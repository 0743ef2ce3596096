"""``diff``: which ranges differ between two images, or snapshots of them."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...backend.differences import differences
from ..getopt import Option, UsageError
from ..objects import Objects
from .opening import Source, open_image
from .shared import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    PROGRESS,
    Meter,
    is_json,
)
from .snapshots import SnapshotChoice, open_snapshot

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    OUTPUT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    PROGRESS,
    Option(("-f",), "fmt", FORMAT.help),
    Option(("-F",), "fmt", "The format of the second image."),
    Option(("-l",), "snapshot_param", "Take this snapshot of the first image."),
    Option(("-L",), "snapshot_param", "Take this snapshot of the second image."),
    Option(("-g",), "granularity", "Compare pieces of so many bytes (512)."),
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand. 0: no difference, 1: some. With one image, its snapshots are meant."""
    from ..sizes import INT_MAX, cvtnum

    given = dict(found)
    objects = Objects()
    for option, value in found:
        if option == "--object":
            objects.add(value)
    names = operands * 2 if len(operands) == 1 and ("-l" in given or "-L" in given) else operands
    if len(names) != 2:
        raise UsageError("Expecting two image file names, or one and its snapshots")
    unit = cvtnum("granularity", given.get("-g", "512"), 512, INT_MAX)
    json = is_json(given.get("--output"))
    with ExitStack() as stack, Meter("-p" in given, stream=sys.stderr) as meter:
        disks: list[Disk] = []
        for name, kind, snapshot in zip(names, ("-f", "-F"), ("-l", "-L"), strict=True):
            source = Source(name, given.get(kind), "--image-opts" in given, "-U" in given)
            disk = stack.enter_context(open_image(source, objects))
            if snapshot in given:
                disk = open_snapshot(disk, SnapshotChoice(given[snapshot]))
            disks.append(disk)
        count = total = 0
        for start, length in differences(disks[0], disks[1], unit=unit, progress=meter):
            meter.clear()
            if json:
                print("[" if not count else ",", f'{{ "start": {start}, "length": {length} }}')
            elif not count:
                print(f"{'Offset':16}Length")
            if not json:
                print(f"{start:<#16x}{length:#x}")
            count, total = count + 1, total + length
        meter.clear()
        if json:
            print("]" if count else "[]")
        else:
            ranges = f"{count} range{'s' * (count != 1)}, {total} bytes"
            print(f"{ranges} differ." if count else "Nothing differs.")
    return 1 if count else 0
