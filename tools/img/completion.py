"""``completion``: what a shell needs to complete this program's command lines."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from ..getopt import Option, UsageError
from ..messages import program_name
from .commands import OURS, QEMU
from .shared import HELP

__all__ = ["OPTIONS", "run"]

OPTIONS = (HELP,)

_CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe")
_FORMATS = ("luks", "qcow2", "raw")
_VALUES: dict[str, tuple[str, ...]] = {
    "fmt": _FORMATS,
    "output_fmt": _FORMATS,
    "backing_fmt": _FORMATS,
    "source_fmt": _FORMATS,
    "cache": _CACHES,
    "src_cache": _CACHES,
    "ofmt": ("human", "json"),
    "prealloc": ("off", "metadata", "falloc", "full"),
}
"""What an option's argument may be, by its name in the help; others are names of files."""
_OPERANDS = {"completion": ("bash", "zsh", "fish"), "man": tuple(sorted({**QEMU, **OURS}))}

_BASH = """\
_@FUNCTION@() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} choices=
    if [[ $word == "=" ]]; then
        word=
    elif [[ $before == "=" ]]; then
        before=${COMP_WORDS[COMP_CWORD-2]}
    fi
    if [ "$COMP_CWORD" = 1 ]; then
        choices="@COMMANDS@"
    else
        case "${COMP_WORDS[1]} $before" in
@VALUES@
        *)
            if [[ $word == -* ]]; then
                case ${COMP_WORDS[1]} in
@CASES@
                esac
            else
                case ${COMP_WORDS[1]} in
@OPERANDS@
                esac
            fi;;
        esac
    fi
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
}
complete -o default -F _@FUNCTION@ @PROGRAM@
"""


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    if len(operands) != 1 or operands[0] not in _OPERANDS["completion"]:
        raise UsageError("Expecting the name of a shell: bash, zsh or fish")
    options = {name: _options(name) for name in sorted({**QEMU, **OURS})}
    if operands[0] == "fish":
        _print_fish(program_name(), options)
        return 0
    if operands[0] == "zsh":
        print("autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit")
    _print_bash(program_name(), options)
    return 0


def _print_bash(program: str, options: dict[str, tuple[Option, ...]]) -> None:
    values = [
        _case([f"{command} {name}" for name in option.names], _VALUES[option.argument])
        for command, known in options.items()
        for option in known
        if option.argument in _VALUES
    ]
    cases = [_case([command], sorted(_names(known))) for command, known in options.items()]
    operands = [_case([command], words) for command, words in _OPERANDS.items()]
    text = _BASH.replace("@FUNCTION@", program.replace("-", "_")).replace("@PROGRAM@", program)
    text = text.replace("@COMMANDS@", " ".join(options)).replace("@VALUES@", "\n".join(values))
    text = text.replace("@CASES@", "\n".join(cases)).replace("@OPERANDS@", "\n".join(operands))
    print(text, end="")


def _case(patterns: Iterable[str], words: Iterable[str]) -> str:
    found = "|".join(f'"{pattern}"' for pattern in patterns)
    return f"        {found}) choices='{' '.join(words)}';;"


def _print_fish(program: str, options: dict[str, tuple[Option, ...]]) -> None:
    print(f"complete -c {program} -n __fish_use_subcommand -xa '{' '.join(options)}'")
    for command, known in options.items():
        here = f"complete -c {program} -n '__fish_seen_subcommand_from {command}'"
        for option in known:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in option.names
            )
            values = _VALUES.get(option.argument or "")
            more = f" -xa '{' '.join(values)}'" if values else " -r" if option.argument else ""
            print(f"{here} {names}{more} -d {_quoted(option.help)}")
        if command in _OPERANDS:
            print(f"{here} -xa '{' '.join(_OPERANDS[command])}'")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _names(options: tuple[Option, ...]) -> list[str]:
    return [name for option in options for name in option.names]


def _options(command: str) -> tuple[Option, ...]:
    options: tuple[Option, ...] = import_module(
        f".{command.replace('-', '_')}", __package__
    ).OPTIONS
    return options
