"""Numbers as they are typed, and sizes, times and buffers as they are shown."""

from __future__ import annotations

import sys

from ...backend.options import parse_size

__all__ = [
    "CommandError",
    "dump",
    "hours",
    "number",
    "pattern_byte",
    "report",
    "show_size",
    "warn",
]

MAX_REQUEST = 2147483136
"""QEMU's ``BDRV_REQUEST_MAX_BYTES``: the largest number of whole sectors in 31 bits."""

_UNITS = ((60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB"))
_INT64_MAX = (1 << 63) - 1


class CommandError(Exception):
    """A command has failed; the user has been told."""


def warn(program: str, message: str) -> None:
    """A warning on standard error."""
    sys.stderr.write(f"{program}: warning: {message}\n")


def number(text: str) -> int:
    """A size as typed. Raises CommandError, with the reason printed."""
    try:
        value = parse_size(text)
    except OverflowError:
        value = _INT64_MAX + 1
    except ValueError:
        print("Parsing error: non-numeric argument, or extraneous/unrecognized suffix --", text)
        raise CommandError from None
    if value > _INT64_MAX:
        print("Parsing error: argument too large --", text)
        raise CommandError
    return value


def pattern_byte(text: str) -> int:
    """A byte's value as typed, decimal, hexadecimal or octal. Raises CommandError."""
    digits = text.strip()
    try:
        octal = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
        value = int(digits, 8) if octal else int(digits, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 255 or "_" in text:
        print(text, "is not a valid pattern byte")
        raise CommandError
    return value


def show_size(value: float) -> str:
    """A number of bytes in the largest unit it fills."""
    digits, unit = f"{value:f}", "bytes"
    for bits, name in _UNITS:
        if value >= 1 << bits:
            digits, unit = f"{value / (1 << bits):.3f}", name
            break
    at = digits.find(".000")
    return f"{digits if at < 0 else digits[:at]} {unit}"


def hours(seconds: float, *, fixed: bool) -> str:
    """A duration; below a second only its fraction is shown, unless ``fixed``."""
    whole, fraction = divmod(seconds, 1)
    if not fixed and not whole:
        return f"{fraction:05.2f} sec"
    rest = int(whole)
    return f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60 + fraction:05.2f}"


def report(verb: str, seconds: float, offset: int, count: int, total: int, *, terse: bool) -> None:
    """Print what one operation has done and how long it took."""
    spent = hours(seconds, fixed=terse)
    rate = total / seconds if seconds else float("inf")
    operations = 1 / seconds if seconds else float("inf")
    if terse:
        print(f"{total},1,{spent},{rate:.3f},{operations:.3f}")
        return
    print(f"{verb} {total}/{count} bytes at offset {offset}")
    print(
        f"{show_size(total)}, 1 ops; {spent} ({show_size(rate)}/sec and {operations:.4f} ops/sec)"
    )


def dump(data: bytes | bytearray, offset: int) -> None:
    """Print bytes in hexadecimal and as text."""
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        digits = "".join(f"{byte:02x} " for byte in row)
        text = "".join(
            chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else "." for byte in row
        )
        print(f"{offset + start:08x}:  {digits} {text}")
