"""``show``: the host file of a qcow2 image drawn cluster by cluster, here or in a page."""

from __future__ import annotations

import os
import sys

from ...qcow2.host_map import KINDS, HostMap, host_map, telling
from ..getopt import Option
from ..messages import Failure
from ..objects import Objects
from .listing import human_size
from .opening import Source, open_image
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, one_operand
from .show_page import page

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    FORMAT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("--html",), "page", "Write a page for a browser into this file."),
    Option(
        ("--width",), "columns", "So many cells in a row; as wide as the terminal if not given."
    ),
)

_COLOURS = {
    "free": "#3a3a3a",
    "leaked": "#ff5f5f",
    "header": "#ffffff",
    "L1 table": "#ffd75f",
    "L2 table": "#ffaf00",
    "refcount table": "#af87ff",
    "refcount block": "#875fff",
    "snapshots": "#ff87d7",
    "bitmaps": "#d7ff87",
    "encryption": "#d7d7af",
    "data": "#5fafff",
    "snapshot data": "#d75faf",
    "compressed": "#5fd787",
    "zero": "#87d7d7",
}
_SNAPSHOT_COLOURS = (
    "#d75faf",
    "#af5fd7",
    "#ff87af",
    "#d787ff",
    "#af5f87",
    "#ffafd7",
    "#875f87",
    "#d7afd7",
)
"""One after the other, from the oldest snapshot on."""
_ROWS = 24


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    given = dict(found)
    objects = Objects()
    for option, value in found:
        if option == "--object":
            objects.add(value)
    name = one_operand(operands)
    width = int(given["--width"]) if given.get("--width", "").isdecimal() else 0
    if "--width" in given and not 0 < width <= 1000:
        raise Failure("The width is a number of columns up to 1000")
    width = width or max(16, min(_columns() - 2, 160))
    source = Source(name, given.get("-f"), "--image-opts" in given, "-U" in given)
    with open_image(source, objects, backing=False, no_io=True) as disk:
        file = disk.children.get("file")
        if disk.format_name != "qcow2" or file is None:
            raise Failure(f"Images of format '{disk.format_name}' cannot be drawn")
        found_map = host_map(file)
        size = disk.size
    if "--html" in given:
        try:
            with open(given["--html"], "w", encoding="utf-8") as target:
                target.write(page(name, size, found_map, _colours(found_map)))
        except OSError as error:
            raise Failure(f"Could not write '{given['--html']}': {error.strerror}") from error
        return 0
    _draw(name, size, found_map, width)
    return 0


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return 80


def _colours(found: HostMap) -> list[str]:
    """One for each kind."""
    snapshots = range(len(found.kinds) - len(KINDS))
    return [
        *(_COLOURS[kind] for kind in KINDS),
        *(_SNAPSHOT_COLOURS[number % len(_SNAPSHOT_COLOURS)] for number in snapshots),
    ]


def _draw(name: str, size: int, found: HostMap, width: int) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=max(width + 2, 60), highlight=False, soft_wrap=True)
    colours = _colours(found)
    step = max(1, -(-found.clusters // (width * _ROWS)))
    per_cell = f"{step} clusters" if step > 1 else "one cluster"
    with console.capture() as captured:
        console.print(
            Text.assemble(
                (name, "bold"),
                f"  {human_size(size)} disk, {found.clusters} clusters of "
                f"{human_size(found.cluster_size)}; a cell is {per_cell}",
            )
        )
        cells = range(0, found.clusters, step)
        for start in range(0, len(cells), width):
            row = Text(" ")
            for cell in cells[start : start + width]:
                row.append(*_cell(found.counts(cell, cell + step), step, colours))
            console.print(row)
        totals = found.totals()
        widest = max(map(len, totals), default=0)
        for kind, count in totals.items():
            line = Text("  ██ ", style=colours[found.kinds.index(kind)])
            size_of_all = human_size(count * found.cluster_size)
            line.append(f"{kind:{max(widest, 16)}}{count:>10}  {size_of_all}", "default")
            console.print(line)
        for problem in found.problems:
            console.print(Text(f"  {problem}", style="bold red"))
    print(captured.get(), end="")


def _cell(counts: dict[int, int], step: int, colours: list[str]) -> tuple[str, str]:
    """A character for some clusters, and its colour."""
    used = sum(count for number, count in counts.items() if number)
    return "█" if used * 2 > step else "▄" if used else "·", colours[telling(counts)]
