"""One front-end's connection: its messages and what they do ("Front-end message types").

A message that breaks the rules (:mod:`.rules`), or asks for what cannot be, is refused: by its
acknowledgement where the front-end wants one (REPLY_ACK), else by closing the connection, for it
would never know; that goes for messages with a reply of their own, too.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ...errors import PyvirtioError
from .. import layout as at
from ..device import VirtioDevice
from ..memory import GuestMemory
from . import layout as vu
from .channel import Channel, Message, VhostUserError
from .inflight import region_size
from .layout import BackendRequest, ProtocolFeature, Request
from .log import DirtyLog
from .memory import MAX_SLOTS, MemoryTable, Region, map_file
from .migration import StateTransfer
from .rules import PROTOCOL_FEATURES, RULES, Rule
from .vrings import Vring, Vrings

__all__ = ["Loop", "Session"]

_log = logging.getLogger(__name__)

_F = ProtocolFeature
_OWN = 1 << vu.VHOST_F_LOG_ALL | 1 << vu.VHOST_USER_F_PROTOCOL_FEATURES
_READY = at.STATUS_ACKNOWLEDGE | at.STATUS_DRIVER | at.STATUS_FEATURES_OK | at.STATUS_DRIVER_OK
_MESSAGES_AT_ONCE = 16
"""So that a front-end that talks without end does not keep its own rings from being served."""


class Loop(Protocol):
    """What a session needs of the server that it lives in."""

    def on_start(self) -> object:
        """A first ring is about to be served. An OSError or PyvirtioError refuses it."""

    def on_stop(self) -> object:
        """The last ring was stopped."""

    def watch(self, fd: int, callback: Callable[[], object]) -> None:
        """Call ``callback`` when there is something to read. Raises OSError."""

    def forget(self, fd: int) -> None:
        """Undo that, if it was done."""


@dataclass(slots=True)
class _Reply:
    payload: bytes
    fd: int = -1
    """Closed when it was sent."""


class Session:
    """A front-end that is connected. ``device`` is attached to who passes its interrupts on here,
    and reset; :meth:`close` leaves it so."""

    def __init__(self, device: VirtioDevice, channel: Channel, loop: Loop) -> None:
        self._device = device
        self._channel = channel
        self._loop = loop
        self._table = MemoryTable()
        self._vrings = Vrings(device, self._table, loop.on_start, loop.on_stop)
        self._backend: Channel | None = None
        self._features_given = 0
        self._protocol = 0
        self._status = 0
        self._known = device.config_generation
        """The configuration that the front-end has read, or heard of."""
        self._writeback: bytes | None = None
        """What the driver has chosen, while the device is reset by a stop of the machine."""
        self._log: DirtyLog | None = None
        self._log_fd = -1
        self._transfer = StateTransfer(device, loop.watch, loop.forget)
        self._handlers: dict[int, Callable[[Message], _Reply | None]] = {
            request: getattr(self, f"_{Request(request).name.lower()}") for request in RULES
        }

    def negotiated(self, feature: ProtocolFeature) -> bool:
        """The protocol feature is in use."""
        return bool(self._protocol >> feature & 1)

    # -- the loop's side -----------------------------------------------------------------------

    def serve_messages(self) -> None:
        """Do what the front-end has sent.

        Raises VhostUserError, EOFError or OSError where the connection is at its end.
        """
        for _ in range(_MESSAGES_AT_ONCE):
            message = self._channel.receive()
            if message is None:
                return
            try:
                self._handle(message)
            finally:
                message.close()

    @property
    def polls(self) -> bool:
        """Some live ring has no kick descriptor: :meth:`poll_rings` has to be called often."""
        if self.negotiated(_F.INBAND_NOTIFICATIONS):
            return False
        return any(vring.live and vring.kick < 0 for vring in self._vrings.all)

    def poll_rings(self) -> None:
        """Look at the rings that nobody kicks."""
        for vring in self._vrings.all:
            if vring.live and vring.kick < 0:
                self._device.kick(vring.index)

    def queue_interrupt(self, index: int) -> None:
        """See :class:`..transport.Transport`."""
        if not self._vrings.all[index].signal("call"):
            self._tell(BackendRequest.VRING_CALL, vu.VRING_STATE.pack(index, 0))
        if self._log is not None and self._log_fd >= 0:
            try:
                os.eventfd_write(self._log_fd, 1)
            except BlockingIOError:  # signalled more often than anyone will count
                pass
            except OSError as error:
                _log.warning("the log's descriptor fails: %s", error)

    def config_interrupt(self) -> None:
        """See :class:`..transport.Transport`."""
        if self._device.status & at.STATUS_NEEDS_RESET:
            for vring in self._vrings.all:
                if not vring.signal("error"):
                    self._tell(BackendRequest.VRING_ERR, vu.VRING_STATE.pack(vring.index, 0))
            self._tell(BackendRequest.CONFIG_CHANGE_MSG)
        self._tell_configuration()

    def _tell_configuration(self) -> None:
        """Say that the configuration is another now, if the front-end does not know. While all
        rings are stopped nothing may be said ("Suspended device state"): it is said when one
        starts, which is soon enough for a driver that had not begun."""
        generation = self._device.config_generation
        if generation != self._known and any(vring.started for vring in self._vrings.all):
            self._known = generation
            self._tell(BackendRequest.CONFIG_CHANGE_MSG)

    def _tell(self, request: BackendRequest, payload: bytes = b"") -> None:
        """Send a message of our own, if there is a way for it."""
        backend = self._backend
        config = request == BackendRequest.CONFIG_CHANGE_MSG
        if backend is None or not self.negotiated(_F.CONFIG if config else _F.INBAND_NOTIFICATIONS):
            return
        try:
            backend.send(request, 0, payload)
        except OSError as error:
            _log.warning("the front-end does not hear us: %s", error)

    def close(self) -> None:
        """Do what is under way, and let go of everything the front-end has sent."""
        for vring in self._vrings.all:
            if vring.kick >= 0:
                self._loop.forget(vring.kick)
        self._vrings.close()
        self._device.reset()
        self._vrings.set_memory(GuestMemory.from_buffer(b""), self._table.close)
        self._set_log(None)
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1
        self._transfer.close()
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        self._channel.close()

    # -- one message ---------------------------------------------------------------------------

    def _handle(self, message: Message) -> None:
        rule = RULES.get(message.request)
        acknowledge = message.need_reply and self.negotiated(_F.REPLY_ACK)
        if rule is not None and rule.answers:
            acknowledge = False
        try:
            self._check(message, rule)
            reply = self._handlers[message.request](message)
        except (PyvirtioError, OSError) as error:
            if not acknowledge:
                raise VhostUserError(f"message {message.request}: {error}") from error
            _log.warning("refused message %d of the front-end: %s", message.request, error)
            reply = _number(1)
        else:
            if reply is None and acknowledge:
                reply = _number(0)
        if reply is not None:
            fds = [reply.fd] if reply.fd >= 0 else []
            try:
                self._channel.send(message.request, vu.FLAG_REPLY, reply.payload, fds)
            finally:
                for fd in fds:
                    os.close(fd)

    def _check(self, message: Message, rule: Rule | None) -> None:
        """Raise VhostUserError for a message that breaks a rule of the table."""
        if rule is None:
            raise VhostUserError("unknown")
        if rule.needs is not None and not self.negotiated(rule.needs):
            raise VhostUserError(f"needs {rule.needs.name}, which was not negotiated")
        if rule.payload is not None and len(message.payload) != rule.payload.size:
            raise VhostUserError(f"{len(message.payload)} bytes, not {rule.payload.size}")
        fewest, most = rule.fds
        if not fewest <= len(message.fds) <= most:
            raise VhostUserError(f"comes with {len(message.fds)} file descriptors")

    # -- features ------------------------------------------------------------------------------

    def _get_features(self, message: Message) -> _Reply:
        return _number(self._device.offered_features | _OWN)

    def _set_features(self, message: Message) -> None:
        (features,) = vu.U64.unpack(message.payload)
        wanted = features & ~_OWN
        if wanted & ~self._device.offered_features:
            raise VhostUserError(f"features {wanted:#x} were not all offered")
        logged = self._logs
        self._features_given = features
        if not features >> vu.VHOST_USER_F_PROTOCOL_FEATURES & 1:
            for vring in self._vrings.all:
                vring.enabled = True
        if wanted != self._device.state.driver_features or not self._device.status:
            # Sent again when a stopped machine goes on: what the driver has chosen then stays.
            self._reset_driver()
            self._device.set_driver_features(wanted)
            self._device.set_status(_READY)
            if self._writeback is not None and self._device.accepted(at.VIRTIO_BLK_F_CONFIG_WCE):
                self._device.write_config(at.BLK_CONFIG_WRITEBACK, self._writeback)
            self._vrings.refresh_all()
        if self._logs != logged:
            self._apply_memory()

    def _get_protocol_features(self, message: Message) -> _Reply:
        return _number(PROTOCOL_FEATURES)

    def _set_protocol_features(self, message: Message) -> None:
        (features,) = vu.U64.unpack(message.payload)
        if features & ~PROTOCOL_FEATURES:
            raise VhostUserError(f"protocol features {features:#x} were not all offered")
        self._protocol = features

    def _get_queue_num(self, message: Message) -> _Reply:
        return _number(self._device.num_queues)

    def _set_owner(self, message: Message) -> None:
        """The front-end says hello."""

    def _reset_owner(self, message: Message) -> None:
        """Deprecated; to be ignored, or to disable all rings, which some could not undo."""

    def _reset_driver(self) -> None:
        """Have a new driver's device; what the old one chose can be given back to it."""
        device = self._device
        self._vrings.stop_all()
        self._vrings.drop_trackers()  # the kind of ring may change
        if device.accepted(at.VIRTIO_BLK_F_CONFIG_WCE):
            self._writeback = device.read_config(at.BLK_CONFIG_WRITEBACK, 1)
        device.reset()

    def _stop_driver(self) -> None:
        for vring in self._vrings.all:
            vring.started = False
            vring.enabled = not self._features_given >> vu.VHOST_USER_F_PROTOCOL_FEATURES & 1
            vring.base = 0
        self._vrings.stop_all()
        self._vrings.forget_inflight()
        self._reset_driver()
        self._vrings.rest()

    def _reset_device(self, message: Message) -> None:
        self._stop_driver()
        self._writeback = None
        self._status = 0

    def _set_status(self, message: Message) -> None:
        (status,) = vu.U64.unpack(message.payload)
        self._status = status & 0xFF
        if not self._status:
            self._stop_driver()

    def _get_status(self, message: Message) -> _Reply:
        status = self._status
        if not self._device.status & at.STATUS_FEATURES_OK:
            status &= ~at.STATUS_FEATURES_OK
        return _number(status | self._device.status & at.STATUS_NEEDS_RESET)

    # -- memory --------------------------------------------------------------------------------

    @property
    def _logs(self) -> bool:
        return bool(self._features_given >> vu.VHOST_F_LOG_ALL & 1) and self._log is not None

    def _apply_memory(self, then: Callable[[], object] = lambda: None) -> None:
        """Have the device use the regions that there are, and the log."""
        on_write = self._log.mark if self._logs and self._log is not None else None
        self._vrings.set_memory(self._table.guest_memory(on_write), then)

    def _set_mem_table(self, message: Message) -> None:
        payload = message.payload
        count = vu.TABLE_HEAD.unpack_from(payload)[0] if len(payload) >= vu.TABLE_HEAD.size else -1
        size = vu.TABLE_HEAD.size + count * vu.REGION.size
        # QEMU sends room for more regions than there are.
        if not 0 <= count <= vu.TABLE_REGIONS or count != len(message.fds) or len(payload) < size:
            raise VhostUserError(f"{count} regions in {len(payload)} bytes")
        table = MemoryTable()
        try:
            for start in range(vu.TABLE_HEAD.size, size, vu.REGION.size):
                guest, length, user, offset = vu.REGION.unpack_from(payload, start)
                table.add(Region(guest, length, user, offset, message.take_fd()))
        except VhostUserError:
            table.close()
            raise
        table.regions, self._table.regions = self._table.regions, table.regions
        self._apply_memory(table.close)

    def _get_max_mem_slots(self, message: Message) -> _Reply:
        return _number(MAX_SLOTS)

    def _add_mem_reg(self, message: Message) -> None:
        guest, size, user, offset = vu.SINGLE_REGION.unpack(message.payload)
        self._table.add(Region(guest, size, user, offset, message.take_fd()))
        self._apply_memory()

    def _rem_mem_reg(self, message: Message) -> None:
        guest, size, user, _ = vu.SINGLE_REGION.unpack(message.payload)
        region = self._table.find(guest, size, user)
        self._table.regions.remove(region)
        self._apply_memory(region.close)

    def _set_log_base(self, message: Message) -> _Reply:
        size, offset = vu.LOG.unpack(message.payload)
        log = DirtyLog(map_file(message.take_fd(), offset, size))
        self._set_log(log)
        return _number(0)

    def _set_log(self, log: DirtyLog | None) -> None:
        old, self._log = self._log, log
        self._apply_memory()
        if old is not None:
            old.close()

    def _set_log_fd(self, message: Message) -> None:
        fd = _event(message.take_fd())
        if self._log_fd >= 0:
            os.close(self._log_fd)
        self._log_fd = fd

    # -- rings ---------------------------------------------------------------------------------

    def _set_vring_num(self, message: Message) -> None:
        index, size = vu.VRING_STATE.unpack(message.payload)
        vring = self._vrings.find(index)
        state = self._device.queue_state(index)
        if state is None or not 0 < size <= state.max_size:
            raise VhostUserError(f"a ring of {size} entries")
        self._vrings.stop(vring)
        vring.size = size
        self._vrings.refresh(vring)

    def _set_vring_addr(self, message: Message) -> None:
        index, _, descriptors, used, available, _ = vu.VRING_ADDR.unpack(message.payload)
        vring = self._vrings.find(index)
        areas = (descriptors, available, used)
        # Sent to live rings, too, to say whether they are logged; the log has all writes anyway.
        if areas != vring.areas:
            self._vrings.stop(vring)
            vring.areas = areas
            self._vrings.refresh(vring)

    def _set_vring_base(self, message: Message) -> None:
        index, base = vu.VRING_STATE.unpack(message.payload)
        vring = self._vrings.find(index)
        self._vrings.stop(vring)
        vring.base = base
        self._vrings.refresh(vring)

    def _get_vring_base(self, message: Message) -> _Reply:
        index, _ = vu.VRING_STATE.unpack(message.payload)
        vring = self._vrings.find(index)
        vring.started = False
        self._vrings.stop(vring)
        if vring.tracker is not None and not vring.held:
            vring.tracker.forget()  # nothing is under way: what comes next says where it begins
        self._replace(vring, "kick", -1)
        vring.replace("call", -1)
        self._vrings.rest()
        return _Reply(vu.VRING_STATE.pack(index, vring.base))

    def _set_vring_enable(self, message: Message) -> None:
        index, enable = vu.VRING_STATE.unpack(message.payload)
        if enable > 1:
            raise VhostUserError(f"a ring that is {enable} enabled")
        vring = self._vrings.find(index)
        if vring.enabled != bool(enable):
            vring.enabled = bool(enable)
            self._vrings.refresh(vring)

    def _set_vring_kick(self, message: Message) -> None:
        vring, fd = self._vring_fd(message)
        self._replace(vring, "kick", fd)
        vring.started = True
        if self._device.state.broken and not any(each.live for each in self._vrings.all):
            self._recover()
        self._vrings.refresh(vring)
        self._tell_configuration()

    def _set_vring_call(self, message: Message) -> None:
        vring, fd = self._vring_fd(message)
        vring.replace("call", fd)
        if vring.live and fd >= 0:
            vring.signal("call")  # the old one may have been left unread

    def _set_vring_err(self, message: Message) -> None:
        vring, fd = self._vring_fd(message)
        vring.replace("error", fd)

    def _vring_fd(self, message: Message) -> tuple[Vring, int]:
        """The ring and the descriptor for it, -1 if there is to be none."""
        (value,) = vu.U64.unpack(message.payload)
        vring = self._vrings.find(value & vu.VRING_INDEX_MASK)
        if bool(value & vu.VRING_NO_FD) == bool(message.fds):
            raise VhostUserError(f"{len(message.fds)} file descriptors with {value:#x}")
        return vring, _event(message.take_fd()) if message.fds else -1

    def _replace(self, vring: Vring, kind: str, fd: int) -> None:
        """Have another kick descriptor, which is to be watched."""
        if vring.kick >= 0:
            self._loop.forget(vring.kick)
        vring.replace(kind, fd)
        if fd >= 0:
            try:
                self._loop.watch(fd, lambda: self._kicked(vring))
            except OSError as error:
                vring.replace(kind, -1)
                raise VhostUserError(f"a kick descriptor that cannot be: {error}") from error

    def _kicked(self, vring: Vring) -> None:
        try:
            if not os.read(vring.kick, 8):
                self._replace(vring, "kick", -1)  # a pipe, whose other end was closed
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("ring %d: its kick descriptor fails: %s", vring.index, error)
            self._replace(vring, "kick", -1)
        self._device.kick(vring.index)

    def _vring_kick(self, message: Message) -> None:
        index, _ = vu.VRING_STATE.unpack(message.payload)
        self._vrings.find(index)
        self._device.kick(index)

    def _recover(self) -> None:
        """The device was broken by the last driver, and a new one comes: no other message tells."""
        wanted = self._device.state.driver_features
        self._reset_driver()
        self._device.set_driver_features(wanted)
        self._device.set_status(_READY)

    # -- requests under way ----------------------------------------------------------------------

    def _get_inflight_fd(self, message: Message) -> _Reply:
        _, _, queues, entries = self._inflight(message)
        packed = bool(self._device.offered_features >> at.VIRTIO_F_RING_PACKED & 1)
        size = queues * region_size(entries, packed)
        fd = os.memfd_create("vhost-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        payload = vu.INFLIGHT.pack(size, 0, queues, entries)
        return _Reply(payload.ljust(len(message.payload), b"\0"), fd)

    def _set_inflight_fd(self, message: Message) -> None:
        size, offset, queues, entries = self._inflight(message)
        if offset % 8:
            raise VhostUserError(f"notes of requests at {offset}")
        self._vrings.set_inflight(map_file(message.take_fd(), offset, size), queues, entries)

    def _inflight(self, message: Message) -> tuple[int, int, int, int]:
        if not vu.INFLIGHT.size <= len(message.payload) <= vu.INFLIGHT.size + 4:
            raise VhostUserError(f"{len(message.payload)} bytes")
        size, offset, queues, entries = vu.INFLIGHT.unpack_from(message.payload)
        if not 0 < queues <= self._device.num_queues or not 0 < entries <= at.QUEUE_SIZE_MAX:
            raise VhostUserError(f"notes for {queues} queues of {entries}")
        return size, offset, queues, entries

    # -- configuration and state -----------------------------------------------------------------

    def _get_config(self, message: Message) -> _Reply:
        try:
            offset, data, _ = _config(message)
        except VhostUserError as error:
            _log.warning("refused to give configuration: %s", error)
            return _Reply(b"")
        head = message.payload[: vu.CONFIG_HEAD.size]
        self._known = self._device.config_generation
        return _Reply(head + self._device.read_config(offset, len(data)))

    def _set_config(self, message: Message) -> None:
        offset, data, flags = _config(message)
        where = at.BLK_CONFIG_WRITEBACK
        whole = flags == vu.CONFIG_F_MIGRATION
        if not whole and (flags or (offset, len(data)) != (where, 1)):
            raise VhostUserError(f"configuration of {len(data)} bytes at {offset} is read-only")
        if 0 <= where - offset < len(data):
            self._device.write_config(where, data[where - offset : where - offset + 1])

    def _set_backend_req_fd(self, message: Message) -> None:
        fd = message.take_fd()
        try:
            connection = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            raise
        if connection.family != socket.AF_UNIX or connection.type != socket.SOCK_STREAM:
            connection.close()
            raise VhostUserError("a channel that is no UNIX stream socket")
        if self._backend is not None:
            self._backend.close()
        self._backend = Channel(connection)

    def _set_device_state_fd(self, message: Message) -> _Reply:
        direction, phase = vu.STATE_TRANSFER.unpack(message.payload)
        fd = message.take_fd()
        if phase or any(vring.live for vring in self._vrings.all):
            os.close(fd)
            _log.warning("no device state is transferred in phase %d, or with live rings", phase)
            return _number(vu.STATE_NO_FD | 1)
        self._transfer.begin(direction, fd)
        return _number(vu.STATE_NO_FD)

    def _check_device_state(self, message: Message) -> _Reply:
        return _number(self._transfer.end())


def _number(value: int) -> _Reply:
    return _Reply(vu.U64.pack(value))


def _event(fd: int) -> int:
    """``fd`` made so that nobody can have us wait on it."""
    os.set_blocking(fd, False)
    return fd


def _config(message: Message) -> tuple[int, bytes, int]:
    """Offset, data and flags of a message on configuration."""
    if len(message.payload) < vu.CONFIG_HEAD.size:
        raise VhostUserError(f"{len(message.payload)} bytes of configuration")
    offset, size, flags = vu.CONFIG_HEAD.unpack_from(message.payload)
    data = message.payload[vu.CONFIG_HEAD.size :]
    if size != len(data) or offset + size > vu.CONFIG_MAX:
        raise VhostUserError(f"{size} bytes of configuration at {offset}, with {len(data)}")
    return offset, data, flags
