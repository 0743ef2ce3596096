"""``create``: a new image."""

from __future__ import annotations

from ...errors import PyvirtioError
from ..getopt import Option, UsageError
from ..messages import Failure, text_of
from ..objects import Objects
from ..optlist import Given, accumulate, wants_help
from ..sizes import cvtnum
from .creating import add_backing, create_image
from .formats import check_protocol, is_driver
from .info import full_name
from .opening import Source, open_quietly
from .settings import create_settings, print_create_help
from .shared import FORMAT, HELP, OBJECT, QUIET

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    OBJECT,
    Option(("-f",), "fmt", FORMAT.help.replace("guessed", "raw")),
    Option(("-b",), "backing_file", "The image is an overlay over this one."),
    Option(("-F",), "backing_fmt", "The format of the backing file."),
    Option(("-u",), None, "Do not look at the backing file."),
    Option(("-o",), "options", "Options of the format; -o help lists them."),
    QUIET,
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    objects = Objects()
    options: str | None = None
    for option, value in found:
        if option == "--object":
            objects.add(value)
        elif option == "-o":
            options = accumulate(options, value)
    chosen = dict(found)
    format = chosen.get("-f", "raw")
    filename = operands[0] if operands else None
    if options is not None and wants_help(options):
        print_create_help(filename, format)
        return 0
    if filename is None:
        raise UsageError("Expecting image file name")
    size = cvtnum("image size", operands[1]) if len(operands) > 1 else None
    if len(operands) > 2:
        raise UsageError(f"Unexpected argument: {operands[2]}")
    try:
        given = _given(filename, format, options, size, chosen)
        _look_at_backing(filename, given, objects, look="-u" not in chosen)
        if given.number("size") is None:
            raise Failure("Image creation needs a size parameter")
        if "-q" not in chosen:
            print(f"Formatting '{filename}', fmt={format} {given.shown()}", flush=True)
        create_image(filename, format, given, objects)
    except Failure as failure:
        message = f"{filename}: {failure.message}"
        raise Failure(message, failure.status, hint=failure.hint) from failure
    except (PyvirtioError, ValueError, OSError) as error:
        raise Failure(f"{filename}: {text_of(error)}") from error
    return 0


def _given(
    filename: str, format: str, options: str | None, size: int | None, chosen: dict[str, str]
) -> Given:
    """The options for creating."""
    settings = create_settings(format)
    check_protocol(filename)
    given = Given(settings)
    if options is not None:
        given.parse(options)
    if given.number("size") is None:
        if size is not None:
            given.put("size", str(size))
    elif size is not None:
        raise Failure("The image size must be specified only once")
    add_backing(given, format, chosen.get("-b"), chosen.get("-F"))
    return given


def _look_at_backing(filename: str, given: Given, objects: Objects, *, look: bool) -> None:
    """Is the backing file there, and how large is it?"""
    backing, kind = given.text("backing_file"), given.text("backing_fmt")
    if backing is not None:
        if not backing:
            raise Failure("Expected backing file name, got empty string")
        if backing == filename:
            raise Failure(
                "Error: Trying to create an image with the same filename as the backing file"
            )
    if kind is not None and not is_driver(kind) and not look:
        raise Failure(f"Unknown backing file format '{kind}'")
    if backing is None:
        return
    if not look:
        if kind is None:
            raise Failure("Backing file specified without backing format")
        return
    full = full_name(filename, backing)
    if full is None:
        raise Failure(f"Cannot use relative backing file names for '{filename}'")
    try:
        disk = open_quietly(Source(full, kind), objects, no_io=True)
    except (PyvirtioError, ValueError, OSError) as error:
        raise Failure(f"{text_of(error)}\nCould not open backing image.") from error
    with disk:
        if kind is None:
            raise Failure(
                "Backing file specified without backing format",
                hint=f"Detected format of {disk.format_name}.",
            )
        if given.number("size") is None:
            given.put("size", str(disk.size))
