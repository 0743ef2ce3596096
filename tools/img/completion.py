"""``completion``: what a shell needs to complete this program's command lines."""

from __future__ import annotations

from importlib import import_module

from ..getopt import Option, UsageError
from ..messages import program_name
from ..shells import SHELLS, print_completion
from .commands import OURS, QEMU
from .shared import HELP

__all__ = ["OPTIONS", "run"]

OPTIONS = (HELP,)

_CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe")
_FORMATS = ("luks", "qcow2", "raw")
_VALUES: dict[str, tuple[str, ...]] = {
    "fmt": _FORMATS,
    "output_fmt": _FORMATS,
    "backing_fmt": _FORMATS,
    "source_fmt": _FORMATS,
    "cache": _CACHES,
    "src_cache": _CACHES,
    "ofmt": ("human", "json"),
    "prealloc": ("off", "metadata", "falloc", "full"),
}
"""What an option's argument may be, by its name in the help; others are names of files."""
_OPERANDS = {"completion": SHELLS, "man": tuple(sorted({**QEMU, **OURS}))}


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    if len(operands) != 1 or operands[0] not in SHELLS:
        raise UsageError("Expecting the name of a shell: bash, zsh or fish")
    options = {name: _options(name) for name in sorted({**QEMU, **OURS})}
    print_completion(operands[0], program_name(), options, values=_VALUES, operands=_OPERANDS)
    return 0


def _options(command: str) -> tuple[Option, ...]:
    options: tuple[Option, ...] = import_module(
        f".{command.replace('-', '_')}", __package__
    ).OPTIONS
    return options
