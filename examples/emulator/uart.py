"""The serial port: a 16550A, with its FIFO and all three interrupts that anybody uses.

"Transmitter empty" is passed on as an event, not as a level that lasts until IIR is read: small
kernels (xv6 is one) never read IIR, and rely on QEMU's serial port and PLIC, which tell it once.

Offset 0: RBR/THR (DLL), 1: IER (DLM), 2: IIR/FCR, 3: LCR, 4: MCR, 5: LSR, 6: MSR, 7: SCR.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pyvirtio.backend.state import StateReader, StateWriter

__all__ = ["Uart"]

_IER_RX, _IER_TX, _IER_LINE = 1, 2, 4
_IIR_NONE, _IIR_TX, _IIR_RX, _IIR_LINE, _IIR_TIMEOUT, _IIR_FIFO = 1, 2, 4, 6, 12, 0xC0
_FCR_ENABLE, _FCR_CLEAR_RX = 1, 2
_LCR_DLAB = 0x80
_MCR_LOOP = 0x10
_LSR_READY, _LSR_OVERRUN, _LSR_IDLE = 1, 2, 0x60
_MSR_CONNECTED = 0xB0
_TRIGGER = (1, 4, 8, 14)
_FIFO = 16


class Uart:
    """``send(byte)`` takes what the guest writes. ``interrupt(level)`` is the line of the
    receiver's interrupts; ``event(True)`` says that the transmitter is empty, ``event(False)``
    takes that back.

    Bytes from outside (:meth:`receive`) wait in a queue of any length and move into the guest's
    FIFO as there is room, so nothing typed is ever lost.
    """

    def __init__(
        self,
        send: Callable[[int], None],
        interrupt: Callable[[bool], None],
        event: Callable[[bool], None],
    ) -> None:
        self._send = send
        self._interrupt = interrupt
        self._event = event
        self._outside: deque[int] = deque()
        self._fifo: deque[int] = deque()
        self._ier = self._fcr = self._lcr = self._mcr = self._scratch = 0
        self._divisor = 12
        self._overrun = False
        self._tx_event = False
        """The transmitter has become empty and IIR has not told so yet."""

    def receive(self, data: bytes) -> None:
        """Bytes arrive on the line."""
        self._outside.extend(data)
        self._update()

    def take(self, most: int) -> bytes:
        """Up to ``most`` bytes that wait, for firmware that reads instead of the guest."""
        data = bytearray()
        while len(data) < most and (self._fifo or self._outside):
            data.append((self._fifo or self._outside).popleft())
        self._update()
        return bytes(data)

    @property
    def waiting(self) -> int:
        """Bytes received that the guest has not read."""
        return len(self._outside) + len(self._fifo)

    def _cause(self) -> int:
        """What IIR says, by priority: line status, received data, transmitter empty."""
        if self._ier & _IER_LINE and self._overrun:
            return _IIR_LINE
        if self._ier & _IER_RX and self._fifo:
            if not self._fcr & _FCR_ENABLE or len(self._fifo) >= _TRIGGER[self._fcr >> 6]:
                return _IIR_RX
            # Below the trigger level the data count as "timed out", without the wait.
            return _IIR_TIMEOUT
        if self._ier & _IER_TX and self._tx_event:
            return _IIR_TX
        return _IIR_NONE

    def _update(self) -> None:
        room = _FIFO if self._fcr & _FCR_ENABLE else 1
        while self._outside and len(self._fifo) < room and not self._mcr & _MCR_LOOP:
            self._fifo.append(self._outside.popleft())
        self._interrupt(self._cause() not in (_IIR_NONE, _IIR_TX))

    def _transmitted(self, empty: bool) -> None:
        self._tx_event = empty
        if self._ier & _IER_TX:
            self._event(empty)

    def read(self, offset: int, size: int) -> int:
        """A register: one byte, however wide the access."""
        if offset == 0:
            value = self._read_data()
        elif offset == 1:
            value = self._divisor >> 8 if self._lcr & _LCR_DLAB else self._ier
        elif offset == 2:
            value = self._cause()
            if value == _IIR_TX:
                self._transmitted(False)
            if self._fcr & _FCR_ENABLE:
                value |= _IIR_FIFO
        elif offset == 3:
            value = self._lcr
        elif offset == 4:
            value = self._mcr
        elif offset == 5:
            value = _LSR_IDLE | (_LSR_READY if self._fifo else 0)
            if self._overrun:
                value |= _LSR_OVERRUN
                self._overrun = False
        elif offset == 6:
            # In loopback the modem outputs (DTR, RTS, OUT1, OUT2) come back as inputs.
            out = self._mcr
            looped = (out & 1) << 5 | (out & 2) << 3 | (out & 4) << 4 | (out & 8) << 4
            value = looped if out & _MCR_LOOP else _MSR_CONNECTED
        else:
            value = self._scratch if offset == 7 else 0
        self._update()
        return value

    def _read_data(self) -> int:
        if self._lcr & _LCR_DLAB:
            return self._divisor & 0xFF
        return self._fifo.popleft() if self._fifo else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; only the lowest byte counts."""
        value &= 0xFF
        if offset == 0:
            self._write_data(value)
        elif offset == 1:
            if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
            else:
                rising = value & ~self._ier & _IER_TX
                self._ier = value & 0xF
                if rising:
                    self._transmitted(True)
                elif not value & _IER_TX:
                    self._event(False)
        elif offset == 2:
            if value & _FCR_CLEAR_RX or (value ^ self._fcr) & _FCR_ENABLE:
                self._fifo.clear()
            self._fcr = value & 0xC9
        elif offset == 3:
            self._lcr = value
        elif offset == 4:
            self._mcr = value & 0x1F
        elif offset == 7:
            self._scratch = value
        self._update()

    def _write_data(self, value: int) -> None:
        if self._lcr & _LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | value
            return
        if self._mcr & _MCR_LOOP:
            if len(self._fifo) < (_FIFO if self._fcr & _FCR_ENABLE else 1):
                self._fifo.append(value)
            else:
                self._overrun = True
        else:
            self._send(value)
        # The byte is gone at once: the transmitter is empty again.
        self._transmitted(True)

    # -- snapshots -----------------------------------------------------------------------------

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write the registers, and what waits to be read."""
        for value in (self._ier, self._fcr, self._lcr, self._mcr, self._scratch):
            stream.u8(value)
        stream.u16(self._divisor & 0xFFFF)
        stream.flag(self._overrun)
        stream.flag(self._tx_event)
        stream.data(bytes(self._fifo))
        stream.data(bytes(self._outside))

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read them; returns how to put them in force. The PLIC has its wires already."""
        registers = [stream.u8() for _ in range(5)]
        divisor, overrun, tx_event = stream.u16(), stream.flag(), stream.flag()
        fifo, outside = stream.data(), stream.data()
        if len(fifo) > _FIFO:
            raise stream.malformed("has more in its FIFO than there is room")

        def adopt() -> None:
            self._ier, self._fcr, self._lcr, self._mcr, self._scratch = registers
            self._divisor, self._overrun, self._tx_event = divisor, overrun, tx_event
            self._fifo, self._outside = deque(fifo), deque(outside)

        return adopt
