"""Our own device on each transport, for ``--device pyvirtio.virtio.conformance.ours:pci``.

They double as examples of what a maker of devices is.
"""

from __future__ import annotations

from typing import Any

from ...backend.memory import MemoryDisk
from ..blk import VirtioBlk
from ..driver import LegacyPciRegisters, PciFunction, PciRegisters, Registers
from ..layout import ByteOrder
from ..memory import GuestMemory
from ..mmio import VirtioMmio
from ..pci import VirtioPci
from .device import DeviceUnderTest

__all__ = ["mmio", "mmio_callbacks", "mmio_v1", "mmio_v1_big", "pci", "pci_callbacks", "pci_legacy"]

_BASE = 0x8000_0000
_RAM = 4 << 20
_DISK = 4 << 20


class _Ours(DeviceUnderTest):
    base = _BASE
    size = _RAM

    def __init__(self, *, callbacks: bool, read_only: bool, in_order: bool = False) -> None:
        ram = bytearray(_RAM)

        def read(pa: int, length: int) -> bytes:
            if not _BASE <= pa <= pa + length <= _BASE + _RAM:
                raise IndexError("no RAM there")
            return bytes(ram[pa - _BASE : pa - _BASE + length])

        def write(pa: int, data: bytes) -> None:
            if not _BASE <= pa <= pa + len(data) <= _BASE + _RAM:
                raise IndexError("no RAM there")
            ram[pa - _BASE : pa - _BASE + len(data)] = data

        self.memory = (
            GuestMemory.from_callbacks(read, write)
            if callbacks
            else GuestMemory.from_buffer(ram, _BASE)
        )
        self.disk = MemoryDisk(_DISK)
        self.blk = VirtioBlk(
            self.disk,
            serial="conformance",
            read_only=read_only,
            packed=True,
            in_order=in_order,
            num_queues=2,
        )

    def wait(self, timeout: float) -> bool:
        return False

    def resize(self, sectors: int) -> None:
        self.disk.truncate(512 * sectors)

    def close(self) -> None:
        self.blk.detach()
        self.disk.close()


class _Mmio(_Ours):
    transport = "mmio"

    def __init__(
        self,
        *,
        legacy: bool = False,
        order: ByteOrder = "little",
        notification_data: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        slot = VirtioMmio(
            self.blk,
            self.memory,
            legacy=legacy,
            order=order,
            notification_data=notification_data,
        )
        self.registers = Registers(slot.read, slot.write, legacy=legacy, order=order)


class _Pci(_Ours):
    transport = "pci"

    def __init__(
        self, *, legacy: bool = False, notification_data: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        messages: list[tuple[int, int]] = []
        card = VirtioPci(
            self.blk,
            self.memory,
            msi=lambda address, data: messages.append((address, data)),
            transitional=legacy,
            notification_data=notification_data,
        )
        self.messages = messages
        self.function = PciFunction(card)
        self.function.map_bars()
        self.registers = (
            LegacyPciRegisters(self.function) if legacy else PciRegisters(self.function)
        )


def mmio(read_only: bool = False) -> DeviceUnderTest:
    """MMIO, version 2; RAM in a buffer."""
    return _Mmio(callbacks=False, read_only=read_only)


def mmio_callbacks(read_only: bool = False) -> DeviceUnderTest:
    """The same with RAM behind callbacks, IN_ORDER and NOTIFICATION_DATA."""
    return _Mmio(callbacks=True, read_only=read_only, in_order=True, notification_data=True)


def mmio_v1(read_only: bool = False) -> DeviceUnderTest:
    """MMIO, version 1: the legacy interface."""
    return _Mmio(callbacks=False, read_only=read_only, legacy=True)


def mmio_v1_big(read_only: bool = False) -> DeviceUnderTest:
    """The same for a big-endian guest."""
    return _Mmio(callbacks=True, read_only=read_only, legacy=True, order="big")


def pci(read_only: bool = False) -> DeviceUnderTest:
    """PCI, modern; RAM in a buffer."""
    return _Pci(callbacks=False, read_only=read_only)


def pci_callbacks(read_only: bool = False) -> DeviceUnderTest:
    """The same with RAM behind callbacks, IN_ORDER and NOTIFICATION_DATA."""
    return _Pci(callbacks=True, read_only=read_only, in_order=True, notification_data=True)


def pci_legacy(read_only: bool = False) -> DeviceUnderTest:
    """A transitional PCI device, through its legacy interface."""
    return _Pci(callbacks=False, read_only=read_only, legacy=True)
