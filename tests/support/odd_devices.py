"""Devices that are odd in ways that virtio allows: the conformance suite must accuse none of them.

For ``--device support.odd_devices:tiny`` and so on. All are our own device, held back or made
strange; what each does is legal, and some drivers meet it every day.
"""

from __future__ import annotations

import random
import time
from typing import Any

from pyvirtio import VirtioBlk
from pyvirtio.virtio import layout as at
from pyvirtio.virtio import pci_layout as pci
from pyvirtio.virtio.conformance.device import DeviceUnderTest
from pyvirtio.virtio.conformance.ours import HarnessDisk, OurMmio, OurPci, OurVhostUser
from pyvirtio.virtio.queue import Queue
from pyvirtio.virtio.ring import Chain

__all__ = ["ODD", "SHOULDS"]

_ESSENTIAL = 1 << at.VIRTIO_F_VERSION_1
_BARE = {"serial": "", "lifetime": False, "secure_erase": False, "num_queues": 1}


class _Plain(VirtioBlk):
    """Offers nothing beyond VERSION_1; a legacy one what it has to."""

    kept = _ESSENTIAL | 1 << at.VIRTIO_F_ANY_LAYOUT

    @property
    def offered_features(self) -> int:
        return super().offered_features & self.kept


class _Narrow(_Plain):
    """Has limits on segments, an event index and no indirect tables."""

    kept = sum(
        1 << bit
        for bit in (
            at.VIRTIO_F_VERSION_1,
            at.VIRTIO_F_EVENT_IDX,
            at.VIRTIO_F_RING_PACKED,
            at.VIRTIO_F_RING_RESET,
            at.VIRTIO_BLK_F_SIZE_MAX,
            at.VIRTIO_BLK_F_SEG_MAX,
            at.VIRTIO_BLK_F_FLUSH,
        )
    )


class _Insisting(VirtioBlk):
    """Refuses drivers that do not accept what it may insist on (BF-89, BF-91, BF-93)."""

    @property
    def offered_features(self) -> int:
        return super().offered_features | self._needed

    @property
    def _needed(self) -> int:
        bits = (at.VIRTIO_F_VERSION_1, at.VIRTIO_F_ACCESS_PLATFORM, at.VIRTIO_F_ORDER_PLATFORM)
        return 0 if self.legacy else sum(1 << bit for bit in bits)

    def features_valid(self) -> bool:
        return super().features_valid() and not self._needed & ~self.state.driver_features


class _Blocks(VirtioBlk):
    """Refuses parts of its blocks of 4096 bytes, as QEMU does."""

    def process(self, chain: Chain, queue: Queue) -> int:
        request = self._parse(chain)
        data = request.outgoing if request.kind == at.VIRTIO_BLK_T_OUT else request.incoming
        if request.kind <= at.VIRTIO_BLK_T_OUT and (
            sum(length for _, length in data) % 4096 or request.sector % 8
        ):
            self.memory.store_byte(request.status, at.VIRTIO_BLK_S_IOERR)
            return 1
        return super().process(chain, queue)

    def make_express(self, *_: Any) -> None:
        return None


class _NoId(VirtioBlk):
    """Knows no GET_ID."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._handlers = {
            kind: handler
            for kind, handler in self._handlers.items()
            if kind != at.VIRTIO_BLK_T_GET_ID
        }


class _SlowDisk(HarnessDisk):
    """Takes its time, and not always the same."""

    def _readv(self, *request: Any) -> None:
        time.sleep(random.choice((0, 0, 0.002, 0.02)))
        super()._readv(*request)

    def _writev(self, *request: Any) -> None:
        time.sleep(random.choice((0, 0.004)))
        super()._writev(*request)


class _Deferred(OurMmio):
    """Works when it is polled: it gathers kicks, and what it tells of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(slot={"notify": "deferred"}, **options)

    def wait(self, timeout: float) -> bool:
        return self.slot.poll()


class _Slow(OurMmio):
    """Threads behind it complete requests late, and in any order."""

    def set_up(self, **options: Any) -> None:
        super().set_up(io_threads=3, **options)
        self.disk = self.blk.disk = _SlowDisk(self.disk.size)
        self.disk.on_resize(self.blk._resized)


