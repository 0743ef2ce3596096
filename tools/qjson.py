"""JSON and listings as QEMU's tools print them: the order of an object's members is that of a hash
table, and everything that is not ASCII is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["compact", "described", "ordered", "pretty"]

_BUCKETS = 512
_SPECIAL = re.compile(r"[^ !#-\[\]-~]")
_SHORT = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}


def _bucket(key: str) -> int:
    """Where a member stands in the table (the hash function of gdbm's and tdb's tables)."""
    data = key.encode()
    value = 0x238F13AF * len(data)
    for index, byte in enumerate(data):
        value += byte << (index * 5 % 24)
    return (1103515243 * (value & 0xFFFF_FFFF) + 12345) % (1 << 32) % _BUCKETS


def ordered(members: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The members in their order: by bucket."""
    return sorted(members.items(), key=lambda member: _bucket(member[0]))


def pretty(value: object, indent: int = 0) -> str:
    """A value as JSON, four blanks deeper with each level."""
    inner, outer = " " * 4 * (indent + 1), " " * 4 * indent
    if isinstance(value, Mapping):
        lines = [f"{_string(key)}: {pretty(item, indent + 1)}" for key, item in ordered(value)]
        left, right = "{}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        lines = [pretty(item, indent + 1) for item in value]
        left, right = "[]"
    elif isinstance(value, str):
        return _string(value)
    else:
        return json.dumps(value)
    body = ",\n".join(inner + line for line in lines)
    return f"{left}\n{body}{chr(10) if lines else ''}{outer}{right}"


def compact(value: object) -> str:
    """A value as JSON in one line."""
    if isinstance(value, Mapping):
        members = (f"{_string(key)}: {compact(item)}" for key, item in ordered(value))
        return "{" + ", ".join(members) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(compact, value)) + "]"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(text: str) -> str:
    return '"' + _SPECIAL.sub(_escaped, text) + '"'


def _escaped(match: re.Match[str]) -> str:
    char = match[0]
    short = _SHORT.get(char)
    if short is not None:
        return short
    code = ord(char)
    if 0xD800 <= code < 0xE000:  # a byte that was no UTF-8
        return "\\uFFFD"
    return "".join(f"\\u{unit:04X}" for unit in _utf16(code))


def _utf16(code: int) -> tuple[int, ...]:
    if code < 1 << 16:
        return (code,)
    code -= 1 << 16
    return 0xD800 | code >> 10, 0xDC00 | code & 0x3FF


def described(value: Mapping[str, Any] | Sequence[Any], indent: int) -> Iterator[str]:
    """Facts as lines for people."""
    blanks = " " * 4 * indent
    items: list[tuple[str, Any]]
    if isinstance(value, Mapping):
        items = [(key.replace("-", " "), item) for key, item in ordered(value)]
    else:
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    for name, item in items:
        if isinstance(item, Mapping | list | tuple):
            yield f"{blanks}{name}:"
            yield from described(item, indent + 1)
        elif isinstance(item, bool):
            yield f"{blanks}{name}: {'true' if item else 'false'}"
        else:
            yield f"{blanks}{name}: {item}"
