"""The core-local interruptor (SiFive CLINT): the timer and the software interrupt of one hart.

======  =========  ==========================================================
offset  register
======  =========  ==========================================================
0x0000  msip       bit 0 is the software interrupt
0x4000  mtimecmp   the timer interrupt is pending while ``mtime >= mtimecmp``
0xbff8  mtime      ticks; writing it moves the guest's clock
======  =========  ==========================================================

The 64-bit registers may be read and written whole, by halves or by bytes. Unicorn makes two
accesses of 32 bits of one of 64, so reading the low half of ``mtime`` keeps the high half for the
access that follows.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvirtio.backend.state import StateReader, StateWriter

from .clock import Clock

__all__ = ["NEVER", "Clint"]

NEVER = (1 << 64) - 1
_MSIP, _MTIMECMP, _MTIME = 0x0000, 0x4000, 0xBFF8


class Clint:
    """``timer(level)`` and ``software(level)`` are the two lines to the hart."""

    def __init__(
        self, clock: Clock, timer: Callable[[bool], None], software: Callable[[bool], None]
    ) -> None:
        self._clock = clock
        self._timer = timer
        self._software = software
        self._msip = 0
        self._mtimecmp = NEVER
        self._shift = 0
        self._kept: int | None = None

    def mtime(self) -> int:
        """The time as the guest reads it, in ticks, from a register or the ``time`` CSR."""
        return (self._clock.look() + self._shift) & NEVER

    def deadline(self) -> int:
        """When the timer goes off next, in ticks of the clock."""
        return NEVER if self._mtimecmp == NEVER else self.to_clock(self._mtimecmp)

    def to_clock(self, mtime: int) -> int:
        """The tick of the clock at which ``mtime`` has that value."""
        return max(0, mtime - self._shift)

    def update(self) -> None:
        """Set the timer's line to what the time says."""
        self._timer(self._mtimecmp != NEVER and self._clock.now() >= self.deadline())

    def read(self, offset: int, size: int) -> int:
        """A register, or part of one; 0 where there is none."""
        kept, self._kept = self._kept, None
        if offset < _MSIP + 4:
            start, value = _MSIP, self._msip
        elif _MTIMECMP <= offset < _MTIMECMP + 8:
            start, value = _MTIMECMP, self._mtimecmp
        elif _MTIME <= offset < _MTIME + 8:
            high = offset >= _MTIME + 4
            start, value = _MTIME, kept if high and kept is not None else self.mtime()
            if not high:
                self._kept = value
        else:
            return 0
        return value >> 8 * (offset - start) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register or part of one, and set the lines accordingly."""

        def merged(old: int, start: int) -> int:
            shift = 8 * (offset - start)
            mask = ((1 << 8 * size) - 1) << shift
            return (old & ~mask | value << shift & mask) & NEVER

        if offset < _MSIP + 4:
            self._msip = merged(self._msip, _MSIP) & 1
            self._software(bool(self._msip))
        elif _MTIMECMP <= offset < _MTIMECMP + 8:
            self._mtimecmp = merged(self._mtimecmp, _MTIMECMP)
            self.update()
        elif _MTIME <= offset < _MTIME + 8:
            now = self._clock.now()
            self._shift = merged((now + self._shift) & NEVER, _MTIME) - now
            self.update()

    # -- snapshots -----------------------------------------------------------------------------

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write the registers."""
        stream.u8(self._msip)
        stream.u64(self._mtimecmp)
        stream.u64(self._shift & NEVER)
        stream.flag(self._kept is not None)
        stream.u64(self._kept or 0)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read them; returns how to put them in force. The hart has its wires already."""
        msip, mtimecmp, shift = stream.u8() & 1, stream.u64(), stream.u64()
        has_kept, kept = stream.flag(), stream.u64()

        def adopt() -> None:
            self._msip, self._mtimecmp = msip, mtimecmp
            self._shift = shift - (1 << 64) if shift >> 63 else shift
            self._kept = kept if has_kept else None

        return adopt
