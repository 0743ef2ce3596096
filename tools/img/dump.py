"""``dump``: all metadata of a qcow2 image as JSON."""

from __future__ import annotations

from ...qcow2.host_map import host_map
from ...qcow2.inspect import metadata_facts
from ..getopt import Option
from ..messages import Failure
from ..objects import Objects
from ..qjson import pretty
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
        facts = metadata_facts(file)
        found_map = host_map(file)
        facts["clusters"] = found_map.totals()
        facts["problems"] = found_map.problems
    print(pretty(facts))
    return 0
