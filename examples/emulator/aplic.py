"""The advanced platform-level interrupt controller (RISC-V AIA 1.0, chapter 4), for the supervisor.

What has a wire and no messages (the serial port, virtio-mmio slots) is turned into messages here:
a source that becomes pending and is enabled is sent to the :mod:`.imsic`, as the number in its
target register, and is not pending any more. One whose wire stays high is sent again when its
number is written to ``setipnum``, which is how a driver ends its work.

============  ============================================================
offset        register (32 bits each)
============  ============================================================
0x0000        domain configuration: bit 8 enables; messages are all there is
4 * s         source configuration: 0 none, 4 and 5 edges, 6 and 7 levels
0x1C00        pending bits, to be set; 0x1CDC by number
0x1D00        wires that are high, pending bits to be cleared; 0x1DDC by number
0x1E00        enable bits, to be set; 0x1EDC by number
0x1F00        enable bits, to be cleared; 0x1FDC by number
0x2000        pending by number, once more
0x3000        sends a message of its own
0x3000 + 4*s  target of source s: the number of its message
============  ============================================================
"""

from __future__ import annotations

from collections.abc import Callable

from pyvirtio.backend.state import StateReader, StateWriter

__all__ = ["Aplic"]

_SOURCES_END, _SET_PENDING, _CLEAR_PENDING, _SET_ENABLE, _CLEAR_ENABLE = (
    *(0x1000, 0x1C00, 0x1D00),
    *(0x1E00, 0x1F00),
)
_BY_NUMBER = 0xDC
_SET_PENDING_NUMBER, _SEND, _TARGETS_END = 0x2000, 0x3000, 0x4000
_ALWAYS = 0x8000_0004
"""Of the domain configuration: what is fixed, and delivery by messages."""
_ENABLED = 1 << 8
_DETACHED, _EDGE, _LEVEL = 1, 4, 6
_LOW = 1
"""Of the modes from 4 on: the wire is active when it is low (or falls)."""
_MODES = (0, _DETACHED, 4, 5, 6, 7)
_IDENTITY = 0x7FF


class Aplic:
    """``deliver(identity)`` sends a message; ``sources`` counts from 1."""

    def __init__(self, deliver: Callable[[int], None], sources: int) -> None:
        self._deliver = deliver
        self._sources = sources
        self._all = ((1 << (sources + 1)) - 1) & ~1
        self._level = 0
        self._edges = 0
        self._on = False
        self._pending = 0
        self._enabled = 0
        self._mode = [0] * (sources + 1)
        self._target = [0] * (sources + 1)

    def set(self, source: int, level: bool) -> None:
        """A device raises or lowers its line."""
        before = self._active(source)
        self._level = self._level | 1 << source if level else self._level & ~(1 << source)
        self._wire(source, before)

    def pulse(self, source: int, on: bool) -> None:
        """An event of a device that is told of once; ``on=False`` takes it back if it waits yet."""
        before = self._active(source)
        self._edges = self._edges | 1 << source if on else self._edges & ~(1 << source)
        self._wire(source, before)

    def _active(self, source: int) -> bool:
        """The wire as its mode has it ("rectified")."""
        mode = self._mode[source]
        high = (self._level | self._edges) >> source & 1
        return mode >= _EDGE and bool(high ^ mode & _LOW)

    def _wire(self, source: int, before: bool) -> None:
        active = self._active(source)
        if active and not before:
            self._pending |= 1 << source
        elif not active and self._mode[source] >= _LEVEL:
            self._pending &= ~(1 << source)
        self._forward()

    def _forward(self) -> None:
        while self._on and (ready := self._pending & self._enabled):
            source = (ready & -ready).bit_length() - 1
            self._pending &= ~(1 << source)
            self._edges &= ~(1 << source)
            self._deliver(self._target[source] & _IDENTITY)

    # -- registers -----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A register; 0 where there is none."""
        if size != 4 or offset % 4:
            return 0
        if offset == 0:
            return _ALWAYS | _ENABLED * self._on
        if offset < _SOURCES_END:
            return self._mode[offset // 4] if offset // 4 <= self._sources else 0
        if _SEND < offset < _TARGETS_END:
            source = (offset - _SEND) // 4
            return self._target[source] if source <= self._sources else 0
        bits = {
            _SET_PENDING: self._pending,
            _CLEAR_PENDING: sum(
                1 << source for source in range(1, self._sources + 1) if self._active(source)
            ),
            _SET_ENABLE: self._enabled,
        }.get(offset & ~0xFF, 0)
        return bits >> 8 * (offset & 0xFF) & 0xFFFF_FFFF if offset & 0xFF < _BY_NUMBER else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; only aligned accesses of 32 bits do anything."""
        if size != 4 or offset % 4:
            return
        if offset == 0:
            self._on = bool(value & _ENABLED)
        elif offset < _SOURCES_END:
            self._configure(offset // 4, value)
        elif offset == _SET_PENDING_NUMBER:
            self._set_pending(1 << value if value <= self._sources else 0)
        elif offset == _SEND:
            self._deliver(value & _IDENTITY)
        elif _SEND < offset < _TARGETS_END:
            source = (offset - _SEND) // 4
            if source <= self._sources:
                self._target[source] = value
        else:
            self._write_bits(offset & ~0xFF, offset & 0xFF, value)
        self._forward()

    def _configure(self, source: int, value: int) -> None:
        if source > self._sources:
            return
        self._mode[source] = value & 7 if value & 7 in _MODES else 0
        if not self._mode[source]:
            self._pending &= ~(1 << source)
            self._enabled &= ~(1 << source)
        elif self._mode[source] >= _LEVEL and not self._active(source):
            self._pending &= ~(1 << source)

    def _write_bits(self, group: int, place: int, value: int) -> None:
        if place == _BY_NUMBER:
            bits = 1 << value if value <= self._sources else 0
        else:
            bits = value << 8 * place if place < _BY_NUMBER else 0
        if group == _SET_PENDING:
            self._set_pending(bits)
        elif group == _CLEAR_PENDING:
            self._pending &= ~bits
        elif group == _SET_ENABLE:
            self._enabled |= bits & self._all & sum(1 << s for s, m in enumerate(self._mode) if m)
        elif group == _CLEAR_ENABLE:
            self._enabled &= ~bits

    def _set_pending(self, bits: int) -> None:
        """Software makes sources pending: one that goes by its level only where its wire does."""
        for source in range(1, self._sources + 1):
            mode = self._mode[source]
            if bits >> source & 1 and mode and (mode < _LEVEL or self._active(source)):
                self._pending |= 1 << source

    # -- snapshots -----------------------------------------------------------------------------

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write the registers, and which sources are raised."""
        stream.flag(self._on)
        for bits in (self._level, self._edges, self._pending, self._enabled):
            stream.data(bits.to_bytes(self._sources // 8 + 1, "little"))
        for mode, target in zip(self._mode, self._target, strict=True):
            stream.u8(mode)
            stream.u32(target)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read them; returns how to put them in force."""
        on = stream.flag()
        level, edges, pending, enabled = (
            int.from_bytes(stream.data(), "little") & self._all for _ in range(4)
        )
        sources = [(stream.u8() & 7, stream.u32()) for _ in self._mode]

        def adopt() -> None:
            self._on, self._level, self._edges = on, level, edges
            self._pending, self._enabled = pending, enabled
            self._mode = [mode if mode in _MODES else 0 for mode, _ in sources]
            self._target = [target for _, target in sources]

        return adopt
