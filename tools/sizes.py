"""Numbers and sizes as QEMU's tools read them."""

from __future__ import annotations

import re

from .messages import Failure, warn

__all__ = ["INT64_MAX", "INT_MAX", "cvtnum", "parse_number", "parse_size"]

INT_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1

_SIZE = re.compile(r"[ \t\n]*\+?(?:(0[xX][0-9a-fA-F]+)|([0-9]+)(?:(\.[0-9]*))?)([bkmgtpe]?)", re.I)


def parse_size(text: str) -> int:
    """Bytes: ``512``, ``0x200``, ``64k``, ``1.5M``.

    Raises ValueError for what is no size, OverflowError from 2^64 on.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no size")
    hexadecimal, whole, fraction, suffix = match.groups()
    unit = 1 << 10 * "bkmgtpe".index((suffix or "b").lower())
    if hexadecimal is not None:
        if suffix and suffix not in "bB":
            warn(f"Using a multiplier suffix on hex numbers is deprecated: {text}")
        value = int(hexadecimal, 16) * unit
    else:
        part = float("0" + fraction) if fraction else 0.0
        if part and unit == 1:
            raise ValueError(f"'{text}' has a part of a byte")
        value = int(whole) * unit + int(part * unit + 0.5)
    if value >= 1 << 64:
        raise OverflowError(f"'{text}' is too large")
    return value


def cvtnum(name: str, text: str, low: int = 0, high: int = INT64_MAX) -> int:
    """The size ``text`` given for ``name``. Raises Failure (two lines, or one)."""
    try:
        value = parse_size(text)
    except OverflowError:
        value = -1
    except ValueError:
        from .messages import report

        report(f"Invalid {name} specified. You may use k, M, G, T, P or E suffixes for")
        raise Failure(
            "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ) from None
    if not low <= value <= high:
        raise Failure(f"Invalid {name} specified. Must be between {low} and {high}.")
    return value


def parse_number(text: str, low: int, high: int) -> int | None:
    """A number as C's strtol reads one of any base; None if it is none or outside the limits."""
    match = re.fullmatch(r"[ \t\n]*([-+]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", text)
    if match is None:
        return None
    digits = match[2]
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
    value = int(digits, base)
    value = -value if match[1] == "-" else value
    return value if low <= value <= high else None
