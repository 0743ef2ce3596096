"""An NBD server: takes connections, has each served in threads of its own, and ends cleanly."""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from .nbd_export import Export, Statistics
from .nbd_session import Session

__all__ = ["MAX_CONNECTIONS", "Server"]

MAX_CONNECTIONS = 100
"""At the same time, if nothing else is said. Others wait until one ends."""
_NEGOTIATION = 10.0
"""Seconds in which a client has to choose an export."""
_DRAINING = 10.0
"""Seconds in which clients have to take the last answers when the server ends."""
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(slots=True)
class _Client:
    thread: threading.Thread
    deadline: float
    """When it has to have chosen an export (time.monotonic)."""


class Server:
    """Takes connections at listening sockets, which stay the caller's."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        exports: Iterable[Export],
        *,
        tls: ssl.SSLContext | None = None,
        max_connections: int = MAX_CONNECTIONS,
        negotiation: float = _NEGOTIATION,
        draining: float = _DRAINING,
    ) -> None:
        self._listeners = {listener.fileno(): listener for listener in listeners}
        for listener in listeners:
            listener.setblocking(False)
        self._exports = {export.name: export for export in exports}
        self._tls = tls
        self._max_connections = max_connections
        self._negotiation = negotiation
        self._draining = draining
        self.statistics = Statistics()
        self._sessions: dict[Session, _Client] = {}
        """Only the thread in :meth:`serve` looks at it."""
        self._ended: deque[Session] = deque()
        self._stops = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waking = threading.Lock()
        """The descriptor is not closed meanwhile."""

    def serve(self) -> None:
        """Serve until :meth:`stop`; returns once every client is done with."""
        try:
            self._take_connections()
            for session in self._sessions:
                session.stop()
            self._drain()
        finally:
            with self._waking:
                wake, self._wake = self._wake, -1
                os.close(wake)

    def stop(self) -> None:
        """Take no more connections and requests, finish those under way, and return from
        :meth:`serve`. Called again: do not wait for clients to take their answers. May be called
        from any thread."""
        self._stops += 1
        self._notify()

    def _notify(self) -> None:
        with self._waking, suppress(BlockingIOError):
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _take_connections(self) -> None:
        resting = 0.0
        while not self._stops:
            listeners = () if len(self._sessions) >= self._max_connections else self._listeners
            now = time.monotonic()
            if now < resting:
                listeners = ()
            deadlines = [
                client.deadline
                for session, client in self._sessions.items()
                if not session.negotiated
            ]
            if resting > now:
                deadlines.append(resting)
            for ready in self._wait(listeners, min(deadlines, default=math.inf)):
                try:
                    self._take(self._listeners[ready])
                except OSError as error:
                    if error.errno not in _NO_ROOM:
                        raise
                    resting = time.monotonic() + 1.0
            now = time.monotonic()
            for session, client in self._sessions.items():
                if not session.negotiated and now >= client.deadline:
                    session.cut()
                    client.deadline = math.inf

    def _take(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it is gone already
        if connection.family != socket.AF_UNIX:
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        session = Session(connection, self._exports, tls=self._tls, statistics=self.statistics)
        thread = threading.Thread(target=self._run, args=(session,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            connection.close()
            raise OSError(errno.ENOMEM, str(error)) from error
        self._sessions[session] = _Client(thread, time.monotonic() + self._negotiation)

    def _run(self, session: Session) -> None:
        try:
            session.serve()
        finally:
            self._ended.append(session)
            self._notify()

    def _drain(self) -> None:
        deadline = time.monotonic() + self._draining
        cut = False
        while self._sessions:
            if not cut and (self._stops > 1 or time.monotonic() >= deadline):
                cut = True
                for session in self._sessions:
                    session.cut()
            self._wait((), math.inf if cut else deadline)

    def _wait(self, listeners: Iterable[int], deadline: float) -> list[int]:
        """Wait for connections, the end of a session, or a call of :meth:`stop`; the listeners at
        which a connection waits."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        for number in listeners:
            poller.register(number, select.POLLIN)
        left = max(0.0, deadline - time.monotonic())
        ready = [n for n, _ in poller.poll(None if math.isinf(left) else left * 1000 + 1)]
        if self._wake in ready:
            ready.remove(self._wake)
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        while self._ended:
            client = self._sessions.pop(self._ended.popleft())
            client.thread.join()  # it notifies nobody any more
        return ready
