"""``dump``: all metadata of a qcow2 image as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ...qcow2.facts import metadata_facts
from ...qcow2.host_map import KINDS, host_map
from ..getopt import Option
from ..messages import Failure
from ..objects import Objects
from .opening import Source, open_image
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, one_operand

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    FORMAT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("--json",), None, "Print JSON; nothing else is there."),
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    given = dict(found)
    objects = Objects()
    for option, value in found:
        if option == "--object":
            objects.add(value)
    source = Source(one_operand(operands), given.get("-f"), "--image-opts" in given, "-U" in given)
    with open_image(source, objects, backing=False, no_io=True) as disk:
        file = disk.children.get("file")
        if disk.format_name != "qcow2" or file is None:
            raise Failure(f"Images of format '{disk.format_name}' have no metadata to dump")
        before = "{"
        for name, value in metadata_facts(file):
            print(f'{before}\n    "{name}": ', end="")
            _print(value)
            before = ","
        clusters: dict[str, int] = {}
        for kind, count in host_map(file).totals().items():
            known = kind if kind in KINDS else "snapshot data"
            clusters[known] = clusters.get(known, 0) + count
        print(f',\n    "clusters": {json.dumps(clusters)}\n}}')
    return 0


def _print(value: object) -> None:
    """A value; an iterator is a list, with a line for each item."""
    if not isinstance(value, Iterator):
        print(json.dumps(value), end="")
        return
    before = "["
    for item in value:
        print(f"{before}\n        {json.dumps(item)}", end="")
        before = ","
    print("[]" if before == "[" else "\n    ]", end="")
