"""``explain``: how one guest offset is mapped, step by step down the backing chain, or what refers
to a host offset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ...backend.chain import layers
from ...backend.disk import Disk
from ...qcow2.inspect import Step, explain
from ...qcow2.referrers import explain_host
from ..getopt import Option, UsageError
from ..messages import Failure
from ..objects import Objects
from ..qjson import pretty
from ..sizes import cvtnum
from .opening import Source, open_image
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, OUTPUT, is_json

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    FORMAT,
    OUTPUT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("--host",), None, "The offset is one of the host file: tell what refers to it."),
)
_Layer = dict[str, Any]


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    given = dict(found)
    objects = Objects()
    for option, value in found:
        if option == "--object":
            objects.add(value)
    if len(operands) != 2:
        raise UsageError("Expecting one image file name and an offset")
    offset = cvtnum("offset", operands[1])
    source = Source(operands[0], given.get("-f"), "--image-opts" in given, "-U" in given)
    on_host = "--host" in given
    with open_image(source, objects, backing=not on_host, no_io=True) as disk:
        told = [_host(disk, offset)] if on_host else list(_guest(disk, offset))
    if is_json(given.get("--output")):
        print(pretty(told))
    else:
        print(f"{'host' if on_host else 'guest'} offset {offset} ({offset:#x})")
        _print(told)
    return 0


def _host(disk: Disk, offset: int) -> _Layer:
    file = disk.children.get("file")
    if disk.format_name != "qcow2" or file is None:
        raise Failure(f"Images of format '{disk.format_name}' have no metadata to explain")
    return _layer(0, disk, explain_host(file, offset))


def _guest(disk: Disk, offset: int) -> Iterator[_Layer]:
    """What every layer of the chain says, down to the one that has the data."""
    chain = list(layers(disk))
    for depth, layer in enumerate(chain):
        file = layer.children.get("file")
        if offset >= layer.size:
            text = f"past the end of the disk ({layer.size} bytes): zeroes"
            yield _layer(depth, layer, [Step("disk", None, None, None, text)])
            return
        if layer.format_name != "qcow2" or file is None:
            extent = layer.block_status(offset, layer.size - offset)
            text = "a hole: zeroes" if extent.zero else f"stored at {extent.host_offset}"
            yield _layer(depth, layer, [Step(layer.format_name, None, None, None, text)])
            return
        steps = list(explain(file, offset))
        below = layer.block_status(offset, 1)
        here = below.depth == 0 and below.allocated
        if not here and layer is chain[-1]:
            steps.append(Step("disk", None, None, None, "in no layer: zeroes"))
        yield _layer(depth, layer, steps)
        if here:
            return


def _layer(depth: int, disk: Disk, steps: Iterable[Step]) -> _Layer:
    facts = [
        {
            "what": step.what,
            "index": step.index,
            "at": step.at,
            "raw": step.raw,
            "meaning": step.meaning,
        }
        for step in steps
    ]
    told = [{name: item for name, item in fact.items() if item is not None} for fact in facts]
    return {"depth": depth, "filename": disk.filename or "", "steps": told}


def _print(told: list[_Layer]) -> None:
    for layer in told:
        print(f"{layer['filename']} (depth {layer['depth']})")
        for step in layer["steps"]:
            place = step["what"] + (f"[{step['index']}]" if "index" in step else "")
            at = f" at {step['at']:#x}" if "at" in step else ""
            raw = f" = {step['raw']:#018x}" if "raw" in step else ""
            print(f"    {place}{at}{raw}: {step['meaning']}")
