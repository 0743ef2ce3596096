"""Options of a command, taken apart and complained about as GNU's ``getopt`` does."""

from __future__ import annotations

import sys

__all__ = ["OptionError", "parse", "parse_long"]


class OptionError(Exception):
    """An option is unknown or lacks its argument; the user has been told."""


def parse(argv: list[str], letters: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The options of ``argv`` (its name first) as (letter, argument), and the operands.

    ``letters`` are those known, a colon after those that take an argument. Raises OptionError.
    """
    return parse_long(argv, letters, {})


def parse_long(
    argv: list[str], letters: str, names: dict[str, tuple[str, bool]]
) -> tuple[list[tuple[str, str]], list[str]]:
    """As :func:`parse`; ``names`` are the long options: what each gives, and whether it takes an
    argument."""
    options: list[tuple[str, str]] = []
    operands: list[str] = []
    rest = list(argv[1:])
    while rest:
        word = rest.pop(0)
        if word == "--":
            operands += rest
            break
        if names and word.startswith("--"):
            options.append(_long(argv[0], word, rest, names))
        elif word.startswith("-") and word != "-":
            _short(argv[0], word[1:], rest, letters, options)
        else:
            operands.append(word)
    return options, operands


def _short(
    program: str, cluster: str, rest: list[str], letters: str, options: list[tuple[str, str]]
) -> None:
    while cluster:
        letter, cluster = cluster[0], cluster[1:]
        at = letters.find(letter)
        if at < 0 or letter == ":":
            _complain(f"{program}: invalid option -- '{letter}'")
        if letters[at + 1 : at + 2] != ":":
            options.append((letter, ""))
            continue
        if not cluster and not rest:
            _complain(f"{program}: option requires an argument -- '{letter}'")
        options.append((letter, cluster or rest.pop(0)))
        return


def _long(
    program: str, word: str, rest: list[str], names: dict[str, tuple[str, bool]]
) -> tuple[str, str]:
    name, equals, argument = word[2:].partition("=")
    found = [name] if name in names else [known for known in names if known.startswith(name)]
    if not found:
        _complain(f"{program}: unrecognized option '--{name}'")
    if len(found) > 1:
        listed = " ".join(f"'--{known}'" for known in found)
        _complain(f"{program}: option '--{name}' is ambiguous; possibilities: {listed}")
    meaning, takes = names[found[0]]
    if not takes:
        if equals:
            _complain(f"{program}: option '--{found[0]}' doesn't allow an argument")
        return meaning, ""
    if not equals:
        if not rest:
            _complain(f"{program}: option '--{found[0]}' requires an argument")
        argument = rest.pop(0)
    return meaning, argument


def _complain(message: str) -> None:
    sys.stderr.write(message + "\n")
    raise OptionError
