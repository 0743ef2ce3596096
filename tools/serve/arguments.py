"""The options of the servers, for the manual and for completion."""

from __future__ import annotations

from importlib import import_module

from ..getopt import Option

__all__ = ["SERVERS", "options_of"]

SERVERS = {"nbd": "nbd", "vhost-user-blk": "vhost_user_blk"}
"""Subcommand -> module with ``make_parser(program)``."""


def options_of(command: str) -> tuple[Option, ...]:
    """What a server's parser knows, operands left out."""
    parser = import_module(f".{SERVERS[command]}", __package__).make_parser(command)
    return tuple(
        Option(
            tuple(action.option_strings), action.metavar if action.nargs != 0 else None, action.help
        )
        for action in parser._actions
        if action.option_strings
    )
