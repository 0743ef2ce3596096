"""The program as a whole: a table of subcommands, each of which is a module."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from ... import __version__

__all__ = ["COMMANDS", "run"]

COMMANDS = {
    "nbd": ("nbd", "images as exports of an NBD server"),
    "vhost-user-blk": ("vhost_user_blk", "a virtio-blk device for QEMU and other VMMs"),
    "man": ("man", "no image, but the manual page of the program or of a command"),
    "completion": ("completion", "no image, but what bash, zsh or fish completes"),
}
"""Subcommand -> module here with ``run(program, arguments) -> exit status``, and what it serves."""


def run(argv: list[str]) -> int:
    """Run the command line ``argv`` (the program's name first); returns the exit status."""
    name = os.path.basename(argv[0])
    if name == "__main__.py":
        name = "pyvirtio-serve"
    command = argv[1] if len(argv) > 1 else "--help"
    if command in ("-V", "--version"):
        print(f"{name} {__version__}")
        return 0
    if command in COMMANDS:
        module = import_module(f".{COMMANDS[command][0]}", __package__)
        try:
            status: int = module.run(f"{name} {command}", argv[2:])
        except KeyboardInterrupt:  # before it serves
            status = 130
        return status
    wanted = command in ("-h", "--help") and len(argv) > 1
    print(_usage(name), file=sys.stdout if wanted else sys.stderr)
    if not command.startswith("-"):
        print(f"{name}: there is no command {command!r}", file=sys.stderr)
    return 0 if wanted else 2


def _usage(name: str) -> str:
    lines = [f"usage: {name} COMMAND [OPTIONS] IMAGE", ""]
    lines += [f"  {command:<16} {text}" for command, (_, text) in COMMANDS.items()]
    lines += ["", f"{name} COMMAND --help tells more."]
    return "\n".join(lines)
