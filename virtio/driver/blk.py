"""A driver for virtio block devices (virtio 1.4 §5.2): one request at a time, or as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic, sleep

from .. import layout as at
from ..fence import make_fence
from ..layout import BIG, LITTLE, SECTOR_SIZE, ByteOrder
from ..memory import GuestMemory
from .packed import PackedDriverRing
from .ring import Arena, Buffer, DriverRing
from .transport import DriverError, DriverTransport

__all__ = ["BlockDriver", "Completion", "DriverError"]

_PATIENCE = 10.0
"""Seconds that a reset may take."""
_UNLIMITED = 1 << 20
"""Bytes, or segments, where the device has no limit."""
_UNTOUCHED = 0xFF
"""What a status byte is before the device writes it."""

UNDERSTOOD = sum(
    1 << bit
    for bit in (
        at.VIRTIO_F_ANY_LAYOUT,
        at.VIRTIO_F_INDIRECT_DESC,
        at.VIRTIO_F_EVENT_IDX,
        at.VIRTIO_F_VERSION_1,
        at.VIRTIO_F_RING_PACKED,
        at.VIRTIO_F_IN_ORDER,
        at.VIRTIO_F_ACCESS_PLATFORM,
        at.VIRTIO_F_RING_RESET,
        at.VIRTIO_F_SUSPEND,
        at.VIRTIO_F_NOTIFICATION_DATA,
        at.VIRTIO_BLK_F_SIZE_MAX,
        at.VIRTIO_BLK_F_SEG_MAX,
        at.VIRTIO_BLK_F_GEOMETRY,
        at.VIRTIO_BLK_F_RO,
        at.VIRTIO_BLK_F_BLK_SIZE,
        at.VIRTIO_BLK_F_FLUSH,
        at.VIRTIO_BLK_F_TOPOLOGY,
        at.VIRTIO_BLK_F_CONFIG_WCE,
        at.VIRTIO_BLK_F_MQ,
        at.VIRTIO_BLK_F_DISCARD,
        at.VIRTIO_BLK_F_WRITE_ZEROES,
        at.VIRTIO_BLK_F_LIFETIME,
        at.VIRTIO_BLK_F_SECURE_ERASE,
        at.VIRTIO_BLK_F_ZONED,
    )
)
"""The features that this driver knows, as a bit mask."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back of a request."""

    status: int
    """The status byte; 255 if the device did not write it."""
    used_length: int
    data: bytes
    """What the device may have written before the status."""


@dataclass(slots=True)
class _Pending:
    incoming: int
    length: int
    status: int


