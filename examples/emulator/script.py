"""Talking to a guest by script: wait for a text, type an answer.

A script file has one command a line; ``#`` starts a comment. Texts may be quoted and then know the
escapes of Python strings:

========================  =================================================================
``expect "TEXT"``         wait until the guest has written TEXT
``send "TEXT"``           type TEXT
``line TEXT``             type TEXT and the return key
``limit SECONDS``         how long an ``expect`` may take, in guest time (60 at first)
``poweroff``              wait until the guest has powered the board off
========================  =================================================================

Limits are in the guest's time, so a script does the same on a slow host as on a quick one.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

from .board import Board
from .clock import TICKS_PER_SECOND
from .syscon import Power

__all__ = ["ScriptError", "Session", "run_script"]


class ScriptError(Exception):
    """The guest did not do what the script expects. Says where, and what it wrote instead."""


class Session:
    """A scripted conversation. Give :meth:`send_out` to the board as its ``send``.

    ``echo(text)`` is called with everything that the guest writes.
    """

    def __init__(self, echo: Callable[[bytes], object] | None = None) -> None:
        self.transcript = bytearray()
        """Everything the guest has written."""
        self.limit = 60.0
        """Seconds of guest time that :meth:`expect` waits."""
        self._echo = echo
        self._seen = 0
        self._board: Board | None = None

    def connect(self, board: Board) -> None:
        """The board to talk to. A second one may follow the first; what was written stays."""
        self._board = board
        self._seen = len(self.transcript)

    def send_out(self, byte: int) -> None:
        """The guest writes a byte."""
        self.transcript.append(byte)
        if self._echo is not None:
            self._echo(bytes((byte,)))

    def expect(self, text: str) -> str:
        """Run until the guest writes ``text``; what it wrote before that. Raises ScriptError."""
        wanted = text.encode()
        self._run(lambda: self.transcript.find(wanted, self._seen) >= 0, f"expected {text!r}")
        found = self.transcript.find(wanted, self._seen)
        before = self.transcript[self._seen : found]
        self._seen = found + len(wanted)
        return before.decode(errors="replace")

    def send(self, text: str) -> None:
        """Type ``text``."""
        self._connected().receive(text.encode())

    def command(self, line: str, prompt: str) -> str:
        """Type a command; what the guest wrote between its echo and the next prompt."""
        self.send(line + "\r")
        self.expect(line)
        return self.expect(prompt).strip("\r\n")

    def wait_for_power_off(self) -> None:
        """Run until the board stops. Raises ScriptError unless the guest has powered it off."""
        self._run(lambda: self._connected().power is Power.OFF, "expected the guest to power off")

    def _connected(self) -> Board:
        if self._board is None:
            raise ScriptError("no board is connected")
        return self._board

    def _run(self, done: Callable[[], bool], what: str) -> None:
        board = self._connected()
        deadline = board.clock.now() + round(self.limit * TICKS_PER_SECOND)
        while not done():
            if board.power is not None:
                raise ScriptError(f"{what}, but the board is {board.power.value}{self._tail()}")
            if board.clock.now() >= deadline:
                raise ScriptError(f"{what} within {self.limit:g} s of guest time{self._tail()}")
            if board.step():
                board.sleep(until=deadline)

    def _tail(self) -> str:
        tail = self.transcript[-500:].decode(errors="replace")
        return f"; the guest wrote last:\n{tail}"


def run_script(path: Path, session: Session) -> None:
    """Carry out a script file. Raises ScriptError, with the line's number, where it fails."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        try:
            _command(session, word, rest.strip())
        except ScriptError as error:
            raise ScriptError(f"{path}:{number}: {error}") from None


def _command(session: Session, word: str, argument: str) -> None:
    if word == "limit":
        try:
            session.limit = float(argument)
        except ValueError:
            raise ScriptError(f"limit takes a number of seconds, not {argument!r}") from None
    elif word == "poweroff" and not argument:
        session.wait_for_power_off()
    elif word == "expect" and argument:
        session.expect(_text(argument))
    elif word == "send" and argument:
        session.send(_text(argument))
    elif word == "line":
        session.send(_text(argument) + "\r")
    else:
        raise ScriptError(f"no such command: {word} {argument}".rstrip())


def _text(argument: str) -> str:
    if argument[:1] not in ("'", '"'):
        return argument
    try:
        value = ast.literal_eval(argument)
    except (SyntaxError, ValueError):
        value = None
    if not isinstance(value, str):
        raise ScriptError(f"not a quoted text: {argument}")
    return value
