"""The platform-level interrupt controller (RISC-V PLIC specification 1.0.0).

A device raises a source. The PLIC tells each context (here: hart 0 in machine mode, hart 0 in
supervisor mode) that something with a priority above its threshold waits. The hart *claims* the
source, which lowers it, serves the device, and *completes* it; only then can the source, if its
device still (or again) raises it, become pending once more.

===========  =================================================
offset       register (32 bits each)
===========  =================================================
4 * s        priority of source s; 0 is never
0x1000       pending bits
0x2000       enable bits, 0x80 apart for each context
0x200000     threshold, 0x1000 apart for each context
0x200004     claim on reading, complete on writing
===========  =================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyvirtio.backend.state import StateReader, StateWriter

__all__ = ["Plic"]

_PENDING, _ENABLE, _ENABLE_STRIDE = 0x1000, 0x2000, 0x80
_CONTEXT, _CONTEXT_STRIDE = 0x200000, 0x1000
_MAX_PRIORITY = 7


class Plic:
    """``targets[c](level)`` is the line to context ``c``; ``sources`` counts from 1."""

    def __init__(self, targets: Sequence[Callable[[bool], None]], sources: int) -> None:
        self._targets = targets
        self._sources = sources
        self._all = ((1 << (sources + 1)) - 1) & ~1
        self._level = 0
        self._edges = 0
        self._claimed = 0
        self._priority = [0] * (sources + 1)
        self._enable = [0] * len(targets)
        self._threshold = [0] * len(targets)

    def set(self, source: int, level: bool) -> None:
        """A device raises or lowers its line; a line still high at completion counts again."""
        if level:
            self._level |= 1 << source
        else:
            self._level &= ~(1 << source)
        self._update()

    def pulse(self, source: int, on: bool) -> None:
        """An event of a device that is told of once; ``on=False`` takes it back if it waits yet."""
        if on:
            self._edges |= 1 << source
        else:
            self._edges &= ~(1 << source)
        self._update()

    @property
    def _pending(self) -> int:
        return (self._level | self._edges) & ~self._claimed

    def _update(self) -> None:
        for context, target in enumerate(self._targets):
            target(self._best(context) != 0)

    def _best(self, context: int) -> int:
        """The waiting source of highest priority (the lowest of equals); 0 if none waits."""
        waiting = self._pending & self._enable[context]
        best, above = 0, self._threshold[context]
        while waiting:
            source = (waiting & -waiting).bit_length() - 1
            waiting &= waiting - 1
            if self._priority[source] > above:
                best, above = source, self._priority[source]
        return best

    def read(self, offset: int, size: int) -> int:
        """A register; 0 where there is none. Narrower accesses than 32 bits give its low part."""
        value = self._read(offset & ~3)
        if size == 8:
            value |= self._read((offset & ~3) + 4) << 32
        return value >> 8 * (offset & 3) & ((1 << 8 * size) - 1)

    def _read(self, offset: int) -> int:
        if offset < _PENDING:
            source = offset // 4
            return self._priority[source] if source <= self._sources else 0
        if offset < _ENABLE:
            return self._pending >> 8 * (offset - _PENDING) & 0xFFFFFFFF
        if offset < _CONTEXT:
            context, byte = divmod(offset - _ENABLE, _ENABLE_STRIDE)
            return self._enable[context] >> 8 * byte & 0xFFFFFFFF if self._has(context) else 0
        context, register = divmod(offset - _CONTEXT, _CONTEXT_STRIDE)
        if self._has(context) and register == 0:
            return self._threshold[context]
        if self._has(context) and register == 4:
            return self._claim(context)
        return 0

    def _has(self, context: int) -> bool:
        return context < len(self._targets)

    def _may_complete(self, context: int, source: int) -> bool:
        """Completing a source that the context has not enabled is ignored (specification, 9)."""
        return 0 < source <= self._sources and bool(self._enable[context] >> source & 1)

    def _claim(self, context: int) -> int:
        source = self._best(context)
        if source:
            self._edges &= ~(1 << source)
            self._claimed |= 1 << source
            self._update()
        return source

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; only aligned accesses of 32 or 64 bits do anything."""
        if offset & 3 or size < 4:
            return
        self._write(offset, value & 0xFFFFFFFF)
        if size == 8:
            self._write(offset + 4, value >> 32)

    def _write(self, offset: int, value: int) -> None:
        if offset < _PENDING:
            source = offset // 4
            if 0 < source <= self._sources:
                self._priority[source] = value & _MAX_PRIORITY
        elif _ENABLE <= offset < _CONTEXT:
            context, byte = divmod(offset - _ENABLE, _ENABLE_STRIDE)
            if self._has(context):
                mask = 0xFFFFFFFF << 8 * byte
                new = self._enable[context] & ~mask | value << 8 * byte
                self._enable[context] = new & self._all
        elif offset >= _CONTEXT:
            context, register = divmod(offset - _CONTEXT, _CONTEXT_STRIDE)
            if self._has(context) and register == 0:
                self._threshold[context] = value & _MAX_PRIORITY
            elif self._has(context) and register == 4 and self._may_complete(context, value):
                self._claimed &= ~(1 << value)
        self._update()

    # -- snapshots -----------------------------------------------------------------------------

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write the registers, and which sources are raised."""
        for bits in (self._level, self._edges, self._claimed, *self._enable):
            stream.data(bits.to_bytes(self._sources // 8 + 1, "little"))
        for value in (*self._priority, *self._threshold):
            stream.u8(value)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read them; returns how to put them in force. The hart has its wires already."""
        level, edges, claimed, *enable = (
            int.from_bytes(stream.data(), "little") & self._all
            for _ in range(3 + len(self._enable))
        )
        values = [stream.u8() & _MAX_PRIORITY for _ in (*self._priority, *self._threshold)]

        def adopt() -> None:
            self._level, self._edges, self._claimed, self._enable = level, edges, claimed, enable
            self._priority = values[: len(self._priority)]
            self._threshold = values[len(self._priority) :]

        return adopt
