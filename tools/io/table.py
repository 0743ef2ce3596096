"""The commands by name, and how a line becomes a call of one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .getopt import OptionError, parse
from .text import CommandError

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Arguments", "Command", "complain", "run_line", "usage"]


@dataclass(frozen=True, slots=True)
class Arguments:
    """The words of a command, taken apart."""

    options: list[tuple[str, str]]
    operands: list[str]

    def __contains__(self, letter: str) -> bool:
        return any(option == letter for option, _ in self.options)

    def last(self, letter: str) -> str | None:
        """The argument of an option, the last if it was given several times."""
        values = [value for option, value in self.options if option == letter]
        return values[-1] if values else None


@dataclass(frozen=True, slots=True)
class Command:
    """One command."""

    name: str
    call: Callable[[Session, Arguments], None]
    """Raises CommandError when it failed and has said so."""
    summary: str
    synopsis: str | None = None
    letters: str | None = None
    """Its options, as getopt has them; None: all words are operands."""
    least: int = 0
    most: int | None = 0
    """How many words may follow; None: any number."""
    operands: tuple[int, int | None] = (0, None)
    """How many of them may be no options."""
    alias: str | None = None
    writes: bool = False
    """The image must be open for writing."""
    needs_image: bool = True
    help: str = ""


def usage(command: Command) -> None:
    """Say how a command is called, and fail."""
    print(f"{command.name} {command.synopsis} -- {command.summary}")
    raise CommandError


def complain(message: str) -> None:
    """A plain message on standard error; and fail."""
    sys.stderr.write(message + "\n")
    raise CommandError


def run_line(session: Session, line: str) -> bool:
    """Run one line; False if it failed."""
    words = [word for word in line.split(" ") if word]
    if not words:
        return True
    try:
        _run(session, words)
    except CommandError:
        return False
    return True


def _run(session: Session, words: list[str]) -> None:
    command = session.find(words[0])
    if command is None:
        complain(f'command "{words[0]}" not found')
        return
    if command.needs_image and session.disk is None:
        complain("no file open, try 'help open'")
    _check_count(command, words)
    if command.writes and session.disk is not None and session.disk.read_only:
        session.fail("Block node is read-only")
    if command.letters is None:
        command.call(session, Arguments([], words[1:]))
        return
    try:
        options, operands = parse(words, command.letters)
    except OptionError:
        usage(command)
        return
    least, most = command.operands
    if len(operands) < least or (most is not None and len(operands) > most):
        usage(command)
    command.call(session, Arguments(options, operands))
    session.wrote |= command.writes


def _check_count(command: Command, words: list[str]) -> None:
    """Complain of too few or too many words."""
    count = len(words) - 1
    if count >= command.least and (command.most is None or count <= command.most):
        return
    if command.least < 0:
        return
    if command.most is None:
        expected = f"at least {command.least}"
    elif command.least == command.most:
        expected = f"{command.least}"
    else:
        expected = f"between {command.least} and {command.most}"
    complain(f"bad argument count {count} to {words[0]}, expected {expected} arguments")
