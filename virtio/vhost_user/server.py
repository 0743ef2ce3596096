"""A device on a UNIX socket, for one vhost-user front-end after the other.

The server has one thread, the one that calls :meth:`VhostUserServer.serve`: messages, kicks and,
unless the device has workers of its own, requests are done there.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Self

from ...backend.listener import UnixListener
from ..device import VirtioDevice
from ..layout import VIRTIO_F_RING_RESET
from ..memory import GuestMemory
from .channel import Channel, VhostUserError
from .session import Session

__all__ = ["VhostUserServer"]

_log = logging.getLogger(__name__)

_RETRY = 0.2
"""Seconds until a front-end that could not be let in is tried again."""
_POLL = 0.001
"""Seconds between two looks at rings without a kick descriptor."""


class VhostUserServer:
    """Offers ``device`` to a vhost-user front-end (QEMU and others).

    ``path`` is where to listen; a socket that is left there by a server that has died is replaced.
    Or ``listener``: a socket that listens already. Or ``connection``: one that is connected, and
    with it the server's only front-end. Sockets are the server's to close then; the disk stays the
    caller's. Raises OSError if it cannot listen.

        with pyvirtio.open_disk("vm.qcow2") as disk:
            with pyvirtio.VhostUserServer(pyvirtio.VirtioBlk(disk), "vhost.sock") as server:
                server.serve()
    """

    def __init__(
        self,
        device: VirtioDevice,
        path: str | Path | None = None,
        *,
        listener: socket.socket | None = None,
        connection: socket.socket | None = None,
        on_start: Callable[[], object] = lambda: None,
        on_stop: Callable[[], object] = lambda: None,
    ) -> None:
        if sum(each is not None for each in (path, listener, connection)) != 1:
            raise ValueError("one of path, listener and connection is needed")
        self.device = device
        self.on_start = on_start
        self.on_stop = on_stop
        self._owned: UnixListener | None = None
        self._session: Session | None = None
        self._channel: Channel | None = None
        self._stopping = False
        self._noted: set[int | None] = set()
        """Interrupts that the front-end is to be told of; None is the configuration's."""
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waking = threading.RLock()
        """The descriptor is not closed meanwhile; a signal's handler may come in between."""
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._listener = listener
        try:
            features = 1 << VIRTIO_F_RING_RESET  # which is GET_VRING_BASE and a new start
            device.connect(GuestMemory.from_buffer(b""), self, features=features)
            if path is not None:
                self._owned = UnixListener(str(path))
                self._listener = self._owned.socket
        except BaseException:
            self.close()
            raise
        if connection is not None:
            self._begin(connection)
        self._accept_next()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        """A front-end is here."""
        return self._session is not None

    def serve(self) -> None:
        """Serve until :meth:`stop` is called; with a ``connection``, until that ends."""
        busy = False
        while not self._stopping and (self._session or self._listener):
            session = self._session
            polls = session is not None and session.polls
            timeout = 0 if busy else _POLL if polls else None
            for key, _ in self._selector.select(timeout):
                if self._stopping:
                    break
                # One that was called before may have undone the watch.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            if polls and session is not None:
                session.poll_rings()
            busy = self.device.poll()

    def stop(self) -> None:
        """Have :meth:`serve` return soon; may be called from any thread or signal handler."""
        self._stopping = True
        with self._waking, suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the connection when what is under way is done, and listen no more."""
        self._end()
        if self._owned is not None:
            self._owned.close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        with self._waking:
            if self._wake >= 0:
                self._selector.close()
                os.close(self._wake)
                self._wake = -1

    # -- connections ---------------------------------------------------------------------------

    def _accept_next(self) -> None:
        if self._listener is not None and self._session is None:
            self._listener.setblocking(False)
            self.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None, "only a listener is watched for this"
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors left in this process or on the host
            _log.warning("a front-end cannot be let in: %s", error)
            sleep(_RETRY)
            return
        self.forget(self._listener.fileno())
        self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        _log.info("a front-end has come")
        self._channel = Channel(connection)
        self._session = Session(self.device, self._channel, self)
        self.watch(self._channel.fileno(), self._serve_messages)

    def _serve_messages(self) -> None:
        assert self._session is not None, "only a session is watched for this"
        try:
            self._session.serve_messages()
        except VhostUserError as error:
            _log.error("the front-end is hung up on: %s", error)
        except EOFError:
            _log.info("the front-end has gone")
        except OSError as error:
            _log.warning("the front-end is lost: %s", error)
        else:
            return
        self._end()
        self._accept_next()

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None and self._channel is not None:
            self.forget(self._channel.fileno())
            session.close()
            self._channel = None

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    # -- what the session and the device call ---------------------------------------------------

    def watch(self, fd: int, callback: Callable[[], object]) -> None:
        """See :class:`.session.Loop`."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def forget(self, fd: int) -> None:
        """See :class:`.session.Loop`."""
        with suppress(KeyError):
            self._selector.unregister(fd)

    def queue_interrupt(self, index: int) -> None:
        """See :class:`..transport.Transport`."""
        session = self._session
        if session is not None:
            session.queue_interrupt(index)

    def note_interrupt(self, index: int | None) -> None:
        """See :class:`..transport.Transport`."""
        self._noted.add(index)

    def deliver(self) -> None:
        """See :class:`..transport.Transport`."""
        while self._noted:
            with suppress(KeyError):  # another thread was quicker
                index = self._noted.pop()
                session = self._session
                if session is None:
                    continue
                if index is None:
                    session.config_interrupt()
                else:
                    session.queue_interrupt(index)
