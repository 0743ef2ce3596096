"""The core of a virtio device: status, features, queues, configuration (virtio 1.4 §2, §3).

It knows nothing of registers: a transport (MMIO, another engine) translates its own into the
methods here and is told about interrupts through the two of :class:`Transport`. What a driver can
see and change is plain data in :class:`DeviceState`.

A device is driven by one thread at a time. Its methods may be called again from inside an
interrupt callback.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from ..backend.state import StateReader, StateWriter
from ..errors import GuestError, UnsupportedError
from .layout import (
    BIG,
    LITTLE,
    QUEUE_SIZE_MAX,
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    STATUS_NEEDS_RESET,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
    ByteOrder,
    Structs,
)
from .memory import GuestMemory
from .packed import PackedRing
from .ring import Chain, QueueState, Ring
from .split import SplitRing

__all__ = ["DeviceState", "Queue", "Transport", "VirtioDevice"]

_log = logging.getLogger(__name__)

_DRIVER_BITS = (
    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK | STATUS_FAILED
)
"""Status bits that a driver may set."""

BUDGET = 1024
"""Chains that one kick serves, to the end of the batch in which that is reached; what is left is
for :meth:`VirtioDevice.poll` or the next kick. Only a driver that runs at the same time can have
that many more, or one that has the device write to its own rings."""

_NO_MEMORY = GuestMemory.from_buffer(b"")
"""The guest memory of a device that is not attached."""


class Transport(Protocol):
    """What a device needs of the thing it is reached through."""

    def queue_interrupt(self, index: int) -> None:
        """Queue ``index`` has used buffers that the driver wants to hear of."""

    def config_interrupt(self) -> None:
        """The configuration, or DEVICE_NEEDS_RESET, has changed."""


@dataclass(slots=True)
class DeviceState:
    """Everything there is to know of a device outside guest memory and its configuration."""

    queues: list[QueueState]
    status: int = 0
    driver_features: int = 0
    config_generation: int = 0
    broken: bool = False
    """Stopped by an error until the driver resets it."""


@dataclass(slots=True)
class Queue:
    """A virtqueue: its state, and its ring while it may be served."""

    index: int
    state: QueueState
    ring: Ring | None = field(default=None, repr=False)
    express: Callable[[], None] | None = field(default=None, repr=False)
    """A short way to serve it, if there is one; see :meth:`VirtioDevice.make_express`."""
    pending: bool = False
    """Kicked, and not served to the end yet."""
    serving: bool = False
    interrupt: bool = False
    """While serving: the driver wants to hear of what was published."""


class VirtioDevice(ABC):
    """The transport-independent part of every virtio device."""

    device_id: int

    def __init__(
        self,
        *,
        features: int,
        num_queues: int,
        queue_size: int,
        packed: bool = False,
        strict: bool = False,
    ) -> None:
        """``features``: those of the device type, as a bit mask. ``packed``: offer packed queues.

        With ``strict`` an error of the driver raises GuestError after the device has answered it,
        and an error of our own is raised as it is.
        """
        if not 0 < queue_size <= QUEUE_SIZE_MAX or queue_size & (queue_size - 1):
            raise ValueError(f"queue_size is {queue_size}, must be a power of two up to 32768")
        if not 0 < num_queues <= 1024:
            raise ValueError(f"num_queues is {num_queues}, must be 1 to 1024")
        self.strict = strict
        self.legacy = False
        self.structs: Structs = LITTLE
        self.state = DeviceState([QueueState(queue_size, queue_size) for _ in range(num_queues)])
        self.queues = [Queue(index, state) for index, state in enumerate(self.state.queues)]
        self._transport_features = 0
        self._type_features = features | 1 << VIRTIO_F_INDIRECT_DESC | 1 << VIRTIO_F_EVENT_IDX
        if packed:
            self._type_features |= 1 << VIRTIO_F_RING_PACKED
        self._memory: GuestMemory = _NO_MEMORY
        self._transport: Transport | None = None
        self._defer = False
        self._violation: GuestError | None = None
        self.resets = 0
        """How often the device was reset: a request looks whether that happened under it."""

    # -- attaching ---------------------------------------------------------------------------

    def connect(
        self,
        memory: GuestMemory,
        transport: Transport,
        *,
        legacy: bool = False,
        order: ByteOrder = "little",
        defer: bool = False,
        features: int = 0,
    ) -> None:
        """Attach the device to guest memory and to its transport; a device has one of each.

        ``legacy``: the interface before virtio 1.0, whose structures are in the guest's ``order``.
        ``defer``: a kick only marks its queue, :meth:`poll` serves it. ``features``: what the
        transport adds to those of the device, as a bit mask.
        """
        if self._transport is not None:
            raise ValueError("the device is attached already")
        if order != "little" and not legacy:
            raise ValueError("only a legacy device has the guest's byte order")
        self._memory = memory
        self._transport = transport
        self.legacy = legacy
        self.structs = LITTLE if order == "little" else BIG
        self._defer = defer
        self._transport_features = features
        self.reset()

    # -- features ----------------------------------------------------------------------------

    @property
    def offered_features(self) -> int:
        """What the device offers, as a bit mask; a legacy driver sees 32 bits."""
        features = self._type_features | self._transport_features
        if self.legacy:
            return (features | 1 << VIRTIO_F_ANY_LAYOUT) & 0xFFFF_FFFF
        return features | 1 << VIRTIO_F_VERSION_1

    def accepted(self, feature: int) -> bool:
        """The driver has accepted feature (bit number) ``feature``."""
        return bool(self.state.driver_features >> feature & 1)

    def set_driver_features(self, features: int, mask: int = -1) -> None:
        """The driver accepts ``features`` among those in ``mask``.

        Ignored once it has said FEATURES_OK (BF-48), or DRIVER_OK on a legacy device.
        """
        state = self.state
        if state.status & (STATUS_FEATURES_OK | STATUS_DRIVER_OK):
            return
        state.driver_features = state.driver_features & ~mask | features & mask
        if self.legacy:  # in force at once, rings that are in use already included
            state.driver_features &= self.offered_features
            for queue in self.queues:
                queue.ring = None
            self._refresh_rings()

    def _features_valid(self) -> bool:
        return not self.state.driver_features & ~self.offered_features

    # -- status ------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """The device status field (§2.1)."""
        return self.state.status

    def set_status(self, value: int) -> None:
        """The driver writes the status field: 0 resets, bits are set, never cleared (BF-02)."""
        if value == 0:
            self.reset()
            return
        state = self.state
        new = value & _DRIVER_BITS & ~state.status
        if self.legacy:
            new &= ~STATUS_FEATURES_OK
        if new & STATUS_FEATURES_OK and not self._features_valid():
            new &= ~STATUS_FEATURES_OK  # BF-19
        if new & STATUS_DRIVER_OK and not self._features_valid():
            # Without FEATURES_OK before it: some small drivers leave that out, and may.
            new &= ~STATUS_DRIVER_OK
            self.guest_error(GuestError("DRIVER_OK with features that were not offered"))
        if not new:
            return
        state.status |= new
        if new & STATUS_FEATURES_OK or (
            new & STATUS_DRIVER_OK and not state.status & STATUS_FEATURES_OK
        ):
            self.negotiated()
        self._refresh_rings()
        if new & STATUS_DRIVER_OK:
            # What was kicked too early (BF-51) is not lost.
            for queue in self.queues:
                if self._defer:
                    queue.pending = queue.ring is not None
                else:
                    self.kick(queue.index)

    def reset(self) -> None:
        """Back to the state after power-on; queues are let go of (BF-27 to BF-29)."""
        state = self.state
        state.status = 0
        state.driver_features = 0
        state.broken = False
        self._violation = None
        self.resets += 1
        for queue in self.queues:
            self._forget(queue)
        state.queues = [queue.state for queue in self.queues]
        self.was_reset()

    def _forget(self, queue: Queue) -> None:
        max_size = queue.state.max_size
        queue.state = QueueState(max_size, max_size)
        queue.ring = None
        queue.pending = False

    def guest_error(self, error: GuestError) -> None:
        """The driver has done what only a reset can mend (BF-07): stop until then."""
        _log.warning("%s needs a reset: %s", type(self).__name__, error)
        self._break()
        if self.strict:
            raise error

    def _break(self) -> None:
        state = self.state
        state.broken = True
        for queue in self.queues:
            queue.ring = None
            queue.pending = False
        if not self.legacy and not state.status & STATUS_NEEDS_RESET:
            state.status |= STATUS_NEEDS_RESET
            if state.status & STATUS_DRIVER_OK and self._transport is not None:
                self._transport.config_interrupt()  # BF-08

    # -- queues ------------------------------------------------------------------------------

    def enable_queue(self, index: int) -> None:
        """The driver has set up queue ``index`` (its :class:`QueueState`) and enables it.

        A second time changes nothing. A queue that cannot work breaks the device.
        """
        queue = self.queues[index]
        if queue.state.ready or self.state.broken:
            return
        try:
            ring = self._make_ring(queue.state, self.state.driver_features)
        except GuestError as error:
            self.guest_error(error)
            return
        queue.state.ready = True
        if self._may_serve():
            self._go_live(queue, ring)

    def disable_queue(self, index: int) -> None:
        """The driver takes queue ``index`` back; what is in it is not served any more (MMIO-08)."""
        queue = self.queues[index]
        state = queue.state
        queue.ring = None
        queue.pending = False
        state.ready = False
        state.rewind()

    def reset_queue(self, index: int) -> None:
        """Queue ``index`` is as after a reset of the device (§2.6.1; BF-38 to BF-40).

        It is complete unless :meth:`resetting`: a request that is being done at that moment (this
        is called from inside it) is done to its end. Ignored unless RING_RESET was accepted.
        """
        if self.accepted(VIRTIO_F_RING_RESET):
            self._forget(self.queues[index])
            self.state.queues[index] = self.queues[index].state

    def resetting(self, index: int) -> bool:
        """A request that was being done when queue ``index`` was reset still is (MMIO-12)."""
        queue = self.queues[index]
        return queue.serving and not queue.state.ready

    def _may_serve(self) -> bool:
        """Queues may be served: after DRIVER_OK (BF-05), on a legacy device always (BF-54)."""
        state = self.state
        if state.broken or state.status & STATUS_FAILED:
            return False
        return self.legacy or bool(state.status & STATUS_DRIVER_OK)

    def _refresh_rings(self) -> None:
        """Bring every queue's ring in line with status and features."""
        live = self._may_serve()
        for queue in self.queues:
            if not (live and queue.state.ready):
                queue.ring = None
            elif queue.ring is None:
                try:
                    self._go_live(queue, self._make_ring(queue.state, self.state.driver_features))
                except GuestError as error:
                    self.guest_error(error)
                    return

    def _go_live(self, queue: Queue, ring: Ring) -> None:
        queue.ring = ring
        queue.express = self.make_express(queue, ring)

    def _make_ring(self, state: QueueState, features: int) -> Ring:
        """A ring for a queue, under the features that the driver has accepted."""
        indirect = bool(features >> VIRTIO_F_INDIRECT_DESC & 1)
        event_idx = bool(features >> VIRTIO_F_EVENT_IDX & 1)
        if features >> VIRTIO_F_RING_PACKED & 1:
            return PackedRing(state, self._memory, indirect=indirect, event_idx=event_idx)
        return SplitRing(
            state, self._memory, indirect=indirect, event_idx=event_idx, structs=self.structs
        )

    # -- serving -----------------------------------------------------------------------------

    def kick(self, index: int) -> None:
        """The driver says that queue ``index`` has something available.

        Serves it here and now, or leaves it to :meth:`poll`. An index that is none, a queue that is
        not enabled, a device that is not started: nothing happens (VQ-S-53).
        """
        if not 0 <= index < len(self.queues):
            return
        queue = self.queues[index]
        ring = queue.ring
        if ring is None:
            return
        if not self._defer and not queue.serving:
            self._serve(queue, ring)
        elif not queue.pending:
            # To be polled, or called from inside an interrupt: the loop outside goes on.
            queue.pending = True
            if not queue.serving:
                self._suppress(ring)

    def poll(self) -> bool:
        """Serve every queue that was kicked and is not done yet; True if there was one."""
        worked = False
        for queue in self.queues:
            ring = queue.ring
            if queue.pending and ring is not None and not queue.serving:
                worked = True
                self._serve(queue, ring)
        return worked

    def _suppress(self, ring: Ring) -> None:
        try:
            ring.suppress()
        except GuestError as error:
            self.guest_error(error)

    def _serve(self, queue: Queue, ring: Ring) -> None:
        """Do everything that is available on ``queue``, within bounds."""
        queue.serving = True
        queue.interrupt = False
        failure: Exception | None = None
        try:
            if ring.suppressed:
                ring.publish()
            if queue.express is not None:
                queue.express()
            else:
                self._serve_rounds(queue, ring)
            if queue.ring is not ring:
                return
        except Exception as error:
            failure = error
            self._fail(error, queue, ring)
        finally:
            queue.serving = False
        # Interrupts only now: what they call may come back to this device, or reset it.
        if queue.interrupt and self._transport is not None:
            self._transport.queue_interrupt(queue.index)
        if failure is not None or self._violation is not None:
            self._raise_strict(failure)

    def _serve_rounds(self, queue: Queue, ring: Ring) -> None:
        """Round after round, until nothing is available or the budget is used up.

        Notes in ``queue`` whether the driver wants an interrupt, and whether something may be left.
        Ends at once where the device is reset from inside.
        """
        budget = BUDGET
        while budget > 0 and (count := ring.ready()):
            budget -= count
            for _ in range(count):
                self.process_next(queue, ring)
                if queue.ring is not ring:
                    return
            queue.interrupt |= ring.publish()
        queue.pending = budget <= 0

    def process_next(self, queue: Queue, ring: Ring) -> None:
        """Do the next chain; there is one."""
        chain = ring.pop()
        written = self.process(chain)
        if queue.ring is ring:  # not reset from inside
            ring.push(chain, written)

    def _fail(self, failure: Exception, queue: Queue, ring: Ring) -> None:
        """Stop for an error of the driver's or our own."""
        if queue.ring is ring:
            with suppress(GuestError):  # what was done before it is the driver's to see
                queue.interrupt |= ring.publish()
        if isinstance(failure, GuestError):
            _log.warning("%s needs a reset: %s", type(self).__name__, failure)
        else:
            _log.error(
                "%s: error while serving queue %d",
                type(self).__name__,
                queue.index,
                exc_info=failure,
            )
        self._break()

    def _raise_strict(self, failure: Exception | None) -> None:
        error, self._violation = failure or self._violation, None
        if self.strict and error is not None:
            raise error

    def violation(self, error: GuestError) -> None:
        """The driver broke a rule and has its answer; under ``strict`` raise when that is out."""
        if self.strict and self._violation is None:
            self._violation = error

    # -- saving and loading --------------------------------------------------------------------

    state_version = 1
    """Of what :meth:`save_state` writes."""

    def save_state(self, stream: StateWriter) -> None:
        """Write everything but guest memory and the transport's registers.

        No request is under way between two calls of the device's methods, and none may be now:
        what the driver has made available and was not served is in guest memory.
        """
        if any(queue.serving for queue in self.queues):
            raise ValueError("a device is not saved from inside one of its requests")
        state = self.state
        stream.u32(self.device_id)
        stream.u32(self.state_version)
        stream.flag(self.legacy)
        stream.flag(self.structs is BIG)
        stream.u64(self.offered_features)
        stream.u64(state.driver_features & 0xFFFF_FFFF_FFFF_FFFF)
        stream.u64(state.driver_features >> 64 & 0xFFFF_FFFF_FFFF_FFFF)
        stream.u8(state.status)
        stream.u32(state.config_generation)
        stream.flag(state.broken)
        stream.u16(len(self.queues))
        for queue in self.queues:
            queue.state.save(stream)
            stream.flag(queue.pending)
            stream.flag(queue.ring is not None and queue.ring.suppressed)
        self.save_own(stream)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read what :meth:`save_state` has written; returns how to put it in force.

        Nothing is changed before that. Raises ImageError for the state of another kind of device,
        of one with other queues or features, or attached in another way; UnsupportedError for a
        newer one.
        """
        device_id, version = stream.u32(), stream.u32()
        if device_id != self.device_id:
            raise stream.malformed(f"is of a device of type {device_id}, not {self.device_id}")
        if version > self.state_version:
            raise UnsupportedError(
                f"Device state of version {version}, known are up to {self.state_version}",
                feature=f"device state version {version}",
            )
        if (stream.flag(), stream.flag()) != (self.legacy, self.structs is BIG):
            raise stream.malformed("is of another virtio version or byte order")
        offered = stream.u64()
        features = stream.u64() | stream.u64() << 64
        status = stream.u8()
        missing = features & ~self.offered_features
        if not status & (STATUS_FEATURES_OK | STATUS_DRIVER_OK):
            missing &= offered  # what a driver tries out before is its own affair
        if missing:
            raise stream.malformed(f"needs features {missing:#x}, which are not offered")
        if status & ~(_DRIVER_BITS | STATUS_NEEDS_RESET):
            raise stream.malformed(f"has a status of {status:#x}")
        state = DeviceState([], status, features, stream.u32(), stream.flag())
        count = stream.u16()
        if count != len(self.queues):
            raise stream.malformed(f"has {count} queues, not {len(self.queues)}")
        flags = []
        for queue in self.queues:
            state.queues.append(QueueState.load(stream, queue.state.max_size))
            flags.append((stream.flag(), stream.flag()))
        adopt_own = self.load_own(stream)
        if not state.broken:
            self._check_rings(state, stream)

        def adopt() -> None:
            self.state = state
            self._violation = None
            self.resets += 1
            for queue, queue_state in zip(self.queues, state.queues, strict=True):
                queue.state, queue.ring = queue_state, None
            self._refresh_rings()
            for queue, (pending, suppressed) in zip(self.queues, flags, strict=True):
                queue.pending = pending and queue.ring is not None
                if queue.ring is not None:
                    queue.ring.suppressed = suppressed
            adopt_own()

        return adopt

    def _check_rings(self, state: DeviceState, stream: StateReader) -> None:
        """Raise ImageError if a queue that is enabled in ``state`` could not work."""
        for index, queue in enumerate(state.queues):
            if queue.ready:
                try:
                    self._make_ring(queue, state.driver_features)
                except GuestError as error:
                    raise stream.malformed(f"has a queue {index} that cannot be: {error}") from None

    # -- what a kind of device provides --------------------------------------------------------

    @abstractmethod
    def save_own(self, stream: StateWriter) -> None:
        """Write what this kind of device has in addition to every one; see :meth:`save_state`."""

    @abstractmethod
    def load_own(self, stream: StateReader) -> Callable[[], object]:
        """Read it again; see :meth:`load_state`. The rest is in force when what it returns is
        called."""

    @abstractmethod
    def process(self, chain: Chain) -> int:
        """Do one request and give the number of bytes written into the chain.

        Raises GuestError for a chain that cannot be answered.
        """

    def make_express(self, queue: Queue, ring: Ring) -> Callable[[], None] | None:
        """A function that serves a queue as :meth:`_serve_rounds` does, only faster; or None."""
        return None

    @abstractmethod
    def negotiated(self) -> None:
        """The driver has settled for ``state.driver_features``."""

    @abstractmethod
    def was_reset(self) -> None:
        """Everything is as it was at the start again."""

    @abstractmethod
    def read_config(self, offset: int, length: int) -> bytes:
        """``length`` bytes of device configuration; zeroes where there is none."""

    @abstractmethod
    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes device configuration; ignored where it may not."""

    def config_changed(self) -> None:
        """The configuration is another now: new generation, interrupt (MMIO-07, BLK-65)."""
        self.state.config_generation = (self.state.config_generation + 1) & 0xFFFF_FFFF
        if self.state.status & STATUS_DRIVER_OK and self._transport is not None:
            self._transport.config_interrupt()
