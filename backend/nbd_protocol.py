"""The NBD protocol: numbers and structures (NBD specification, doc/proto.md). Big-endian."""

from __future__ import annotations

import errno
import socket
from enum import IntEnum, IntFlag
from struct import Struct

from ..errors import BackendError

__all__ = [
    "BLOCK_SIZE_INFO",
    "CHUNK",
    "CHUNK_MAGIC",
    "DEFAULT_PORT",
    "DONE",
    "ERRORS",
    "EXPORT_INFO",
    "FIXED_NEWSTYLE",
    "INIT",
    "INIT_MAGIC",
    "MAX_OPTION",
    "MAX_REQUEST",
    "MAX_STRING",
    "NO_ZEROES",
    "OLD_STYLE",
    "OLD_STYLE_MAGIC",
    "OPTION",
    "OPTION_MAGIC",
    "OPTION_REPLY",
    "REPLY_MAGIC",
    "REQUEST",
    "REQUEST_MAGIC",
    "SIMPLE_MAGIC",
    "SIMPLE_REPLY",
    "Command",
    "Flag",
    "Info",
    "Option",
    "Reply",
    "Transmission",
    "Type",
    "number_of",
    "receive",
    "receive_into",
]

DEFAULT_PORT = 10809
INIT_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

OLD_STYLE_MAGIC = 0x00420281861253

INIT = Struct(">QQ")
"""INIT_MAGIC; OPTION_MAGIC (handshake flags follow, 16 bits) or OLD_STYLE_MAGIC"""
OLD_STYLE = Struct(">QI124x")
"""What follows in the old style, where nothing is negotiated: size, transmission flags"""
OPTION = Struct(">QII")
"""OPTION_MAGIC, option, length"""
OPTION_REPLY = Struct(">QIII")
"""REPLY_MAGIC, option, reply, length"""
EXPORT_INFO = Struct(">HQH")
"""Info.EXPORT, size, transmission flags"""
BLOCK_SIZE_INFO = Struct(">HIII")
"""Info.BLOCK_SIZE, smallest, preferred and largest request"""
REQUEST = Struct(">IHHQQI")
"""REQUEST_MAGIC, flags, command, cookie, offset, length"""
SIMPLE_REPLY = Struct(">IIQ")
"""SIMPLE_MAGIC, error, cookie"""
CHUNK = Struct(">IHHQI")
"""CHUNK_MAGIC, flags, type, cookie, length"""

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
MAX_OPTION = 1 << 16
"""Bytes of an option's data that a peer may send."""
MAX_STRING = 4096
"""Bytes of a name or a text."""
MAX_REQUEST = 32 << 20
"""Bytes of data in one request, the specification's advice."""
DONE = 1
"""Flag of the last chunk of a reply."""


class Option(IntEnum):
    """``NBD_OPT_*``."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """``NBD_REP_*``."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = 0x80000001
    POLICY = 0x80000002
    INVALID = 0x80000003
    TLS_REQUIRED = 0x80000005
    UNKNOWN = 0x80000006
    TOO_BIG = 0x80000009


class Info(IntEnum):
    """``NBD_INFO_*``."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Transmission(IntFlag):
    """``NBD_FLAG_*``: what an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_CACHE = 1024
    SEND_FAST_ZERO = 2048


class Command(IntEnum):
    """``NBD_CMD_*``."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Flag(IntFlag):
    """``NBD_CMD_FLAG_*``."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16


class Type(IntEnum):
    """``NBD_REPLY_TYPE_*``: chunks of a structured reply."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


ERRORS = {
    errno.EPERM: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EOVERFLOW: 75,
    errno.EOPNOTSUPP: 95,
    errno.ESHUTDOWN: 108,
}
"""The host's numbers of errors, and the protocol's."""


def number_of(code: int) -> int:
    """The host's number for an error of the protocol; EINVAL for unknown ones."""
    return next((host for host, wire in ERRORS.items() if wire == code), errno.EINVAL)


def receive(connection: socket.socket, length: int) -> bytes:
    """Exactly ``length`` bytes. Raises BackendError (ECONNRESET) at the end of the stream."""
    data = bytearray(length)
    receive_into(connection, memoryview(data))
    return bytes(data)


def receive_into(connection: socket.socket, view: memoryview) -> None:
    """Fill ``view``; see :func:`receive`."""
    while view:
        count = connection.recv_into(view)
        if not count:
            raise BackendError(errno.ECONNRESET, "The peer has closed the NBD connection")
        view = view[count:]
