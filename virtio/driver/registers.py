"""A driver's view of virtio-mmio registers (virtio 1.4 §4.2.2, §4.2.4)."""

from __future__ import annotations

from collections.abc import Callable

from .. import layout as at

__all__ = ["Registers"]


class Registers:
    """The registers behind ``read(offset, size) -> int`` and ``write(offset, size, value)``."""

    def __init__(
        self, read: Callable[[int, int], int], write: Callable[[int, int, int], object]
    ) -> None:
        self.read = read
        self.write = write

    def load(self, offset: int) -> int:
        """Read a 32-bit register."""
        return self.read(offset, 4)

    def store(self, offset: int, value: int) -> None:
        """Write a 32-bit register."""
        self.write(offset, 4, value)

    @property
    def status(self) -> int:
        """The device status field."""
        return self.load(at.MMIO_STATUS)

    @status.setter
    def status(self, value: int) -> None:
        self.store(at.MMIO_STATUS, value)

    def offered_features(self) -> int:
        """The first 64 feature bits that the device offers."""
        features = 0
        for word in range(2):
            self.store(at.MMIO_DEVICE_FEATURES_SEL, word)
            features |= self.load(at.MMIO_DEVICE_FEATURES) << 32 * word
        return features

    def accept_features(self, features: int) -> None:
        """Write the first 64 feature bits that the driver accepts."""
        for word in range(2):
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
        return self.load(at.MMIO_QUEUE_RESET) == 0 and self.load(at.MMIO_QUEUE_READY) == 0

    def notify(self, index: int, data: int = 0) -> None:
        """Kick queue ``index``; ``data`` goes with it where NOTIFICATION_DATA was negotiated."""
        self.store(at.MMIO_QUEUE_NOTIFY, data << 16 | index)

    def take_interrupt(self) -> int:
        """Read the interrupt status and acknowledge what it says."""
        status = self.load(at.MMIO_INTERRUPT_STATUS)
        if status:
            self.store(at.MMIO_INTERRUPT_ACK, status)
        return status

    def config(self, offset: int, size: int) -> int:
        """A field of the device configuration, read again until its generation holds still."""
        while True:
            before = self.load(at.MMIO_CONFIG_GENERATION)
            if size == 8:
                value = self.read(at.MMIO_CONFIG + offset, 4)
                value |= self.read(at.MMIO_CONFIG + offset + 4, 4) << 32
            else:
                value = self.read(at.MMIO_CONFIG + offset, size)
            if self.load(at.MMIO_CONFIG_GENERATION) == before:
                return value
