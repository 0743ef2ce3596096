"""Constants and structures of virtio 1.4, as its tables give them; no logic.

Names are the specification's (and Linux's). Section numbers are those of virtio 1.4 cs01.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, Literal

__all__ = ["BIG", "LITTLE", "ByteOrder", "Structs"]

ByteOrder = Literal["little", "big"]

# -- §2.1 device status ------------------------------------------------------------------------

STATUS_ACKNOWLEDGE: Final = 0x01
STATUS_DRIVER: Final = 0x02
STATUS_DRIVER_OK: Final = 0x04
STATUS_FEATURES_OK: Final = 0x08
STATUS_SUSPEND: Final = 0x10
STATUS_NEEDS_RESET: Final = 0x40
STATUS_FAILED: Final = 0x80

# -- §6 device-independent features (bit numbers) ----------------------------------------------

VIRTIO_F_NOTIFY_ON_EMPTY: Final = 24
"""Legacy only."""
VIRTIO_F_ANY_LAYOUT: Final = 27
"""Legacy only; a transitional device must offer it."""
VIRTIO_F_INDIRECT_DESC: Final = 28
VIRTIO_F_EVENT_IDX: Final = 29
VIRTIO_F_VERSION_1: Final = 32
VIRTIO_F_ACCESS_PLATFORM: Final = 33
VIRTIO_F_RING_PACKED: Final = 34
VIRTIO_F_IN_ORDER: Final = 35
VIRTIO_F_ORDER_PLATFORM: Final = 36
VIRTIO_F_NOTIFICATION_DATA: Final = 38
VIRTIO_F_RING_RESET: Final = 40
VIRTIO_F_SUSPEND: Final = 43

# -- §2.7 split virtqueues ---------------------------------------------------------------------

QUEUE_SIZE_MAX: Final = 32768
"""§2.7: entries; a split queue's size is also a power of two."""
CHAIN_BYTES_MAX: Final = 1 << 32
"""§2.7.5.1: a chain must not be longer than this in total."""
DATA_BYTES_MAX: Final = CHAIN_BYTES_MAX - 17
"""So of a block request's data: header and status are in the chain, too."""

VIRTQ_DESC_ALIGN: Final = 16
VIRTQ_AVAIL_ALIGN: Final = 2
VIRTQ_USED_ALIGN: Final = 4

VIRTQ_DESC_SIZE: Final = 16
VIRTQ_USED_ELEM_SIZE: Final = 8

VIRTQ_DESC_F_NEXT: Final = 1
VIRTQ_DESC_F_WRITE: Final = 2
VIRTQ_DESC_F_INDIRECT: Final = 4

VIRTQ_AVAIL_F_NO_INTERRUPT: Final = 1
VIRTQ_USED_F_NO_NOTIFY: Final = 1

# -- §2.8 packed virtqueues --------------------------------------------------------------------

VIRTQ_DESC_F_AVAIL: Final = 1 << 7
VIRTQ_DESC_F_USED: Final = 1 << 15

VIRTQ_EVENT_ALIGN: Final = 4
VIRTQ_EVENT_SIZE: Final = 4
"""Bytes of an event suppression structure: off_wrap, flags."""

RING_EVENT_FLAGS_ENABLE: Final = 0
RING_EVENT_FLAGS_DISABLE: Final = 1
RING_EVENT_FLAGS_DESC: Final = 2

# -- §4.2.2 virtio over MMIO: register offsets -------------------------------------------------