class _Chatty(OurPci):
    """Sends every message twice: drivers have to cope with spurious ones (VQ-S-30)."""

    def message(self, address: int, data: int) -> None:
        super().message(address, data)
        super().message(address, data)


class _Leisurely(OurPci):
    """Resets that take a while, as the status and the queue show."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asynchronous = True
        self._left = {pci.COMMON_DEVICE_STATUS: 0, pci.COMMON_QUEUE_RESET: 0}
        self._read, self._write = self.card.bar_read, self.card.bar_write
        self.card.bar_read, self.card.bar_write = self.read, self.write  # type: ignore[method-assign]

    def read(self, bar: int, offset: int, size: int) -> int:
        left = self._left.get(offset, 0) if bar == 4 else 0
        if left:
            self._left[offset] = left - 1
            return 15 if offset == pci.COMMON_DEVICE_STATUS else 1
        return self._read(bar, offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self._write(bar, offset, size, value)
        if bar == 4 and (offset, value) in (
            (pci.COMMON_DEVICE_STATUS, 0),
            (pci.COMMON_QUEUE_RESET, 1),
        ):
            self._left[offset] = 3


def tiny(read_only: bool = False) -> DeviceUnderTest:
    """A queue of two entries, and indirect tables alone to make up for it."""
    return OurMmio(queue_size=2, read_only=read_only, **_BARE)


def tiny_and_plain() -> DeviceUnderTest:
    """A queue of two entries and no feature at all."""
    return OurMmio(queue_size=2, kind=_Plain, **_BARE)


def plain() -> DeviceUnderTest:
    """No feature at all, on PCI and with RAM behind callbacks."""
    return OurPci(callbacks=True, kind=_Plain, **_BARE)


def plain_legacy() -> DeviceUnderTest:
    """The same through the legacy interface."""
    return OurPci(legacy=True, kind=_Plain, **_BARE)


def narrow() -> DeviceUnderTest:
    """A queue of eight entries, segments of 512 bytes."""
    return OurMmio(queue_size=8, size_max=512, kind=_Narrow, **_BARE)


def insisting() -> DeviceUnderTest:
    """Refuses drivers without VERSION_1, ACCESS_PLATFORM or ORDER_PLATFORM."""
    return OurPci(kind=_Insisting)


def blocks() -> DeviceUnderTest:
    """Blocks of 4096 bytes that are not to be divided."""
    return OurMmio(logical_block_size=4096, kind=_Blocks, in_order=True)


def always_read_only() -> DeviceUnderTest:
    """Has never been anything else."""
    return OurVhostUser(read_only=True)


def no_id() -> DeviceUnderTest:
    """Answers GET_ID with UNSUPP."""
    return OurMmio(kind=_NoId, num_queues=1)


def deferred(zoned: str = "") -> DeviceUnderTest:
    """Works when it is polled, in its own time."""
    return _Deferred(zoned=zoned)


def slow() -> DeviceUnderTest:
    """Completes requests late and out of their order."""
    return _Slow()


def chatty() -> DeviceUnderTest:
    """Sends spurious messages, with one vector for all its events."""
    return _Chatty(slot={"vectors": 2})


def leisurely() -> DeviceUnderTest:
    """Takes its time over resets."""
    return _Leisurely(num_queues=1)


def one_vector() -> DeviceUnderTest:
    """Has one MSI-X vector for all its events."""
    return OurPci(slot={"vectors": 1})


ODD = (
    "tiny",
    "tiny_and_plain",
    "plain",
    "plain_legacy",
    "narrow",
    "insisting",
    "blocks",
    "always_read_only",
    "no_id",
    "deferred",
    "slow",
    "chatty",
    "leisurely",
    "one_vector",
)
SHOULDS = {
    "tiny_and_plain": {"BLK-11"},
    "plain": {"BLK-11"},
    "plain_legacy": {"BLK-11"},
    "one_vector": {"PCI-108"},
}
"""What some should do and do not: the suite may say so."""
