"""Manual pages, in the language of troff."""

from __future__ import annotations

from collections.abc import Iterable

from .. import __version__
from .getopt import Option

__all__ = ["print_head", "print_options", "quoted"]

_DATE = "2026-11-29"
"""Of the version that the pages are of."""


def print_head(title: str, text: str) -> None:
    """The title of a page of section 1, and its NAME."""
    print(f'.TH "{quoted(title)}" 1 "{_DATE}" "pyvirtio {__version__}" "User Commands"')
    print(f".SH NAME\n{quoted(f'{title} - {text}')}")


def print_options(options: Iterable[Option]) -> None:
    """The section OPTIONS."""
    print(".SH OPTIONS")
    for option in options:
        names = ", ".join(option.names)
        argument = f" \\fI{quoted(option.argument)}\\fR" if option.argument else ""
        print(f".TP\n\\fB{quoted(names)}\\fR{argument}\n{quoted(option.help)}")


def quoted(text: str) -> str:
    """Text for troff: no dash becomes a hyphen, no line a command."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("``", '"')
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in text.split("\n"))