MMIO_MAGIC_VALUE: Final = 0x000
MMIO_VERSION: Final = 0x004
MMIO_DEVICE_ID: Final = 0x008
MMIO_VENDOR_ID: Final = 0x00C
MMIO_DEVICE_FEATURES: Final = 0x010
MMIO_DEVICE_FEATURES_SEL: Final = 0x014
MMIO_DRIVER_FEATURES: Final = 0x020
MMIO_DRIVER_FEATURES_SEL: Final = 0x024
MMIO_GUEST_PAGE_SIZE: Final = 0x028
"""Legacy (§4.2.4)."""
MMIO_QUEUE_SEL: Final = 0x030
MMIO_QUEUE_SIZE_MAX: Final = 0x034
MMIO_QUEUE_SIZE: Final = 0x038
MMIO_QUEUE_ALIGN: Final = 0x03C
"""Legacy."""
MMIO_QUEUE_PFN: Final = 0x040
"""Legacy."""
MMIO_QUEUE_READY: Final = 0x044
MMIO_QUEUE_NOTIFY: Final = 0x050
MMIO_INTERRUPT_STATUS: Final = 0x060
MMIO_INTERRUPT_ACK: Final = 0x064
MMIO_STATUS: Final = 0x070
MMIO_QUEUE_DESC_LOW: Final = 0x080
MMIO_QUEUE_DESC_HIGH: Final = 0x084
MMIO_QUEUE_DRIVER_LOW: Final = 0x090
MMIO_QUEUE_DRIVER_HIGH: Final = 0x094
MMIO_QUEUE_DEVICE_LOW: Final = 0x0A0
MMIO_QUEUE_DEVICE_HIGH: Final = 0x0A4
MMIO_SHM_SEL: Final = 0x0AC
MMIO_SHM_LEN_LOW: Final = 0x0B0
MMIO_SHM_LEN_HIGH: Final = 0x0B4
MMIO_SHM_BASE_LOW: Final = 0x0B8
MMIO_SHM_BASE_HIGH: Final = 0x0BC
MMIO_QUEUE_RESET: Final = 0x0C0
MMIO_CONFIG_GENERATION: Final = 0x0FC
MMIO_CONFIG: Final = 0x100

MMIO_SIZE: Final = 0x200
"""Bytes of address space that QEMU and Linux's device trees give one device."""
MMIO_MAGIC: Final = 0x74726976
"""``virt``, little-endian."""
MMIO_INTERRUPT_USED_BUFFER: Final = 1
MMIO_INTERRUPT_CONFIG_CHANGE: Final = 2
VENDOR_QEMU: Final = 0x554D4551
"""``QEMU``. Guests written for QEMU's board (xv6) look for it."""

# -- §5.2 block device -------------------------------------------------------------------------

VIRTIO_ID_BLOCK: Final = 2
SECTOR_SIZE: Final = 512
"""Unit of every sector number, whatever ``blk_size`` says."""

VIRTIO_BLK_F_SIZE_MAX: Final = 1
VIRTIO_BLK_F_SEG_MAX: Final = 2
VIRTIO_BLK_F_GEOMETRY: Final = 4
VIRTIO_BLK_F_RO: Final = 5
VIRTIO_BLK_F_BLK_SIZE: Final = 6
VIRTIO_BLK_F_FLUSH: Final = 9
VIRTIO_BLK_F_TOPOLOGY: Final = 10
VIRTIO_BLK_F_CONFIG_WCE: Final = 11
VIRTIO_BLK_F_MQ: Final = 12
VIRTIO_BLK_F_DISCARD: Final = 13
VIRTIO_BLK_F_WRITE_ZEROES: Final = 14
VIRTIO_BLK_F_LIFETIME: Final = 15
VIRTIO_BLK_F_SECURE_ERASE: Final = 16
VIRTIO_BLK_F_ZONED: Final = 17

VIRTIO_BLK_T_IN: Final = 0
VIRTIO_BLK_T_OUT: Final = 1
VIRTIO_BLK_T_FLUSH: Final = 4
VIRTIO_BLK_T_FLUSH_OUT: Final = 5
"""Legacy synonym of FLUSH (§5.2.6.4)."""
VIRTIO_BLK_T_GET_ID: Final = 8
VIRTIO_BLK_T_GET_LIFETIME: Final = 10
VIRTIO_BLK_T_DISCARD: Final = 11
VIRTIO_BLK_T_WRITE_ZEROES: Final = 13
VIRTIO_BLK_T_SECURE_ERASE: Final = 14
VIRTIO_BLK_T_ZONE_APPEND: Final = 15
VIRTIO_BLK_T_ZONE_REPORT: Final = 16
VIRTIO_BLK_T_ZONE_OPEN: Final = 18
VIRTIO_BLK_T_ZONE_CLOSE: Final = 20
VIRTIO_BLK_T_ZONE_FINISH: Final = 22
VIRTIO_BLK_T_ZONE_RESET: Final = 24
VIRTIO_BLK_T_ZONE_RESET_ALL: Final = 26

