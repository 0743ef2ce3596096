"""Our own device on each transport, for ``--device pyvirtio.virtio.conformance.ours:pci``.

They double as examples of what a maker of devices is.
"""

from __future__ import annotations

import socket
from threading import Thread
from typing import Any

from ...backend.disk import Disk
from ...backend.memory import MemoryDisk
from ...backend.zoned import ZonedDisk
from ...backend.zones import ZoneModel, ZoneState
from ..blk import VirtioBlk
from ..blk_config import Lifetime
from ..driver import LegacyPciRegisters, Link, PciFunction, PciRegisters, Registers
from ..layout import ByteOrder
from ..memory import GuestMemory
from ..mmio import VirtioMmio
from ..pci import VirtioPci
from ..vhost_user.server import VhostUserServer
from .device import CannotMakeError, DeviceUnderTest, VhostUserDevice

__all__ = [
    "mmio",
    "mmio_callbacks",
    "mmio_v1",
    "mmio_v1_big",
    "pci",
    "pci_callbacks",
    "pci_legacy",
    "vhost_user",
]

_BASE = 0x8000_0000
_RAM = 4 << 20
_DISK = 4 << 20
_MORE: dict[str, Any] = {"callbacks": True, "in_order": True, "notification_data": True}


def _make_disk(zoned: str) -> Disk:
    if not zoned:
        return MemoryDisk(_DISK)
    return ZonedDisk(
        MemoryDisk(_DISK // 4),
        zone_size=64 << 10,
        zone_capacity=60 << 10,
        conventional=1,
        max_open=2,
        max_active=3,
        max_append=0 if zoned == "no-append" else 8192,
        write_granularity=4096,
        model=ZoneModel.HOST_AWARE if zoned == "aware" else ZoneModel.HOST_MANAGED,
    )


class _Backed:
    """The device itself, and what its owner may do to the disk."""

    disk: Disk
    blk: VirtioBlk

    def set_up(self, *, read_only: bool, zoned: str, in_order: bool = False) -> None:
        """Make it."""
        self.disk = _make_disk(zoned)
        self.blk = VirtioBlk(
            self.disk,
            serial="conformance",
            read_only=read_only,
            lifetime=lambda: Lifetime(1, 2, 3),
            secure_erase=True,
            size_max=1 << 20,
            packed=True,
            in_order=in_order,
            num_queues=2,
        )

    def resize(self, sectors: int) -> None:
        self.disk.truncate(512 * sectors)

    def fail_zone(self, sector: int, *, offline: bool) -> None:
        if not isinstance(self.disk, ZonedDisk):
            raise CannotMakeError("the disk has no zones")
        zone = self.disk.zone_at(512 * sector)
        self.disk.fail_zone(zone, ZoneState.OFFLINE if offline else ZoneState.READ_ONLY)

    def close_disk(self) -> None:
        """It is not used any more."""
        self.blk.detach()
        self.disk.close()


class _Ours(_Backed, DeviceUnderTest):
    base = _BASE
    size = _RAM

    def __init__(
        self, *, callbacks: bool, read_only: bool, zoned: str, legacy: bool, in_order: bool = False
    ) -> None:
        if zoned and legacy:
            raise CannotMakeError("a legacy device has no zones")
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
        self.set_up(read_only=read_only, zoned=zoned, in_order=in_order)

    def wait(self, timeout: float) -> bool:
        return False

    def close(self) -> None:
        self.close_disk()


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
        super().__init__(legacy=legacy, **options)
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
        super().__init__(legacy=legacy, **options)
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


class _VhostUser(_Backed, VhostUserDevice):
    """The back-end in a thread of this process."""

    def __init__(self, **options: Any) -> None:
        self.set_up(**options)
        ours, theirs = socket.socketpair()
        self._server = VhostUserServer(self.blk, connection=theirs)
        self._thread = Thread(target=self._server.serve, daemon=True)
        self._thread.start()
        super().__init__(Link(ours, timeout=10))

    def close(self) -> None:
        super().close()
        self._server.stop()
        self._thread.join()
        self._server.close()
        self.close_disk()


def mmio(read_only: bool = False, zoned: str = "") -> DeviceUnderTest:
    """MMIO, version 2; RAM in a buffer."""
    return _Mmio(callbacks=False, read_only=read_only, zoned=zoned)


def mmio_callbacks(read_only: bool = False, zoned: str = "") -> DeviceUnderTest:
    """The same with RAM behind callbacks, IN_ORDER and NOTIFICATION_DATA."""
    return _Mmio(**_MORE, read_only=read_only, zoned=zoned)


def mmio_v1(read_only: bool = False, zoned: str = "") -> DeviceUnderTest:
    """MMIO, version 1: the legacy interface."""
    return _Mmio(callbacks=False, read_only=read_only, zoned=zoned, legacy=True)


def mmio_v1_big(read_only: bool = False, zoned: str = "") -> DeviceUnderTest:
    """The same for a big-endian guest."""
    return _Mmio(callbacks=True, read_only=read_only, zoned=zoned, legacy=True, order="big")


def pci(read_only: bool = False, zoned: str = "") -> DeviceUnderTest:
    """PCI, modern; RAM in a buffer."""
    return _Pci(callbacks=False, read_only=read_only, zoned=zoned)


def pci_callbacks(read_only: bool = False, zoned: str = "") -> DeviceUnderTest:
    """The same with RAM behind callbacks, IN_ORDER and NOTIFICATION_DATA."""
    return _Pci(**_MORE, read_only=read_only, zoned=zoned)


def pci_legacy(read_only: bool = False, zoned: str = "") -> DeviceUnderTest:
    """A transitional PCI device, through its legacy interface."""
    return _Pci(callbacks=False, read_only=read_only, zoned=zoned, legacy=True)


def vhost_user(read_only: bool = False, zoned: str = "") -> DeviceUnderTest:
    """A vhost-user back-end."""
    return _VhostUser(read_only=read_only, zoned=zoned, in_order=True)
