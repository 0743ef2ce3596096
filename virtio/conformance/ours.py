"""Our own device on each transport, for ``--device pyvirtio.virtio.conformance.ours:pci``.

They double as examples of what a maker of devices is.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

from ...backend.disk import Disk
from ...backend.memory import MemoryDisk
from ...backend.zoned import ZonedDisk
from ...backend.zones import ZoneModel, ZoneState
from .. import layout as at
from ..blk import VirtioBlk
from ..blk_config import Lifetime
from ..driver import (
    DriverTransport,
    LegacyPciRegisters,
    Link,
    PciFunction,
    PciRegisters,
    Registers,
)
from ..layout import ByteOrder
from ..memory import GuestMemory
from ..mmio import VirtioMmio
from ..pci import VirtioPci
from ..vhost_user.server import VhostUserServer
from .bench import PATIENCE
from .device import CannotMakeError, DeviceUnderTest, VhostUserDevice

__all__ = [
    "HarnessDisk",
    "OurMmio",
    "OurPci",
    "OurVhostUser",
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


class HarnessDisk(MemoryDisk):
    """A disk that can be made to wait, and to lose what was not flushed."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.stable = bytes(size)
        """What is left when the power fails."""
        self.goes_on = Event()
        self.goes_on.set()

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.goes_on.wait(PATIENCE)
        super()._readv(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self.goes_on.wait(PATIENCE)
        super()._writev(offset, views, length)

    def _flush(self) -> None:
        super()._flush()
        self.stable = self.getvalue()


def _make_disk(zoned: str) -> Disk:
    if zoned in ("", "none"):
        return HarnessDisk(_DISK)
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


class _OffersZones(VirtioBlk):
    """Offers ZONED whatever the disk is, as one may that manages its zones itself."""

    @property
    def offered_features(self) -> int:
        return super().offered_features | (not self.legacy) << at.VIRTIO_BLK_F_ZONED


class Backed:
    """The device itself, and what its owner may do to the disk."""

    disk: Disk
    blk: VirtioBlk
    registers: DriverTransport

    def set_up(
        self,
        *,
        read_only: bool = False,
        zoned: str = "",
        lifetime: bool = True,
        stalls: bool = False,
        kind: type[VirtioBlk] = VirtioBlk,
        **options: Any,
    ) -> None:
        """Make it; ``options`` are VirtioBlk's."""
        self.disk = _make_disk(zoned)
        # One that works inside of register accesses would have these wait, too.
        options.setdefault("io_threads", 2 if stalls else 0)
        self.asynchronous = options["io_threads"] > 0
        usual: dict[str, Any] = {
            "serial": "conformance",
            "secure_erase": True,
            "size_max": 1 << 20,
            "packed": True,
            "num_queues": 2,
        }
        self.blk = (_OffersZones if zoned == "none" else kind)(
            self.disk,
            read_only=read_only,
            lifetime=(lambda: Lifetime(1, 2, 3)) if lifetime else None,
            **usual | options,
        )

    def resize(self, sectors: int) -> None:
        self.disk.truncate(512 * sectors)

    def fail_zone(self, sector: int, *, offline: bool) -> None:
        if not isinstance(self.disk, ZonedDisk):
            raise CannotMakeError("the disk has no zones")
        zone = self.disk.zone_at(512 * sector)
        self.disk.fail_zone(zone, ZoneState.OFFLINE if offline else ZoneState.READ_ONLY)

    def stall(self) -> Callable[[], object]:
        assert isinstance(self.disk, HarnessDisk)
        self.disk.goes_on.clear()
        return self.disk.goes_on.set

    def cut_power(self) -> None:
        assert isinstance(self.disk, HarnessDisk)
        stable = self.disk.stable
        self.registers.status = 0
        self.disk.write(0, stable)

    def close_disk(self) -> None:
        """It is not used any more."""
        self.blk.detach()
        self.disk.close()


class _Ours(Backed, DeviceUnderTest):
    base = _BASE
    size = _RAM

    def __init__(self, *, callbacks: bool, legacy: bool = False, **options: Any) -> None:
        if legacy and options.get("zoned"):
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
        self.set_up(**options)

    def wait(self, timeout: float) -> bool:
        return False

    def close(self) -> None:
        self.close_disk()


class OurMmio(_Ours):
    """On MMIO."""

    transport = "mmio"

    def __init__(
        self,
        *,
        callbacks: bool = False,
        legacy: bool = False,
        order: ByteOrder = "little",
        slot: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """``slot``: options of VirtioMmio."""
        super().__init__(callbacks=callbacks, legacy=legacy, **options)
        self.slot = VirtioMmio(self.blk, self.memory, legacy=legacy, order=order, **(slot or {}))
        self.registers = Registers(self.slot.read, self.slot.write, legacy=legacy, order=order)


class OurPci(_Ours):
    """On PCI."""

    transport = "pci"

    def __init__(
        self,
        *,
        callbacks: bool = False,
        legacy: bool = False,
        slot: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """``slot``: options of VirtioPci."""
        super().__init__(callbacks=callbacks, legacy=legacy, **options)
        self.messages = []
        self.card = VirtioPci(
            self.blk, self.memory, msi=self.message, transitional=legacy, **(slot or {})
        )
        self.function = PciFunction(self.card)
        self.function.map_bars()
        self.registers = (
            LegacyPciRegisters(self.function) if legacy else PciRegisters(self.function)
        )

    def message(self, address: int, data: int) -> None:
        """A message arrives."""
        assert self.messages is not None
        self.messages.append((address, data))


class OurVhostUser(Backed, VhostUserDevice):
    """The back-end in a thread of this process."""

    def __init__(self, **options: Any) -> None:
        self.set_up(**options)
        ours, theirs = socket.socketpair()
        self._server = VhostUserServer(self.blk, connection=theirs)
        self._thread = Thread(target=self._server.serve, daemon=True)
        self._thread.start()
        super().__init__(Link(ours, timeout=10))
        self.asynchronous = True

    def close(self) -> None:
        super().close()
        self._server.stop()
        self._thread.join()
        self._server.close()
        self.close_disk()


def mmio(
    read_only: bool = False,
    zoned: str = "",
    lifetime: bool = True,
    stalls: bool = False,
    volatile: bool = False,
) -> DeviceUnderTest:
    """MMIO, version 2; RAM in a buffer."""
    return OurMmio(read_only=read_only, zoned=zoned, lifetime=lifetime, stalls=stalls)


def mmio_callbacks(
    read_only: bool = False,
    zoned: str = "",
    lifetime: bool = True,
    stalls: bool = False,
    volatile: bool = False,
) -> DeviceUnderTest:
    """The same with RAM behind callbacks, IN_ORDER and NOTIFICATION_DATA."""
    return OurMmio(
        callbacks=True,
        in_order=True,
        slot={"notification_data": True},
        read_only=read_only,
        zoned=zoned,
        lifetime=lifetime,
        stalls=stalls,
    )


def mmio_v1(read_only: bool = False, zoned: str = "", volatile: bool = False) -> DeviceUnderTest:
    """MMIO, version 1: the legacy interface."""
    return OurMmio(read_only=read_only, zoned=zoned, legacy=True)


def mmio_v1_big(
    read_only: bool = False, zoned: str = "", volatile: bool = False
) -> DeviceUnderTest:
    """The same for a big-endian guest."""
    return OurMmio(callbacks=True, read_only=read_only, zoned=zoned, legacy=True, order="big")


def pci(
    read_only: bool = False,
    zoned: str = "",
    lifetime: bool = True,
    stalls: bool = False,
    volatile: bool = False,
) -> DeviceUnderTest:
    """PCI, modern; RAM in a buffer."""
    return OurPci(read_only=read_only, zoned=zoned, lifetime=lifetime, stalls=stalls)


def pci_callbacks(
    read_only: bool = False,
    zoned: str = "",
    lifetime: bool = True,
    stalls: bool = False,
    volatile: bool = False,
) -> DeviceUnderTest:
    """The same with RAM behind callbacks, IN_ORDER, NOTIFICATION_DATA and vendor data."""
    return OurPci(
        callbacks=True,
        in_order=True,
        slot={"notification_data": True, "vendor_data": (0x1234, b"five!")},
        read_only=read_only,
        zoned=zoned,
        lifetime=lifetime,
        stalls=stalls,
    )


def pci_legacy(read_only: bool = False, zoned: str = "", volatile: bool = False) -> DeviceUnderTest:
    """A transitional PCI device, through its legacy interface."""
    return OurPci(read_only=read_only, zoned=zoned, legacy=True)


def vhost_user(
    read_only: bool = False, zoned: str = "", lifetime: bool = True, volatile: bool = False
) -> DeviceUnderTest:
    """A vhost-user back-end."""
    return OurVhostUser(read_only=read_only, zoned=zoned, lifetime=lifetime, in_order=True)
