"""Command lines as GNU's ``getopt_long`` takes them apart: options anywhere, clusters of
short ones, long ones abbreviated."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Option", "UsageError", "parse"]


class UsageError(Exception):
    """A command line that is wrong; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command."""

    names: tuple[str, ...]
    """With their dashes, ``-f`` and ``--format``; the first is what a parse gives."""
    argument: str | None = None
    """What its argument is called in a help text; None if it takes none."""
    help: str = ""
    """One sentence for the manual."""


def parse(
    arguments: list[str], options: tuple[Option, ...], *, permute: bool = True, before: str = ""
) -> tuple[list[tuple[str, str]], list[str]]:
    """The options in ``arguments`` as (first name, argument) in their order, and what is left.

    Without ``permute`` the first operand ends the options. ``before`` is the word in front of the
    arguments (errors may name it). Raises UsageError with the texts that QEMU's tools have.
    """
    short = {name[1]: option for option in options for name in option.names if name[1] != "-"}
    long = {name[2:]: option for option in options for name in option.names if name[1] == "-"}
    found: list[tuple[str, str]] = []
    operands: list[str] = []
    at = 0
    while at < len(arguments):
        word = arguments[at]
        at += 1
        if word == "--":
            return found, operands + arguments[at:]
        if word.startswith("--"):
            option, value = _long(word, long)
            if option.argument is not None and value is None:
                if at == len(arguments):
                    raise UsageError(f"missing argument for option '{word}'")
                value, at = arguments[at], at + 1
            elif option.argument is None and value is not None:
                raise UsageError(f"unrecognized option '{word}'")
            found.append((option.names[0], value or ""))
        elif len(word) > 1 and word[0] == "-":
            previous = arguments[at - 2] if at > 1 else before
            at = _cluster(word, arguments, at, short, previous, found)
        elif permute:
            operands.append(word)
        else:
            return found, arguments[at - 1 :]
    return found, operands


def _long(word: str, options: dict[str, Option]) -> tuple[Option, str | None]:
    name, equals, value = word[2:].partition("=")
    if name in options:
        matching = [options[name]]
    else:
        matching = [option for known, option in options.items() if known.startswith(name)]
    if len({id(option) for option in matching}) != 1:
        raise UsageError(f"unrecognized option '{word}'")
    return matching[0], value if equals else None


def _cluster(
    word: str,
    arguments: list[str],
    at: int,
    options: dict[str, Option],
    previous: str,
    found: list[tuple[str, str]],
) -> int:
    """The short options of one word; where the next one is."""
    for position, letter in enumerate(word[1:], 1):
        option = options.get(letter)
        if option is None:
            # QEMU names the word before where getopt has not finished with this one.
            raise UsageError(
                f"unrecognized option '{word if position == len(word) - 1 else previous}'"
            )
        if option.argument is None:
            found.append((option.names[0], ""))
            continue
        value = word[position + 1 :]
        if not value:
            if at == len(arguments):
                raise UsageError(f"missing argument for option '{word}'")
            value, at = arguments[at], at + 1
        found.append((option.names[0], value))
        break
    return at
