"""A person at the guest's serial port: the terminal in raw mode, and given back as it was.

Ctrl-A is the way out, as in QEMU: Ctrl-A X leaves, Ctrl-A Ctrl-A sends one, Ctrl-A H tells. Ctrl-C
goes to the guest.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Any, Self

from .board import Board
from .clock import TICKS_PER_SECOND
from .syscon import Power

__all__ = ["HELP", "Console"]

_ESCAPE = 0x01
_PATIENCE = 0.2
"""Seconds to wait for a key at a time, so that a board switched off by a signal is noticed."""
HELP = "\r\nCtrl-A X  leave   Ctrl-A H  this help   Ctrl-A Ctrl-A  send Ctrl-A\r\n"


class Console:
    """Connects standard input and output with a board. Use as a context manager.

    Standard input need not be a terminal: a file or a pipe is typed to the guest as it is, and its
    end just means that nothing more comes.
    """

    def __init__(self, source: int | None = None, sink: int | None = None) -> None:
        self._source = sys.stdin.fileno() if source is None else source
        self._sink = sys.stdout.fileno() if sink is None else sink
        self._output = bytearray()
        self._saved: list[Any] | None = None
        self._escaped = False
        self._open = True

    def __enter__(self) -> Self:
        if os.isatty(self._source):
            self._saved = termios.tcgetattr(self._source)
            tty.setraw(self._source)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._flush()
        finally:
            if self._saved is not None:
                termios.tcsetattr(self._source, termios.TCSADRAIN, self._saved)

    def send(self, byte: int) -> None:
        """The guest writes a byte: give this to the board."""
        self._output.append(byte)

    def run(self, board: Board) -> Power:
        """Run the board until it stops or the user leaves."""
        while board.power is None:
            idle = board.step()
            self._flush()
            if idle:
                self._rest(board)
            else:
                self._read(board, 0)
        return board.power

    def _rest(self, board: Board) -> None:
        """The guest sleeps: so do we, until its next timer or the next key."""
        now, tick = board.clock.now(), board.next_event()
        if not self._open:
            board.sleep()
            return
        wait = (tick - now) / TICKS_PER_SECOND
        started = time.monotonic()
        if self._read(board, min(wait, _PATIENCE)) or wait > _PATIENCE:
            board.sleep(until=now + round((time.monotonic() - started) * TICKS_PER_SECOND))
        else:
            board.sleep()

    def _read(self, board: Board, wait: float) -> bool:
        """Pass on what is typed within ``wait`` seconds; True if there was something."""
        if not self._open or not select.select([self._source], [], [], wait)[0]:
            return False
        data = os.read(self._source, 4096)
        if not data:
            self._open = False
        elif self._saved is None:
            board.receive(data)
        else:
            board.receive(self._keys(data, board))
        return bool(data)

    def _keys(self, data: bytes, board: Board) -> bytes:
        """What of the keys is for the guest."""
        passed = bytearray()
        for key in data:
            if not self._escaped:
                self._escaped = key == _ESCAPE
                if not self._escaped:
                    passed.append(key)
                continue
            self._escaped = False
            if key == _ESCAPE:
                passed.append(key)
            elif key in b"xX":
                board.finisher.power = Power.QUIT
            elif key in b"hH?":
                self._output += HELP.encode()
        return bytes(passed)

    def _flush(self) -> None:
        while self._output:
            written = os.write(self._sink, self._output)
            del self._output[:written]
