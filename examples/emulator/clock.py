"""Guest time. One tick is 100 ns: the timebase of QEMU's virt board is 10 MHz.

By default time is made of instructions, so a run is the same each time, however busy the host is:
so many instructions are one tick, and touching a device or looking at the clock costs a fixed
number of ticks. A guest that waits in a loop until the time has come, or a byte, would otherwise
wait for ages: going through Python is hundreds of times slower than an instruction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from pyvirtio.backend.state import StateReader, StateWriter

__all__ = ["TICKS_PER_SECOND", "Clock", "InstructionClock", "WallClock"]

TICKS_PER_SECOND = 10_000_000


class Clock(Protocol):
    """Where a board gets its time from."""

    def now(self) -> int:
        """Ticks since the board was switched on; looking changes nothing."""
        ...

    def look(self) -> int:
        """The time as the guest reads it."""
        ...

    def touched(self) -> None:
        """The guest has accessed a register of a device."""
        ...

    def ran(self, instructions: int) -> None:
        """That many instructions have been run."""
        ...

    def budget(self, until: int, most: int) -> int:
        """How many instructions, from 1 to ``most``, may run before tick ``until``."""
        ...

    def sleep_until(self, tick: int) -> None:
        """The guest has nothing to do before ``tick``: let the time pass."""
        ...

    @property
    def state_version(self) -> int:
        """The version of what :meth:`save_state` writes."""
        ...

    def save_state(self, stream: StateWriter, /) -> None:
        """Write what time it is."""
        ...

    def load_state(self, stream: StateReader, /) -> Callable[[], object]:
        """Read it again; returns how to make it that time."""
        ...


class InstructionClock:
    """Time by instructions run: ``rate`` of them make a tick.

    ``cost`` is the ticks that a look at the clock takes, and an access to a device.
    """

    def __init__(self, rate: int = 10, cost: int = 30) -> None:
        self._rate = rate
        self._cost = cost * rate
        self._instructions = 0

    def now(self) -> int:
        return self._instructions // self._rate

    def look(self) -> int:
        self._instructions += self._cost
        return self._instructions // self._rate

    def touched(self) -> None:
        self._instructions += self._cost

    def ran(self, instructions: int) -> None:
        self._instructions += instructions

    def budget(self, until: int, most: int) -> int:
        return max(1, min(most, until * self._rate - self._instructions))

    def sleep_until(self, tick: int) -> None:
        self._instructions = max(self._instructions, tick * self._rate)

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        stream.u64(self._instructions)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        instructions = stream.u64()

        def adopt() -> None:
            self._instructions = instructions

        return adopt


class WallClock:
    """Time by the host's clock."""

    def __init__(self) -> None:
        self._start = time.monotonic_ns()

    def now(self) -> int:
        return (time.monotonic_ns() - self._start) // 100

    look = now

    def touched(self) -> None:
        """Took the time it took."""

    def ran(self, instructions: int) -> None:
        """Took the time it took."""

    def budget(self, until: int, most: int) -> int:
        return most

    def sleep_until(self, tick: int) -> None:
        time.sleep(max(0, tick - self.now()) / TICKS_PER_SECOND)

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        stream.u64(self.now())

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        now = stream.u64()

        def adopt() -> None:
            # Guest time goes on from where it was.
            self._start = time.monotonic_ns() - 100 * now

        return adopt
