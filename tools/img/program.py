"""The program as a whole: its own options, then a subcommand."""

from __future__ import annotations

import os
import signal
import sys

from ... import __version__
from ..output import finish

TYPE_CHECKING = False  # as type checkers know it; importing typing takes time at every start
if TYPE_CHECKING:
    from ..messages import Failure

__all__ = ["VERSION", "run"]

VERSION = "7.2.22"
"""The version of qemu-img whose language this is."""


def run(argv: list[str]) -> int:
    """Run the command line ``argv`` (the program's name first); returns the exit status."""
    name = os.path.basename(argv[0])
    if argv[1:2] in (["--version"], ["-V"]):
        return finish(0, f"{name} version {VERSION} (pyvirtio {__version__})\n")
    from ..messages import Failure, say_more, text_of

    _buffer_output()
    try:
        return finish(_run(argv))
    except Failure as failure:
        return _fail(failure)
    except BrokenPipeError:
        return finish(0)
    except KeyboardInterrupt:
        finish(0)
        say_more("\n")
        # As a shell expects of one that was interrupted.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 130
    except (OSError, ValueError, KeyError, MemoryError, ArithmeticError) as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, Failure):
            behind = behind.__context__
        # Closing the image failed as well; what came first says more.
        return _fail(Failure(text_of(error)) if behind is None else behind)


def _fail(failure: Failure) -> int:
    from ..messages import report, say_more

    if failure.message:
        report(failure.message)
        say_more(failure.hint)
    return finish(failure.status)


def _buffer_output() -> None:
    """As C's streams do it: into a pipe, output comes after what is said of errors. And any file
    name can be printed."""
    stdout = sys.__stdout__
    if stdout is not None and stdout is sys.stdout and not stdout.isatty():
        stdout.flush()
        sys.stdout = open(  # noqa: SIM115 (it lives as long as the program)
            1, "w", encoding="utf-8", errors="surrogateescape", closefd=False
        )
    else:
        reconfigure = getattr(sys.stdout, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="surrogateescape")


def _run(argv: list[str]) -> int:
    from ..getopt import Option, UsageError, parse
    from ..messages import Failure, report, say_more
    from .commands import OURS, QEMU

    options = (
        Option(("--help", "-h")),
        Option(("--version", "-V")),
        Option(("--trace", "-T"), "pattern"),
    )
    try:
        if len(argv) < 2:
            raise UsageError("Not enough arguments")
        found, rest = parse(argv[1:], options, permute=False, before=argv[0])
        for option, _ in found:
            if option == "--help":
                return _help()
            if option == "--version":
                return run([argv[0], "--version"])
        if not rest:
            return 0
        command = rest[0]
        if command not in QEMU and command not in OURS:
            raise UsageError(f"Command not found: {command}")
        return _call(command, rest)
    except UsageError as error:
        report(str(error))
        say_more(f"Try '{os.path.basename(argv[0])} --help' for more information\n")
        raise Failure() from None


def _call(command: str, words: list[str]) -> int:
    from importlib import import_module

    from ..getopt import UsageError, parse
    from ..messages import say_more

    module = import_module(f".{command.replace('-', '_')}", __package__)
    arguments = words[1:]
    if command == "resize" and len(arguments) < 2:
        raise UsageError("Not enough arguments")
    last = arguments.pop() if command == "resize" else None
    try:
        found, operands = parse(arguments, module.OPTIONS, before=words[0])
    except UsageError as error:
        if command != "measure":
            raise
        # This one leaves the message to getopt, and goes on to the help text.
        say_more(f"measure: {error}\n")
        return _help()
    if any(option == "--help" for option, _ in found):
        return _help()
    if last is not None:
        operands.append(last)  # a size may begin with a dash
    status: int = module.run(found, operands)
    return status


def _help() -> int:
    from .help import help_text

    print(help_text(), end="")
    return 0