VIRTIO_BLK_S_OK: Final = 0
VIRTIO_BLK_S_IOERR: Final = 1
VIRTIO_BLK_S_UNSUPP: Final = 2
VIRTIO_BLK_S_ZONE_INVALID_CMD: Final = 3
VIRTIO_BLK_S_ZONE_UNALIGNED_WP: Final = 4
VIRTIO_BLK_S_ZONE_OPEN_RESOURCE: Final = 5
VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE: Final = 6

VIRTIO_BLK_ID_BYTES: Final = 20
VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP: Final = 1

BLK_CONFIG_WRITEBACK: Final = 32
"""Offset of ``writeback``, the only field that a driver may write."""
BLK_CONFIG_SIZE: Final = 96
"""Bytes of the whole configuration."""
BLK_CONFIG_ZONED: Final = 72
"""Offset of the fields that belong to ZONED; they are the last."""


class Structs:
    """The structures in memory, in one byte order.

    Modern devices are little-endian; a legacy one has its guest's order (§2.7.3, §5.2.6.3).
    """

    __slots__ = (
        "blk_config",
        "blk_lifetime",
        "blk_request",
        "blk_segment",
        "desc",
        "order",
        "packed_used",
        "three_desc",
        "used_elem",
        "word",
        "zone_append",
        "zone_descriptor",
        "zone_report",
    )

    def __init__(self, order: ByteOrder) -> None:
        mark = "<" if order == "little" else ">"
        self.order: ByteOrder = order
        self.desc = Struct(mark + "QIHH")
        """addr, len, flags, next (§2.7.5); of a packed queue: addr, len, id, flags."""
        self.three_desc = Struct(mark + 3 * "QIHH")
        """Three descriptors that are neighbours."""
        self.word = Struct(mark + "H")
        """The fields of both rings, but for the used elements."""
        self.used_elem = Struct(mark + "II")
        """id, len (§2.7.8)."""
        self.packed_used = Struct(mark + "IH")
        """len, id: what the device writes of a used packed descriptor besides its flags."""
        self.blk_request = Struct(mark + "IIQ")
        """type, reserved (legacy: ioprio), sector (§5.2.6)."""
        self.blk_segment = Struct(mark + "QII")
        """sector, num_sectors, flags: one range of DISCARD and WRITE_ZEROES."""
        self.blk_config = Struct(mark + "QIIHBBIBBHIBxHIIIIIBxxx" + "III" + "IIIIIBxxx")
        """§5.2.4: capacity, size_max, seg_max, cylinders, heads, sectors, blk_size,
        physical_block_exp, alignment_offset, min_io_size, opt_io_size, writeback, num_queues,
        max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors,
        max_write_zeroes_seg, write_zeroes_may_unmap; max_secure_erase_sectors,
        max_secure_erase_seg, secure_erase_sector_alignment; zone_sectors, max_open_zones,
        max_active_zones, max_append_sectors, write_granularity, model."""
        self.blk_lifetime = Struct(mark + "HHH")
        """pre_eol_info, device_lifetime_est_typ_a, device_lifetime_est_typ_b (§5.2.6)."""
        self.zone_report = Struct(mark + "Q56x")
        """nr_zones: the head of a zone report, 64 bytes."""
        self.zone_descriptor = Struct(mark + "QQQBB38x")
        """z_cap, z_start, z_wp (all in sectors), z_type, z_state: 64 bytes."""
        self.zone_append = Struct(mark + "Q")
        """append_sector: what a zone append answers before its status."""


LITTLE: Final = Structs("little")
BIG: Final = Structs("big")
