"""``resize``: another size for the disk."""

from __future__ import annotations

from ...errors import PyvirtioError
from ..getopt import Option, UsageError
from ..messages import Failure, report, text_of, warn
from ..objects import Objects
from ..optlist import Given, Setting
from .opening import Source, open_image
from .shared import FORMAT, HELP, IMAGE_OPTS, OBJECT, QUIET

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    FORMAT,
    OBJECT,
    IMAGE_OPTS,
    QUIET,
    Option(("--preallocation",), "prealloc", "How new space is made: off, metadata, falloc, full."),
    Option(("--shrink",), None, "The size may be smaller than it is; data behind it is lost."),
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand; the last operand is the size."""
    given = dict(found)
    objects = Objects()
    preallocation = "off"
    for option, value in found:
        if option == "--object":
            objects.add(value)
        elif option == "--preallocation":
            if value not in ("off", "metadata", "falloc", "full"):
                raise Failure(f"Invalid preallocation mode '{value}'")
            preallocation = value
    if len(operands) != 2:
        raise UsageError("Expecting image file name and size")
    name, text = operands
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    size = Given((Setting("size", "size", "Virtual disk size"),))
    size.put("size", text[1:] if sign else text)
    source = Source(name, given.get("-f"), "--image-opts" in given)
    with open_image(source, objects, writable=True) as disk:
        wanted = (size.number("size") or 0) * (sign or 1) + (disk.size if sign else 0)
        if not 0 < wanted < 1 << 63:
            raise Failure("New image size must be positive")
        if wanted <= disk.size and preallocation != "off":
            raise Failure("Preallocation can only be used for growing images")
        if wanted < disk.size and "--shrink" not in given:
            report("Use the --shrink option to perform a shrink operation.")
            warn(
                "Shrinking an image will delete all data beyond the shrunken image's end. Before "
                "performing such an operation, make sure there is no important data there."
            )
            raise Failure
        try:
            disk.truncate(wanted, preallocation=preallocation, shrink=True)
        except (PyvirtioError, ValueError, OSError) as error:
            raise Failure(text_of(error)) from error
        if "-q" not in given:
            print("Image resized.")
    return 0
