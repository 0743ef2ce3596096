"""Options of block drivers: QEMU's ``key=value,…`` strings, its JSON, and typed values.

Options of a graph of nodes are one flat dictionary with dotted keys (``file.driver``); values are
strings, or what JSON has (booleans, numbers, None). Errors are ValueErrors with QEMU's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "Options",
    "flatten",
    "parse_boolean",
    "parse_json",
    "parse_keyval",
    "parse_size",
    "subset",
    "take_value",
]

_SIZE = re.compile(r"\s*\+?(?:(0[xX][0-9a-fA-F]+)|([0-9]+)(\.[0-9]*)?)([bkmgtpeBKMGTPE]?)")
_SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)
_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")


# -- texts -----------------------------------------------------------------------------------------


def parse_keyval(
    text: str,
    *,
    implied: str | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> dict[str, str]:
    """``key=value,…`` as QemuOpts: a doubled comma stands for one in a value, the last of several
    values of a key counts.

    A first word without ``=`` is the value of the key ``implied``; others are switches, of which
    ``warn`` hears. ``id`` is checked and dropped.
    """
    options: dict[str, str] = {}
    at = 0
    first = True
    while at < len(text):
        match = re.compile(r"[^=,]*").match(text, at)
        name = match[0] if match else ""
        end = at + len(name)
        if text[end : end + 1] == "=":
            value, at = take_value(text, end + 1)
        elif first and implied is not None:
            value, at = take_value(text, at)
            name = implied
        else:
            name, value, at = _switch(name, warn), "on", end
            if name.startswith("\0"):
                name, value = name[1:], "off"
        first = False
        at += 1  # the comma
        if name == "id":
            if not _WELL_FORMED.fullmatch(value):
                raise ValueError("Parameter 'id' expects an identifier")
            continue
        options[name] = value
    return options


def take_value(text: str, at: int) -> tuple[str, int]:
    """The value that begins at ``at`` (two commas are one in it), and where it ends."""
    parts = []
    while True:
        comma = text.find(",", at)
        if comma < 0:
            parts.append(text[at:])
            return "".join(parts), len(text)
        if text[comma + 1 : comma + 2] != ",":
            parts.append(text[at:comma])
            return "".join(parts), comma
        parts.append(text[at : comma + 1])
        at = comma + 2


def _switch(name: str, warn: Callable[[str], None]) -> str:
    """The name of a switch without a value; a NUL before it says that it is off."""
    bare, state = (name[2:], "off") if name.startswith("no") else (name, "on")
    warn(f"short-form boolean option '{name}' deprecated\nPlease use {bare}={state} instead")
    return "\0" + bare if state == "off" else bare


def parse_json(text: str) -> dict[str, Any]:
    """The options in a ``json:`` name's object; QEMU's JSON takes single quotes, too."""
    import json

    try:
        value = json.loads(_requote(text), parse_constant=_refuse_constant)
        if not isinstance(value, dict):
            raise TypeError
        return flatten(value)
    except TypeError:
        raise ValueError("Invalid JSON object given") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Could not parse the JSON options: {_reason(text, error)}") from None


def _requote(text: str) -> str:
    """Strings in single quotes as strings in double quotes."""
    out = []
    quote = ""
    at = 0
    while at < len(text):
        char = text[at]
        if quote and char == "\\":
            escaped = text[at : at + 2]
            out.append("'" if escaped == "\\'" else escaped)
            at += 2
            continue
        if not quote and char in "'\"":
            quote = char
            char = '"'
        elif char == quote:
            quote = ""
            char = '"'
        elif quote == "'" and char == '"':
            char = '\\"'
        out.append(char)
        at += 1
    return "".join(out)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"invalid keyword '{name}'")


def _reason(text: str, error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "JSON nesting depth limit exceeded"
    word = re.match(r"\s*([a-zA-Z]\w*)", text)
    if word and word[1] not in ("true", "false", "null"):
        return f"JSON parse error, invalid keyword '{word[1]}'"
    import json

    if isinstance(error, json.JSONDecodeError):
        if error.pos >= len(error.doc.rstrip()):
            return "JSON parse error, premature EOI"
        if "property name" in error.msg or "delimiter" in error.msg:
            expected = "," if "','" in error.msg else "key is not a string in object"
            if expected == ",":
                return "JSON parse error, expected separator in dict"
            return f"JSON parse error, {expected}"
    return "JSON parse error, expecting value"


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects and lists as one level of dotted keys; empty ones stay as values."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = prefix + str(key)
        if isinstance(item, list):
            item = {str(index): element for index, element in enumerate(item)} or item
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, name + ".")
        else:
            flat[name] = item
    return flat


def subset(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Take out of ``options`` those that begin with ``prefix``, and return them without it."""
    names = [name for name in options if name.startswith(prefix)]
    return {name[len(prefix) :]: options.pop(name) for name in names}


