"""Constants and structures of the vhost-user protocol, as its tables give them; no logic.

Names are those of QEMU's docs/interop/vhost-user.rst, where section names quoted here are from.
Everything is in the byte order of the machine: both sides are on the same one.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

__all__ = ["BackendRequest", "ProtocolFeature", "Request"]

# -- "Header" ------------------------------------------------------------------------------------

HEADER: Final = Struct("=III")
"""request, flags, size of the payload in bytes."""
VERSION: Final = 0x1
FLAG_VERSION: Final = 0x3
FLAG_REPLY: Final = 0x4
FLAG_NEED_REPLY: Final = 0x8

VHOST_F_LOG_ALL: Final = 26
"""Bit of the features on the socket: writes to guest memory are to be logged."""
VHOST_USER_F_PROTOCOL_FEATURES: Final = 30
"""Bit of the features on the socket: there are protocol features."""


class ProtocolFeature(IntEnum):
    """ "Protocol features": bit numbers."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19


class Request(IntEnum):
    """ "Front-end message types"."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """ "Back-end message types"."""

    CONFIG_CHANGE_MSG = 2
    VRING_CALL = 4
    VRING_ERR = 5


# -- "Message payloads" --------------------------------------------------------------------------

U64: Final = Struct("=Q")
VRING_STATE: Final = Struct("=II")
"""index, num."""
VRING_ADDR: Final = Struct("=IIQQQQ")
"""index, flags, descriptor, used, available (user addresses), log (guest address)."""
REGION: Final = Struct("=QQQQ")
"""guest address, size, user address, mmap offset."""
TABLE_HEAD: Final = Struct("=I4x")
"""number of regions."""
SINGLE_REGION: Final = Struct("=8xQQQQ")
LOG: Final = Struct("=QQ")
"""size, offset."""
CONFIG_HEAD: Final = Struct("=III")
"""offset, size, flags; the data follow."""
INFLIGHT: Final = Struct("=QQHH")
"""mmap size, mmap offset, queues, entries of each. QEMU pads it to 24 bytes."""
STATE_TRANSFER: Final = Struct("=II")
"""direction, phase."""

VRING_INDEX_MASK: Final = 0xFF
VRING_NO_FD: Final = 0x100
TABLE_REGIONS: Final = 8
"""Most regions of SET_MEM_TABLE, and file descriptors of any message."""
CONFIG_MAX: Final = 256
"""Bytes of configuration: QEMU's limit."""
CONFIG_F_MIGRATION: Final = 1
"""flags of SET_CONFIG: the whole configuration, as it was at the other end."""
PAYLOAD_MAX: Final = TABLE_HEAD.size + TABLE_REGIONS * REGION.size
"""Bytes of the longest payload there is, but for configuration."""
LOG_PAGE: Final = 0x1000
"""Guest memory per bit of the log."""
STATE_SAVE: Final = 0
STATE_LOAD: Final = 1
STATE_NO_FD: Final = 0x100

# -- "Inflight I/O tracking" ---------------------------------------------------------------------

INFLIGHT_VERSION: Final = 1
INFLIGHT_ALIGN: Final = 64
"""Of each queue's region; a back-end's own choice, this is QEMU's."""
