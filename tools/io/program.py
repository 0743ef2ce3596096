"""The program as a whole: its options, then commands from its arguments or from standard input."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ... import __version__
from ..output import finish

if TYPE_CHECKING:
    from .session import OpenFlags, Session

__all__ = ["run"]

_LETTERS = "hVc:d:f:rsnCmki:t:T:U"
_NAMES = {
    "help": ("h", False),
    "version": ("V", False),
    "cmd": ("c", True),
    "format": ("f", True),
    "read-only": ("r", False),
    "snapshot": ("s", False),
    "nocache": ("n", False),
    "copy-on-read": ("C", False),
    "misalign": ("m", False),
    "native-aio": ("k", False),
    "aio": ("i", True),
    "discard": ("d", True),
    "cache": ("t", True),
    "trace": ("T", True),
    "object": ("object", True),
    "image-opts": ("image-opts", False),
    "force-share": ("U", False),
}

_USAGE = """\
Usage: {name} [OPTIONS]... [-c STRING]... [file]
QEMU Disk exerciser

  --object OBJECTDEF   define an object such as 'secret' for
                       passwords and/or encryption keys
  --image-opts         treat file as option string
  -c, --cmd STRING     execute command with its arguments
                       from the given string
  -f, --format FMT     specifies the block driver to use
  -r, --read-only      export read-only
  -s, --snapshot       use snapshot file
  -n, --nocache        disable host cache, short for -t none
  -C, --copy-on-read   enable copy-on-read
  -m, --misalign       misalign allocations for O_DIRECT
  -k, --native-aio     use kernel AIO implementation
                       (Linux only, prefer use of -i)
  -i, --aio=MODE       use AIO mode (threads, native or io_uring)
  -t, --cache=MODE     use the given cache mode for the image
  -d, --discard=MODE   use the given discard mode for the image
  -T, --trace [[enable=]<pattern>][,events=<file>][,file=<file>]
                       specify tracing options
                       see qemu-img(1) man page for full description
  -U, --force-share    force shared permissions
  -h, --help           display this help and exit
  -V, --version        output version information and exit

See '{name} -c help' for information on available commands.

See <https://qemu.org/contribute/report-a-bug> for how to report bugs.
More information on the QEMU project at <https://qemu.org>."""

_LONGEST_LINE = 1023
"""Bytes of one command on standard input; what is longer goes on as the next."""


def run(argv: list[str]) -> int:
    """Run the command line ``argv`` (the program's name first); returns the exit status."""
    name = os.path.basename(argv[0])
    if argv[1:] in (["--version"], ["-V"]):
        return finish(0, f"{_version(name)}\n")
    try:
        status = finish(_run(name, argv))
    except BrokenPipeError:
        # Nobody reads on; what is buffered would raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return finish(130)
    return status


def _version(name: str) -> str:
    return f"{name} version 7.2.22 (pyvirtio {__version__})"


class _Exit(Exception):
    """The program ends with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _run(name: str, argv: list[str]) -> int:
    from .commands import ALL
    from .session import OpenFlags, Session
    from .text import CommandError

    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    sys.stderr.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    session = Session(name, ALL)
    flags = OpenFlags()
    try:
        lines, format, operands = _take_options(session, flags, argv)
        _open_first(session, flags, format, operands)
        failed = _run_lines(session, lines) if lines else _run_input(session)
    except _Exit as end:
        return end.status
    except CommandError:
        return 1
    session.finish()
    return 1 if failed else 0


def _take_options(
    session: Session, flags: OpenFlags, argv: list[str]
) -> tuple[list[str], str | None, list[str]]:
    """The commands given, the format, and the image's name; the rest goes where it belongs."""
    from .getopt import OptionError, parse_long

    lines: list[str] = []
    format = None
    try:
        options, operands = parse_long(argv, _LETTERS, _NAMES)
    except OptionError:
        print(_USAGE.format(name=session.program))
        raise _Exit(1) from None
    for option, value in options:
        if option == "c":
            lines.append(value)
        elif option == "f":
            format = value
        else:
            _take_option(session, flags, option, value)
    if len(operands) > 1:
        print(_USAGE.format(name=session.program))
        raise _Exit(1)
    return lines, format, operands


def _take_option(session: Session, flags: OpenFlags, option: str, value: str) -> None:
    if option == "h":
        print(_USAGE.format(name=session.program))
        raise _Exit(0)
    if option == "V":
        print(_version(session.program))
        raise _Exit(0)
    if option == "n":
        flags.direct, flags.writethrough = True, False
    elif option == "d" and not flags.set_discard(value):
        session.fail(f"Invalid discard option: {value}")
    elif option == "t" and not flags.set_cache(value):
        session.fail(f"Invalid cache option: {value}")
    elif option == "i" and not flags.set_aio(value):
        session.fail(f"Invalid aio option: {value}")
    elif option == "object":
        _add_object(session, value)
    elif option == "image-opts":
        session.image_opts = True
    for letter, attribute in (
        ("r", "read_only"),
        ("s", "snapshot"),
        ("C", "copy_on_read"),
        ("k", "native"),
        ("U", "force_share"),
    ):
        if option == letter:
            setattr(flags, attribute, True)


def _add_object(session: Session, text: str) -> None:
    from ..messages import Failure
    from ..objects import Objects

    if session.objects is None:
        session.objects = Objects()
    try:
        session.objects.add(text)
    except Failure as error:
        session.fail(error.message)


def _open_first(
    session: Session, flags: OpenFlags, format: str | None, operands: list[str]
) -> None:
    """Open the image that the command line names, if it names one."""
    from ...backend.options import parse_keyval

    if format is not None and session.image_opts:
        session.fail("--image-opts and -f are mutually exclusive")
    if not operands:
        return
    options: dict[str, Any] = {}
    name: str | None = operands[0]
    if session.image_opts:
        try:
            options |= parse_keyval(operands[0], warn=session.warn)
        except ValueError as error:
            session.fail(str(error))
        name = None
    elif format is not None:
        options["driver"] = format
    session.open(name, flags, options)


def _run_lines(session: Session, lines: list[str]) -> bool:
    """Run the commands given on the command line; True if one failed."""
    from .table import run_line

    failed = False
    for line in lines:
        failed |= not run_line(session, line)
        if session.quitting:
            break
    return failed


def _run_input(session: Session) -> bool:
    """Run the commands on standard input; True if one failed."""
    from .table import run_line

    failed = False
    read_line = _line_reader(session.program)
    while not session.quitting:
        line = read_line()
        if line is None:
            break
        session.deliver()
        failed |= not run_line(session, line)
    return failed


def _line_reader(program: str) -> Any:
    """What gives the next line after a prompt, None at the end."""
    prompt = f"{program}> "
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 -- editing and history, for input()

        def ask() -> str | None:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None

        return ask

    def read() -> str | None:
        sys.stdout.write(prompt)
        sys.stdout.flush()
        line = sys.stdin.buffer.readline(_LONGEST_LINE)
        if not line:
            return None
        return line.removesuffix(b"\n").decode(errors="surrogateescape")

    return read