# -- values ----------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes, as QEMU's ``strtosz``: ``512``, ``0x200``, ``64k``, ``1.5M``.

    Raises OverflowError for 2^64 and more, ValueError for what is no size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size")
    hexadecimal, whole, fraction, suffix = match.groups()
    unit = 1 << 10 * "bkmgtpe".index(suffix.lower() or "b")
    if hexadecimal is not None:
        value = int(hexadecimal, 16) * unit
    else:
        part = float(f"0{fraction or ''}")
        if part and unit == 1:
            raise ValueError(f"{text!r} has a part of a byte")
        value = int(whole) * unit + int(part * unit + 0.5)
    if value >= 1 << 64:
        raise OverflowError(f"{text!r} is too large")
    return value


def parse_boolean(name: str, value: Any) -> bool:
    """True or False, or QEMU's words for them."""
    if isinstance(value, bool):
        return value
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise ValueError(f"Parameter '{name}' expects 'on' or 'off'")


class Options:
    """The options given to one driver; what was not taken in the end is unknown to it.

    Names are compared with ``_`` and ``.`` as ``-``, so that keyword arguments will do.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.left: dict[str, Any] = dict(given)
        """What has not been taken yet."""

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def _find(self, name: str) -> str | None:
        if name in self.left:
            return name
        wanted = _folded(name)
        return next((given for given in self.left if _folded(given) == wanted), None)

    def take(self, name: str) -> Any:
        """The value of an option; None if it was not given."""
        found = self._find(name)
        return None if found is None else self.left.pop(found)

    def text(self, name: str) -> str | None:
        """A string (JSON's numbers and booleans have one, too)."""
        value = self.take(name)
        if isinstance(value, bool):
            return "on" if value else "off"
        return None if value is None else str(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or False, or QEMU's words for them."""
        value = self.take(name)
        return default if value is None else parse_boolean(name, value)

    def number(self, name: str, default: int = 0) -> int:
        """A number that is not negative and below 2^64."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, str) and value.isascii():
            try:
                value = int(value, 0)
            except ValueError:
                value = None
            else:
                if -(1 << 63) <= value < 0:
                    value += 1 << 64  # as C's strtoull has it
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
            raise ValueError(f"Parameter '{name}' expects a number")
        return value

    def size(self, name: str) -> int | None:
        """Bytes, as a number or a text like ``64k``; None if it was not given."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, str):
            try:
                value = parse_size(value)
            except OverflowError:
                value = -1
            except ValueError:
                raise ValueError(
                    f"Parameter '{name}' expects a non-negative number below 2^64\n{_SIZE_HINT}"
                ) from None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
            raise ValueError(f"Parameter '{name}' expects a non-negative number below 2^64")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        """One of some words."""
        value = self.text(name)
        if value is None:
            return default
        if value not in allowed:
            raise ValueError(f"invalid parameter value: {value}")
        return value

    def group(self, prefix: str) -> dict[str, Any]:
        """Take all options that begin with ``prefix``; their names without it."""
        return subset(self.left, prefix)


def _folded(name: str) -> str:
    return name.replace("_", "-").replace(".", "-")
