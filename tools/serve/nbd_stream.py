"""The connection of an NBD client as bytes: received by one thread at a time, sent by any."""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress

from ...backend import nbd_protocol as nbd
from ...errors import BackendError

__all__ = ["Stream"]

_Bytes = bytes | bytearray | memoryview
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_JOINED = 16 << 10
"""Bytes of a message that is copied together, to be one record of TLS."""


class Stream:
    """A connected socket, in the clear at first."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._tls: ssl.SSLSocket | None = None
        self._tls_lock = threading.Lock()
        """OpenSSL has no two calls for one connection at the same time."""
        self._stopped = -1
        """With TLS: an eventfd that is set when nothing more is to be received. OpenSSL takes an
        end of the stream for an attack, and sends nothing after it either."""
        self._send_lock = threading.Lock()

    @property
    def encrypted(self) -> bool:
        """True after :meth:`start_tls`."""
        return self._tls is not None

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Have the client begin TLS. Raises OSError if it does not come to that."""
        tls = context.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
        self._socket = tls  # the one from before is empty now
        tls.do_handshake()
        tls.setblocking(False)
        with self._tls_lock:
            self._stopped = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._tls = tls

    def receive(self, length: int) -> bytearray:
        """Exactly ``length`` bytes. Raises BackendError (ECONNRESET) at the end of the stream."""
        data = bytearray(length)
        if self._tls is None:
            nbd.receive_into(self._socket, memoryview(data))
        else:
            view = memoryview(data)
            while view:
                count = self._received_by_tls(self._tls, view)
                if not count:
                    raise BackendError(errno.ECONNRESET, "The peer has closed the NBD connection")
                view = view[count:]
        return data

    def send(self, parts: Sequence[_Bytes]) -> None:
        """Send all of it, with nothing of another message in between."""
        with self._send_lock:
            if self._tls is not None:
                if sum(len(part) for part in parts) <= _JOINED:
                    parts = [b"".join(parts)]
                for part in parts:
                    self._send_by_tls(self._tls, memoryview(part))
                return
            views = [memoryview(part) for part in parts if part]
            while views:
                count = self._socket.sendmsg(views[:_IOV_MAX])
                done = 0
                while done < len(views) and count >= len(views[done]):
                    count -= len(views[done])
                    done += 1
                del views[:done]
                if count:
                    views[0] = views[0][count:]

    def _received_by_tls(self, tls: ssl.SSLSocket, view: memoryview) -> int:
        while True:
            try:
                with self._tls_lock:
                    return tls.recv_into(view)
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            if self._stopped in self._wait(event, stoppable=True):
                return 0

    def _send_by_tls(self, tls: ssl.SSLSocket, view: memoryview) -> None:
        while view:
            try:
                with self._tls_lock:
                    count = tls.send(view)
                view = view[count:]
                continue
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            self._wait(event)

    def _wait(self, event: int, *, stoppable: bool = False) -> list[int]:
        poller = select.poll()
        poller.register(self._socket, event)
        if stoppable:
            poller.register(self._stopped, select.POLLIN)
        return [number for number, _ in poller.poll()]

    def stop_receiving(self) -> None:
        """Nothing more is received; what is sent still arrives."""
        with self._tls_lock:
            if self._stopped >= 0:
                os.eventfd_write(self._stopped, 1)
                return
        self._shut_down(socket.SHUT_RD)

    def cut(self) -> None:
        """Whoever receives or sends stops at once."""
        self._shut_down(socket.SHUT_RDWR)

    def _shut_down(self, how: int) -> None:
        # Not an SSLSocket's own, after which it sends in the clear.
        with suppress(OSError):  # it is over already
            socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        """Say good-bye where TLS does, and close."""
        with self._tls_lock:
            if self._tls is not None:
                with suppress(OSError, ValueError):
                    self._tls.unwrap()
            if self._stopped >= 0:
                os.close(self._stopped)
                self._stopped = -1
        self._socket.close()
