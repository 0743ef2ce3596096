"""``rebase``: another backing file for an image."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...backend.chain import Overlay, as_overlay
from ...backend.rebase import rebase
from ...errors import PyvirtioError
from ..getopt import Option, UsageError
from ..messages import Failure, errno_text, text_of
from ..objects import Objects
from .commit import find_layer
from .formats import is_driver
from .info import full_name
from .opening import Source, cache_mode, open_image, open_quietly
from .shared import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    Meter,
    one_operand,
)

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("-f",), "fmt", FORMAT.help),
    Option(("-F",), "backing_fmt", "The format of the new backing file."),
    Option(("-b",), "backing_file", "The new backing file; an empty name for none."),
    Option(("-u",), None, "Only change the name: the data is the same."),
    PROGRESS,
    Option(("-t",), "cache", "The cache mode of the image."),
    Option(("-T",), "src_cache", "The cache mode of the backing files."),
    QUIET,
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    objects = Objects()
    for option, value in found:
        if option == "--object":
            objects.add(value)
    given = dict(found)
    name = one_operand(operands)
    unsafe, base, kind = "-u" in given, given.get("-b"), given.get("-F")
    if not unsafe and base is None:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    with Meter("-p" in given and "-q" not in given, 2.0) as meter, ExitStack() as stack:
        cache = cache_mode(given.get("-t", "writeback"))
        if cache is None:
            raise Failure(f"Invalid cache option: {given['-t']}")
        source_cache = cache_mode(given.get("-T", "writeback"))
        if source_cache is None:
            raise Failure(f"Invalid source cache option: {given['-T']}")
        source = Source(name, given.get("-f"), "--image-opts" in given)
        disk = stack.enter_context(
            open_image(source, objects, writable=True, cache=cache, backing=not unsafe)
        )
        if kind is not None and not is_driver(kind):
            raise Failure(f"Invalid format name: '{kind}'")
        if not isinstance(disk, Overlay):
            raise Failure(_prefix(base) + "Operation not supported")
        if unsafe:
            _rename(disk, base, kind)
            return 0
        new = _new_backing(disk, base or "", kind, objects, force_share="-U" in given)
        if base and kind is None:
            # Found out before anything is copied.
            if new is not None and find_layer(disk, base) is None:
                new.close()
            raise _refusal(base)
        try:
            rebase(
                disk, new, name=base, format=kind if base else None, sparse=False, progress=meter
            )
        except (PyvirtioError, ValueError, OSError) as error:
            raise Failure(_reason(error, base)) from error
    return 0


def _new_backing(
    disk: Disk, base: str, kind: str | None, objects: Objects, *, force_share: bool
) -> Disk | None:
    """The new backing file, which may be in the chain already; None if there shall be none."""
    if not base:
        return None
    full = full_name(disk.filename, base)
    if full is None:
        raise Failure(
            "Could not resolve backing filename: Cannot generate a base directory with a "
            f"relative backing filename '{base}'"
        )
    layer = find_layer(disk, full)
    if layer is not None:
        return layer
    try:
        return open_quietly(Source(full, kind, force_share=force_share), objects)
    except (PyvirtioError, ValueError, OSError) as error:
        message = f"Could not open new backing file '{base}': {text_of(error)}"
        raise Failure(message) from error


def _rename(disk: Disk, base: str | None, kind: str | None) -> None:
    if base and kind is None:
        raise _refusal(base)
    try:
        as_overlay(disk).change_backing_file(base or None, kind if base else None)
    except (PyvirtioError, ValueError, OSError) as error:
        raise Failure(_reason(error, base)) from error


def _refusal(base: str) -> Failure:
    return Failure(
        f"Could not change the backing file to '{base}': backing format must be specified"
    )


def _prefix(base: str | None) -> str:
    return f"Could not change the backing file to '{'(null)' if base is None else base}': "


def _reason(error: Exception, base: str | None) -> str:
    prefix = _prefix(base)
    text = text_of(error)
    if "too long" in text or "space" in text.lower():
        return prefix + "No space left in the file header"
    if isinstance(error, OSError):
        return f"Error while writing to COW image: {errno_text(error)}"
    return prefix + text
