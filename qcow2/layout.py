"""The qcow2 format as declared by its specification: fields, bits, limits. No logic.

All integers are big-endian; offsets and lengths are in bytes (QEMU, docs/interop/qcow2.rst).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

# -- header (spec, "Header") -------------------------------------------------------------------

MAGIC = 0x514649FB
"""``QFI\\xfb``"""

HEADER_V2 = Struct(">IIQIIQIIQQIIQ")
"""magic, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method,
l1_size, l1_table_offset, refcount_table_offset, refcount_table_clusters, nb_snapshots,
snapshots_offset"""

HEADER_V3 = Struct(">QQQII")
"""incompatible_features, compatible_features, autoclear_features, refcount_order, header_length;
follows HEADER_V2"""

HEADER_V2_LENGTH = 72
HEADER_V3_LENGTH = 104
COMPRESSION_TYPE_OFFSET = 104
HEADER_LENGTH = 112
"""The v3 header with compression_type and its padding: what QEMU writes since 5.1."""

# Where single fields stand, for changing them in place.
SIZE_OFFSET = 24
L1_SIZE_OFFSET = 36
L1_TABLE_OFFSET_OFFSET = 40
REFCOUNT_TABLE_OFFSET_OFFSET = 48
NB_SNAPSHOTS_OFFSET = 60
INCOMPATIBLE_FEATURES_OFFSET = 72
AUTOCLEAR_FEATURES_OFFSET = 88

U32 = Struct(">I")
U64 = Struct(">Q")
SIZE_AND_L1 = Struct(">QIIQ")
"""size, crypt_method, l1_size, l1_table_offset: header bytes 24 to 47"""
REFCOUNT_TABLE_FIELDS = Struct(">QI")
"""refcount_table_offset, refcount_table_clusters: header bytes 48 to 59"""
SNAPSHOT_FIELDS = Struct(">IQ")
"""nb_snapshots, snapshots_offset: header bytes 60 to 71"""


class Incompatible(IntFlag):
    """``incompatible_features``: an unknown one set means the image must not be opened."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """``compatible_features``: unknown ones do no harm."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """``autoclear_features``: unknown ones are cleared before the first write."""

    BITMAPS = 1 << 0
    RAW_DATA = 1 << 1


class CryptMethod(IntEnum):
    """``crypt_method``"""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    """``compression_type``"""

    DEFLATE = 0
    ZSTD = 1


COMPRESSION_NAMES = {CompressionType.DEFLATE: "zlib", CompressionType.ZSTD: "zstd"}
"""QEMU's names for them."""


# -- header extensions (spec, "Header extensions") -----------------------------------------------

EXTENSION = Struct(">II")
"""type, length; the data follows, padded to a multiple of 8"""


class ExtensionType(IntEnum):
    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


FEATURE_NAME = Struct(">BB46s")
"""kind (0 incompatible, 1 compatible, 2 autoclear), bit, name"""

FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
"""The feature name table as QEMU writes it."""

ENCRYPTION_HEADER = Struct(">QQ")
"""offset, length: where the LUKS header and its key material stand"""

# -- refcounts (spec, "Host cluster management") -------------------------------------------------

REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00

# -- L1 and L2 entries (spec, "Cluster mapping") -------------------------------------------------

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
"""Bits 9 to 55: the host offset in an L1 entry or a standard L2 entry."""
L1_RESERVED_MASK = 0x7F00_0000_0000_01FF
L2_RESERVED_MASK = 0x3F00_0000_0000_01FE
COPIED = 1 << 63
"""The refcount of what the entry refers to is exactly 1: it may be written in place."""
COMPRESSED = 1 << 62
ZERO = 1 << 0
"""Reads as zeroes (version 3)."""


# Extended entries (spec, "Extended L2 Entries"): the entry above, then 64 bits for 32 subclusters.

