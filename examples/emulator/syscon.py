"""The switch: SiFive's test finisher, by which a guest powers the board off or resets it."""

from __future__ import annotations

from enum import Enum

__all__ = ["Power", "TestFinisher"]

_FAIL, _PASS, _RESET = 0x3333, 0x5555, 0x7777


class Power(Enum):
    """How a board came to stop."""

    OFF = "powered off"
    RESET = "reset"
    FAILED = "powered off, telling of a failure"
    QUIT = "stopped by the user"
    ASLEEP = "waiting for an interrupt that cannot come"


class TestFinisher:
    """``power`` is None while the board runs, then what the guest asked for."""

    SIZE = 0x1000
    __test__ = False  # the name is SiFive's; it is no test case

    def __init__(self) -> None:
        self.power: Power | None = None
        self.code = 0
        """The exit code a failing guest gave."""

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The low half is the command, the high half the code of a failure."""
        if offset != 0 or size < 2:
            return
        command = value & 0xFFFF
        if command == _PASS:
            self.power = Power.OFF
        elif command == _RESET:
            self.power = Power.RESET
        elif command == _FAIL:
            self.power = Power.FAILED
            self.code = value >> 16 & 0xFFFF
