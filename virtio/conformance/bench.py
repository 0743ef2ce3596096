"""The workbench of a test: a device under test and drivers for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic, sleep
from typing import Any

import pytest

from .. import layout as at
from ..driver import Arena, BlockDriver, Completion, DriverTransport
from ..driver.blk import UNDERSTOOD
from .device import CannotMakeError, DeviceUnderTest

__all__ = ["Bench"]

PATIENCE = 10.0
"""Seconds that a device may take for a request: far more than any needs."""
_SETTINGS = {at.VIRTIO_F_RING_PACKED, at.VIRTIO_F_EVENT_IDX, at.VIRTIO_F_IN_ORDER}
"""Features that change how a ring is used; in force only where a test asks for them."""


class Bench:
    """A device, its registers, memory, and what tests do with them again and again."""

    def __init__(self, device: DeviceUnderTest, packed: bool = False) -> None:
        self.device = device
        self.packed = packed
        """The kind of queue that drivers use unless told otherwise."""
        self.registers: Any = device.registers
        self.memory = device.memory
        self.arena = Arena(device.base, device.size)

    @property
    def legacy(self) -> bool:
        """Whether the legacy interface is tested."""
        return self.registers.legacy is True

    # -- what is there -------------------------------------------------------------------------

    def offers(self, bit: int) -> bool:
        """The device offers a feature."""
        transport: DriverTransport = self.registers
        if self.device.transport == "vhost-user":
            transport.identify(at.VIRTIO_ID_BLOCK)
        return bool(transport.offered_features() >> bit & 1)

    def need(self, bit: int, name: str) -> None:
        """Skip the test unless the device offers a feature."""
        if not self.offers(bit):
            pytest.skip(f"the device does not offer {name}")

    def need_status(self) -> None:
        """Skip the test unless the device keeps a status field of its own."""
        if self.device.transport == "vhost-user":
            pytest.skip("vhost-user: the status field is the front-end's")
        if self.legacy:
            pytest.skip("the legacy interface has other rules for the status field")

    def need_modern(self) -> None:
        """Skip the test on a legacy interface."""
        if self.legacy:
            pytest.skip("not for the legacy interface")

    def need_legacy(self) -> None:
        """Skip the test unless it is a legacy interface that is tested."""
        if not self.legacy:
            pytest.skip("for the legacy interface")

    def resize(self, sectors: int) -> None:
        """Change the disk's size, or skip the test."""
        try:
            self.device.resize(sectors)
        except CannotMakeError as error:
            pytest.skip(str(error))

    # -- drivers -----------------------------------------------------------------------------

    def driver(
        self,
        *,
        packed: bool | None = None,
        want: Iterable[int] = (),
        without: Iterable[int] = (),
        queue_size: int = 16,
        queue_index: int = 0,
    ) -> Any:
        """A BlockDriver that is not started. It accepts what it knows but for ``without``; of
        packed queues, EVENT_IDX and IN_ORDER only those that it is told to ``want``.

        Typed as anything: tests reach into rings of either kind.
        """
        use_packed = self.packed if packed is None else packed
        wanted = {*want, at.VIRTIO_F_RING_PACKED} if use_packed else set(want)
        features = UNDERSTOOD | 1 << at.VIRTIO_F_IN_ORDER | 1 << at.VIRTIO_F_ORDER_PLATFORM
        if self.device.transport == "vhost-user":
            features &= ~(1 << at.VIRTIO_F_ACCESS_PLATFORM)  # which means IOTLB messages there
        for bit in {*_SETTINGS, *without} - wanted:
            features &= ~(1 << bit)
        driver = BlockDriver(
            self.registers,
            self.memory,
            self.arena,
            features=features,
            queue_size=queue_size,
            queue_index=queue_index,
        )
        driver._wait = lambda: self.until(lambda: driver.ring.has_used)
        return driver

    def start(self, **options: Any) -> Any:
        """A started one."""
        driver = self.driver(**options)
        driver.start()
        return driver

    def before_driver_ok(self, **options: Any) -> Any:
        """One that has done everything but to set DRIVER_OK."""
        driver = self.driver(**options)
        driver.identify()
        driver.negotiate()
        driver.set_up_queue()
        return driver

    def start_read_write(self, **options: Any) -> Any:
        """A started one on a disk that can be written."""
        driver = self.start(**options)
        self.need_writable()
        return driver

    # -- waiting -----------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], timeout: float = PATIENCE) -> bool:
        """Wait for something that the device does; whether it has come."""
        deadline = monotonic() + timeout
        while not condition():
            worked = self.device.wait(0.01)
            if not worked and not self.device.asynchronous:
                return condition()
            if not worked:
                sleep(0.001)
            if monotonic() > deadline:
                return False
        return True

    def settle(self) -> None:
        """Let the device do everything it is going to do."""
        self.device.settle()

    def interrupts(self) -> int:
        """Which interrupts there were since the last call, when all is quiet: 1 used buffers,
        2 configuration."""
        self.settle()
        return int(self.registers.take_interrupt())

    def interrupted(self, bit: int) -> bool:
        """Wait for an interrupt of this kind; whether it has come."""
        return self.until(lambda: bool(self.registers.take_interrupt() & bit))

    def finish(self, driver: BlockDriver, count: int = 1) -> dict[int, Completion]:
        """Wait for ``count`` requests to come back. Fails if they do not."""
        done: dict[int, Completion] = {}
        while len(done) < count:
            came = self.until(lambda: driver.ring.has_used)
            assert came, f"only {len(done)} of {count} requests came back"
            done |= driver.collect()
        return done

    def ram(self) -> bytes:
        """All of the driver's memory."""
        return self.memory.read(self.device.base, self.device.size)

    @property
    def unit(self) -> int:
        """Bytes of the smallest request: some devices refuse parts of what they call a block."""
        if not self.offers(at.VIRTIO_BLK_F_BLK_SIZE):
            return 512
        return max(int(self.registers.config(20, 4)), 512)

    def segment_limit(self, driver: BlockDriver) -> int:
        """Data segments that a request may have; one unless the device says more."""
        if driver.features >> at.VIRTIO_BLK_F_SEG_MAX & 1:
            return driver.segments
        return 1

    def requests_that_fit(self, driver: BlockDriver, most: int) -> int:
        """How many reads of a unit may be made available at once: ``most``, or fewer."""
        each = min(2 + -(-self.unit // driver.segment_bytes), driver.ring.size)
        return max(min(most, driver.ring.size // each), 1)

    def need_room(self, driver: BlockDriver, descriptors: int) -> None:
        """Skip the test if the queue is too small for it."""
        if driver.ring.size < descriptors:
            pytest.skip(f"a queue of {driver.ring.size} entries is too small")

    def need_writable(self) -> None:
        """Skip the test on a read-only device."""
        if self.offers(at.VIRTIO_BLK_F_RO):
            pytest.skip("the device is read-only")

    def reset_queue(self) -> bool:
        """Reset the selected queue; whether that is ever complete."""
        return bool(self.registers.reset_queue()) or self.until(self.registers.queue_was_reset)


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that repeat in no sector."""
    return bytes((index * 7 + index // 251 * 13 + seed * 31) & 0xFF for index in range(length))
