"""The common configuration of virtio over PCI (virtio 1.4 §4.1.4.3): the registers of a device.

Fields are written by accesses of their own width, those of 64 bits in halves (PCI-15, PCI-17);
other writes are ignored. Reads may have any width: none has a side effect.
"""

from __future__ import annotations

from collections.abc import Callable

from ..backend.state import StateReader, StateWriter
from . import layout
from . import pci_layout as at
from .pci_interrupts import PciInterrupts
from .ring import QueueState
from .transport import TransportDevice

__all__ = ["CommonConfig"]

_AREAS = (
    (at.COMMON_QUEUE_DESC, "descriptor_area"),
    (at.COMMON_QUEUE_DRIVER, "driver_area"),
    (at.COMMON_QUEUE_DEVICE, "device_area"),
)


class CommonConfig:
    """Selectors, and what they select. ``set_status(value)`` is what a status write does."""

    def __init__(
        self,
        device: TransportDevice,
        interrupts: PciInterrupts,
        set_status: Callable[[int], None],
        get_status: Callable[[], int],
    ) -> None:
        self.device = device
        self.interrupts = interrupts
        self.reset()
        self._readers: dict[int, tuple[int, Callable[[], int]]] = {
            at.COMMON_DEVICE_FEATURE_SELECT: (4, lambda: self._device_select),
            at.COMMON_DEVICE_FEATURE: (4, self._read_device_feature),
            at.COMMON_DRIVER_FEATURE_SELECT: (4, lambda: self._driver_select),
            at.COMMON_DRIVER_FEATURE: (4, self._read_driver_feature),
            at.COMMON_CONFIG_MSIX_VECTOR: (2, lambda: interrupts.config_vector),
            at.COMMON_NUM_QUEUES: (2, lambda: device.num_queues),
            at.COMMON_DEVICE_STATUS: (1, get_status),
            at.COMMON_CONFIG_GENERATION: (1, lambda: self.generation),
            at.COMMON_QUEUE_SELECT: (2, lambda: self._queue_select),
            at.COMMON_QUEUE_SIZE: (2, self._of_queue(lambda queue: queue.size)),
            at.COMMON_QUEUE_MSIX_VECTOR: (2, self._read_queue_vector),
            at.COMMON_QUEUE_ENABLE: (2, self._of_queue(lambda queue: int(queue.ready))),
            at.COMMON_QUEUE_NOTIFY_OFF: (2, self._of_queue(lambda queue: self._queue_select)),
            at.COMMON_QUEUE_RESET: (2, self._read_queue_reset),
        }
        self._writers: dict[int, tuple[int, Callable[[int], None]]] = {
            at.COMMON_DEVICE_FEATURE_SELECT: (4, self._write_device_select),
            at.COMMON_DRIVER_FEATURE_SELECT: (4, self._write_driver_select),
            at.COMMON_DRIVER_FEATURE: (4, self._write_driver_feature),
            at.COMMON_CONFIG_MSIX_VECTOR: (2, self._write_config_vector),
            at.COMMON_DEVICE_STATUS: (1, set_status),
            at.COMMON_QUEUE_SELECT: (2, self._write_queue_select),
            at.COMMON_QUEUE_SIZE: (2, self._write_queue_size),
            at.COMMON_QUEUE_MSIX_VECTOR: (2, self._write_queue_vector),
            at.COMMON_QUEUE_ENABLE: (2, self._write_queue_enable),
            at.COMMON_QUEUE_RESET: (2, self._write_queue_reset),
        }
        for offset, area in _AREAS:
            for half in (0, 1):
                self._add_address(offset + 4 * half, area, 32 * half)

    def reset(self) -> None:
        """The device was reset. The generation stays: nothing says that it goes back."""
        self._device_select = self._driver_select = self._queue_select = 0

    # -- the window --------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """An access of any width."""
        field = self._readers.get(offset)
        if field is not None and field[0] == size:
            return field[1]()
        value = 0
        for start, (width, read) in self._readers.items():
            if start < offset + size and offset < start + width:
                shift = 8 * (start - offset)
                value |= read() << shift if shift >= 0 else read() >> -shift
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """An access of a field's own width, or of 8 bytes to both halves of an address."""
        if size == 8 and any(offset == area for area, _ in _AREAS):
            self.write(offset, 4, value & 0xFFFF_FFFF)
            self.write(offset + 4, 4, value >> 32)
            return
        field = self._writers.get(offset)
        if field is not None and field[0] == size:
            field[1](value & (1 << 8 * size) - 1)

    # -- the configuration's generation ----------------------------------------------------------

    generation = 0
    """8 bits. It moves when the driver reads something that has changed since it last read
    (PCI-36), not at the change: so no number of changes between two reads brings it around."""
    _read_at = 0

    def device_config_read(self) -> None:
        """The driver reads device configuration."""
        now = self.device.config_generation
        if now != self._read_at:
            self._read_at = now
            self.generation = (self.generation + 1) & 0xFF

    # -- features ----------------------------------------------------------------------------

    def _write_device_select(self, value: int) -> None:
        self._device_select = value

    def _write_driver_select(self, value: int) -> None:
        self._driver_select = value

    def _read_device_feature(self) -> int:
        return _word(self.device.offered_features, self._device_select)  # PCI-33

    def _read_driver_feature(self) -> int:
        return _word(self.device.driver_features, self._driver_select)  # PCI-34

    def _write_driver_feature(self, value: int) -> None:
        if self._driver_select < 4:
            shift = 32 * self._driver_select
            self.device.set_driver_features(value << shift, 0xFFFF_FFFF << shift)

    # -- the selected queue ----------------------------------------------------------------------

    def _write_queue_select(self, value: int) -> None:
        self._queue_select = value

    def _of_queue(self, get: Callable[[QueueState], int]) -> Callable[[], int]:
        def read() -> int:
            queue = self.device.queue_state(self._queue_select)
            return 0 if queue is None else get(queue)  # PCI-45

        return read

    def _unready(self) -> QueueState | None:
        """The selected queue, if its fields may be written."""
        queue = self.device.queue_state(self._queue_select)
        return None if queue is None or queue.ready else queue

    def _add_address(self, offset: int, area: str, shift: int) -> None:
        keep = 0xFFFF_FFFF << (32 - shift)

        def write(value: int) -> None:
            queue = self._unready()
            if queue is not None:
                setattr(queue, area, getattr(queue, area) & keep | value << shift)

        self._readers[offset] = (
            4,
            self._of_queue(lambda queue: getattr(queue, area) >> shift & 0xFFFF_FFFF),
        )
        self._writers[offset] = (4, write)

    def _write_queue_size(self, value: int) -> None:
        queue = self._unready()
        if queue is not None:  # what it has to be is checked when it is enabled
            queue.size = value

    def _write_queue_enable(self, value: int) -> None:
        if value == 1 and self._unready() is not None:  # 0 means nothing (PCI-54)
            self.device.enable_queue(self._queue_select)

    def _read_queue_reset(self) -> int:
        known = self.device.queue_state(self._queue_select) is not None
        return int(known and self.device.resetting(self._queue_select))

    def _write_queue_reset(self, value: int) -> None:
        known = self.device.queue_state(self._queue_select) is not None
        if value == 1 and known and self.device.accepted(layout.VIRTIO_F_RING_RESET):
            self.device.reset_queue(self._queue_select)
            self.interrupts.queue_vectors[self._queue_select] = at.NO_VECTOR

    # -- vectors -----------------------------------------------------------------------------

    def _write_config_vector(self, value: int) -> None:
        self.interrupts.config_vector = self.interrupts.map(value)

    def _read_queue_vector(self) -> int:
        vectors = self.interrupts.queue_vectors
        return vectors[self._queue_select] if self._queue_select < len(vectors) else at.NO_VECTOR

    def _write_queue_vector(self, value: int) -> None:
        vectors = self.interrupts.queue_vectors
        if self._queue_select < len(vectors):
            vectors[self._queue_select] = self.interrupts.map(value)

    # -- saving ------------------------------------------------------------------------------

    def save(self, stream: StateWriter) -> None:
        """Write the selectors and the generation."""
        stream.u32(self._device_select)
        stream.u32(self._driver_select)
        stream.u16(self._queue_select)
        stream.u8(self.generation)
        stream.u32(self._read_at)

    def load(self, stream: StateReader) -> Callable[[], None]:
        """Read them again; returns how to put them in force."""
        selectors = stream.u32(), stream.u32(), stream.u16()
        generation, read_at = stream.u8(), stream.u32()

        def adopt() -> None:
            self._device_select, self._driver_select, self._queue_select = selectors
            self.generation, self._read_at = generation, read_at

        return adopt


def _word(features: int, select: int) -> int:
    return features >> 32 * select & 0xFFFF_FFFF if select < 4 else 0
