"""The block device (virtio 1.4 §5.2): requests on one side, a Disk on the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final

from ..backend.disk import Disk
from ..backend.state import StateReader, StateWriter
from ..errors import GuestError, PyvirtioError
from . import layout as at
from .device import VirtioDevice
from .express import make_express
from .iommu import Translate
from .layout import SECTOR_SIZE, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from .memory import Segment
from .queue import Queue
from .request import BlockRequest, make_parser
from .ring import Chain, Ring
from .service import BUDGET
from .split import SplitRing

__all__ = ["VirtioBlk"]

_log = logging.getLogger(__name__)

_MAX_RANGE_SECTORS: Final = 0x3F_FFFF
"""Sectors of one range of DISCARD or WRITE_ZEROES: just under 2 GiB, QEMU's limit."""
_MAX_DISCARD_SEGMENTS: Final = 32
_MAX_WRITE_ZEROES_SEGMENTS: Final = 1
"""One as in QEMU: where the disk has no zero clusters, zeroes are really written."""


class _RefusedError(GuestError):
    """The driver broke a rule, and the answer to that is a status."""

    def __init__(self, reason: str, status: int = at.VIRTIO_BLK_S_IOERR) -> None:
        super().__init__(reason)
        self.status = status


class VirtioBlk(VirtioDevice):
    """A virtio block device on ``disk``, which stays the caller's to close.

    ``serial``: what GET_ID answers, at most 20 ASCII characters.
    ``read_only``: None is what the disk is.
    ``queue_size``: entries of each of ``num_queues`` queues, a power of two.
    ``packed``: offer packed queues, too; a driver that knows them will choose them.
    ``logical_block_size``: bytes; a hint to the driver, requests are in units of 512 anyway.
    ``in_order``, ``access_platform``: offer these features.
    ``iommu``: translates the driver's addresses, see :mod:`.iommu`.
    ``strict``: errors of the driver raise GuestError, too, for those who write one.

    Limits and alignments that the driver is told are the disk's. Sectors are 512 bytes; what a disk
    has beyond its last whole sector cannot be reached.
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
        packed: bool = False,
        in_order: bool = False,
        access_platform: bool = False,
        iommu: Translate | None = None,
        strict: bool = False,
    ) -> None:
        if read_only is None:
            read_only = disk.read_only
        elif disk.read_only and not read_only:
            raise ValueError("the disk is read-only")
        if not 512 <= logical_block_size <= 1 << 20 or logical_block_size & logical_block_size - 1:
            raise ValueError(
                f"logical_block_size is {logical_block_size}, must be a power of two, 512 to 1 MiB"
            )
        self._serial = serial.encode("ascii")
        if len(self._serial) > at.VIRTIO_BLK_ID_BYTES:
            raise ValueError(f"serial {serial!r} is longer than 20 characters")
        self.disk = disk
        self.read_only = read_only
        self.logical_block_size = logical_block_size
        self.capacity = disk.size // SECTOR_SIZE
        """Sectors of 512 bytes."""
        self.writeback = True
        """Writes may stay volatile until a flush; otherwise each is stable when it completes."""
        self._handlers: dict[int, Callable[[BlockRequest], int]] = {
            at.VIRTIO_BLK_T_FLUSH: self._flush,
            at.VIRTIO_BLK_T_FLUSH_OUT: self._flush,  # BLK-118
            at.VIRTIO_BLK_T_GET_ID: self._get_id,
            at.VIRTIO_BLK_T_DISCARD: self._discard,
            at.VIRTIO_BLK_T_WRITE_ZEROES: self._write_zeroes,
        }
        super().__init__(
            features=self._block_features(num_queues),
            num_queues=num_queues,
            queue_size=queue_size,
            packed=packed,
            in_order=in_order,
            access_platform=access_platform,
            iommu=iommu,
            strict=strict,
        )
        self.was_reset()
        self._stop_listening = disk.on_resize(self._resized)

    def detach(self) -> None:
        """Stop following changes of the disk's size; the device is not used any more."""
        self._stop_listening()

    # -- features and configuration ------------------------------------------------------------

    def _block_features(self, num_queues: int) -> int:
        bits = [
            at.VIRTIO_BLK_F_SEG_MAX,
            at.VIRTIO_BLK_F_BLK_SIZE,
            at.VIRTIO_BLK_F_FLUSH,
            at.VIRTIO_BLK_F_TOPOLOGY,
            at.VIRTIO_BLK_F_CONFIG_WCE,
        ]
        if num_queues > 1:
            bits.append(at.VIRTIO_BLK_F_MQ)
        if self.read_only:
            bits.append(at.VIRTIO_BLK_F_RO)
        else:
            bits += [at.VIRTIO_BLK_F_DISCARD, at.VIRTIO_BLK_F_WRITE_ZEROES]
        return sum(1 << bit for bit in bits)

    def _make_config(self) -> bytes:
        """struct virtio_blk_config; fields whose feature is not offered are 0."""
        limits = self.disk.limits
        block = self.logical_block_size
        physical = max(limits.request_alignment // block, 1)
        discards = not self.read_only
        queue_size = self.queues[0].state.max_size
        return self.structs.blk_config.pack(
            self.capacity,
            0,  # size_max
            max(queue_size - 2, 1),  # seg_max: a chain has a header and a status besides
            0,
            0,
            0,  # geometry
            block,
            physical.bit_length() - 1,
            0,  # alignment_offset
            min(physical, 0xFFFF),  # min_io_size
            min(limits.optimal_io_size // block, 0xFFFF_FFFF),
            int(self.writeback),
            len(self.queues) if len(self.queues) > 1 else 0,
            _MAX_RANGE_SECTORS if discards else 0,
            _MAX_DISCARD_SEGMENTS if discards else 0,
            max(limits.discard_alignment, block) // SECTOR_SIZE if discards else 0,
            _MAX_RANGE_SECTORS if discards else 0,
            _MAX_WRITE_ZEROES_SEGMENTS if discards else 0,
            int(discards),  # write_zeroes_may_unmap
        )

    def read_config(self, offset: int, length: int) -> bytes:
        """See :class:`VirtioDevice`."""
        return self._config[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """See :class:`VirtioDevice`. ``writeback`` alone can be written (BLK-47)."""
        where = at.BLK_CONFIG_WRITEBACK - offset
        allowed = self.legacy or self.accepted(at.VIRTIO_BLK_F_CONFIG_WCE)  # BF-53
        if 0 <= where < len(data) and allowed:
            self.writeback = bool(data[where])
            self._config = self._make_config()

    def was_reset(self) -> None:
        """See :class:`VirtioDevice`."""
        self.writeback = True
        self._config = self._make_config()
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
            self._config = self._make_config()

    def _resized(self, size: int) -> None:
        self.capacity = size // SECTOR_SIZE
        self._config = self._make_config()
        self.config_changed()

    def save_own(self, stream: StateWriter) -> None:
        """See :class:`VirtioDevice`."""
        stream.u32(self.logical_block_size)
        stream.u64(self.capacity)
        stream.flag(self.writeback)

    def load_own(self, stream: StateReader) -> Callable[[], object]:
        """See :class:`VirtioDevice`. The disk may have another size: the driver is told then."""
        block_size, capacity, writeback = stream.u32(), stream.u64(), stream.flag()
        if block_size != self.logical_block_size:
            raise stream.malformed(
                f"has blocks of {block_size} bytes, not {self.logical_block_size}"
            )

        def adopt() -> None:
            self.writeback = writeback
            self.capacity = self.disk.size // SECTOR_SIZE
            self._config = self._make_config()
            if self.capacity != capacity:
                self.config_changed()

        return adopt

    # -- requests ----------------------------------------------------------------------------

    def process(self, chain: Chain) -> int:
        """Do one request; see :class:`VirtioDevice`.

        The used length is the number of bytes written into the chain: data and status where it
        succeeded, the status byte alone where it did not.
        """
        memory = self._memory
        request = self._parse(chain)
        kind, sector, outgoing, incoming, status_byte = request
        resets = self.resets
        written = 0
        status = at.VIRTIO_BLK_S_OK
        try:
            if kind == VIRTIO_BLK_T_IN:
                if outgoing:
                    raise _RefusedError("a read with data for the device")
                written = self._read(sector, incoming)
            elif kind == VIRTIO_BLK_T_OUT:
                if incoming:
                    raise _RefusedError("a write with room for data")
                self._write(sector, outgoing)
            else:
                handler = self._handlers.get(kind)
                if handler is None:
                    status = at.VIRTIO_BLK_S_UNSUPP  # BLK-107
                else:
                    written = handler(request)
        except Exception as error:
            status = self.status_of(error, sector)
        if self.resets == resets:  # else the memory is the driver's again (BF-29)
            memory.store_byte(status_byte, status)
        return written + 1

    def status_of(self, error: Exception, sector: int) -> int:
        """The answer to a request that ended in ``error``; raises it again if that is a bug."""
        if isinstance(error, GuestError):
            _log.debug("request at sector %d: %s", sector, error)
            self.violation(error)
            return error.status if isinstance(error, _RefusedError) else at.VIRTIO_BLK_S_IOERR
        if isinstance(error, (OSError, PyvirtioError)):
            _log.warning("I/O error at sector %d: %s", sector, error)
            return at.VIRTIO_BLK_S_IOERR
        if isinstance(error, ValueError) and self.disk.closed:
            return at.VIRTIO_BLK_S_IOERR
        raise error

    def make_express(self, queue: Queue, ring: Ring) -> Callable[[], None] | None:
        """See :class:`VirtioDevice`."""
        if not isinstance(ring, SplitRing):
            return None
        return make_express(self, queue, ring, self._memory, BUDGET)

    def _read(self, sector: int, segments: list[Segment]) -> int:
        """Read from the disk into ``segments``; how many bytes."""
        memory = self._memory
        length = segments[0][1] if len(segments) == 1 else _total(segments)
        if length & (SECTOR_SIZE - 1) or sector + length // SECTOR_SIZE > self.capacity:
            raise self._out_of_bounds(sector, length)
        offset = sector * SECTOR_SIZE
        if length > memory.map_limit:
            self._check_long(length, segments, True)
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
        if self.read_only:
            # BLK-66, BLK-67; whether RO was accepted or not. Not held against the driver.
            raise OSError("write to a read-only device")
        memory = self._memory
        length = segments[0][1] if len(segments) == 1 else _total(segments)
        if length & (SECTOR_SIZE - 1) or sector + length // SECTOR_SIZE > self.capacity:
            raise self._out_of_bounds(sector, length)
        offset = sector * SECTOR_SIZE
        if length > memory.map_limit:
            self._check_long(length, segments, False)
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

    def _check_long(self, length: int, segments: list[Segment], writable: bool) -> None:
        """Before a transfer that is done in pieces: refuse it whole."""
        if length > at.CHAIN_BYTES_MAX:
            raise _RefusedError(f"a chain of {length} bytes")  # VQ-S-16
        self._memory.check(segments, writable)

    def _out_of_bounds(self, sector: int, length: int) -> _RefusedError:
        if length % SECTOR_SIZE:
            return _RefusedError(f"{length} bytes of data are no whole sectors")  # BLK-41
        return _RefusedError(f"{length} bytes at sector {sector} of {self.capacity}")  # BLK-37

    def _flush(self, request: BlockRequest) -> int:
        self.disk.flush()
        return 0

    def _get_id(self, request: BlockRequest) -> int:
        """BLK-108; into a shorter buffer (BLK-43) as much as goes."""
        left = self._serial.ljust(at.VIRTIO_BLK_ID_BYTES, b"\0")
        written = 0
        for address, length in request.incoming:
            part = left[:length]
            if part:
                self._memory.write(address, part)
            left = left[length:]
            written += len(part)
        return written

    # -- ranges: DISCARD and WRITE_ZEROES ------------------------------------------------------

    def _ranges(self, request: BlockRequest, most: int) -> list[tuple[int, int, int]]:
        """The (offset, length, flags) of the request's segments, in bytes; all are checked."""
        if self.read_only:
            raise OSError("write to a read-only device")
        struct = self.structs.blk_segment
        total = sum(length for _, length in request.outgoing)
        if total % struct.size or total > most * struct.size:  # BLK-42, BLK-44, BLK-46
            raise _RefusedError(f"{total} bytes of ranges, at most {most} are allowed")
        data = b"".join(self._memory.read(*segment) for segment in request.outgoing)
        ranges = []
        unmap = at.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        for sector, count, flags in struct.iter_unpack(data):
            if flags & ~unmap or (flags and request.kind == at.VIRTIO_BLK_T_DISCARD):
                raise _RefusedError(f"flags {flags:#x}", at.VIRTIO_BLK_S_UNSUPP)  # BLK-68, BLK-69
            if count > _MAX_RANGE_SECTORS or sector + count > self.capacity:
                raise _RefusedError(f"{count} sectors at {sector} of {self.capacity}")
            ranges.append((sector * SECTOR_SIZE, count * SECTOR_SIZE, flags))
        return ranges

    def _discard(self, request: BlockRequest) -> int:
        if not self.accepted(at.VIRTIO_BLK_F_DISCARD):
            raise _RefusedError("a discard, which was not negotiated", at.VIRTIO_BLK_S_UNSUPP)
        for offset, length, _ in self._ranges(request, _MAX_DISCARD_SEGMENTS):
            self.disk.discard(offset, length)
        return 0

    def _write_zeroes(self, request: BlockRequest) -> int:
        if not self.accepted(at.VIRTIO_BLK_F_WRITE_ZEROES):
            raise _RefusedError("write zeroes, which was not negotiated", at.VIRTIO_BLK_S_UNSUPP)
        for offset, length, flags in self._ranges(request, _MAX_WRITE_ZEROES_SEGMENTS):
            self.disk.write_zeroes(offset, length, unmap=bool(flags))
            if not self.writeback:
                self.disk.flush()
        return 0


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
