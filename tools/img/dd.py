"""``dd``: copy blocks of an image into a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import PyvirtioError
from ..getopt import Option
from ..messages import Failure, errno_text, report, text_of
from ..objects import Objects
from ..optlist import Given
from ..sizes import INT64_MAX, INT_MAX, cvtnum
from .creating import create_image
from .formats import check_protocol, is_driver
from .opening import Source, open_image
from .settings import create_settings
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("-f",), "fmt", FORMAT.help),
    Option(("-O",), "output_fmt", "The format of the output; raw if not given."),
)

_CHUNK = 2 << 20


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    objects = Objects()
    for option, value in found:
        if option == "--object":
            objects.add(value)
    given = dict(found)
    words: dict[str, str] = {}
    numbers = {"bs": 512, "count": INT64_MAX, "skip": 0}
    for operand in operands:
        name, equals, value = operand.partition("=")
        if not equals or name not in ("bs", "count", "skip", "if", "of"):
            raise Failure(f"unrecognized operand {name}")
        if name in ("if", "of"):
            words[name] = value
        else:
            low, high = (1, INT_MAX) if name == "bs" else (0, INT64_MAX)
            numbers[name] = cvtnum(name, value, low, high)
    if len(words) < 2:
        raise Failure("Must specify both input and output files")
    source = Source(words["if"], given.get("-f"), "--image-opts" in given, "-U" in given)
    with open_image(source, objects) as disk:
        _copy(disk, words, numbers, given.get("-O", "raw"), objects)
    return 0


def _copy(
    disk: Disk, words: dict[str, str], numbers: dict[str, int], format: str, objects: Objects
) -> None:
    name, block = words["of"], numbers["bs"]
    if not is_driver(format):
        raise Failure("Unknown file format")
    check_protocol(name)
    given = Given(create_settings(format))
    size = min(disk.size, numbers["count"] * block)
    start = numbers["skip"] * block
    given.put("size", str(max(0, size - start)))
    try:
        create_image(name, format, given, objects)
    except Failure as failure:
        message = f"{name}: error while creating output image: {failure.message}"
        raise Failure(message) from failure
    except (PyvirtioError, ValueError, OSError) as error:
        message = f"{name}: error while creating output image: {text_of(error)}"
        raise Failure(message) from error
    with open_image(Source(name, format), objects, writable=True) as target:
        if size < start:
            report(f"{words['if']}: cannot skip to specified offset")
        # The whole blocks of a chunk make one request: what is stored is the same.
        chunk = max(block, _CHUNK // block * block)
        at = start
        while at < size:
            length = min(chunk, size - at)
            try:
                data = disk.read(at, length)
            except (PyvirtioError, OSError) as error:
                text = f"error while reading from input image file: {errno_text(error)}"
                raise Failure(text) from error
            try:
                target.write(at - start, data)
            except (PyvirtioError, OSError) as error:
                text = f"error while writing to output image file: {errno_text(error)}"
                raise Failure(text) from error
            at += length
