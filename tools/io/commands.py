"""All commands, in the order in which ``help`` lists them."""

from __future__ import annotations

from . import control, queries, transfers

__all__ = ["ALL"]

ALL = sorted(
    [*transfers.COMMANDS, *queries.COMMANDS, *control.COMMANDS], key=lambda command: command.name
)
