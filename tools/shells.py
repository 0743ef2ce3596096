"""What shells need to complete the command lines of a program with subcommands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .getopt import Option

__all__ = ["SHELLS", "print_completion"]

SHELLS = ("bash", "zsh", "fish")
Options = Mapping[str, tuple[Option, ...]]
Words = Mapping[str, tuple[str, ...]]

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


def print_completion(
    shell: str, program: str, options: Options, *, values: Words, operands: Words
) -> None:
    """Print it for one of SHELLS: ``options`` by subcommand, ``values`` of an argument by
    its name in the help, ``operands`` by subcommand. Other words are names of files."""
    if shell == "fish":
        _print_fish(program, options, values, operands)
        return
    if shell == "zsh":
        print("autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit")
    _print_bash(program, options, values, operands)


def _print_bash(program: str, options: Options, values: Words, operands: Words) -> None:
    arguments = [
        _case([f"{command} {name}" for name in option.names], values[option.argument or ""])
        for command, known in options.items()
        for option in known
        if option.argument in values
    ]
    cases = [_case([command], sorted(_names(known))) for command, known in options.items()]
    others = [_case([command], words) for command, words in operands.items()]
    text = _BASH.replace("@FUNCTION@", program.replace("-", "_")).replace("@PROGRAM@", program)
    text = text.replace("@COMMANDS@", " ".join(options)).replace("@VALUES@", "\n".join(arguments))
    text = text.replace("@CASES@", "\n".join(cases)).replace("@OPERANDS@", "\n".join(others))
    print(text, end="")


def _case(patterns: Iterable[str], words: Iterable[str]) -> str:
    found = "|".join(f'"{pattern}"' for pattern in patterns)
    return f"        {found}) choices='{' '.join(words)}';;"


def _print_fish(program: str, options: Options, values: Words, operands: Words) -> None:
    print(f"complete -c {program} -n __fish_use_subcommand -xa '{' '.join(options)}'")
    for command, known in options.items():
        here = f"complete -c {program} -n '__fish_seen_subcommand_from {command}'"
        for option in known:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in option.names
            )
            known_values = values.get(option.argument or "")
            more = " -r" if option.argument else ""
            if known_values:
                more = f" -xa '{' '.join(known_values)}'"
            print(f"{here} {names}{more} -d {_quoted(option.help)}")
        if command in operands:
            print(f"{here} -xa '{' '.join(operands[command])}'")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _names(options: tuple[Option, ...]) -> list[str]:
    return [name for option in options for name in option.names]
