"""``verify-chain``: is a whole backing chain there, and in order?"""

from __future__ import annotations

from ...errors import PyvirtioError
from ..getopt import Option
from ..messages import Failure, text_of
from ..objects import Objects
from .check import check_quietly
from .info import image_facts
from .opening import Source, open_quietly
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, one_operand

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    FORMAT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("--fast",), None, "Do not check the images themselves."),
)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand. 0: all is well, 2: something is wrong."""
    given = dict(found)
    objects = Objects()
    for option, value in found:
        if option == "--object":
            objects.add(value)
    name: str | None = one_operand(operands)
    kind, image_opts = given.get("-f"), "--image-opts" in given
    seen: set[str] = set()
    problems = depth = 0
    above: int | None = None
    while name is not None:
        found_here: list[str] = []
        source = Source(name, kind, image_opts, "-U" in given)
        following: str | None = None
        size: int | None = None
        if name in seen:
            found_here.append("names itself further up: a loop")
        else:
            seen.add(name)
            try:
                with open_quietly(source, objects, backing=False, no_io=True) as disk:
                    facts = image_facts(disk, source)
                size = facts["virtual-size"]
                following = facts.get("full-backing-filename")
                found_here += _look(facts, above, source, objects, fast="--fast" in given)
                kind, image_opts = facts.get("backing-filename-format"), False
            except (Failure, PyvirtioError, ValueError, OSError) as error:
                found_here.append(text_of(error))
        state = "; ".join(found_here) or "good"
        print(f"{depth}: {name}" + ("" if size is None else f" ({size} bytes)") + f": {state}")
        problems += len(found_here)
        name, above, depth = following, size, depth + 1
    several = "1 problem was" if problems == 1 else f"{problems} problems were"
    print(f"{several} found." if problems else "The chain is in order.")
    return 2 if problems else 0


def _look(
    facts: dict[str, object], above: int | None, source: Source, objects: Objects, *, fast: bool
) -> list[str]:
    """What is wrong with one image."""
    found = []
    if "backing-filename" in facts:
        if "backing-filename-format" not in facts:
            found.append("does not say of which format its backing file is")
        if "full-backing-filename" not in facts:
            found.append(f"its backing file '{facts['backing-filename']}' cannot be found")
    if facts.get("dirty-flag"):
        found.append("was not closed")
    size = facts["virtual-size"]
    if above is not None and isinstance(size, int) and size > above:
        found.append(f"is larger than the image above it ({above} bytes): its end is hidden")
    if not fast:
        try:
            found += check_quietly(source, objects)
        except Failure as failure:
            found.append(text_of(failure))
    return found
