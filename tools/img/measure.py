"""``measure``: how large a file an image would take."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from ...backend.measure import Measurement, measure
from ...errors import PyvirtioError
from ..getopt import Option
from ..messages import Failure, report, text_of
from ..objects import Objects
from ..optlist import Given, accumulate
from ..qjson import pretty
from ..sizes import cvtnum
from .creating import creation_arguments
from .formats import is_driver
from .opening import Source, open_image
from .settings import create_settings
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, OUTPUT, is_json
from .snapshots import SnapshotChoice, open_snapshot

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    Option(("--size",), "N", "The size of a disk without data, in place of an image."),
    FORCE_SHARE,
    Option(("-f",), "fmt", FORMAT.help),
    Option(("-O",), "output_fmt", "The format of the new image; raw if not given."),
    Option(("-o",), "options", "Options of the new image."),
    Option(("-l",), "snapshot_param", "Measure a snapshot."),
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    objects = Objects()
    options: str | None = None
    snapshot: SnapshotChoice | None = None
    size: int | None = None
    json = False
    for option, value in found:
        if option == "--object":
            objects.add(value)
        elif option == "-o":
            options = accumulate(options, value)
        elif option == "-l":
            snapshot = SnapshotChoice(value)
        elif option == "--output":
            json = is_json(value)
        elif option == "--size":
            size = cvtnum("image size", value)
    given = dict(found)
    if len(operands) > 1:
        raise Failure("At most one filename argument is allowed.")
    name = operands[0] if operands else None
    if name is None and (snapshot or "--image-opts" in given or "-f" in given):
        raise Failure("--image-opts, -f, and -l require a filename argument.")
    if name is not None and size is not None:
        raise Failure("--size N cannot be used together with a filename.")
    if name is None and size is None:
        raise Failure("Either --size N or one filename must be specified.")
    with ExitStack() as stack:
        disk = image = None
        if name is not None:
            source = Source(name, given.get("-f"), "--image-opts" in given, "-U" in given)
            disk = image = stack.enter_context(open_image(source, objects))
            if snapshot is not None:
                disk = open_snapshot(disk, snapshot)
        format = given.get("-O", "raw")
        arguments = _arguments(format, options, objects)
        wanted = disk if disk is not None else -(-(size or 0) // 512) * 512
        if format == "file":
            raise Failure("Block driver 'file' does not support size measurement")
        try:
            measured = measure(wanted, format=format, **arguments)
            if image is not None and snapshot is not None and measured.bitmaps is not None:
                # QEMU loads the snapshot into the image, whose bitmaps stay.
                others = measure(image, format=format, **arguments)
                measured = replace(measured, bitmaps=others.bitmaps)
        except (PyvirtioError, ValueError, OSError) as error:
            raise Failure(text_of(error)) from error
    _print(measured, json)
    return 0


def _arguments(format: str, options: str | None, objects: Objects) -> dict[str, object]:
    if not is_driver(format):
        raise Failure(f"Unknown file format '{format}'")
    given = Given(create_settings(format))
    if options is not None:
        try:
            given.parse(options)
        except Failure as failure:
            report(failure.message)
            raise Failure(f"Invalid options for file format '{format}'") from failure
    return creation_arguments(format, given, objects)


def _print(measured: Measurement, json: bool) -> None:
    facts = {"required": measured.required, "fully-allocated": measured.fully_allocated}
    if measured.bitmaps is not None:
        facts["bitmaps"] = measured.bitmaps
    if json:
        print(pretty(facts))
        return
    for name, value in facts.items():
        print(f"{name.replace('-', ' ')} size: {value}")