SUBCLUSTERS = 32
"""Subclusters in a cluster."""
ALL_ALLOCATED = 0x0000_0000_FFFF_FFFF
"""Bit i: subcluster i is allocated, at its place in the host cluster."""
ALL_ZEROES = 0xFFFF_FFFF_0000_0000
"""Bit 32 + i: subcluster i reads as zeroes."""


class ClusterKind(IntEnum):
    """What an L2 entry says of its cluster; the names are QEMU's."""

    UNALLOCATED = 0
    ZERO_PLAIN = 1
    ZERO_ALLOCATED = 2
    NORMAL = 3
    COMPRESSED = 4


SECTOR = 512
"""Bytes; the unit of compressed cluster lengths and the smallest cluster."""

# -- snapshots (spec, "Snapshots") ---------------------------------------------------------------

SNAPSHOT_HEADER = Struct(">QIHHIIQII")
"""l1_table_offset, l1_size, id_str_size, name_size, date_sec, date_nsec, vm_clock_nsec,
vm_state_size, extra_data_size; extra data, id and name follow, padded to a multiple of 8"""
SNAPSHOT_EXTRA_DATA = Struct(">QQQ")
"""vm_state_size_large, disk_size, icount"""
NO_ICOUNT = (1 << 64) - 1

# -- limits --------------------------------------------------------------------------------------
# Those marked QEMU are not in the specification; images beyond them cannot be used by QEMU.

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21  # QEMU
MIN_EXTENDED_CLUSTER_BITS = 14
MAX_REFCOUNT_ORDER = 6
MAX_L1_SIZE = 32 << 20  # QEMU; bytes
MAX_REFCOUNT_TABLE_SIZE = 8 << 20  # QEMU; bytes
MAX_SNAPSHOTS = 65536  # QEMU
MAX_SNAPSHOT_EXTRA_DATA = 1024  # QEMU; bytes per snapshot
MAX_SNAPSHOT_TABLE_SIZE = 1024 * MAX_SNAPSHOTS  # QEMU; bytes
MAX_ENCRYPTION_HEADER = 64 << 20  # bytes; ours: QEMU writes 2 MiB at most, and sets no limit
MAX_BACKING_NAME = 1023
MAX_BACKING_FORMAT_NAME = 15  # QEMU
MAX_HOST_OFFSET = 1 << 56
INT64_MAX = (1 << 63) - 1

# -- bitmaps (spec, "Bitmaps") -------------------------------------------------------------------

BITMAPS_EXTENSION = Struct(">IIQQ")
"""nb_bitmaps, reserved, bitmap_directory_size, bitmap_directory_offset"""
BITMAP_ENTRY = Struct(">QIIBBHI")
"""bitmap_table_offset, bitmap_table_size, flags, type, granularity_bits, name_size,
extra_data_size; extra data and name follow, padded to a multiple of 8"""
BITMAP_FLAGS_OFFSET = 12


class BitmapFlags(IntFlag):
    """``flags`` of a bitmap directory entry."""

    IN_USE = 1 << 0
    AUTO = 1 << 1


BITMAP_FLAGS_RESERVED = 0xFFFF_FFFC  # QEMU: "extra_data_compatible" too, it knows no extra data
DIRTY_TRACKING = 1
"""The one type of bitmap."""
BITMAP_TABLE_RESERVED_MASK = 0xFF00_0000_0000_01FE
BITMAP_ALL_ONES = 1 << 0
"""In a bitmap table entry without an offset."""

MAX_BITMAPS = 65535  # QEMU
MAX_BITMAP_DIRECTORY_SIZE = 1024 * MAX_BITMAPS  # QEMU; bytes
MAX_BITMAP_TABLE_SIZE = 0x800_0000  # QEMU; entries
MAX_BITMAP_SIZE = 0x2000_0000  # QEMU; bytes of one bitmap's data
MIN_GRANULARITY_BITS = 9  # QEMU
MAX_GRANULARITY_BITS = 31  # QEMU
MAX_BITMAP_NAME = 1023  # QEMU; bytes
