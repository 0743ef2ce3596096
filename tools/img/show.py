"""``show``: the host file of a qcow2 image drawn cluster by cluster, here or in a page."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ...qcow2.inspect import KINDS, HostMap, host_map
from ..getopt import Option
from ..messages import Failure
from ..objects import Objects
from .listing import human_size
from .opening import Source, open_image
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, one_operand
from .show_page import page

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["COLOURS", "OPTIONS", "run"]

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

COLOURS = {
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
_ROWS = 24
_PAGE_CELLS = 16384


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
        found_map = host_map(file, cells=_PAGE_CELLS if "--html" in given else width * _ROWS)
        size = disk.size
    if "--html" in given:
        try:
            with open(given["--html"], "w", encoding="utf-8") as target:
                target.write(page(name, size, found_map, COLOURS))
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


def _draw(name: str, size: int, found: HostMap, width: int) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=max(width + 2, 60), highlight=False, soft_wrap=True)
    per_cell = f"{found.per_cell} clusters" if found.per_cell > 1 else "one cluster"
    console.print(
        Text.assemble(
            (name, "bold"),
            f"  {human_size(size)} disk, {found.clusters} clusters of "
            f"{human_size(found.cluster_size)}; a cell is {per_cell}",
        )
    )
    for start in range(0, len(found.cells), width):
        console.print(_row(found.cells[start : start + width], found.per_cell))
    for kind, count in found.totals().items():
        line = Text("  ██ ", style=COLOURS[kind])
        line.append(f"{kind:16}{count:>10}  {human_size(count * found.cluster_size)}", "default")
        console.print(line)
    for problem in found.problems:
        console.print(Text(f"  {problem}", style="bold red"))


def _row(cells: list[dict[str, int]], per_cell: int) -> Text:
    from rich.text import Text

    row = Text(" ")
    for cell in cells:
        used = sum(cell.values())
        # Little that matters shows more than much that is the rule.
        ranked = sorted(cell, key=lambda kind: (kind == "leaked", cell[kind], KINDS.index(kind)))
        kind = ranked[-1] if ranked else "free"
        row.append("█" if used * 2 > per_cell else "▄" if used else "·", COLOURS[kind])
    return row
