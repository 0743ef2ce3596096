"""The commands about the program itself: opening and closing, breakpoints, waiting, ending."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...backend.options import parse_boolean, parse_keyval
from .help_texts import HELP
from .session import OpenFlags, Session, debugger, reason
from .table import Arguments, Command, usage
from .text import CommandError, number

if TYPE_CHECKING:
    from ...backend.blkdebug import BlkdebugDisk

__all__ = ["COMMANDS"]

_SIGNALS = 65
"""One more than the highest number of a signal."""


# -- images ----------------------------------------------------------------------------------------


def _open(session: Session, arguments: Arguments) -> None:
    flags = OpenFlags()
    options: dict[str, Any] = {}
    for letter, value in arguments.options:
        if letter == "n":
            flags.direct, flags.writethrough = True, False
        elif letter == "t" and not flags.set_cache(value):
            session.fail(f"Invalid cache option: {value}")
        elif letter == "d" and not flags.set_discard(value):
            session.fail(f"Invalid discard option: {value}")
        elif letter == "i" and not flags.set_aio(value):
            session.fail(f"Invalid aio option: {value}")
        elif letter == "o":
            if session.image_opts:
                print("--image-opts and 'open -o' are mutually exclusive")
                raise CommandError
            options |= _options(session, value)
    flags.read_only = "r" in arguments
    flags.snapshot = "s" in arguments
    flags.copy_on_read = "C" in arguments
    flags.native = flags.native or "k" in arguments
    flags.force_share = "U" in arguments
    name = arguments.operands[0] if arguments.operands else None
    if len(arguments.operands) > 1:
        usage(OPEN)
    if session.image_opts and name is not None:
        options |= _options(session, name)
        name = None
    session.open(name, flags, options)


def _options(session: Session, text: str) -> dict[str, Any]:
    try:
        return dict(parse_keyval(text, warn=session.warn))
    except ValueError as error:
        session.fail(str(error))


def _close(session: Session, arguments: Arguments) -> None:
    session.close()


def _reopen(session: Session, arguments: Arguments) -> None:
    flags = OpenFlags()
    flags.__dict__.update(session.flags.__dict__)
    flags.read_only = session.image.read_only
    options: dict[str, Any] = {}
    cached = switched = False
    for letter, value in arguments.options:
        if letter == "c":
            if not flags.set_cache(value):
                session.fail(f"Invalid cache option: {value}")
            cached = True
        elif letter == "o":
            options |= _options(session, value)
        else:
            if switched:
                session.fail("Only one -r/-w option may be given")
            flags.read_only, switched = letter == "r", True
    if "read-only" in options:
        if switched:
            session.fail("Cannot set both -r/-w and 'read-only'")
        try:
            flags.read_only = parse_boolean("read-only", options.pop("read-only"))
        except ValueError as error:
            session.fail(str(error))
    if cached and ("cache.direct" in options or "cache.no-flush" in options):
        session.fail("Cannot set both -c and the cache options")
    session.reopen(flags, options)


# -- breakpoints -----------------------------------------------------------------------------------


def _debugger(session: Session) -> BlkdebugDisk:
    """The filter that breakpoints are set in. Raises KeyError if there is none."""
    node = debugger(session.image)
    if node is None:
        raise LookupError
    return node


def _on_breakpoint(session: Session, action: Callable[[BlkdebugDisk], None], what: str) -> None:
    try:
        action(_debugger(session))
    except KeyError:
        print(f"Could not {what}: {reason(errno.ENOENT)}")
        raise CommandError from None
    except LookupError:
        print(f"Could not {what}: {reason(errno.ENOTSUP)}")
        raise CommandError from None


def _break(session: Session, arguments: Arguments) -> None:
    event, tag = arguments.operands
    _on_breakpoint(session, lambda node: node.rules.add_breakpoint(event, tag), "set breakpoint")


def _remove_break(session: Session, arguments: Arguments) -> None:
    (tag,) = arguments.operands
    _on_breakpoint(
        session, lambda node: node.rules.remove_breakpoint(tag), f"remove breakpoint {tag}"
    )


def _resume(session: Session, arguments: Arguments) -> None:
    (tag,) = arguments.operands
    _on_breakpoint(session, lambda node: node.rules.resume(tag), "resume request")
    session.settle()


def _wait_break(session: Session, arguments: Arguments) -> None:
    try:
        node = _debugger(session)
    except LookupError:
        threading.Event().wait()  # for ever, as QEMU
        return
    node.rules.wait_suspended(arguments.operands[0])
    session.deliver()


# -- the program -----------------------------------------------------------------------------------


def _abort(session: Session, arguments: Arguments) -> None:
    os.abort()


def _sigraise(session: Session, arguments: Arguments) -> None:
    text = arguments.operands[0]
    value = number(text)
    if value > _SIGNALS:
        print(f"signal argument '{text}' is too large to be a valid signal")
        raise CommandError
    sys.stdout.flush()
    sys.stderr.flush()
    if 0 < value < _SIGNALS:
        signal.raise_signal(value)


def _sleep(session: Session, arguments: Arguments) -> None:
    text = arguments.operands[0]
    try:
        milliseconds = int(text, 0)
    except ValueError:
        milliseconds = -1
    if milliseconds < 0:
        print(text, "is not a valid number")
        raise CommandError
    session.wait(milliseconds / 1000)


def _quit(session: Session, arguments: Arguments) -> None:
    session.quitting = True


def _help(session: Session, arguments: Arguments) -> None:
    if not arguments.operands:
        for command in session.commands:
            _one_line(command.name, command)
        print("\nUse 'help commandname' for extended help.")
        return
    name = arguments.operands[0]
    found = session.find(name)
    if found is None:
        print(f"command {name} not found")
        raise CommandError
    _one_line(name, found)
    if found.help:
        print(found.help)


def _one_line(name: str, command: Command) -> None:
    words = [name] if command.synopsis is None else [name, command.synopsis]
    print(*words, "--", command.summary)


OPEN = Command(
    "open",
    _open,
    "open the file specified by path",
    "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
    "snCro:ki:t:d:U",
    least=1,
    most=None,
    alias="o",
    needs_image=False,
    help=HELP["open"],
)

COMMANDS = [
    OPEN,
    Command("close", _close, "close the current open file", alias="c"),
    Command(
        "reopen",
        _reopen,
        "reopens an image with new options",
        "[(-r|-w)] [-c cache] [-o options]",
        "c:o:rw",
        most=None,
        operands=(0, 0),
        help=HELP["reopen"],
    ),
    Command(
        "break",
        _break,
        "sets a breakpoint on event and tags the stopped request as tag",
        "event tag",
        least=2,
        most=2,
    ),
    Command("remove_break", _remove_break, "remove a breakpoint by tag", "tag", least=1, most=1),
    Command("resume", _resume, "resumes the request tagged as tag", "tag", least=1, most=1),
    Command(
        "wait_break", _wait_break, "waits for the suspension of a request", "tag", least=1, most=1
    ),
    Command("abort", _abort, "simulate a program crash using abort(3)", needs_image=False),
    Command(
        "sleep",
        _sleep,
        "waits for the given value in milliseconds",
        least=1,
        most=1,
        needs_image=False,
    ),
    Command(
        "sigraise",
        _sigraise,
        "raises a signal",
        "signal",
        least=1,
        most=1,
        needs_image=False,
        help=HELP["sigraise"],
    ),
    Command("quit", _quit, "exit the program", least=-1, most=-1, alias="q", needs_image=False),
    Command(
        "help",
        _help,
        "help for one or all commands",
        "[command]",
        most=1,
        alias="?",
        needs_image=False,
        help="",
    ),
]
