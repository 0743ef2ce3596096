"""``bitmap``: make, change and remove persistent dirty bitmaps."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...errors import PyvirtioError
from ..getopt import Option
from ..messages import Failure, text_of
from ..objects import Objects
from ..sizes import cvtnum
from .bitmap_copy import bitmaps_of
from .opening import Source, open_image
from .shared import FORMAT, HELP, IMAGE_OPTS, OBJECT

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    OBJECT,
    IMAGE_OPTS,
    Option(("--add",), None, "Make the bitmap."),
    Option(("--remove",), None, "Remove it."),
    Option(("--clear",), None, "Have nothing count as dirty."),
    Option(("--enable",), None, "Record writes from now on."),
    Option(("--disable",), None, "Record none."),
    Option(("--merge",), "SOURCE", "What is dirty in another bitmap is so in this one."),
    Option(("-g", "--granularity"), "granularity", "Bytes that one bit stands for."),
    Option(("-b", "--source-file"), "source_file", "The image that --merge reads."),
    Option(("-F", "--source-format"), "source_fmt", "Its format."),
    Option(("-f",), "fmt", FORMAT.help),
)

_ACTIONS = ("--add", "--remove", "--clear", "--enable", "--disable", "--merge")


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    objects = Objects()
    granularity = 0
    for option, value in found:
        if option == "--object":
            objects.add(value)
        elif option == "-g":
            granularity = cvtnum("granularity", value)
    given = dict(found)
    actions = [(option, value) for option, value in found if option in _ACTIONS]
    for condition, message in (
        (
            not actions,
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ),
        (bool(granularity) and "--add" not in given, "granularity only supported with --add"),
        ("-F" in given and "-b" not in given, "-F only supported with -b"),
        (
            "-b" in given and "--merge" not in given,
            "Merge bitmap source file only supported with --merge",
        ),
        (len(operands) != 2, "Expecting filename and bitmap name"),
    ):
        if condition:
            raise Failure(message)
    filename, name = operands
    with ExitStack() as stack:
        image = Source(filename, given.get("-f"), "--image-opts" in given)
        disk = stack.enter_context(open_image(image, objects, writable=True, backing=False))
        other = disk
        if "-b" in given:
            source = Source(given["-b"], given.get("-F"))
            other = stack.enter_context(open_image(source, objects, backing=False))
        for action, value in actions:
            try:
                _act(disk, other, action, value, name, granularity)
            except (PyvirtioError, ValueError, KeyError, OSError) as error:
                # QEMU names the node, which it has made a name up for.
                text = text_of(error).replace("' persistent: ", "' persistent in '#block000': ")
                raise Failure(f"Operation {action[2:]} on bitmap {name} failed: {text}") from error
    return 0


def _act(disk: Disk, other: Disk, action: str, value: str, name: str, granularity: int) -> None:
    bitmaps, sources = bitmaps_of(disk), bitmaps_of(other)
    if action == "--add" and granularity:
        granularity &= 0xFFFF_FFFF
        if granularity < 512 or granularity & (granularity - 1):
            raise ValueError("Granularity must be power of 2 and at least 512")
    if bitmaps is None:
        if action == "--add":
            raise ValueError("Can't store persistent bitmaps to #block000: Operation not supported")
        raise ValueError(f"Dirty bitmap '{name}' not found")
    if action == "--add":
        bitmaps.add(name, granularity=granularity or None)
    elif action == "--remove":
        bitmaps.remove(name)
    elif action == "--clear":
        bitmaps.clear(name)
    elif action == "--enable":
        bitmaps.enable(name)
    elif action == "--disable":
        bitmaps.disable(name)
    else:
        bitmaps[name]
        if sources is None:
            raise ValueError(f"Dirty bitmap '{value}' not found")
        bitmaps.merge(name, [sources[value]])
