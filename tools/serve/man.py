"""``pyvirtio-serve man``: the manual pages."""

from __future__ import annotations

from ..messages import say_more
from ..troff import print_head, print_options, quoted
from .arguments import SERVERS, options_of

__all__ = ["run"]


def run(program: str, arguments: list[str]) -> int:
    """Print the page of the program, or of one subcommand; the exit status."""
    from .program import COMMANDS

    name = program.split()[0]
    if len(arguments) > 1 or any(word not in SERVERS for word in arguments):
        say_more(f"{program}: the name of a server is expected, or none: {', '.join(SERVERS)}\n")
        return 2
    title = "-".join([name, *arguments])
    if arguments:
        command = arguments[0]
        print_head(title, f"serve {COMMANDS[command][1]}")
        operand = "[OPTIONS] IMAGE"
        print(f".SH SYNOPSIS\n.B {quoted(f'{name} {command}')}\n{quoted(operand)}")
        print_options(options_of(command))
        return 0
    print_head(title, "give disk images to other programs")
    print(f".SH SYNOPSIS\n.B {quoted(name)}\nCOMMAND [OPTIONS] IMAGE\n.SH COMMANDS")
    for command, (_, text) in COMMANDS.items():
        print(f".TP\n.B {quoted(command)}\n{quoted(text)}")
    return 0
