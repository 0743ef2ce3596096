"""A driver's view of a virtio PCI function (virtio 1.4 §4.1): what firmware and driver do to it.

:class:`PciFunction` finds capabilities, sizes and maps BARs; :class:`PciRegisters` is the modern
transport on it, :class:`LegacyPciRegisters` the one in I/O BAR 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from .. import pci_layout as at
from ..layout import ByteOrder
from .transport import DriverError, DriverTransport

__all__ = ["Capability", "LegacyPciRegisters", "PciBus", "PciFunction", "PciRegisters"]


class PciBus(Protocol):
    """The accesses that a driver makes; :class:`~..pci.VirtioPci` has them."""

    def config_read(self, offset: int, size: int) -> int: ...

    def config_write(self, offset: int, size: int, value: int) -> None: ...

    def bar_read(self, bar: int, offset: int, size: int) -> int: ...

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Capability:
    """One entry of the capability list; the virtio fields are 0 for other kinds."""

    offset: int
    """In configuration space."""
    ident: int
    length: int = 0
    """``cap_len``."""
    kind: int = 0
    """``cfg_type``."""
    bar: int = 0
    start: int = 0
    """In the BAR."""
    size: int = 0


class PciFunction:
    """Configuration space and BARs of one function."""

    def __init__(self, bus: PciBus) -> None:
        self.bus = bus

    def capabilities(self) -> list[Capability]:
        """All of them, in their order. Raises DriverError for a list that goes around."""
        return list(self._walk())

    def _walk(self) -> Iterator[Capability]:
        read = self.bus.config_read
        if not read(at.PCI_STATUS, 2) & at.PCI_STATUS_CAP_LIST:
            return
        offset = read(at.PCI_CAPABILITY_LIST, 1) & ~3
        for _ in range(48):
            if not offset:
                return
            ident = read(offset, 1)
            if ident == at.PCI_CAP_ID_VENDOR:
                yield Capability(
                    offset,
                    ident,
                    read(offset + 2, 1),
                    read(offset + 3, 1),
                    read(offset + at.CAP_BAR, 1),
                    read(offset + at.CAP_OFFSET, 4),
                    read(offset + at.CAP_LENGTH, 4),
                )
            else:
                yield Capability(offset, ident)
            offset = read(offset + 1, 1) & ~3
        raise DriverError("the capability list has no end")

    def find(self, kind: int) -> Capability:
        """The first virtio capability of a ``cfg_type`` (PCI-19). Raises DriverError."""
        for capability in self.capabilities():
            if (capability.ident, capability.kind) == (at.PCI_CAP_ID_VENDOR, kind):
                return capability
        raise DriverError(f"no virtio capability of type {kind}")

    def msix(self) -> Capability | None:
        """The MSI-X capability."""
        found = (each for each in self.capabilities() if each.ident == at.PCI_CAP_ID_MSIX)
        return next(found, None)

    def bar_size(self, index: int) -> int:
        """Bytes of a BAR, 0 if there is none; found by writing ones, with its value restored."""
        read, write = self.bus.config_read, self.bus.config_write
        offset = at.PCI_BAR_0 + 4 * index
        command = read(at.PCI_COMMAND, 2)
        write(at.PCI_COMMAND, 2, command & ~(at.PCI_COMMAND_IO | at.PCI_COMMAND_MEMORY))
        before = read(offset, 4)
        write(offset, 4, 0xFFFF_FFFF)
        mask = read(offset, 4)
        write(offset, 4, before)
        write(at.PCI_COMMAND, 2, command)
        mask &= ~3 if mask & at.PCI_BAR_IO else ~0xF
        return -mask & 0xFFFF_FFFF if mask else 0

    def map_bars(self, memory: int = 0xE000_0000, io: int = 0xC000) -> None:
        """Give every BAR an address of its own, as firmware does, and enable the function."""
        index = 0
        while index < 6:
            flags = self.bus.config_read(at.PCI_BAR_0 + 4 * index, 4)
            size = self.bar_size(index)
            if size:
                base = io if flags & at.PCI_BAR_IO else memory
                base = -(-base // size) * size
                self.bus.config_write(at.PCI_BAR_0 + 4 * index, 4, base)
                if flags & at.PCI_BAR_IO:
                    io = base + size
                else:
                    memory = base + size
            if not flags & at.PCI_BAR_IO and flags & at.PCI_BAR_64BIT:
                index += 1
                self.bus.config_write(at.PCI_BAR_0 + 4 * index, 4, 0)
            index += 1
        self.enable(at.PCI_COMMAND_IO | at.PCI_COMMAND_MEMORY | at.PCI_COMMAND_MASTER)

    def enable(self, bits: int) -> None:
        """Set bits of the command register."""
        self.bus.config_write(at.PCI_COMMAND, 2, self.bus.config_read(at.PCI_COMMAND, 2) | bits)

    def disable(self, bits: int) -> None:
        """Clear bits of the command register."""
        self.bus.config_write(at.PCI_COMMAND, 2, self.bus.config_read(at.PCI_COMMAND, 2) & ~bits)

    # -- MSI-X -------------------------------------------------------------------------------

    def set_msix(self, *, enabled: bool, masked: bool = False) -> int:
        """Switch MSI-X; the number of vectors. Raises DriverError where there is none."""
        capability = self.msix()
        if capability is None:
            raise DriverError("no MSI-X capability")
        control = self.bus.config_read(capability.offset + 2, 2)
        size = control & at.MSIX_CONTROL_SIZE
        bits = at.MSIX_CONTROL_ENABLE if enabled else 0
        bits |= at.MSIX_CONTROL_MASK_ALL if masked else 0
        self.bus.config_write(capability.offset + 2, 2, size | bits)
        return size + 1

    def set_vector(self, vector: int, address: int, data: int, *, masked: bool = False) -> None:
        """Fill an entry of the MSI-X table."""
        bar, start = self._msix_part(4)
        start += at.MSIX_ENTRY_SIZE * vector
        words = (address & 0xFFFF_FFFF, address >> 32, data, int(masked))
        for place, value in enumerate(words):
            self.bus.bar_write(bar, start + 4 * place, 4, value)

    def pending_bits(self) -> int:
        """The first 32 of the MSI-X pending bits."""
        bar, start = self._msix_part(8)
        return self.bus.bar_read(bar, start, 4)

    def _msix_part(self, where: int) -> tuple[int, int]:
        capability = self.msix()
        if capability is None:
            raise DriverError("no MSI-X capability")
        value = self.bus.config_read(capability.offset + where, 4)
        return value & 7, value & ~7


class _PciTransport(DriverTransport):
    """What both interfaces have in common."""

    def __init__(self, function: PciFunction, device_ids: Callable[[int], set[int]]) -> None:
        self.function = function
        self.bus = function.bus
        self._device_ids = device_ids

    def identify(self, device_id: int) -> None:
        """See :class:`DriverTransport`; PCI-08, PCI-09."""
        found = [self.bus.config_read(each, 2) for each in (at.PCI_VENDOR_ID, at.PCI_DEVICE_ID)]
        if found[0] != at.VIRTIO_PCI_VENDOR or found[1] not in self._device_ids(device_id):
            raise DriverError(f"PCI device {found[0]:04x}:{found[1]:04x} is none of that type")


class PciRegisters(_PciTransport):
    """The modern transport of a function whose BARs are mapped."""

    def __init__(self, function: PciFunction) -> None:
        super().__init__(
            function,
            lambda kind: {
                at.VIRTIO_PCI_DEVICE_BASE + kind,
                at.VIRTIO_PCI_TRANSITIONAL_IDS.get(kind, -1),
            },
        )

    @cached_property
    def common(self) -> Capability:
        """The common configuration; as the next ones, DriverError where there is none."""
        return self.function.find(at.VIRTIO_PCI_CAP_COMMON_CFG)

    @cached_property
    def notification(self) -> Capability:
        """Where queues are notified."""
        return self.function.find(at.VIRTIO_PCI_CAP_NOTIFY_CFG)

    @cached_property
    def isr(self) -> Capability:
        """The ISR status."""
        return self.function.find(at.VIRTIO_PCI_CAP_ISR_CFG)

    @cached_property
    def device(self) -> Capability:
        """The device configuration."""
        return self.function.find(at.VIRTIO_PCI_CAP_DEVICE_CFG)

    @cached_property
    def multiplier(self) -> int:
        """``notify_off_multiplier``."""
        return self.bus.config_read(self.notification.offset + at.CAP_DATA, 4)

    def load(self, offset: int, size: int) -> int:
        """Read a field of the common configuration."""
        return self.bus.bar_read(self.common.bar, self.common.start + offset, size)

    def store(self, offset: int, size: int, value: int) -> None:
        """Write one."""
        self.bus.bar_write(self.common.bar, self.common.start + offset, size, value)

    @property
    def status(self) -> int:
        """The device status field."""
        return self.load(at.COMMON_DEVICE_STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.store(at.COMMON_DEVICE_STATUS, 1, value)

    def offered_features(self) -> int:
        """See :class:`DriverTransport`."""
        features = 0
        for word in range(2):
            self.store(at.COMMON_DEVICE_FEATURE_SELECT, 4, word)
            features |= self.load(at.COMMON_DEVICE_FEATURE, 4) << 32 * word
        return features

    def accept_features(self, features: int) -> None:
        """See :class:`DriverTransport`."""
        for word in range(2):
            self.store(at.COMMON_DRIVER_FEATURE_SELECT, 4, word)
            self.store(at.COMMON_DRIVER_FEATURE, 4, features >> 32 * word & 0xFFFF_FFFF)

    def select_queue(self, index: int) -> int:
        """See :class:`DriverTransport`. The size it reads is the largest only after a reset."""
        self.store(at.COMMON_QUEUE_SELECT, 2, index)
        return self.load(at.COMMON_QUEUE_SIZE, 2)

    def enable_queue(self, size: int, descriptors: int, available: int, used: int) -> bool:
        """See :class:`DriverTransport`."""
        self.store(at.COMMON_QUEUE_SIZE, 2, size)
        for field, address in (
            (at.COMMON_QUEUE_DESC, descriptors),
            (at.COMMON_QUEUE_DRIVER, available),
            (at.COMMON_QUEUE_DEVICE, used),
        ):
            self.store(field, 4, address & 0xFFFF_FFFF)
            self.store(field + 4, 4, address >> 32)
        self.store(at.COMMON_QUEUE_ENABLE, 2, 1)
        return self.queue_enabled()

    def queue_enabled(self) -> bool:
        """See :class:`DriverTransport`."""
        return self.load(at.COMMON_QUEUE_ENABLE, 2) == 1

    def reset_queue(self) -> bool:
        """See :class:`DriverTransport`; PCI-55."""
        self.store(at.COMMON_QUEUE_RESET, 2, 1)
        return self.queue_was_reset()

    def queue_was_reset(self) -> bool:
        """See :class:`DriverTransport`."""
        return self.load(at.COMMON_QUEUE_RESET, 2) == 0 and not self.queue_enabled()

    def notify(self, index: int, data: int | None = None) -> None:
        """See :class:`DriverTransport`; PCI-123 to PCI-126."""
        self.store(at.COMMON_QUEUE_SELECT, 2, index)
        offset = self.load(at.COMMON_QUEUE_NOTIFY_OFF, 2) * self.multiplier
        where = self.notification.start + offset
        if data is None:
            self.bus.bar_write(self.notification.bar, where, 2, index)
        else:
            self.bus.bar_write(self.notification.bar, where, 4, data << 16 | index)

    def take_interrupt(self) -> int:
        """The ISR status, which reading resets."""
        return self.bus.bar_read(self.isr.bar, self.isr.start, 1)

    def generation(self) -> int:
        """See :class:`DriverTransport`."""
        return self.load(at.COMMON_CONFIG_GENERATION, 1)

    def read_config(self, offset: int, size: int) -> int:
        """See :class:`DriverTransport`."""
        return self.bus.bar_read(self.device.bar, self.device.start + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """See :class:`DriverTransport`."""
        self.bus.bar_write(self.device.bar, self.device.start + offset, size, value)


class LegacyPciRegisters(_PciTransport):
    """The legacy transport of a function whose BARs are mapped; ``order`` is the guest's."""

    legacy = True
    fixed_queue_size = True  # VQ-S-02

    def __init__(self, function: PciFunction, order: ByteOrder = "little") -> None:
        super().__init__(function, lambda kind: {at.VIRTIO_PCI_TRANSITIONAL_IDS.get(kind, -1)})
        self.order = order

    def load(self, offset: int, size: int) -> int:
        """Read a register."""
        return self.bus.bar_read(0, offset, size)

    def store(self, offset: int, size: int, value: int) -> None:
        """Write one."""
        self.bus.bar_write(0, offset, size, value)

    @property
    def status(self) -> int:
        """The device status field."""
        return self.load(at.LEGACY_STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.store(at.LEGACY_STATUS, 1, value)

    def offered_features(self) -> int:
        """See :class:`DriverTransport`."""
        return self.load(at.LEGACY_DEVICE_FEATURES, 4)

    def accept_features(self, features: int) -> None:
        """See :class:`DriverTransport`."""
        self.store(at.LEGACY_DRIVER_FEATURES, 4, features & 0xFFFF_FFFF)

    def select_queue(self, index: int) -> int:
        """See :class:`DriverTransport`."""
        self.store(at.LEGACY_QUEUE_SELECT, 2, index)
        return self.load(at.LEGACY_QUEUE_SIZE, 2)

    def enable_queue(self, size: int, descriptors: int, available: int, used: int) -> bool:
        """A legacy queue is in one piece: see :meth:`enable_legacy_queue`."""
        raise DriverError("a legacy interface has no queues in three parts")

    def enable_legacy_queue(self, size: int, address: int, page: int, align: int) -> bool:
        """See :class:`DriverTransport`. Size, page and alignment are the device's (VQ-S-02)."""
        self.store(at.LEGACY_QUEUE_ADDRESS, 4, address // at.LEGACY_PAGE)
        return self.queue_enabled()

    def queue_enabled(self) -> bool:
        """See :class:`DriverTransport`."""
        return self.load(at.LEGACY_QUEUE_ADDRESS, 4) != 0

    def reset_queue(self) -> bool:
        """There is no such thing."""
        raise DriverError("a legacy interface cannot reset a queue")

    def notify(self, index: int, data: int | None = None) -> None:
        """See :class:`DriverTransport`."""
        self.store(at.LEGACY_QUEUE_NOTIFY, 2, index)

    def take_interrupt(self) -> int:
        """The ISR status, which reading resets."""
        return self.load(at.LEGACY_ISR, 1)

    def generation(self) -> int:
        """There is none."""
        return 0

    def read_config(self, offset: int, size: int) -> int:
        """See :class:`DriverTransport`."""
        return self.load(self._header() + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """See :class:`DriverTransport`."""
        self.store(self._header() + offset, size, value)

    def _header(self) -> int:
        """PCI-100."""
        capability = self.function.msix()
        if capability is None:
            return at.LEGACY_HEADER
        control = self.bus.config_read(capability.offset + 2, 2)
        return at.LEGACY_HEADER_MSIX if control & at.MSIX_CONTROL_ENABLE else at.LEGACY_HEADER
