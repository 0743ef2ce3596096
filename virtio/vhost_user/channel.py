"""Messages on a UNIX socket, with file descriptors: what both ends of vhost-user share.

A :class:`Channel` never blocks and never believes a length: :meth:`Channel.receive` takes what is
there and gives a message once it is whole.
"""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...errors import PyvirtioError
from .layout import (
    CONFIG_HEAD,
    CONFIG_MAX,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    FLAG_VERSION,
    HEADER,
    PAYLOAD_MAX,
    TABLE_REGIONS,
    VERSION,
)

__all__ = ["Channel", "Message", "VhostUserError"]

_LONGEST = max(PAYLOAD_MAX, CONFIG_HEAD.size + CONFIG_MAX)


class VhostUserError(PyvirtioError):
    """The other end broke the vhost-user protocol, or asked for what cannot be."""


@dataclass(slots=True)
class Message:
    """A message as it came. Its file descriptors are whoever's who has it: see :meth:`close`."""

    request: int
    flags: int
    payload: bytes = b""
    fds: list[int] = field(default_factory=list)

    @property
    def need_reply(self) -> bool:
        """The sender wants to hear how it went (REPLY_ACK)."""
        return bool(self.flags & FLAG_NEED_REPLY)

    @property
    def is_reply(self) -> bool:
        """It answers another one."""
        return bool(self.flags & FLAG_REPLY)

    def take_fd(self) -> int:
        """The first file descriptor, which is the caller's now. Raises VhostUserError."""
        if not self.fds:
            raise VhostUserError(f"message {self.request} without a file descriptor")
        return self.fds.pop(0)

    def close(self) -> None:
        """Close the file descriptors that nobody has taken."""
        while self.fds:
            os.close(self.fds.pop())


class Channel:
    """One end of a vhost-user connection over ``connection``, which is its to close."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._received = bytearray()
        self._fds: list[int] = []
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def receive(self) -> Message | None:
        """The next message; None if it is not all there yet.

        Raises EOFError at the end of the connection, VhostUserError for what is no message, and
        OSError for a connection that broke.
        """
        while True:
            wanted = HEADER.size
            if len(self._received) >= HEADER.size:
                request, flags, size = HEADER.unpack_from(self._received)
                if flags & FLAG_VERSION != VERSION:
                    raise VhostUserError(f"message {request} of version {flags & FLAG_VERSION}")
                if size > _LONGEST:
                    raise VhostUserError(f"message {request} of {size} bytes")
                wanted += size
                if len(self._received) == wanted:
                    payload = bytes(self._received[HEADER.size :])
                    fds, self._fds = self._fds, []
                    self._received.clear()
                    return Message(request, flags, payload, fds)
            if not self._receive_some(wanted - len(self._received)):
                return None

    def _receive_some(self, count: int) -> bool:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                count, socket.CMSG_SPACE(4 * TABLE_REGIONS), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) // fds.itemsize * fds.itemsize])
                self._fds += fds
        if flags & socket.MSG_CTRUNC or len(self._fds) > TABLE_REGIONS:
            raise VhostUserError(f"a message with more than {TABLE_REGIONS} file descriptors")
        if not data:
            raise EOFError("the other end has closed the connection")
        self._received += data
        return True

    def send(self, request: int, flags: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message; any thread may. The version is added to ``flags``.

        Raises OSError if the connection broke or the other end does not read what it is sent.
        """
        self.send_bytes(HEADER.pack(request, flags | VERSION, len(payload)) + payload, fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are: for messages that are none."""
        ancillary = []
        if fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        with self._sending:
            sent = self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        if sent != len(data):
            raise OSError("the other end does not read its messages")

    def close(self) -> None:
        """Close the connection, and the file descriptors of a message that is not whole."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())
