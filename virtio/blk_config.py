"""What a block device says of itself: features and configuration (virtio 1.4 §5.2.3, §5.2.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..backend.disk import Disk
from ..backend.zoned import ZonedDisk
from ..backend.zones import ZoneModel
from . import layout as at
from .layout import SECTOR_SIZE, Structs
from .memory import BOUNCE_SIZE

__all__ = [
    "MAX_DISCARD_SEGMENTS",
    "MAX_RANGE_SECTORS",
    "MAX_SECURE_ERASE_SEGMENTS",
    "MAX_WRITE_ZEROES_SEGMENTS",
    "BlockTraits",
    "Geometry",
    "Lifetime",
]

MAX_RANGE_SECTORS: Final = 0x3F_FFFF
"""Sectors of one range of DISCARD and its like: just under 2 GiB, QEMU's limit."""
MAX_DISCARD_SEGMENTS: Final = 32
MAX_WRITE_ZEROES_SEGMENTS: Final = 1
"""One as in QEMU: where the disk has no zero clusters, zeroes are really written."""
MAX_SECURE_ERASE_SEGMENTS: Final = 1
"""One, since everything is overwritten."""

_HEADS: Final = 16
_TRACK: Final = 63
_CYLINDERS_MAX: Final = 16383
"""The geometry that ATA gives disks of any size, and QEMU, too."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How worn the storage is: what GET_LIFETIME answers (as eMMC's registers of that name)."""

    pre_eol_info: int = 0
    """0 undefined, 1 normal, 2 warning (80 % of reserved blocks used), 3 urgent (90 %)."""
    type_a: int = 0
    """SLC blocks: 0 undefined, 1 to 10 is up to that many tenths of the life used, 11 all of it."""
    type_b: int = 0
    """MLC blocks: the same."""

    def __post_init__(self) -> None:
        # BLK-80: no reserved value goes to a driver.
        if not (0 <= self.pre_eol_info <= 3 and 0 <= self.type_a <= 11 and 0 <= self.type_b <= 11):
            raise ValueError(f"{self} has a reserved value")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Cylinders, heads and sectors of a track, for the software that still asks."""

    cylinders: int
    heads: int
    sectors: int

    def __post_init__(self) -> None:
        if not (0 < self.cylinders <= 0xFFFF and 0 < self.heads < 256 and 0 < self.sectors < 256):
            raise ValueError(f"{self} does not fit")

    @classmethod
    def guess(cls, capacity: int) -> Geometry:
        """What a disk of ``capacity`` sectors of 512 bytes pretends to have."""
        cylinders = capacity // (_HEADS * _TRACK)
        return cls(min(max(cylinders, 2), _CYLINDERS_MAX), _HEADS, _TRACK)


@dataclass(frozen=True, slots=True)
class BlockTraits:
    """A block device's own properties: all but the disk that changes and the driver's choices."""

    disk: Disk
    read_only: bool
    logical_block_size: int
    num_queues: int
    queue_size: int
    size_max: int | None
    geometry: Geometry | None
    lifetime: Callable[[], Lifetime] | None
    secure_erase: bool

    def __post_init__(self) -> None:
        block = self.logical_block_size
        if not 512 <= block <= 1 << 20 or block & block - 1:
            raise ValueError(f"logical_block_size is {block}, must be a power of two, 512 to 1 MiB")
        if self.size_max is not None and not 512 <= self.size_max < 1 << 32:
            raise ValueError(f"size_max is {self.size_max}, must be 512 bytes or more")
        zoned = self.zoned
        if zoned is not None and zoned.zone_size // SECTOR_SIZE >= 1 << 32:
            raise ValueError("zones must be below 2 TiB")

    @property
    def zoned(self) -> ZonedDisk | None:
        """The disk, if it has zones."""
        return self.disk if isinstance(self.disk, ZonedDisk) else None

    @property
    def seg_max(self) -> int:
        """Data segments of a request: a chain has a header and a status besides."""
        return max(self.queue_size - 2, 1)

    @property
    def host_managed(self) -> bool:
        """The disk has zones that must be written in order."""
        return self.zoned is not None and self.zoned.model == ZoneModel.HOST_MANAGED

    def features(self) -> int:
        """The block device's own features, as a bit mask."""
        bits = {
            at.VIRTIO_BLK_F_SIZE_MAX: self.size_max is not None,
            at.VIRTIO_BLK_F_SEG_MAX: True,
            at.VIRTIO_BLK_F_GEOMETRY: True,
            at.VIRTIO_BLK_F_RO: self.read_only,
            at.VIRTIO_BLK_F_BLK_SIZE: True,
            at.VIRTIO_BLK_F_FLUSH: True,  # BLK-11, BLK-12
            at.VIRTIO_BLK_F_TOPOLOGY: True,
            at.VIRTIO_BLK_F_CONFIG_WCE: True,
            at.VIRTIO_BLK_F_MQ: self.num_queues > 1,
            # BLK-06: no driver may take it together with such zones.
            at.VIRTIO_BLK_F_DISCARD: not self.read_only and not self.host_managed,
            at.VIRTIO_BLK_F_WRITE_ZEROES: not self.read_only,
            at.VIRTIO_BLK_F_LIFETIME: self.lifetime is not None,  # BLK-78, BLK-79
            at.VIRTIO_BLK_F_SECURE_ERASE: self.secure_erase and not self.read_only,
            at.VIRTIO_BLK_F_ZONED: self.zoned is not None,  # BLK-15
        }
        return sum(offered << bit for bit, offered in bits.items())

    def pack(self, structs: Structs, capacity: int, writeback: bool, *, zoned: bool) -> bytes:
        """struct virtio_blk_config; fields whose feature is not offered are 0.

        ``zoned``: tell of the zones; if the driver went on without ZONED they are 0 (BLK-17).
        """
        limits = self.disk.limits
        block = self.logical_block_size
        physical = max(limits.request_alignment // block, 1)
        writable = not self.read_only
        geometry = Geometry.guess(capacity) if self.geometry is None else self.geometry
        features = self.features()
        discards = bool(features >> at.VIRTIO_BLK_F_DISCARD & 1)
        erases = bool(features >> at.VIRTIO_BLK_F_SECURE_ERASE & 1)
        return structs.blk_config.pack(
            capacity,
            self.size_max or 0,
            self.seg_max,
            geometry.cylinders,
            geometry.heads,
            geometry.sectors,
            block,
            physical.bit_length() - 1,
            0,  # alignment_offset
            min(physical, 0xFFFF),  # min_io_size
            min(limits.optimal_io_size // block, 0xFFFF_FFFF),
            int(writeback),
            self.num_queues if self.num_queues > 1 else 0,
            MAX_RANGE_SECTORS if discards else 0,
            MAX_DISCARD_SEGMENTS if discards else 0,
            max(limits.discard_alignment, block) // SECTOR_SIZE if discards else 0,
            MAX_RANGE_SECTORS if writable else 0,
            MAX_WRITE_ZEROES_SEGMENTS if writable else 0,
            int(writable),  # write_zeroes_may_unmap
            self.erase_sectors if erases else 0,
            MAX_SECURE_ERASE_SEGMENTS if erases else 0,
            self.erase_alignment // SECTOR_SIZE if erases else 0,
            *(self._zone_fields() if zoned else (0,) * 6),
        )

    @property
    def erase_alignment(self) -> int:
        """Bytes that a secure erase is aligned to: whole zones where there are any (BLK-103)."""
        if self.zoned is not None:
            return self.zoned.zone_size
        return max(self.disk.limits.request_alignment, self.logical_block_size)

    @property
    def erase_sectors(self) -> int:
        """Most sectors of a secure erase."""
        unit = self.erase_alignment // SECTOR_SIZE
        return max(MAX_RANGE_SECTORS // unit, 1) * unit

    @property
    def max_append(self) -> int:
        """Most bytes of a zone append (BLK-26, BLK-27)."""
        if self.zoned is None:
            return 0
        most = min(self.zoned.max_append, BOUNCE_SIZE)
        return most if self.size_max is None else min(most, self.seg_max * self.size_max)

    def _zone_fields(self) -> tuple[int, ...]:
        """BLK-19 to BLK-30."""
        disk = self.zoned
        if disk is None:
            return (0,) * 6
        return (
            disk.zone_size // SECTOR_SIZE,
            disk.max_open,
            disk.max_active,
            self.max_append // SECTOR_SIZE,
            disk.write_granularity,
            int(disk.model),
        )
