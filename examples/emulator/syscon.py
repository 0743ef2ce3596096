"""The switch: SiFive's test finisher, by which a guest powers the board off or resets it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from pyvirtio.backend.state import StateReader, StateWriter

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

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write whether and how the board has stopped."""
        stream.text("" if self.power is None else self.power.name)
        stream.u32(self.code)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read it; returns how to put it in force."""
        name, code = stream.text(), stream.u32()
        if name and name not in Power.__members__:
            raise stream.malformed(f"has stopped as {name!r}, which is no way to stop")

        def adopt() -> None:
            self.power, self.code = Power[name] if name else None, code

        return adopt
