"""Lists of options, ``-o name=value,…``, read against a table of what there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..backend.options import take_value
from .messages import Failure
from .sizes import parse_size

__all__ = ["HINT", "Given", "Setting", "accumulate", "escaped", "help_lines", "split", "wants_help"]

HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)

_TYPES = {"str": "str", "size": "size", "num": "num", "bool": "bool (on/off)"}
_NUMBER = re.compile(r"[ \t\n]*([-+]?)(0[xX][0-9a-fA-F]+|[0-9]+)")


@dataclass(frozen=True, slots=True)
class Setting:
    """An option that a list may have."""

    name: str
    kind: str
    """``str``, ``size``, ``num`` or ``bool``."""
    help: str
    default: str | None = None
    """What is shown where it was not given; None: nothing."""


class Given:
    """The options given, by name, in the types that the table says."""

    def __init__(self, settings: tuple[Setting, ...]) -> None:
        self._settings = {setting.name: setting for setting in settings}
        self.texts: dict[str, str] = {}
        self.values: dict[str, str | int | bool] = {}

    def parse(self, text: str) -> None:
        """Take a list. Raises Failure, without a program's name, for what is unknown or wrong."""
        for name, value in split(text):
            self.put(name, value)

    def put(self, name: str, value: str) -> None:
        """Take one option."""
        setting = self._settings.get(name)
        if setting is None:
            raise Failure(f"Invalid parameter '{name}'")
        self.values[name] = _typed(setting, value)
        self.texts[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._settings

    def text(self, name: str) -> str | None:
        """The value of an option as a string; None if it was not given."""
        return self.texts.get(name)

    def number(self, name: str) -> int | None:
        """The value of a size or a number; None if it was not given."""
        value = self.values.get(name)
        return value if isinstance(value, int) else None

    def flag(self, name: str) -> bool:
        """The value of a switch; False if it was not given."""
        return self.values.get(name) is True

    def shown(self) -> str:
        """All that was given or has a default, as ``create`` prints it."""
        words = []
        for name, setting in self._settings.items():
            value = self.values.get(name)
            if name not in self.values:
                if setting.default is not None:
                    words.append(f"{name}={escaped(setting.default)}")
            elif setting.kind in ("size", "num"):
                number = int(value or 0)
                words.append(f"{name}={number - (1 << 64) if number >> 63 else number}")
            else:
                words.append(f"{name}={escaped(self.texts[name])}")
        return " ".join(words)


def _typed(setting: Setting, value: str) -> str | int | bool:
    name = setting.name
    if setting.kind == "bool":
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
        raise Failure(f"Parameter '{name}' expects 'on' or 'off'")
    if setting.kind == "num":
        match = _NUMBER.fullmatch(value)
        if match is None:
            raise Failure(f"Parameter '{name}' expects a number")
        digits = match[2]
        if digits[:2] in ("0x", "0X"):
            number = int(digits, 16)
        elif digits[0] == "0" and digits.strip("01234567"):
            raise Failure(f"Parameter '{name}' expects a number")
        else:
            number = int(digits, 8 if digits[0] == "0" else 10)
        if number >> 64:
            raise Failure(f"Value '{value}' is too large for parameter '{name}'")
        return -number % (1 << 64) if match[1] == "-" else number
    if setting.kind == "size":
        try:
            return parse_size(value)
        except OverflowError:
            raise Failure(f"Value '{value}' is out of range for parameter '{name}'") from None
        except ValueError:
            raise Failure(
                f"Parameter '{name}' expects a non-negative number below 2^64\n{HINT}"
            ) from None
    return value


def split(text: str, implied: str | None = None) -> Iterator[tuple[str, str]]:
    """(name, value) of each option; a doubled comma stands for one in a value.

    A word without ``=`` is a switch that is on (or, with ``no`` before it, off); the first may
    also be the value of the option ``implied``.
    """
    at, first = 0, True
    while at < len(text):
        end = at
        while end < len(text) and text[end] not in "=,":
            end += 1
        name = text[at:end]
        if text[end : end + 1] == "=":
            value, at = take_value(text, end + 1)
        elif first and implied is not None:
            name = implied
            value, at = take_value(text, at)
        elif name.startswith("no"):
            name, value, at = name[2:], "off", end
        else:
            value, at = "on", end
        yield name, value
        first = False
        at += 1


def accumulate(before: str | None, more: str) -> str:
    """Two lists in one. Raises Failure for one that would run into the other."""
    commas = len(more) - len(more.rstrip(","))
    if not more or more[0] == "," or commas % 2:
        raise Failure(f"Invalid option list: {more}")
    return more if before is None else f"{before},{more}"


def wants_help(text: str) -> bool:
    """Whether a list asks for help."""
    at = 0
    while at < len(text):
        value, at = take_value(text, at)
        if value in ("help", "?"):
            return True
        at += 1
    return False


def escaped(value: str) -> str:
    """A value as it has to stand in a list."""
    return value.replace(",", ",,")


def help_lines(settings: tuple[Setting, ...]) -> Iterator[str]:
    """What ``-o help`` lists, sorted by name."""
    for setting in sorted(settings, key=lambda setting: setting.name):
        head = f"  {setting.name}=<{_TYPES[setting.kind]}>"
        yield f"{head:<24} - {setting.help}"
