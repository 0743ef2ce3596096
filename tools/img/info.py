"""``info``: what an image says of itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..getopt import Option
from ..messages import Failure
from ..objects import Objects
from ..qjson import pretty
from .formats import prefix_of
from .listing import info_lines
from .opening import Source, open_image
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, OUTPUT, is_json, one_operand

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["OPTIONS", "full_name", "image_facts", "run"]

OPTIONS = (
    HELP,
    FORMAT,
    OUTPUT,
    Option(("--backing-chain",), None, "Tell of the backing files, too."),
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    given = dict(found)
    objects = Objects()
    for option, value in found:
        if option == "--object":
            objects.add(value)
    name = one_operand(operands)
    json = is_json(given.get("--output"))
    source = Source(name, given.get("-f"), "--image-opts" in given, "-U" in given)
    chain = _collect(source, objects, "--backing-chain" in given)
    if json:
        print(pretty(chain if "--backing-chain" in given else chain[0]))
    else:
        print("\n\n".join("\n".join(info_lines(facts)) for facts in chain))
    return 0


def _collect(source: Source, objects: Objects, whole: bool) -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = []
    seen: set[str] = set()
    while True:
        if source.name in seen:
            raise Failure(f"Backing file '{source.name}' creates an infinite loop.")
        seen.add(source.name)
        with open_image(source, objects, backing=False, no_io=True) as disk:
            facts.append(image_facts(disk))
        last = facts[-1]
        if not whole or "backing-filename" not in last:
            return facts
        full = last.get("full-backing-filename")
        if full is None:
            raise Failure(
                "Could not determine absolute backing filename, but backing filename "
                f"'{last['backing-filename']}' present"
            )
        source = Source(full, last.get("backing-filename-format"), False, source.force_share)


def image_facts(disk: Disk) -> dict[str, Any]:
    """QEMU's ``ImageInfo`` of a disk."""
    info = disk.info()
    name = info.filename or ""
    if prefix_of(name) not in (None, "json") and os.path.exists(name):
        name = f"./{name}"  # a path, whatever it looks like
    facts: dict[str, Any] = {"filename": name, "format": info.format}
    facts["virtual-size"] = info.virtual_size
    if info.actual_size is not None:
        facts["actual-size"] = info.actual_size
    if info.cluster_size:
        facts["cluster-size"] = info.cluster_size
    facts["dirty-flag"] = info.dirty
    if info.encrypted:
        facts["encrypted"] = True
    if info.specific:
        facts["format-specific"] = {"type": info.format, "data": _plain(info.specific)}
    if info.backing_filename is not None:
        facts["backing-filename"] = info.backing_filename
        full = full_name(_file_name(disk, name), info.backing_filename)
        if full is not None:
            facts["full-backing-filename"] = full
        if info.backing_format is not None:
            facts["backing-filename-format"] = info.backing_format
    if info.snapshots:
        facts["snapshots"] = list(info.snapshots)
    return facts


def _file_name(disk: Disk, name: str) -> str:
    """The name that a relative one of a backing file is beside: that of the file, whatever filters
    lie over it."""
    below = disk
    while (file := below.children.get("file")) is not None:
        below = file
    if below is disk or not below.filename or len(below.children):
        return name
    return f"./{below.filename}" if prefix_of(below.filename) is not None else below.filename


def full_name(image: str | None, backing: str) -> str | None:
    """The backing file's name for somebody who is not in the image's folder; None if that is not
    known."""
    if prefix_of(backing) is not None or os.path.isabs(backing):
        return backing
    if not image or image.startswith("json:"):
        return None
    prefix = prefix_of(image)
    start = 0 if prefix is None else len(prefix) + 1
    return image[: max(start, image.rfind("/") + 1)] + backing


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if item is not None}
