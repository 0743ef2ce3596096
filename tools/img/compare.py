"""``compare``: do two images hold the same?"""

from __future__ import annotations

import os
from contextlib import ExitStack

from ...backend.compare import CompareError, compare
from ..getopt import Option, UsageError
from ..messages import Failure
from ..objects import Objects
from .opening import Source, cache_mode, open_image
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Meter

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("-f",), "fmt", FORMAT.help),
    Option(("-F",), "fmt", "The format of the second image."),
    Option(("-T",), "src_cache", "The cache mode of both."),
    PROGRESS,
    QUIET,
    Option(("-s",), None, "Sizes and allocation have to be the same, too."),
)

_NOT_OPENED, _NOT_MAPPED, _NOT_READ = 2, 3, 4


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand. 0: the same, 1: different, more: an error."""
    objects = Objects()
    for option, value in found:
        if option == "--object":
            try:
                objects.add(value)
            except Failure as failure:
                raise Failure(failure.message, _NOT_OPENED) from failure
    given = dict(found)
    if len(operands) != 2:
        raise UsageError("Expecting two image file names")
    cache = cache_mode(given.get("-T", "writeback"))
    if cache is None:
        raise Failure(f"Invalid source cache option: {given['-T']}", _NOT_OPENED)
    quiet = "-q" in given
    with Meter("-p" in given and not quiet, 2.0) as meter, ExitStack() as stack:
        try:
            first, second = (
                stack.enter_context(
                    open_image(
                        Source(name, given.get(option), "--image-opts" in given, "-U" in given),
                        objects,
                        cache=cache,
                    )
                )
                for name, option in zip(operands, ("-f", "-F"), strict=True)
            )
        except Failure as failure:
            raise Failure(failure.message, _NOT_OPENED) from failure
        try:
            result = compare(first, second, strict="-s" in given, progress=meter)
        except CompareError as error:
            if error.past_end and not quiet:
                print("Warning: Image size mismatch!")
            name = operands[0 if error.disk is first else 1]
            reason = os.strerror(error.errno or 5)
            if error.mapping:
                text = f"Sector allocation test failed for {name}"
                raise Failure(text, _NOT_MAPPED) from error
            text = f"Error while reading offset {error.offset} of {name}: {reason}"
            raise Failure(text, _NOT_READ) from error
        if not quiet:
            if result.sizes_differ and (result.identical or result.past_end):
                print("Warning: Image size mismatch!")
            print(result.message)
    return 0 if result.identical else 1
