"""``commit``: write an overlay's data into its backing file."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

from ...backend.chain import as_overlay, layers
from ...backend.commit import commit
from ...errors import PyvirtioError, UnsupportedError
from ..getopt import Option
from ..messages import Failure, errno_text, text_of
from ..objects import Objects
from ..sizes import cvtnum
from .formats import prefix_of
from .info import full_name
from .opening import Source, cache_mode, open_image
from .shared import FORMAT, HELP, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Meter, one_operand

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["OPTIONS", "find_layer", "run"]

OPTIONS = (
    HELP,
    OBJECT,
    IMAGE_OPTS,
    Option(("-f",), "fmt", FORMAT.help),
    Option(("-t",), "cache", "The cache mode."),
    Option(("-b",), "base", "Write into this image of the chain, and keep the overlay."),
    Option(("-d",), None, "Do not empty the overlay."),
    PROGRESS,
    QUIET,
    Option(("-r",), "rate_limit", "Write so many bytes per second at most."),
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    objects = Objects()
    rate = 0
    for option, value in found:
        if option == "--object":
            objects.add(value)
        elif option == "-r":
            rate = cvtnum("rate limit", value)
    given = dict(found)
    name = one_operand(operands)
    cache = cache_mode(given.get("-t", "writeback"))
    if cache is None:
        raise Failure(f"Invalid cache option: {given['-t']}")
    quiet = "-q" in given
    source = Source(name, given.get("-f"), "--image-opts" in given)
    with (
        open_image(source, objects, writable=True, cache=cache, unmap=True) as disk,
        Meter("-p" in given and not quiet) as meter,
    ):
        if "-b" in given:
            base = find_layer(disk, given["-b"])
            if base is None:
                raise Failure(f"Did not find '{given['-b']}' in the backing chain of '{name}'")
        else:
            base = disk.backing
            if base is None:
                raise Failure("Image does not have a backing file")
        keep = "-d" in given or "-b" in given
        try:
            commit(disk, base, keep=True, rate_limit=rate, progress=meter)
        except (PyvirtioError, OSError) as error:
            if getattr(error, "errno", None) is None:
                raise Failure(text_of(error)) from error
            raise Failure(f"Block job failed: {errno_text(error)}") from error
        except ValueError as error:
            raise Failure(text_of(error)) from error
        if not keep:
            try:
                as_overlay(disk).make_empty()
            except UnsupportedError:
                pass
            except (PyvirtioError, OSError) as error:
                text = f"Failed to empty {disk.filename or name}: {errno_text(error)}"
                raise Failure(text) from error
    if not quiet:
        print("Image committed.")
    return 0


def find_layer(disk: Disk, name: str) -> Disk | None:
    """The layer below the disk of that name, which may be relative to the layer above."""
    for above, layer in pairwise(layers(disk)):
        if layer.filename is None:
            continue
        if prefix_of(name) is not None:
            if name in (layer.filename, getattr(above, "backing_file", None)):
                return layer
            continue
        full = full_name(above.filename, name)
        if full is not None and os.path.realpath(full) == os.path.realpath(layer.filename):
            return layer
    return None
