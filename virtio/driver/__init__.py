"""The guest's side: a small, correct driver in Python, for tests of devices (ours or anybody's).

:class:`BlockDriver` brings a device up through its registers and does requests on a ring that
lies in guest memory. Under it :class:`DriverRing` (split) and :class:`PackedDriverRing` write any
ring at all: wrong ones, too, on purpose.

A :class:`DriverTransport` is the way to the device: :class:`Registers` for MMIO,
:class:`PciRegisters` for PCI, :class:`VhostUserFrontEnd` for vhost-user.

    registers = Registers(mmio.read, mmio.write)
    driver = BlockDriver(registers, memory, Arena(base, 1 << 20))
    driver.start()
    data = driver.read(sector=0, count=8)
"""

from __future__ import annotations

from .blk import BlockDriver, Completion
from .packed import PackedDriverRing
from .pci import LegacyPciRegisters, PciFunction, PciRegisters
from .registers import Registers
from .ring import Arena, Buffer, DriverRing
from .transport import DriverError, DriverTransport
from .vhost_user import Link, SharedRam, VhostUserFrontEnd

__all__ = [
    "Arena",
    "BlockDriver",
    "Buffer",
    "Completion",
    "DriverError",
    "DriverRing",
    "DriverTransport",
    "LegacyPciRegisters",
    "Link",
    "PackedDriverRing",
    "PciFunction",
    "PciRegisters",
    "Registers",
    "SharedRam",
    "VhostUserFrontEnd",
]
