"""The front-end's side of vhost-user: a driver's way to a device in another process.

Guest memory is a :class:`SharedRam` here; :class:`VhostUserFrontEnd` is the
:class:`~.transport.DriverTransport` over it, which a :class:`~.blk.BlockDriver` uses as any other::

    ram = SharedRam(16 << 20)
    with VhostUserFrontEnd.connect("vhost.sock", ram) as front:
        driver = BlockDriver(front, ram.memory, ram.arena(), wait=front.wait)
        driver.start()
        data = driver.read(sector=0, count=8)

What goes over the socket can be wrong on purpose: :class:`Link` sends whatever it is given, and
the steps of :class:`VhostUserFrontEnd` can be taken one by one.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Self

from .. import layout as at
from ..memory import GuestMemory
from ..vhost_user import layout as vu
from ..vhost_user.channel import Channel, Message
from ..vhost_user.layout import ProtocolFeature, Request
from .ring import Arena
from .transport import DriverError, DriverTransport

__all__ = ["Link", "SharedRam", "VhostUserFrontEnd", "Vring"]

USER_OFFSET = 0x7F00_0000_0000
"""Added to guest addresses: where the RAM is said to be in this process. Nobody goes there."""
UNDERSTOOD = sum(
    1 << bit
    for bit in (
        ProtocolFeature.MQ,
        ProtocolFeature.LOG_SHMFD,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.CONFIG,
        ProtocolFeature.INFLIGHT_SHMFD,
        ProtocolFeature.RESET_DEVICE,
        ProtocolFeature.INBAND_NOTIFICATIONS,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ProtocolFeature.STATUS,
        ProtocolFeature.DEVICE_STATE,
    )
)
"""The protocol features that this front-end knows, as a bit mask."""


class SharedRam:
    """Guest RAM in a memfd, which another process can map: ``size`` bytes at address ``base``."""

    def __init__(self, size: int, base: int = 0x1000_0000) -> None:
        self.base = base
        self.size = size
        self.fd = os.memfd_create("pyvirtio-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self.buffer = mmap.mmap(self.fd, size)
        self.memory = GuestMemory.from_buffer(self.buffer, base)

    @property
    def region(self) -> tuple[int, int, int, int]:
        """Guest address, size, user address and offset in the file, as messages have them."""
        return self.base, self.size, self.base + USER_OFFSET, 0

    def arena(self) -> Arena:
        """All of it, to be handed out."""
        return Arena(self.base, self.size)

    def close(self) -> None:
        """Give it back; it must not be used any more."""
        self.buffer.close()
        os.close(self.fd)


class Link:
    """A connection to a back-end, and the messages on it. ``timeout``: seconds for an answer."""

    def __init__(self, connection: socket.socket, timeout: float = 30) -> None:
        self.channel = Channel(connection)
        self.timeout = timeout
        self.acknowledges = False
        """REPLY_ACK was negotiated: :meth:`order` asks how it went."""

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0
    ) -> None:
        """Send a message, whatever it is."""
        self.channel.send(request, flags, payload, fds)

    def receive(self) -> Message:
        """The next message. Raises DriverError when none comes, EOFError at the end."""
        deadline = monotonic() + self.timeout
        while (message := self.channel.receive()) is None:
            left = deadline - monotonic()
            if left <= 0 or not select.select([self.channel], [], [], left)[0]:
                raise DriverError("the back-end does not answer")
        return message

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Send a message that always has a reply, which is given back."""
        self.send(request, payload, fds)
        reply = self.receive()
        if reply.request != request or not reply.is_reply:
            raise DriverError(f"message {request} was answered by {reply.request}")
        return reply

    def ask_u64(self, request: int, payload: bytes = b"") -> int:
        """The same for a reply that is a number."""
        reply = self.ask(request, payload)
        if len(reply.payload) != vu.U64.size:
            raise DriverError(f"message {request}: {len(reply.payload)} bytes for a number")
        return int(vu.U64.unpack(reply.payload)[0])

    def order(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a message without a reply of its own; 0 if it went well, as far as one can know."""
        if not self.acknowledges:
            self.send(request, payload, fds)
            return 0
        self.send(request, payload, fds, flags=vu.FLAG_NEED_REPLY)
        reply = self.receive()
        if reply.request != request or len(reply.payload) != vu.U64.size:
            raise DriverError(f"message {request} was acknowledged by {reply.request}")
        return int(vu.U64.unpack(reply.payload)[0])

    def close(self) -> None:
        """Hang up."""
        self.channel.close()


@dataclass(slots=True)
class Vring:
    """A queue as the front-end has it."""

    index: int
    size: int = 0
    areas: tuple[int, int, int] = (0, 0, 0)
    """Descriptor, driver and device area, as guest addresses."""
    base: int = 0
    """What SET_VRING_BASE says; GET_VRING_BASE's answer after a stop."""
    enabled: bool = False
    """The driver has enabled it; it is started with DRIVER_OK."""
    started: bool = False
    kick: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    call: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    error: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def close(self) -> None:
        """Give the event descriptors back."""
        for fd in (self.kick, self.call, self.error):
            os.close(fd)


class VhostUserFrontEnd(DriverTransport):
    """A device behind a vhost-user socket.

    ``link`` is the connection, ``ram`` the guest's RAM. ``protocol_features`` masks what is
    accepted of what the back-end offers. ``queue_size`` is the largest that :meth:`select_queue`
    allows: the protocol does not tell. With ``inflight`` the back-end is given a region to note
    requests in (where it can), which a back-end that comes after it is given by
    :meth:`reconnect`.
    """

    def __init__(
        self,
        link: Link,
        ram: SharedRam,
        *,
        protocol_features: int = UNDERSTOOD,
        queue_size: int = 256,
        inflight: bool = True,
    ) -> None:
        self.link = link
        self.ram = ram
        self.queue_size = queue_size
        self.features = 0
        """The driver's."""
        self.protocol_features = protocol_features
        self.num_queues = 1
        self.vrings: dict[int, Vring] = {}
        self.backend: Channel | None = None
        """The back-end's own messages come here (BACKEND_REQ)."""
        self.inflight: tuple[int, bytes] | None = None
        """The region for requests under way: file descriptor, and the message that goes with it."""
        self._wants_inflight = inflight
        self._selected = 0
        self._status = 0
        self._set_up = False

    @classmethod
    def connect(
        cls,
        path: str | Path,
        ram: SharedRam,
        *,
        protocol_features: int = UNDERSTOOD,
        queue_size: int = 256,
        inflight: bool = True,
        timeout: float = 30,
    ) -> Self:
        """Connect to a back-end that listens at ``path``. Raises OSError."""
        return cls(
            connect(path, timeout),
            ram,
            protocol_features=protocol_features,
            queue_size=queue_size,
            inflight=inflight,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up and give everything back but the RAM."""
        self.link.close()
        if self.backend is not None:
            self.backend.close()
            self.backend = None
        if self.inflight is not None:
            os.close(self.inflight[0])
            self.inflight = None
        while self.vrings:
            self.vrings.popitem()[1].close()

    def negotiated(self, feature: ProtocolFeature) -> bool:
        """The protocol feature is in use."""
        return bool(self.protocol_features >> feature & 1)

    # -- setting up ----------------------------------------------------------------------------

    def set_up(self) -> None:
        """What comes before any driver: protocol features, the back-end's channel, memory."""
        link = self.link
        offered = link.ask_u64(Request.GET_FEATURES)
        if offered >> vu.VHOST_USER_F_PROTOCOL_FEATURES & 1:
            self.protocol_features &= link.ask_u64(Request.GET_PROTOCOL_FEATURES)
            link.send(Request.SET_PROTOCOL_FEATURES, vu.U64.pack(self.protocol_features))
        else:
            self.protocol_features = 0
        link.acknowledges = self.negotiated(ProtocolFeature.REPLY_ACK)
        if self.negotiated(ProtocolFeature.MQ):
            self.num_queues = link.ask_u64(Request.GET_QUEUE_NUM)
        if self.negotiated(ProtocolFeature.BACKEND_REQ):
            ours, theirs = socket.socketpair()
            self._ordered(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
            theirs.close()
            self.backend = Channel(ours)
        self._ordered(Request.SET_OWNER)
        self.share_memory()
        self._set_up = True

    def share_memory(self) -> None:
        """Tell the back-end where guest memory is."""
        if self.negotiated(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            payload = vu.SINGLE_REGION.pack(*self.ram.region)
            self._ordered(Request.ADD_MEM_REG, payload, [self.ram.fd])
        else:
            payload = vu.TABLE_HEAD.pack(1) + vu.REGION.pack(*self.ram.region)
            self._ordered(Request.SET_MEM_TABLE, payload, [self.ram.fd])

    def share_inflight(self) -> None:
        """Have the back-end note what is under way, in a region that outlives it."""
        if not self._wants_inflight or not self.negotiated(ProtocolFeature.INFLIGHT_SHMFD):
            return
        if self.inflight is None:
            payload = vu.INFLIGHT.pack(0, 0, self.num_queues, self.queue_size)
            reply = self.link.ask(Request.GET_INFLIGHT_FD, payload)
            size, offset, _, _ = vu.INFLIGHT.unpack_from(reply.payload)
            message = vu.INFLIGHT.pack(size, offset, self.num_queues, self.queue_size)
            self.inflight = reply.take_fd(), message
        fd, message = self.inflight
        self._ordered(Request.SET_INFLIGHT_FD, message, [fd])

    def start_queue(self, vring: Vring) -> None:
        """Give a queue to the back-end, and have it served."""
        descriptors, available, used = (address + USER_OFFSET for address in vring.areas)
        state = vu.VRING_STATE.pack
        self._ordered(Request.SET_VRING_NUM, state(vring.index, vring.size))
        self._ordered(Request.SET_VRING_BASE, state(vring.index, vring.base))
        address = vu.VRING_ADDR.pack(vring.index, 0, descriptors, used, available, vring.areas[2])
        self._ordered(Request.SET_VRING_ADDR, address)
        for request, fd in (
            (Request.SET_VRING_KICK, vring.kick),
            (Request.SET_VRING_ERR, vring.error),
            (Request.SET_VRING_CALL, vring.call),
        ):
            self._ordered(request, vu.U64.pack(vring.index), [fd])
        if self.protocol_features:
            self._ordered(Request.SET_VRING_ENABLE, state(vring.index, 1))
        vring.started = True

    def stop_queue(self, vring: Vring) -> None:
        """Take a queue back; ``vring.base`` is where to go on."""
        request = Request.GET_VRING_BASE
        reply = self.link.ask(request, vu.VRING_STATE.pack(vring.index, 0))
        _, vring.base = vu.VRING_STATE.unpack(reply.payload)
        vring.started = False

    def reconnect(self, path: str | Path) -> None:
        """The back-end has gone: give all that it had to the one that listens at ``path`` now.

        With an inflight region that one does again what was under way.
        """
        self.link.close()
        if self.backend is not None:
            self.backend.close()
            self.backend = None
        self.link = connect(path, self.link.timeout)
        self.set_up()
        self._send_features()
        self.share_inflight()
        for vring in self.vrings.values():
            if vring.enabled:
                self.start_queue(vring)

    def _ordered(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        if self.link.order(request, payload, fds):
            raise DriverError(f"the back-end refuses message {request}")

    def _send_features(self) -> int:
        own = 1 << vu.VHOST_USER_F_PROTOCOL_FEATURES if self.protocol_features else 0
        return self.link.order(Request.SET_FEATURES, vu.U64.pack(self.features | own))

    # -- DriverTransport -----------------------------------------------------------------------

    def identify(self, device_id: int) -> None:
        """See :class:`DriverTransport`. The protocol does not tell: what has a configuration is
        taken for what is looked for."""
        if not self._set_up:
            self.set_up()
        if not self.negotiated(ProtocolFeature.CONFIG):
            raise DriverError("the back-end has no configuration to be read")

    @property
    def status(self) -> int:
        """The device status field; kept here where the back-end does not (STATUS)."""
        if self.negotiated(ProtocolFeature.STATUS):
            return self.link.ask_u64(Request.GET_STATUS) & 0xFF
        return self._status

    @status.setter
    def status(self, value: int) -> None:
        starting = value & ~self._status & at.STATUS_DRIVER_OK
        self._status = value
        if value == 0:
            self._reset()
        elif self.negotiated(ProtocolFeature.STATUS):
            self._ordered(Request.SET_STATUS, vu.U64.pack(value))
        if starting:
            self.share_inflight()
            for vring in self.vrings.values():
                if vring.enabled:
                    self.start_queue(vring)

    def _reset(self) -> None:
        for vring in self.vrings.values():
            if vring.started:
                self.stop_queue(vring)
            vring.enabled = False
            vring.base = 0
        if self.negotiated(ProtocolFeature.RESET_DEVICE):
            self._ordered(Request.RESET_DEVICE)
        if self.negotiated(ProtocolFeature.STATUS):
            self._ordered(Request.SET_STATUS, vu.U64.pack(0))
        if self.inflight is not None:
            os.close(self.inflight[0])
            self.inflight = None

    def offered_features(self) -> int:
        """See :class:`DriverTransport`; without those that are the socket's own."""
        features = self.link.ask_u64(Request.GET_FEATURES)
        own = 1 << vu.VHOST_USER_F_PROTOCOL_FEATURES | 1 << vu.VHOST_F_LOG_ALL
        return features & ~own

    def accept_features(self, features: int) -> None:
        """See :class:`DriverTransport`."""
        self.features = features
        self._send_features()

    def select_queue(self, index: int) -> int:
        """See :class:`DriverTransport`; the number of queues is known with MQ alone, else 1."""
        self._selected = index
        return self.queue_size if index < self.num_queues else 0

    def _vring(self) -> Vring:
        index = self._selected
        if index not in self.vrings:
            self.vrings[index] = Vring(index)
        return self.vrings[index]

    def enable_queue(self, size: int, descriptors: int, available: int, used: int) -> bool:
        """See :class:`DriverTransport`. The back-end hears of it when the driver is ready."""
        vring = self._vring()
        vring.size, vring.areas = size, (descriptors, available, used)
        if self.features >> at.VIRTIO_F_RING_PACKED & 1:
            vring.base = 1 << 15 | 1 << 31  # at the start, both wrap counters 1
        vring.enabled = True
        if self._status & at.STATUS_DRIVER_OK:
            self.start_queue(vring)
        return True

    def queue_enabled(self) -> bool:
        """See :class:`DriverTransport`."""
        return self._selected in self.vrings and self._vring().enabled

    def reset_queue(self) -> bool:
        """See :class:`DriverTransport`."""
        vring = self._vring()
        if vring.started:
            self.stop_queue(vring)
        vring.enabled = False
        vring.base = 0
        return True

    def notify(self, index: int, data: int | None = None) -> None:
        """See :class:`DriverTransport`. There is no way for ``data``."""
        if index in self.vrings:
            os.eventfd_write(self.vrings[index].kick, 1)

    def take_interrupt(self) -> int:
        """See :class:`DriverTransport`."""
        found = 0
        for vring in self.vrings.values():
            with suppress(BlockingIOError):
                os.eventfd_read(vring.call)
                found |= at.MMIO_INTERRUPT_USED_BUFFER
        if self.backend is not None:
            with suppress(EOFError):
                while (message := self.backend.receive()) is not None:
                    message.close()
                    if message.request == vu.BackendRequest.CONFIG_CHANGE_MSG:
                        found |= at.MMIO_INTERRUPT_CONFIG_CHANGE
        return found

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for an interrupt of any queue, which stays to be taken; whether there was one.

        Comes back, too, when the back-end hangs up. ``timeout``: seconds, the link's if None.
        """
        watched: list[int] = [vring.call for vring in self.vrings.values()]
        end = self.link.channel.fileno()
        limit = self.link.timeout if timeout is None else timeout
        ready, _, _ = select.select([*watched, end], [], [], limit)
        return any(fd in ready for fd in watched)

    def generation(self) -> int:
        """See :class:`DriverTransport`: the protocol has none."""
        return 0

    def read_config(self, offset: int, size: int) -> int:
        """See :class:`DriverTransport`. Asks from 0 on, as QEMU does: some do not look at the
        offset."""
        return int.from_bytes(self.config_bytes(0, offset + size)[offset:], "little")

    def config_bytes(self, offset: int, size: int) -> bytes:
        """``size`` bytes of configuration, in one message. Raises DriverError."""
        payload = vu.CONFIG_HEAD.pack(offset, size, 0) + bytes(size)
        reply = self.link.ask(Request.GET_CONFIG, payload)
        if len(reply.payload) != len(payload):
            raise DriverError(f"the back-end does not give {size} bytes at {offset}")
        return reply.payload[vu.CONFIG_HEAD.size :]

    def write_config(self, offset: int, size: int, value: int) -> None:
        """See :class:`DriverTransport`."""
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        self.link.order(Request.SET_CONFIG, vu.CONFIG_HEAD.pack(offset, size, 0) + data)


def connect(path: str | Path, timeout: float = 30) -> Link:
    """A link to the back-end that listens at ``path``. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return Link(connection, timeout)
