"""``pyvirtio-serve completion``: what shells need to complete this program's command lines."""

from __future__ import annotations

from ..getopt import Option
from ..messages import say_more
from ..shells import SHELLS, print_completion
from .arguments import SERVERS, options_of

__all__ = ["run"]


def run(program: str, arguments: list[str]) -> int:
    """Print it; the exit status."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        say_more(f"{program}: the name of a shell is expected: {', '.join(SHELLS)}\n")
        return 2
    options: dict[str, tuple[Option, ...]] = {name: options_of(name) for name in SERVERS}
    options |= {"completion": (), "man": ()}
    print_completion(
        arguments[0],
        program.split()[0],
        options,
        values={"FORMAT": ("luks", "qcow2", "raw")},
        operands={"completion": SHELLS, "man": tuple(SERVERS)},
    )
    return 0
