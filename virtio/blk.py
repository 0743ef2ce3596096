"""The block device (virtio 1.4 §5.2): requests on one side, a Disk on the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from threading import get_ident
from time import monotonic_ns
from typing import Any

from ..backend.disk import Disk, OutsideError
from ..backend.state import StateReader, StateWriter
from ..backend.zones import ZoneError
from ..errors import GuestError, PyvirtioError
from . import layout as at
from .blk_commands import BlockCommands, RefusedError
from .blk_config import BlockTraits, Geometry, Lifetime
from .device import VirtioDevice
from .error_policy import ErrorPolicy
from .express import make_express
from .express_packed import make_packed_express
from .iommu import Translate
from .layout import SECTOR_SIZE, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from .memory import GuestMemory, Segment
from .observe import RequestRecord
from .packed import PackedRing
from .queue import Queue
from .request import make_parser
from .ring import Chain, Ring
from .service import BUDGET, HELD
from .split import SplitRing
from .transport import Transport
from .zone_requests import ZONE_STATUS, ZoneRequests

__all__ = ["VirtioBlk"]

_log = logging.getLogger(__name__)


class VirtioBlk(VirtioDevice):
    """A virtio block device on ``disk``, which stays the caller's to close.

    ``serial``: what GET_ID answers, at most 20 ASCII characters.
    ``read_only``: None is what the disk is.
    ``queue_size``: entries of each of ``num_queues`` queues, a power of two.
    ``packed``: offer packed queues, too; a driver that knows them will choose them.
    ``logical_block_size``: bytes; a hint to the driver, requests are in units of 512 anyway.
    ``size_max``: most bytes of a descriptor that the driver is to use; None tells it no limit.
    ``geometry``: None is a guess, as QEMU's.
    ``lifetime``: asked how worn the storage is, where that is known.
    ``secure_erase``: offer SECURE_ERASE, done by overwriting.
    ``errors``: what becomes of requests that the disk cannot do; see :attr:`on_stop`.
    ``in_order``, ``access_platform``: offer these features.
    ``iommu``: translates the driver's addresses, see :mod:`.iommu`.
    ``io_threads``: serve the queues in so many threads, see :mod:`.workers`; 0 is in the caller's.
    ``strict``: errors of the driver raise GuestError, too, for those who write one.

    Limits and alignments that the driver is told are the disk's; a ZonedDisk's zones are offered.
    Sectors are 512 bytes; what a disk has beyond its last whole sector cannot be reached. A disk
    that is closed under the device answers IOERR.
    """

    device_id = at.VIRTIO_ID_BLOCK

    def __init__(
        self,
        disk: Disk,
        *,
        serial: str = "",
        read_only: bool | None = None,
        queue_size: int = 256,
        num_queues: int = 1,
        logical_block_size: int = 512,
        size_max: int | None = None,
        geometry: Geometry | None = None,
        lifetime: Callable[[], Lifetime] | None = None,
        secure_erase: bool = False,
        errors: ErrorPolicy | None = None,
        packed: bool = False,
        in_order: bool = False,
        access_platform: bool = False,
        iommu: Translate | None = None,
        io_threads: int = 0,
        strict: bool = False,
    ) -> None:
        if read_only is None:
            read_only = disk.read_only
        elif disk.read_only and not read_only:
            raise ValueError("the disk is read-only")
        self.serial = serial.encode("ascii")
        if len(self.serial) > at.VIRTIO_BLK_ID_BYTES:
            raise ValueError(f"serial {serial!r} is longer than 20 characters")
        self.traits = BlockTraits(
            disk=disk,
            read_only=read_only,
            logical_block_size=logical_block_size,
            num_queues=num_queues,
            queue_size=queue_size,
            size_max=size_max,
            geometry=geometry,
            lifetime=lifetime,
            secure_erase=secure_erase,
        )
        self.disk = disk
        self.read_only = read_only
        self.logical_block_size = logical_block_size
        self.errors = ErrorPolicy() if errors is None else errors
        self.capacity = disk.size // SECTOR_SIZE
        """Sectors of 512 bytes."""
        self.writeback = True
        """Writes may stay volatile until a flush; otherwise each is stable when it completes."""
        commands = BlockCommands(self)
        self._handlers = commands.handlers
        if self.traits.zoned is not None:
            self._handlers |= ZoneRequests(self, self.traits.zoned, commands).handlers
        super().__init__(
            features=self.traits.features(),
            num_queues=num_queues,
            queue_size=queue_size,
            packed=packed,
            in_order=in_order,
            access_platform=access_platform,
            iommu=iommu,
            io_threads=io_threads,
            strict=strict,
        )
        self.was_reset()
        self._stop_listening = disk.on_resize(self._resized)

    def detach(self) -> None:
        """The device is not used any more: end its threads, and stop following the disk's size.

        A second call does nothing.
        """
        self.close()
        self._stop_listening()
        self._stop_listening = lambda: None

    # -- features and configuration ------------------------------------------------------------

    @property
    def offered_features(self) -> int:
        """See :class:`VirtioDevice`. A legacy device offers no zones (BLK-16)."""
        return super().offered_features & ~(self.legacy << at.VIRTIO_BLK_F_ZONED)

    def features_valid(self) -> bool:
        """See :class:`VirtioDevice`. Zones to be written in order have to be known (BLK-18)."""
        zoned = self.accepted(at.VIRTIO_BLK_F_ZONED)
        return super().features_valid() and (zoned or not self.traits.host_managed)

    def _make_config(self, *, zoned: bool = True) -> bytes:
        return self.traits.pack(
            self.structs, self.capacity, self.writeback, zoned=zoned and not self.legacy
        )

    def _refresh_config(self) -> None:
        """Have the configuration that goes with what was negotiated, if that is settled."""
        settled = self.status & (at.STATUS_FEATURES_OK | at.STATUS_DRIVER_OK | at.STATUS_SUSPEND)
        self._config = self._make_config(zoned=not settled or self.accepted(at.VIRTIO_BLK_F_ZONED))

    def read_config(self, offset: int, length: int) -> bytes:
        """See :class:`VirtioDevice`."""
        with self.lock:
            config = self._config
        return config[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """See :class:`VirtioDevice`. ``writeback`` alone can be written (BLK-47)."""
        where = at.BLK_CONFIG_WRITEBACK - offset
        allowed = self.legacy or self.accepted(at.VIRTIO_BLK_F_CONFIG_WCE)  # BF-53
        if 0 <= where < len(data) and allowed and not self.suspended:  # BF-64
            with self.lock:
                self.writeback = bool(data[where])
                self._refresh_config()

    def connect(self, memory: GuestMemory, transport: Transport, **options: Any) -> None:
        """See :class:`VirtioDevice`. Zones that must be written in order need a driver that knows
        them: there is no legacy one."""
        if options.get("legacy") and self.traits.host_managed:
            raise ValueError("a legacy device has no zones")
        super().connect(memory, transport, **options)

    def was_reset(self) -> None:
        """See :class:`VirtioDevice`."""
        self.writeback = True
        self._refresh_config()
        self.memory_changed()

    def memory_changed(self) -> None:
        """See :class:`VirtioDevice`."""
        self._parse = make_parser(self._memory, self.structs)

    def negotiated(self) -> None:
        """See :class:`VirtioDevice`. Chooses between writeback and writethrough (§5.2.6.2).

        A driver that cannot flush gets writes that are stable when they complete (BLK-76 case 1,
        BLK-13). On a legacy device CONFIG_WCE leaves what the driver wrote (BLK-33).
        """
        if not (self.legacy and self.accepted(at.VIRTIO_BLK_F_CONFIG_WCE)):
            self.writeback = self.accepted(at.VIRTIO_BLK_F_FLUSH)
        self._refresh_config()

    def _resized(self, size: int) -> None:
        with self.holding():
            if self.suspended:  # BF-67: later
                return
            self.capacity = size // SECTOR_SIZE
            self._refresh_config()
            self.config_changed()

    def woken(self) -> None:
        """See :class:`VirtioDevice`: the disk may have been resized (BF-69)."""
        if self.disk.size // SECTOR_SIZE != self.capacity:
            self._resized(self.disk.size)

    def save_own(self, stream: StateWriter) -> None:
        """See :class:`VirtioDevice`."""
        stream.u32(self.logical_block_size)
        stream.u64(self.capacity)
        stream.flag(self.writeback)

    def load_own(self, stream: StateReader) -> Callable[[], object]:
        """See :class:`VirtioDevice`. The disk may have another size: the driver is told then, or
        when it wakes a device that is suspended."""
        block_size, capacity, writeback = stream.u32(), stream.u64(), stream.flag()
        if block_size != self.logical_block_size:
            raise stream.malformed(
                f"has blocks of {block_size} bytes, not {self.logical_block_size}"
            )

        def adopt() -> None:
            self.writeback = writeback
            self.capacity = capacity if self.suspended else self.disk.size // SECTOR_SIZE
            self._refresh_config()
            if self.capacity != capacity:
                self.config_changed()

        return adopt

    # -- requests ----------------------------------------------------------------------------

    def process(self, chain: Chain, queue: Queue) -> int:
        """Do one request; see :class:`VirtioDevice`.

        The used length is the number of bytes written into the chain: data and status where it
        succeeded, the status byte alone where it did not.
        """
        memory, observer = self._memory, self.service.observer
        started = 0 if observer is None else monotonic_ns()
        request = self._parse(chain)
        kind, sector, outgoing, incoming, status_byte = request
        resets = self.resets
        written = 0
        status = at.VIRTIO_BLK_S_OK
        try:
            if kind == VIRTIO_BLK_T_IN:
                if outgoing:
                    raise RefusedError("a read with data for the device")
                written = self._read(sector, incoming)
            elif kind == VIRTIO_BLK_T_OUT:
                if incoming:
                    raise RefusedError("a write with room for data")
                self._write(sector, outgoing)
            else:
                handler = self._handlers.get(kind)
                if handler is None:
                    status = at.VIRTIO_BLK_S_UNSUPP  # BLK-107
                else:
                    written = handler(request)
        except Exception as error:
            status = self.status_of(error, sector, kind == VIRTIO_BLK_T_IN)
            if status == HELD:
                return HELD
            if status == at.VIRTIO_BLK_S_OK:  # the error is ignored
                written = _total(incoming)
        if self.resets == resets:  # else the memory is the driver's again (BF-29)
            memory.store_byte(status_byte, status)
        if observer is not None:
            length = _total(outgoing) or written
            observer.done(
                RequestRecord(
                    queue.index, kind, sector, length, status, started, monotonic_ns(), get_ident()
                )
            )
        return written + 1

    def status_of(self, error: Exception, sector: int, reading: bool) -> int:
        """The answer to a request that ended in ``error``; raises it again if that is a bug.

        HELD where the request is to be kept: the device is paused then.
        """
        if isinstance(error, GuestError):
            _log.debug("request at sector %d: %s", sector, error)
            if not isinstance(error, RefusedError):
                self.violation(error)
                return at.VIRTIO_BLK_S_IOERR
            if not error.forgiven:
                self.violation(error)
            return error.status
        if isinstance(error, ZoneError):
            self.violation(GuestError(str(error)))
            # A driver that did not take the zones knows their statuses as little.
            zoned = self.accepted(at.VIRTIO_BLK_F_ZONED)
            return ZONE_STATUS[error.fault] if zoned else at.VIRTIO_BLK_S_IOERR
        if isinstance(error, OutsideError):
            _log.warning("request at sector %d: the disk was made smaller (%s)", sector, error)
            return at.VIRTIO_BLK_S_IOERR
        if _closed(self.disk):
            _log.warning("request at sector %d: the disk is closed (%s)", sector, error)
            return at.VIRTIO_BLK_S_IOERR
        if isinstance(error, (OSError, PyvirtioError)):
            _log.warning("I/O error at sector %d: %s", sector, error)
            action = self.errors.action(error, reading)
            if action == "stop":
                self.hold(error)
                return HELD
            return at.VIRTIO_BLK_S_OK if action == "ignore" else at.VIRTIO_BLK_S_IOERR
        raise error

    def check_writable(self) -> None:
        """Raise RefusedError on a read-only device (BLK-66, BLK-67; whether RO was accepted or
        not). Not held against the driver."""
        if self.read_only:
            raise RefusedError("a write to a read-only device", forgiven=True)

    def make_express(self, queue: Queue, ring: Ring) -> Callable[[], None] | None:
        """See :class:`VirtioDevice`."""
        if isinstance(ring, SplitRing):
            return make_express(self, queue, ring, self._memory, BUDGET)
        if isinstance(ring, PackedRing):
            return make_packed_express(self, queue, ring, self._memory, BUDGET)
        return None

    def _read(self, sector: int, segments: list[Segment]) -> int:
        """Read from the disk into ``segments``; how many bytes."""
        memory = self._memory
        length = segments[0][1] if len(segments) == 1 else _total(segments)
        if length & (SECTOR_SIZE - 1) or sector + length // SECTOR_SIZE > self.capacity:
            raise self._out_of_bounds(sector, length)
        offset = sector * SECTOR_SIZE
        if length > memory.map_limit:
            self._check_long(offset, length, segments, True)
            for part, size in _pieces(segments, memory.map_limit):
                self._read(offset // SECTOR_SIZE, part)
                offset += size
            return length
        views = memory.map(segments, True)
        try:
            self.disk.readv(offset, views)
            if memory.commits:
                memory.commit(segments, views)
        finally:
            for view in views:
                view.release()
        return length

    def _write(self, sector: int, segments: list[Segment]) -> None:
        """Write ``segments`` to the disk."""
        self.check_writable()
        memory = self._memory
        length = segments[0][1] if len(segments) == 1 else _total(segments)
        if length & (SECTOR_SIZE - 1) or sector + length // SECTOR_SIZE > self.capacity:
            raise self._out_of_bounds(sector, length)
        offset = sector * SECTOR_SIZE
        if length > memory.map_limit:
            self._check_long(offset, length, segments, False)
            for part, size in _pieces(segments, memory.map_limit):
                self._write(offset // SECTOR_SIZE, part)
                offset += size
            return
        views = memory.map(segments, False)
        try:
            self.disk.writev(offset, views, fua=not self.writeback)
        finally:
            for view in views:
                view.release()

    def _check_long(self, offset: int, length: int, segments: list[Segment], reading: bool) -> None:
        """Before a transfer that is done in pieces: refuse it whole."""
        if length > at.DATA_BYTES_MAX:
            raise RefusedError(f"a chain of {length} bytes")  # VQ-S-16
        self._memory.check(segments, reading)
        if self.traits.zoned is not None:
            self.traits.zoned.check_request(offset, length, writing=not reading)

    def _out_of_bounds(self, sector: int, length: int) -> RefusedError:
        if length % SECTOR_SIZE:
            return RefusedError(f"{length} bytes of data are no whole sectors")  # BLK-41
        return RefusedError(f"{length} bytes at sector {sector} of {self.capacity}")  # BLK-37


def _closed(disk: Disk) -> bool:
    """The disk, or one below it, was closed under the device."""
    return disk.closed or any(_closed(child) for child in disk.children.values())


def _total(segments: list[Segment]) -> int:
    length = 0
    for segment in segments:
        length += segment[1]
    return length


def _pieces(segments: list[Segment], limit: int) -> Iterator[tuple[list[Segment], int]]:
    """``segments`` cut into lists of at most ``limit`` bytes, each with its length."""
    part: list[Segment] = []
    size = 0
    for address, length in segments:
        while length:
            take = min(length, limit - size)
            part.append((address, take))
            address += take
            length -= take
            size += take
            if size == limit:
                yield part, size
                part, size = [], 0
    if part:
        yield part, size
