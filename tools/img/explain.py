"""``explain``: how one guest offset is mapped, step by step through the backing chain."""

from __future__ import annotations

from contextlib import ExitStack

from ...backend.chain import layers
from ...qcow2.inspect import explain
from ..getopt import UsageError
from ..objects import Objects
from ..qjson import pretty
from ..sizes import cvtnum
from .opening import Source, open_image
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, OUTPUT, is_json

__all__ = ["OPTIONS", "run"]

OPTIONS = (HELP, FORMAT, OUTPUT, OBJECT, IMAGE_OPTS, FORCE_SHARE)


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
    told: list[dict[str, object]] = []
    with ExitStack() as stack:
        disk = stack.enter_context(open_image(source, objects, no_io=True))
        for depth, layer in enumerate(layers(disk)):
            steps: list[dict[str, object]] = []
            told.append({"depth": depth, "filename": layer.filename or "", "steps": steps})
            if offset >= layer.size:
                text = f"past the end of the disk ({layer.size} bytes): zeroes"
                steps.append({"what": "disk", "meaning": text})
                break
            file = layer.children.get("file")
            if layer.format_name != "qcow2" or file is None:
                extent = layer.block_status(offset, layer.size - offset)
                text = "a hole: zeroes" if extent.zero else f"stored at {extent.host_offset}"
                steps.append({"what": layer.format_name, "meaning": text})
                break
            for step in explain(file, offset):
                fact = {
                    "what": step.what,
                    "index": step.index,
                    "at": step.at,
                    "raw": step.raw,
                    "meaning": step.meaning,
                }
                steps.append({name: item for name, item in fact.items() if item is not None})
            if layer.block_status(offset, 1).depth == 0:
                break
    if is_json(given.get("--output")):
        print(pretty(told))
    else:
        _print(offset, told)
    return 0


def _print(offset: int, told: list[dict[str, object]]) -> None:
    print(f"guest offset {offset} ({offset:#x})")
    for layer in told:
        print(f"{layer['filename']} (depth {layer['depth']})")
        steps = layer["steps"]
        for step in steps if isinstance(steps, list) else ():
            place = step["what"] + (f"[{step['index']}]" if "index" in step else "")
            at = f" at {step['at']:#x}" if "at" in step else ""
            raw = f" = {step['raw']:#018x}" if "raw" in step else ""
            print(f"    {place}{at}{raw}: {step['meaning']}")