class BlockDriver:
    """A driver on one queue of a virtio block device, reached through ``registers``.

    The queue is packed where the device offers that and ``features`` allows it, else split.
    ``memory`` is the guest's RAM, ``arena`` the part of it that the driver may use. ``features``
    masks what it accepts of what is offered. ``wait`` is called while a request is not
    done, until it gives something false: for devices that are polled, or in another process.
    """

    def __init__(
        self,
        registers: DriverTransport,
        memory: GuestMemory,
        arena: Arena,
        *,
        features: int = UNDERSTOOD,
        queue_index: int = 0,
        queue_size: int = 16,
        page_size: int = 4096,
        wait: Callable[[], object] | None = None,
    ) -> None:
        self.registers = registers
        self.memory = memory
        self.arena = arena
        self.features = features
        self.queue_index = queue_index
        self.queue_size = queue_size
        self.legacy = registers.legacy
        self.order: ByteOrder = registers.order
        self.page_size = page_size
        self.structs = LITTLE if self.order == "little" else BIG
        self.ring: DriverRing | PackedDriverRing
        self.segment_bytes = _UNLIMITED
        """Most bytes of a data segment (SIZE_MAX)."""
        self.segments = _UNLIMITED
        """Most data segments of a request (SEG_MAX)."""
        self._wait = wait
        self._pending: dict[int, _Pending] = {}
        self._fence = make_fence()

    # -- bringing the device up ----------------------------------------------------------------

    def start(self) -> None:
        """Reset and initialise the device (§3.1.1). Raises DriverError if it will not."""
        self.identify()
        self.negotiate()
        self.set_up_queue()
        self.registers.status |= at.STATUS_DRIVER_OK

    def identify(self) -> None:
        """Check that there is a block device, reset it and say that it was found."""
        registers = self.registers
        registers.identify(at.VIRTIO_ID_BLOCK)
        registers.status = 0
        deadline = monotonic() + _PATIENCE
        while registers.status:  # BF-30
            if monotonic() > deadline:
                raise DriverError("the device does not reset")
            sleep(0.001)
        registers.status = at.STATUS_ACKNOWLEDGE
        registers.status |= at.STATUS_DRIVER

    def negotiate(self) -> None:
        """Accept what is offered and wanted."""
        registers = self.registers
        self.features &= registers.offered_features()
        registers.accept_features(self.features)
        if not self.legacy:
            registers.status |= at.STATUS_FEATURES_OK
            if not registers.status & at.STATUS_FEATURES_OK:
                raise DriverError("the device refuses the features")
        self.segment_bytes = self._limit(at.VIRTIO_BLK_F_SIZE_MAX, 8)
        self.segments = self._limit(at.VIRTIO_BLK_F_SEG_MAX, 12)

    def _limit(self, feature: int, field: int) -> int:
        """What a field of the configuration allows, if its feature was accepted."""
        if not self.features >> feature & 1:
            return _UNLIMITED
        return min(self.registers.config(field, 4) or _UNLIMITED, _UNLIMITED)

    @property
    def most(self) -> int:
        """Bytes of data that a request may have."""
        indirect = self.features >> at.VIRTIO_F_INDIRECT_DESC & 1
        room = self.segments if indirect else max(self.ring.size - 2, 1)
        segments = min(self.segments, room)
        bytes_ = min(segments * self.segment_bytes, _UNLIMITED)
        return max(bytes_ // SECTOR_SIZE, 1) * SECTOR_SIZE

    def set_up_queue(self) -> None:
        """Lay out the ring and give it to the device."""
        registers = self.registers
        largest = registers.select_queue(self.queue_index)
        size = largest if registers.fixed_queue_size else min(self.queue_size, largest)
        if not size:
            raise DriverError(f"there is no queue {self.queue_index}")
        self.ring = ring = self._allocate_ring(size)
        self._pending = {}
        if self.legacy:
            ready = registers.enable_legacy_queue(
                size, ring.descriptors, self.page_size, self.page_size
            )
        else:
            ready = registers.enable_queue(size, ring.descriptors, ring.available, ring.used)
        if not ready:
            raise DriverError("the device does not take the queue")

    def _allocate_ring(self, size: int) -> DriverRing | PackedDriverRing:
        event_idx = bool(self.features >> at.VIRTIO_F_EVENT_IDX & 1)
        in_order = bool(self.features >> at.VIRTIO_F_IN_ORDER & 1)
        if self.features >> at.VIRTIO_F_RING_PACKED & 1:
            return PackedDriverRing.allocate(
                self.memory, self.arena, size, event_idx=event_idx, in_order=in_order
            )
        return DriverRing.allocate(
            self.memory,
            self.arena,
            size,
            event_idx=event_idx,
            in_order=in_order,
            order=self.order,
            align=self.page_size if self.legacy else None,
        )

    def suspend(self, timeout: float = _PATIENCE) -> None:
        """Have the device stand still (SUSPEND negotiated): what it had taken comes back first.

        Nothing may be added to the ring until :meth:`resume`. Raises DriverError if it does not
        within ``timeout`` seconds, or needs a reset.
        """
        self.registers.status |= at.STATUS_SUSPEND
        self._await_status(at.STATUS_SUSPEND, timeout)

    def resume(self, timeout: float = _PATIENCE) -> None:
        """Have a suspended device go on; the same of errors."""
        self.registers.status |= at.STATUS_DRIVER_OK
        self._await_status(at.STATUS_DRIVER_OK, timeout)

    def _await_status(self, wanted: int, timeout: float) -> None:
        """Wait until of DRIVER_OK and SUSPEND this one alone is set (BF-58, BF-62)."""
        both = at.STATUS_DRIVER_OK | at.STATUS_SUSPEND
        deadline = monotonic() + timeout
        while (status := self.registers.status) & (both | at.STATUS_NEEDS_RESET) != wanted:
            if status & at.STATUS_NEEDS_RESET:
                raise DriverError("the device needs a reset")
            if monotonic() > deadline:
                raise DriverError(f"the device's status stays {status:#x}")
            if self._wait is None or not self._wait():
                sleep(0.001)

    @property
    def capacity(self) -> int:
        """Of the disk, in sectors of 512 bytes."""
        return self.registers.config(0, 8)

    # -- requests ----------------------------------------------------------------------------

    def submit(
        self,
        kind: int,
        sector: int = 0,
        outgoing: bytes = b"",
        incoming: int = 0,
        *,
        cuts: Iterable[int] = (),
        indirect: int | None = None,
    ) -> int:
        """Add one request to the ring (published by :meth:`kick`); its head.

        ``outgoing`` is data for the device, ``incoming`` the number of bytes expected from it.
        ``cuts`` are lengths of the first descriptors, instead of header, data and status in one
        each. ``indirect`` puts all but that many descriptors into an indirect table.
        """
        memory = self.memory
        header = self.structs.blk_request.pack(kind, 0, sector)
        out_at = self.arena.take(len(header) + len(outgoing))
        memory.write(out_at, header + outgoing)
        in_at = self.arena.take(incoming + 1)
        memory.write(in_at, bytes([_UNTOUCHED]) * (incoming + 1))
        lengths = list(cuts)
        whole = [Buffer(out_at, 16 + len(outgoing)), Buffer(in_at, incoming + 1, True)]
        if not lengths:
            lengths = [len(header), *self._parts(len(outgoing)), *self._parts(incoming)]
        buffers = _cut(whole, lengths)
        if indirect is None and not cuts and len(buffers) > self.ring.size:
            if self.features >> at.VIRTIO_F_INDIRECT_DESC & 1:
                indirect = 0
            else:  # a very small ring: how a request is cut means nothing
                buffers = whole
        if indirect is None:
            head = self.ring.add(buffers)
        else:
            table = self.arena.take(at.VIRTQ_DESC_SIZE * len(buffers))
            head = self.ring.add_indirect(buffers, table, indirect)
        self._pending[head] = _Pending(in_at, incoming, in_at + incoming)
        return head

    def _parts(self, length: int) -> list[int]:
        """Lengths of the segments of so many bytes of data."""
        whole, rest = divmod(length, self.segment_bytes)
        return [self.segment_bytes] * whole + [rest] * (rest > 0)

    def kick(self) -> None:
        """Publish what was added, and notify the device if it wants that."""
        if self.ring.publish():
            with_data = self.features >> at.VIRTIO_F_NOTIFICATION_DATA & 1
            self.registers.notify(self.queue_index, self.ring.next_place if with_data else None)

    def collect(self) -> dict[int, Completion]:
        """What is done, by head."""
        done = self._collect()
        while True:
            self.ring.want_next_interrupt()
            self.registers.take_interrupt()
            self._fence()
            found = self._collect()  # what was used before that wish raises no interrupt
            if not found:
                return done
            done |= found

    def _collect(self) -> dict[int, Completion]:
        done = {}
        for head, used_length in self.ring.collect():
            pending = self._pending.pop(head)
            done[head] = Completion(
                self.memory.read(pending.status, 1)[0],
                used_length,
                self.memory.read(pending.incoming, pending.length),
            )
        return done

    def request(
        self,
        kind: int,
        sector: int = 0,
        outgoing: bytes = b"",
        incoming: int = 0,
        *,
        cuts: Iterable[int] = (),
        indirect: int | None = None,
    ) -> Completion:
        """Do one request, see :meth:`submit`. Raises DriverError if nothing comes back."""
        mark = self.arena.mark()
        head = self.submit(kind, sector, outgoing, incoming, cuts=cuts, indirect=indirect)
        self.kick()
        done = self.collect()
        while head not in done and self._wait is not None and self._wait():
            done |= self.collect()
        if head not in done:
            raise DriverError("the request did not come back")
        self.arena.give_back(mark)
        return done[head]

    def read(self, sector: int, count: int) -> bytes:
        """``count`` sectors from ``sector`` on, in requests as long as the device allows.

        Raises DriverError unless the status is OK.
        """
        total, data = count * SECTOR_SIZE, b""
        for start in range(0, max(total, 1), self.most):
            length = min(total - start, self.most)
            place = sector + start // SECTOR_SIZE
            data += self._checked(at.VIRTIO_BLK_T_IN, place, b"", length).data
        return data

    def write(self, sector: int, data: bytes) -> None:
        """Write whole sectors. Raises DriverError, as those that follow, unless it went well."""
        for start in range(0, max(len(data), 1), self.most):
            part = data[start : start + self.most]
            self._checked(at.VIRTIO_BLK_T_OUT, sector + start // SECTOR_SIZE, part)

    def flush(self) -> None:
        """Have everything written before on stable storage."""
        self._checked(at.VIRTIO_BLK_T_FLUSH)

    def serial(self) -> str:
        """The device's id string."""
        data = self._checked(at.VIRTIO_BLK_T_GET_ID, 0, b"", at.VIRTIO_BLK_ID_BYTES).data
        return data.rstrip(b"\0").decode("ascii")

    def discard(self, sector: int, count: int) -> None:
        """Say that these sectors are no longer needed."""
        self._checked(at.VIRTIO_BLK_T_DISCARD, 0, self.segment(sector, count))

    def write_zeroes(self, sector: int, count: int, *, unmap: bool = False) -> None:
        """Have these sectors read as zeroes."""
        self._checked(at.VIRTIO_BLK_T_WRITE_ZEROES, 0, self.segment(sector, count, int(unmap)))

    def secure_erase(self, sector: int, count: int) -> None:
        """Have the data of these sectors gone for good."""
        self._checked(at.VIRTIO_BLK_T_SECURE_ERASE, 0, self.segment(sector, count))

    def report_zones(self, sector: int = 0, room: int = 16) -> list[tuple[int, int, int, int, int]]:
        """Of up to ``room`` zones from the one with ``sector`` on: capacity, start, write pointer
        (in sectors), type and state."""
        head, each = self.structs.zone_report, self.structs.zone_descriptor
        incoming = head.size + room * each.size
        data = self._checked(at.VIRTIO_BLK_T_ZONE_REPORT, sector, b"", incoming).data
        (count,) = head.unpack_from(data)
        return [each.unpack_from(data, head.size + number * each.size) for number in range(count)]

    def append(self, sector: int, data: bytes) -> int:
        """Write to the write pointer of the zone that starts at ``sector``; the first sector."""
        struct = self.structs.zone_append
        done = self._checked(at.VIRTIO_BLK_T_ZONE_APPEND, sector, data, struct.size)
        return int(struct.unpack(done.data)[0])

    def segment(self, sector: int, count: int, flags: int = 0) -> bytes:
        """One range of DISCARD and its like, as it goes into the request's data."""
        return self.structs.blk_segment.pack(sector, count, flags)

    def _checked(
        self, kind: int, sector: int = 0, outgoing: bytes = b"", incoming: int = 0
    ) -> Completion:
        completion = self.request(kind, sector, outgoing, incoming)
        if completion.status != at.VIRTIO_BLK_S_OK:
            raise DriverError(f"request {kind} at sector {sector}: status {completion.status}")
        return completion


def _cut(buffers: list[Buffer], lengths: list[int]) -> list[Buffer]:
    """The buffers cut so that the first pieces have these lengths (or end with their buffer)."""
    pieces = []
    for address, left, writable in buffers:
        while left:
            length = min(lengths.pop(0), left) if lengths else left
            pieces.append(Buffer(address, length, writable))
            address += length
            left -= length
    return pieces
