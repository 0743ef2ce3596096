"""What the suite needs of a device under test, and where it gets one from."""

from __future__ import annotations

import inspect
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from time import sleep
from typing import Any, Literal

from ..driver import DriverTransport, Link, PciFunction, SharedRam, VhostUserFrontEnd
from ..memory import GuestMemory

__all__ = ["WISHES", "CannotMakeError", "DeviceUnderTest", "VhostUserDevice", "find_maker"]

WISHES = {
    "read_only": "the device is to refuse writes",
    "zoned": "the disk has zones: 'managed', 'aware', or 'no-append' (managed) says of which kind; "
    "'none': it has none, and the device offers ZONED",
    "lifetime": "False: the storage does not know how worn it is; True: it does",
    "stalls": "the harness can have the disk's requests wait (DeviceUnderTest.stall)",
    "volatile": "the harness can have the power fail (DeviceUnderTest.cut_power)",
}
"""Parameters that a maker of devices may have, and what they ask of the device.

A zoned device should have a conventional zone, eight sequential ones, a zone capacity below the
zone size, limits for open and active zones of two and three, and one for appends.
"""


class CannotMakeError(Exception):
    """Such a device cannot be had; says why."""


class DeviceUnderTest(ABC):
    """One device, freshly powered on, and the machine around it as far as the suite needs it."""

    transport: Literal["mmio", "pci", "vhost-user"]
    memory: GuestMemory
    """The guest's RAM, as the driver sees it."""
    base: int
    """Where the RAM is that the driver may use."""
    size: int
    """How many bytes of it: 2 MiB at least."""
    registers: DriverTransport
    """The driver's way to the device: ``Registers`` for MMIO, ``PciRegisters``, …"""
    function: PciFunction | None = None
    """On PCI: the function, its BARs mapped."""
    messages: list[tuple[int, int]] | None = None
    """On PCI: where MSI messages arrive, as (address, data)."""
    asynchronous: bool = False
    """The device works in threads or a process of its own: what it does may come at any time."""

    @abstractmethod
    def wait(self, timeout: float) -> bool:
        """Let the device work for at most ``timeout`` seconds. False if it has nothing to do, or
        did nothing; a device that works inside of register accesses gives False at once. An
        :attr:`asynchronous` one may give False whatever it does: it is waited for by the clock."""

    def settle(self) -> None:
        """Let the device do all that it is going to do, for tests that nothing happens."""
        while self.wait(0.05):
            pass
        if self.asynchronous:
            sleep(0.05)

    def resize(self, sectors: int) -> None:
        """Give the disk another size, as its owner may at any time. Raises CannotMakeError."""
        raise CannotMakeError("the harness cannot change the disk's size")

    def fail_zone(self, sector: int, *, offline: bool) -> None:
        """Have the zone that begins at a sector fail: read-only from now on, or offline. Raises
        CannotMakeError."""
        raise CannotMakeError("the harness cannot have zones fail")

    def stall(self) -> Callable[[], object]:
        """From now on requests of the disk wait, until what this returns is called. Registers are
        accessed meanwhile, by another thread, too. Raises CannotMakeError."""
        raise CannotMakeError("the harness cannot have the disk wait")

    def cut_power(self) -> None:
        """The power fails and comes back: the disk has what was stable, the device was reset.
        Raises CannotMakeError."""
        raise CannotMakeError("the harness cannot have the power fail")

    def close(self) -> None:
        """The test is over."""


class VhostUserDevice(DeviceUnderTest):
    """A vhost-user-blk back-end at the other end of a socket."""

    transport = "vhost-user"
    asynchronous = True

    def __init__(self, link: Link) -> None:
        self._ram = SharedRam(4 << 20)
        self.memory, self.base, self.size = self._ram.memory, self._ram.base, self._ram.size
        self.registers = self.front = VhostUserFrontEnd(link, self._ram)

    @classmethod
    def connect(cls, path: str) -> VhostUserDevice:
        """The one at ``path``. Raises CannotMakeError if nobody listens there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise CannotMakeError(f"{path}: {error}") from None
        return cls(Link(connection, timeout=10))

    def wait(self, timeout: float) -> bool:
        """See :class:`DeviceUnderTest`."""
        return self.front.wait(timeout)

    def settle(self) -> None:
        """See :class:`DeviceUnderTest`: a back-end that was to do something would have by then."""
        self.front.wait(0.05)

    def close(self) -> None:
        """Hang up."""
        self.front.close()
        self._ram.close()


Maker = Callable[..., DeviceUnderTest]


def find_maker(spec: str) -> Maker:
    """What ``--device`` names: ``vhost-user:PATH`` or ``module:function``."""
    kind, _, rest = spec.partition(":")
    if kind == "vhost-user":
        return lambda: VhostUserDevice.connect(rest)
    maker: Any = import_module(kind)
    for name in rest.split("."):
        maker = getattr(maker, name)
    if not callable(maker):
        raise TypeError(f"{spec} is no function that makes a device")
    return maker  # type: ignore[no-any-return]


def make(maker: Maker, wishes: dict[str, Any]) -> DeviceUnderTest:
    """A device with these wishes. Raises CannotMakeError if the maker does not know them."""
    parameters = inspect.signature(maker).parameters
    for wish in wishes:
        if wish not in parameters:
            raise CannotMakeError(f"there is none for which: {WISHES[wish]}")
    return maker(**wishes)
