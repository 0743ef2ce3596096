"""``completion``: what a shell needs to complete this program's command lines."""

from __future__ import annotations

from importlib import import_module

from ..getopt import UsageError
from ..messages import program_name
from .commands import OURS, QEMU
from .shared import HELP

__all__ = ["OPTIONS", "run"]

OPTIONS = (HELP,)

_BASH = """\
_@FUNCTION@() {
    local word=${COMP_WORDS[COMP_CWORD]} words=
    if [ "$COMP_CWORD" = 1 ]; then
        words="@COMMANDS@"
    elif [[ $word == -* ]]; then
        case ${COMP_WORDS[1]} in
@CASES@
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _@FUNCTION@ @PROGRAM@
"""


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    if len(operands) != 1 or operands[0] not in ("bash", "zsh", "fish"):
        raise UsageError("Expecting the name of a shell: bash, zsh or fish")
    program = program_name()
    names = sorted({**QEMU, **OURS})
    options = {name: _options(name) for name in names}
    if operands[0] == "fish":
        print(f"complete -c {program} -n __fish_use_subcommand -xa '{' '.join(names)}'")
        for name, words in options.items():
            for word in words:
                form = f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}"
                print(f"complete -c {program} -n '__fish_seen_subcommand_from {name}' {form}")
        return 0
    if operands[0] == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    cases = "\n".join(f'        {name}) words="{" ".join(o)}";;' for name, o in options.items())
    text = _BASH.replace("@FUNCTION@", program.replace("-", "_")).replace("@PROGRAM@", program)
    print(text.replace("@COMMANDS@", " ".join(names)).replace("@CASES@", cases), end="")
    return 0


def _options(command: str) -> list[str]:
    module = import_module(f".{command.replace('-', '_')}", __package__)
    return sorted(name for option in module.OPTIONS for name in option.names)
