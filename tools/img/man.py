"""``man``: the manual pages, in the language of troff."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..getopt import UsageError
from ..messages import program_name
from ..troff import print_head, print_options, quoted
from .commands import OURS, QEMU
from .help import PARAMETERS
from .shared import HELP

__all__ = ["OPTIONS", "run"]

OPTIONS = (HELP,)


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand: the page of the program, or of one subcommand."""
    known = {**QEMU, **OURS}
    if len(operands) > 1 or (operands and operands[0] not in known):
        raise UsageError("Expecting the name of a command, or none")
    name = program_name()
    title = "-".join([name, *operands])
    if operands:
        command = operands[0]
        doc = (_module(command).__doc__ or "").partition(": ")[2].strip()
        print_head(title, doc)
        print(f".SH SYNOPSIS\n.B {quoted(f'{name} {command}')}\n{quoted(known[command])}")
        print_options(_module(command).OPTIONS)
        return 0
    print_head(title, "make, look into, check and change disk images")
    print(f".SH SYNOPSIS\n.B {quoted(name)}\n[standard options] command [command options]")
    print(".SH COMMANDS")
    for command, usage in known.items():
        doc = (_module(command).__doc__ or "").partition(": ")[2].partition("\n")[0].strip()
        print(f".TP\n.B {quoted(command)} {quoted(usage)}\n{quoted(doc)}")
    print(f".SH PARAMETERS\n.nf\n{quoted(PARAMETERS)}.fi")
    return 0


def _module(command: str) -> ModuleType:
    return import_module(f".{command.replace('-', '_')}", __package__)
