"""The legacy interface of a transitional PCI device (§4.1.4.10): registers in I/O BAR 0."""

from __future__ import annotations

from collections.abc import Callable

from ..backend.state import StateReader, StateWriter
from . import pci_layout as at
from .layout import ByteOrder
from .pci_interrupts import PciInterrupts
from .split import legacy_layout
from .transport import TransportDevice

__all__ = ["LegacyRegisters"]


class LegacyRegisters:
    """The registers, little-endian, and behind them the device configuration in guest order."""

    def __init__(
        self,
        device: TransportDevice,
        interrupts: PciInterrupts,
        order: ByteOrder,
        *,
        set_status: Callable[[int], None],
        get_status: Callable[[], int],
        kick: Callable[[int], None],
    ) -> None:
        self.device = device
        self.interrupts = interrupts
        self._order: ByteOrder = order
        self.reset()
        self._readers: dict[int, tuple[int, Callable[[], int]]] = {
            at.LEGACY_DEVICE_FEATURES: (4, lambda: device.offered_features & 0xFFFF_FFFF),
            at.LEGACY_DRIVER_FEATURES: (4, lambda: device.driver_features & 0xFFFF_FFFF),
            at.LEGACY_QUEUE_ADDRESS: (4, self._read_address),
            at.LEGACY_QUEUE_SIZE: (2, self._read_size),
            at.LEGACY_QUEUE_SELECT: (2, lambda: self._select),
            at.LEGACY_STATUS: (1, get_status),
            at.LEGACY_ISR: (1, interrupts.read_isr),
        }
        self._writers: dict[int, tuple[int, Callable[[int], None]]] = {
            at.LEGACY_DRIVER_FEATURES: (4, lambda value: device.set_driver_features(value)),
            at.LEGACY_QUEUE_ADDRESS: (4, self._write_address),
            at.LEGACY_QUEUE_SELECT: (2, self._write_select),
            at.LEGACY_QUEUE_NOTIFY: (2, kick),
            at.LEGACY_STATUS: (1, set_status),
        }
        self._msix_readers = {
            at.LEGACY_CONFIG_VECTOR: (2, lambda: interrupts.config_vector),
            at.LEGACY_QUEUE_VECTOR: (2, self._read_vector),
        }
        self._msix_writers: dict[int, tuple[int, Callable[[int], None]]] = {
            at.LEGACY_CONFIG_VECTOR: (2, self._write_config_vector),
            at.LEGACY_QUEUE_VECTOR: (2, self._write_vector),
        }

    def reset(self) -> None:
        """The device was reset."""
        self._select = 0

    @property
    def _header(self) -> int:
        """PCI-96: what comes before the device configuration is longer while MSI-X is on."""
        return at.LEGACY_HEADER_MSIX if self.interrupts.msix_enabled else at.LEGACY_HEADER

    def read(self, offset: int, size: int) -> int:
        """The guest reads; the device configuration in any width (PCI-95)."""
        if offset >= self._header:
            return int.from_bytes(self.device.read_config(offset - self._header, size), self._order)
        field = self._readers.get(offset) or self._msix_readers.get(offset)
        return field[1]() & (1 << 8 * size) - 1 if field is not None and field[0] <= size else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes."""
        value &= (1 << 8 * size) - 1
        if offset >= self._header:
            self.device.write_config(offset - self._header, value.to_bytes(size, self._order))
            return
        field = self._writers.get(offset) or self._msix_writers.get(offset)
        if field is not None and field[0] == size:
            field[1](value)

    def _write_select(self, value: int) -> None:
        self._select = value

    def _read_size(self) -> int:
        queue = self.device.queue_state(self._select)
        return 0 if queue is None else queue.size

    def _read_address(self) -> int:
        queue = self.device.queue_state(self._select)
        return 0 if queue is None or not queue.ready else queue.descriptor_area // at.LEGACY_PAGE

    def _write_address(self, value: int) -> None:
        queue = self.device.queue_state(self._select)
        if queue is None:
            return
        if value == 0:
            self.device.disable_queue(self._select)
        elif not queue.ready:
            areas = legacy_layout(value * at.LEGACY_PAGE, queue.size, at.LEGACY_PAGE)
            queue.descriptor_area, queue.driver_area, queue.device_area = areas
            self.device.enable_queue(self._select)

    def _write_config_vector(self, value: int) -> None:
        self.interrupts.config_vector = self.interrupts.map(value)

    def _read_vector(self) -> int:
        vectors = self.interrupts.queue_vectors
        return vectors[self._select] if self._select < len(vectors) else at.NO_VECTOR

    def _write_vector(self, value: int) -> None:
        vectors = self.interrupts.queue_vectors
        if self._select < len(vectors):
            vectors[self._select] = self.interrupts.map(value)

    def save(self, stream: StateWriter) -> None:
        """Write the selector."""
        stream.u16(self._select)

    def load(self, stream: StateReader) -> Callable[[], None]:
        """Read it again; returns how to put it in force."""
        select = stream.u16()

        def adopt() -> None:
            self._select = select

        return adopt
