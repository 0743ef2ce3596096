"""``map``: which part of the disk is where."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from ...backend.map import MapEntry, json_lines, map_extents
from ...errors import PyvirtioError
from ..getopt import Option
from ..messages import Failure, errno_text
from ..objects import Objects
from ..sizes import cvtnum
from .opening import Source, open_image
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, OUTPUT, is_json, one_operand

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    FORMAT,
    OUTPUT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("-s", "--start-offset"), "offset", "Begin at this byte."),
    Option(("-l", "--max-length"), "len", "Look at so many bytes."),
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    given = dict(found)
    objects = Objects()
    start, length = 0, None
    for option, value in found:
        if option == "--object":
            objects.add(value)
        elif option == "-s":
            start = cvtnum("start offset", value)
        elif option == "-l":
            length = cvtnum("max length", value)
    name = one_operand(operands)
    json = is_json(given.get("--output"))
    source = Source(name, given.get("-f"), "--image-opts" in given, "-U" in given)
    with open_image(source, objects) as disk:
        entries = iter(map_extents(disk, start, length))
        try:
            if json:
                # Of nothing, QEMU says that there is nothing.
                first = next(entries, MapEntry(start, 0, 0, False, False, False, False, None))
                for line in json_lines(chain([first], entries)):
                    print(line, end="")
            else:
                _print(entries)
        except (PyvirtioError, OSError) as error:
            raise Failure(f"Could not read file metadata: {errno_text(error)}") from error
    return 0


def _print(entries: Iterable[MapEntry]) -> None:
    """Only data; what is next to each other and goes on in the file is one line."""
    print(f"{'Offset':16}{'Length':16}{'Mapped to':16}File")
    for entry in entries:
        if not entry.data or entry.zero:
            continue
        if entry.offset is None:
            raise Failure("File contains external, encrypted or compressed clusters.")
        row = "".join(f"{_hex(n):<16}" for n in (entry.start, entry.length, entry.offset))
        print(row + (entry.filename or ""))


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"
