"""A driver's view of virtio-mmio registers (virtio 1.4 §4.2.2, §4.2.4)."""

from __future__ import annotations

from collections.abc import Callable

from .. import layout as at
from ..layout import ByteOrder
from .transport import DriverError, DriverTransport

__all__ = ["Registers"]


class Registers(DriverTransport):
    """The registers behind ``read(offset, size) -> int`` and ``write(offset, size, value)``."""

    def __init__(
        self,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], object],
        *,
        legacy: bool = False,
        order: ByteOrder = "little",
    ) -> None:
        self.read = read
        self.write = write
        self.legacy = legacy
        self.order = order

    def load(self, offset: int) -> int:
        """Read a 32-bit register."""
        return self.read(offset, 4)

    def store(self, offset: int, value: int) -> None:
        """Write a 32-bit register."""
        self.write(offset, 4, value)

    def identify(self, device_id: int) -> None:
        """See :class:`DriverTransport`; MMIO-19 to MMIO-24."""
        found = [self.load(each) for each in (at.MMIO_MAGIC_VALUE, at.MMIO_VERSION)]
        if found != [at.MMIO_MAGIC, 1 if self.legacy else 2]:
            raise DriverError(f"no virtio device of that version: {found}")
        if (found_id := self.load(at.MMIO_DEVICE_ID)) != device_id:
            raise DriverError(f"a device of type {found_id}, not {device_id}")

    @property
    def status(self) -> int:
        """The device status field."""
        return self.load(at.MMIO_STATUS)

    @status.setter
    def status(self, value: int) -> None:
        self.store(at.MMIO_STATUS, value)

    def offered_features(self) -> int:
        """See :class:`DriverTransport`."""
        features = 0
        for word in range(1 if self.legacy else 2):
            self.store(at.MMIO_DEVICE_FEATURES_SEL, word)
            features |= self.load(at.MMIO_DEVICE_FEATURES) << 32 * word
        return features

    def accept_features(self, features: int) -> None:
        """See :class:`DriverTransport`."""
        for word in range(1 if self.legacy else 2):
            self.store(at.MMIO_DRIVER_FEATURES_SEL, word)
            self.store(at.MMIO_DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)

    def select_queue(self, index: int) -> int:
        """Select a queue; its largest size, 0 if there is no such queue."""
        self.store(at.MMIO_QUEUE_SEL, index)
        return self.load(at.MMIO_QUEUE_SIZE_MAX)

    def enable_queue(self, size: int, descriptors: int, available: int, used: int) -> bool:
        """Set the selected queue up (version 2); whether it is ready then."""
        self.store(at.MMIO_QUEUE_SIZE, size)
        for low, address in (
            (at.MMIO_QUEUE_DESC_LOW, descriptors),
            (at.MMIO_QUEUE_DRIVER_LOW, available),
            (at.MMIO_QUEUE_DEVICE_LOW, used),
        ):
            self.store(low, address & 0xFFFF_FFFF)
            self.store(low + 4, address >> 32)
        self.store(at.MMIO_QUEUE_READY, 1)
        return self.load(at.MMIO_QUEUE_READY) == 1

    def queue_enabled(self) -> bool:
        """See :class:`DriverTransport`."""
        return self.load(at.MMIO_QUEUE_PFN if self.legacy else at.MMIO_QUEUE_READY) != 0

    def enable_legacy_queue(self, size: int, address: int, page: int, align: int) -> bool:
        """Set the selected queue up (version 1); whether it is in use then."""
        self.store(at.MMIO_GUEST_PAGE_SIZE, page)
        self.store(at.MMIO_QUEUE_SIZE, size)
        self.store(at.MMIO_QUEUE_ALIGN, align)
        self.store(at.MMIO_QUEUE_PFN, address // page)
        return self.load(at.MMIO_QUEUE_PFN) == address // page

    def reset_queue(self) -> bool:
        """Reset the selected queue (RING_RESET negotiated); whether that is complete (MMIO-34)."""
        self.store(at.MMIO_QUEUE_RESET, 1)
        return self.queue_was_reset()

    def queue_was_reset(self) -> bool:
        """See :class:`DriverTransport`."""
        return self.load(at.MMIO_QUEUE_RESET) == 0 and self.load(at.MMIO_QUEUE_READY) == 0

    def notify(self, index: int, data: int | None = None) -> None:
        """See :class:`DriverTransport`."""
        self.store(at.MMIO_QUEUE_NOTIFY, index if data is None else data << 16 | index)

    def take_interrupt(self) -> int:
        """Read the interrupt status and acknowledge what it says."""
        status = self.load(at.MMIO_INTERRUPT_STATUS)
        if status:
            self.store(at.MMIO_INTERRUPT_ACK, status)
        return status

    def generation(self) -> int:
        """See :class:`DriverTransport`."""
        return 0 if self.legacy else self.load(at.MMIO_CONFIG_GENERATION)

    def read_config(self, offset: int, size: int) -> int:
        """See :class:`DriverTransport`."""
        return self.read(at.MMIO_CONFIG + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """See :class:`DriverTransport`."""
        self.write(at.MMIO_CONFIG + offset, size, value)
