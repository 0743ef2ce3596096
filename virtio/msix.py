"""MSI-X: messages in place of interrupt lines (PCI 3.0 §6.8.2): the table and the pending bits.

Both lie in one BAR: the table at its beginning, the pending bits in its second half.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from ..backend.state import StateReader, StateWriter
from . import pci_layout as at

__all__ = ["MsixTable"]

_SMALLEST = 0x800


class MsixTable:
    """The vectors of one function; ``send(address, data)`` delivers a message.

    Vectors are notified by any thread, and no lock is held while a message is sent.
    """

    def __init__(self, vectors: int, send: Callable[[int, int], object]) -> None:
        if not 1 <= vectors <= at.MSIX_VECTORS_MAX:
            raise ValueError(f"{vectors} MSI-X vectors, must be 1 to {at.MSIX_VECTORS_MAX}")
        self.vectors = vectors
        self._send = send
        self._lock = Lock()
        half = _SMALLEST
        while half < at.MSIX_ENTRY_SIZE * vectors:
            half *= 2
        self.pending_offset = half
        """Where in the BAR the pending bits are."""
        self.bar_size = 2 * half
        self.open = False
        """Messages may be sent: MSI-X is enabled and not masked, the function a bus master."""
        self.reset()

    def reset(self) -> None:
        """Everything masked, nothing pending."""
        entry = at.MSIX_ENTRY.pack(0, 0, at.MSIX_MASKED)
        self._table = bytearray(entry * self.vectors)
        self._pending = 0

    def note(self, vector: int) -> None:
        """The message of a vector is to be sent, by :meth:`send` or when that is possible again."""
        with self._lock:
            self._pending |= 1 << vector

    def send(self) -> None:
        """Send what waits, as far as it is not masked."""
        pending = self._pending
        while pending:
            vector = pending.bit_length() - 1
            pending ^= 1 << vector
            self._send_pending(vector)

    def forget(self, vector: int) -> None:
        """Nothing is pending on a vector any more: what it was for is no more."""
        with self._lock:
            self._pending &= ~(1 << vector)

    def set_open(self, value: bool) -> None:
        """See :attr:`open`; what has waited for it is sent."""
        self.open = value
        if value:
            self.send()

    def _send_pending(self, vector: int) -> None:
        with self._lock:
            if not self.open or not self._pending >> vector & 1:
                return
            entry = at.MSIX_ENTRY.unpack_from(self._table, at.MSIX_ENTRY_SIZE * vector)
            address, data, control = entry
            if control & at.MSIX_MASKED:
                return
            self._pending &= ~(1 << vector)
        self._send(address, data)

    def read(self, offset: int, size: int) -> int:
        """The guest reads from the BAR; where nothing is, there are zeroes."""
        if offset >= self.pending_offset:
            return self._pending >> 8 * (offset - self.pending_offset) & (1 << 8 * size) - 1
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes: aligned 4 or 8 bytes of the table, all else is ignored."""
        if size == 8:
            self.write(offset, 4, value & 0xFFFF_FFFF)
            self.write(offset + 4, 4, value >> 32)
            return
        if size != 4 or offset % 4 or offset + 4 > len(self._table):
            return
        vector, field = divmod(offset, at.MSIX_ENTRY_SIZE)
        if field == at.MSIX_VECTOR_CONTROL:
            value &= at.MSIX_MASKED
        elif field == 0:
            value &= ~3  # an address of 4 bytes
        with self._lock:
            self._table[offset : offset + 4] = (value & 0xFFFF_FFFF).to_bytes(4, "little")
        self._send_pending(vector)

    def save(self, stream: StateWriter) -> None:
        """Write table and pending bits."""
        stream.data(self._table)
        stream.data(self._pending.to_bytes(-(-self.vectors // 8), "little"))

    def load(self, stream: StateReader) -> Callable[[], None]:
        """Read them again; returns how to put them in force."""
        table, pending = bytearray(stream.data()), int.from_bytes(stream.data(), "little")
        if len(table) != len(self._table) or pending >> self.vectors:
            raise stream.malformed("has another number of MSI-X vectors")

        def adopt() -> None:
            self._table, self._pending = table, pending

        return adopt
