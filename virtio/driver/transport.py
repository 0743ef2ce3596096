"""What a driver does to a device, whatever way leads there: MMIO, PCI, a vhost-user socket."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..layout import ByteOrder

__all__ = ["DriverError", "DriverTransport"]


class DriverError(Exception):
    """The device did not do what the driver needs; says what."""


class DriverTransport(ABC):
    """The driver's side of a transport. Nothing is checked: values go out as they are given."""

    legacy: bool = False
    """The interface before virtio 1.0: 32 feature bits, no FEATURES_OK, queues in one piece."""
    order: ByteOrder = "little"
    """Of the device configuration, and of legacy rings and requests."""
    fixed_queue_size: bool = False
    """A queue has the size that the device gives it."""

    @abstractmethod
    def identify(self, device_id: int) -> None:
        """Raise DriverError unless a device of that type (2: block) is there."""

    @property
    @abstractmethod
    def status(self) -> int:
        """The device status field; writing 0 resets."""

    @status.setter
    @abstractmethod
    def status(self, value: int) -> None: ...

    @abstractmethod
    def offered_features(self) -> int:
        """The feature bits that the device offers: 64, or 32 on a legacy interface."""

    @abstractmethod
    def accept_features(self, features: int) -> None:
        """Write as many feature bits as the driver's own."""

    @abstractmethod
    def select_queue(self, index: int) -> int:
        """Select a queue for what follows; its largest size, 0 if there is no such queue."""

    @abstractmethod
    def enable_queue(self, size: int, descriptors: int, available: int, used: int) -> bool:
        """Set the selected queue up; whether it is ready then."""

    @abstractmethod
    def queue_enabled(self) -> bool:
        """Whether the selected queue is."""

    def enable_legacy_queue(self, size: int, address: int, page: int, align: int) -> bool:
        """Set the selected queue up through a legacy interface; whether it is in use then."""
        raise DriverError("this transport has no legacy interface")

    @abstractmethod
    def reset_queue(self) -> bool:
        """Reset the selected queue (RING_RESET negotiated); whether that is complete."""

    def queue_was_reset(self) -> bool:
        """Whether the reset of the selected queue is complete, where it takes its time."""
        return True

    @abstractmethod
    def notify(self, index: int, data: int | None = None) -> None:
        """Kick queue ``index``. ``data``: the upper half of what goes with it, where
        NOTIFICATION_DATA was negotiated."""

    @abstractmethod
    def take_interrupt(self) -> int:
        """What interrupts there were since the last call: 1 used buffers, 2 configuration."""

    @abstractmethod
    def generation(self) -> int:
        """The configuration's generation; 0 where the transport has none."""

    @abstractmethod
    def read_config(self, offset: int, size: int) -> int:
        """One access of 1, 2 or 4 bytes to the device configuration."""

    @abstractmethod
    def write_config(self, offset: int, size: int, value: int) -> None:
        """The same for writing."""

    def config(self, offset: int, size: int) -> int:
        """A field of 1, 2, 4 or 8 bytes, read again until its generation holds still (BF-32)."""
        while True:
            before = self.generation()
            if size == 8:
                first, second = (self.read_config(offset + at, 4) for at in (0, 4))
                value = first | second << 32 if self.order == "little" else first << 32 | second
            else:
                value = self.read_config(offset, size)
            if self.generation() == before:
                return value
