"""A Linux guest at its shell, for programs to talk to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pyvirtio

from .board import Board
from .linux import COMMAND_LINE, RAM, find_linux
from .script import ScriptError, Session

__all__ = ["LinuxGuest"]

_PROMPT = "guest# "


class LinuxGuest:
    """Boots Debian's Linux from ``disks[0]``, up to its shell.

    ``arguments`` are added to the kernel's command line. ``echo(text)`` gets what the guest
    writes; ``make_board`` makes another kind of board. Raises ScriptError if the guest does
    something else, PackageError if there is none.
    """

    def __init__(
        self,
        disks: Sequence[pyvirtio.Disk | pyvirtio.VirtioBlk],
        *,
        arguments: str = "",
        echo: Callable[[bytes], object] | None = None,
        make_board: Callable[..., Board] = Board,
    ) -> None:
        linux = find_linux()
        self.session = Session(echo)
        self.board = make_board(self.session.send_out, ram=RAM, disks=disks)
        self.session.connect(self.board)
        self.board.start_supervisor(
            self.board.load_linux(linux.kernel),
            f"{COMMAND_LINE} root=/dev/vda {arguments}",
            linux.initramfs,
        )
        self.session.expect(_PROMPT)
        # The shell would break long lines at the edge of a terminal.
        self.run("stty cols 4000")

    def run(self, command: str, *, fails: bool = False) -> str:
        """What a command writes; its status must be 0, or (``fails``) must not be 0."""
        self.session.send(f'{command}; echo "=$?="\r')
        said = self.session.expect(_PROMPT).replace("\r", "")
        found = re.search(r"=(\d+)=\n", said)
        if found is None:
            raise ScriptError(f"{command}: no status in {said!r}")
        output = said[: found.start()].partition("\n")[2]
        if (found[1] != "0") != fails:
            raise ScriptError(f"{command}: status {found[1]}\n{output}")
        return output

    def warnings(self) -> list[str]:
        """What the kernel has warned of since it was asked last: levels up to 4 (syslog(2))."""
        return self.run("dmesg -r | grep '^<[0-4]>'; dmesg -c >/dev/null").splitlines()

    def power_off(self) -> None:
        """Shut the guest down."""
        self.session.send("poweroff\r")
        self.session.wait_for_power_off()
        self.board.close()

    def cut_power(self) -> None:
        """Stop it without a word."""
        self.board.close()
