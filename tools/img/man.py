"""``man``: the manual pages, in the language of troff."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ... import __version__
from ..getopt import UsageError
from ..messages import program_name
from .commands import OURS, QEMU
from .help import PARAMETERS
from .shared import HELP

__all__ = ["OPTIONS", "run"]

OPTIONS = (HELP,)

_DATE = "2026-11-29"
"""Of the version that the pages are of."""


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand: the page of the program, or of one subcommand."""
    known = {**QEMU, **OURS}
    if len(operands) > 1 or (operands and operands[0] not in known):
        raise UsageError("Expecting the name of a command, or none")
    name = program_name()
    title = "-".join([name, *operands])
    print(f'.TH "{_quoted(title)}" 1 "{_DATE}" "pyvirtio {__version__}" "User Commands"')
    print(".SH NAME")
    if operands:
        command = operands[0]
        doc = (_module(command).__doc__ or "").partition(": ")[2].strip()
        print(_quoted(f"{title} - {doc}"))
        print(f".SH SYNOPSIS\n.B {_quoted(f'{name} {command}')}\n{_quoted(known[command])}")
        _print_options(command)
        return 0
    print(_quoted(f"{name} - make, look into, check and change disk images"))
    print(f".SH SYNOPSIS\n.B {_quoted(name)}\n[standard options] command [command options]")
    print(".SH COMMANDS")
    for command, usage in known.items():
        doc = (_module(command).__doc__ or "").partition(": ")[2].partition("\n")[0].strip()
        print(f".TP\n.B {_quoted(command)} {_quoted(usage)}\n{_quoted(doc)}")
    print(f".SH PARAMETERS\n.nf\n{_quoted(PARAMETERS)}.fi")
    return 0


def _print_options(command: str) -> None:
    print(".SH OPTIONS")
    for option in _module(command).OPTIONS:
        names = ", ".join(option.names)
        argument = f" \\fI{_quoted(option.argument)}\\fR" if option.argument else ""
        print(f".TP\n\\fB{_quoted(names)}\\fR{argument}\n{_quoted(option.help)}")


def _module(command: str) -> ModuleType:
    return import_module(f".{command.replace('-', '_')}", __package__)


def _quoted(text: str) -> str:
    """Text for troff: no dash becomes a hyphen, no line a command."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("``", '"')
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in text.split("\n"))
