"""The core of a virtio device: status, features, queues, configuration (virtio 1.4 §2, §3).

It knows nothing of registers: a transport (MMIO, another engine) translates its own into the
methods here, as :class:`~.transport.TransportDevice` has them, and is told about interrupts through
the two of :class:`~.transport.Transport`. What a driver can see and change is plain data in
:class:`DeviceState`. Serving the queues is :mod:`.service`'s, saving and loading :mod:`.saving`'s.

A device is driven by one thread at a time; with ``io_threads``, by any. Its methods may be called
again from inside an interrupt callback.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

from ..backend.state import StateReader, StateWriter
from ..errors import GuestError
from . import suspension
from .guarded import Guarded, locked
from .iommu import Translate, TranslatedMemory
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
    STATUS_SUSPEND,
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_NOTIFY_ON_EMPTY,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
    ByteOrder,
    Structs,
)
from .memory import GuestMemory
from .observe import Observer
from .queue import DeviceState, Queue
from .ring import Chain, QueueState, Ring
from .rings import make_ring
from .saving import load_device, save_device
from .service import Service
from .transport import Transport
from .workers import WorkerService

__all__ = ["VirtioDevice"]

_log = logging.getLogger(__name__)

_DRIVER_BITS = (
    STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK | STATUS_FAILED
)
"""Status bits that a driver may set."""

_LEGACY_FEATURES = 1 << VIRTIO_F_ANY_LAYOUT | 1 << VIRTIO_F_NOTIFY_ON_EMPTY
_NO_MEMORY = GuestMemory.from_buffer(b"")
"""The guest memory of a device that is not attached."""


class VirtioDevice(Guarded, ABC):
    """The transport-independent part of every virtio device."""

    device_id: int

    def __init__(
        self,
        *,
        features: int,
        num_queues: int,
        queue_size: int,
        packed: bool = False,
        in_order: bool = False,
        access_platform: bool = False,
        iommu: Translate | None = None,
        io_threads: int = 0,
        strict: bool = False,
    ) -> None:
        """``features``: those of the device type, as a bit mask. ``packed``, ``in_order``,
        ``access_platform``: offer packed queues, IN_ORDER, ACCESS_PLATFORM.

        ``iommu`` translates every address that the driver gives, see :mod:`.iommu`; it implies
        ACCESS_PLATFORM, and a driver that does not accept that is refused (BF-91).
        ``io_threads``: so many threads serve the queues, see :mod:`.workers`. With ``strict``
        an error of the driver raises GuestError after the device has answered it, and an error of
        our own is raised as it is.
        """
        if not 0 < queue_size <= QUEUE_SIZE_MAX or queue_size & (queue_size - 1):
            raise ValueError(f"queue_size is {queue_size}, must be a power of two up to 32768")
        if not 0 < num_queues <= 1024:
            raise ValueError(f"num_queues is {num_queues}, must be 1 to 1024")
        if io_threads < 0 or (io_threads and strict):
            raise ValueError("io_threads must be 0 or more, and 0 with strict")
        super().__init__()
        self.strict = strict
        self.legacy = False
        self.structs: Structs = LITTLE
        self.state = DeviceState([QueueState(queue_size, queue_size) for _ in range(num_queues)])
        self.queues = [Queue(index, state) for index, state in enumerate(self.state.queues)]
        self.transitional = False
        """The driver chooses between legacy and modern: see :meth:`use_interface`."""
        self.legacy_structs: Structs = LITTLE
        self._transport_features = 0
        self._type_features = features | 1 << VIRTIO_F_INDIRECT_DESC | 1 << VIRTIO_F_EVENT_IDX
        self._iommu = iommu
        for bit, wanted in (
            (VIRTIO_F_RING_PACKED, packed),
            (VIRTIO_F_IN_ORDER, in_order),
            (VIRTIO_F_ACCESS_PLATFORM, access_platform or iommu is not None),
        ):
            self._type_features |= wanted << bit
        self._memory: GuestMemory = _NO_MEMORY
        self._violation: GuestError | None = None
        self.resets = 0
        """How often the device was reset: a request looks whether that happened under it."""
        self.wrap_ring: Callable[[int, Ring], Ring] | None = None
        """Given a queue's index and new ring, gives the ring to be used: for who wants to see what
        is taken and used (vhost-user's inflight tracking). Set before queues are enabled."""
        self.on_stop: Callable[[Exception], object] | None = None
        """Called with the error that has paused the device (an error policy of ``stop``), from the
        thread that served; :meth:`resume` tries the request again."""
        self._stopped_by: Exception | None = None
        self.service = WorkerService(self, io_threads) if io_threads else Service(self)
        self.kick: Callable[[int], None] = self.service.kick
        """See :class:`~.transport.TransportDevice`."""
        self.poll: Callable[[], bool] = self.service.poll
        """See :class:`~.transport.TransportDevice`."""

    # -- attaching ---------------------------------------------------------------------------

    def connect(
        self,
        memory: GuestMemory,
        transport: Transport,
        *,
        legacy: bool = False,
        transitional: bool = False,
        order: ByteOrder = "little",
        defer: bool = False,
        features: int = 0,
    ) -> None:
        """Attach the device to guest memory and to its transport; a device has one of each.

        ``legacy``: the interface before virtio 1.0, whose structures are in the guest's ``order``;
        ``transitional``: both interfaces, one at a time. ``defer``: a kick only marks its queue,
        :meth:`poll` serves it. ``features``: what the transport adds to those of the device, as a
        bit mask.
        """
        if self.transport is not None:
            raise ValueError("the device is attached already")
        if order != "little" and not (legacy or transitional):
            raise ValueError("only a legacy device has the guest's byte order")
        if legacy and self._iommu is not None:
            raise ValueError("a legacy device has no IOMMU")
        self._memory = self._seen(memory)
        self.transport = transport
        self.transitional = transitional
        self.legacy_structs = LITTLE if order == "little" else BIG
        self.legacy = legacy
        self.structs = self.legacy_structs if legacy else LITTLE
        self.service.defer = defer and self.service.inline  # threads need nobody who polls
        self._transport_features = features
        self.reset()

    @locked
    def use_interface(self, *, legacy: bool) -> None:
        """See :class:`~.transport.TransportDevice`."""
        self.legacy = legacy
        self.structs = self.legacy_structs if legacy else LITTLE
        self.was_reset()

    def set_memory(self, memory: GuestMemory) -> None:
        """Guest memory is another now; requests under way are done with the old one first.

        A queue whose rings do not lie in the new one breaks the device.
        """
        paused = self.paused
        self.pause()
        self._memory = self._seen(memory)
        self.memory_changed()
        if not paused:
            self.resume()

    def _seen(self, memory: GuestMemory) -> GuestMemory:
        return memory if self._iommu is None else TranslatedMemory(memory, self._iommu)

    @property
    def memory(self) -> GuestMemory:
        """Guest memory, by the addresses that the driver uses."""
        return self._memory

    # -- features ----------------------------------------------------------------------------

    @property
    def offered_features(self) -> int:
        """What the device offers, as a bit mask; a legacy driver sees 32 bits."""
        features = self._type_features | self._transport_features
        if self.legacy:
            return (features | _LEGACY_FEATURES) & 0xFFFF_FFFF
        return features | 1 << VIRTIO_F_VERSION_1

    @property
    def driver_features(self) -> int:
        """See :class:`~.transport.TransportDevice`."""
        return self.state.driver_features

    def accepted(self, feature: int) -> bool:
        """The driver has accepted feature (bit number) ``feature``."""
        return bool(self.state.driver_features >> feature & 1)

    @locked
    def set_driver_features(self, features: int, mask: int = -1) -> None:
        """The driver accepts ``features`` among those in ``mask``.

        Ignored once it has said FEATURES_OK (BF-48), or DRIVER_OK on a legacy device.
        """
        state = self.state
        if state.status & (STATUS_FEATURES_OK | STATUS_DRIVER_OK | STATUS_SUSPEND):
            return
        state.driver_features = state.driver_features & ~mask | features & mask
        if self.legacy:  # in force at once, rings that are in use already included
            self.service.drain()
            state.driver_features &= self.offered_features
            for queue in self.queues:
                queue.park()
            self.refresh_rings()

    def features_valid(self) -> bool:
        """The driver's features go together (BF-19)."""
        if self._iommu is not None and not self.accepted(VIRTIO_F_ACCESS_PLATFORM):
            return False
        return not self.state.driver_features & ~self.offered_features

    # -- status ------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """The device status field (§2.1)."""
        return suspension.shown(self.state.status)

    @property
    def suspended(self) -> bool:
        """The driver has the device stand still; see :mod:`.suspension`."""
        return suspension.is_suspended(self.state.status)

    @locked
    def set_status(self, value: int) -> None:
        """The driver writes the status field: 0 resets, bits are set, never cleared (BF-02)."""
        if value == 0:
            self.reset()
            return
        state = self.state
        if suspension.asked_for(self, value):
            return
        new = value & _DRIVER_BITS & ~state.status
        if self.legacy:
            new &= ~STATUS_FEATURES_OK
        if new & STATUS_FEATURES_OK and not self.features_valid():
            new &= ~STATUS_FEATURES_OK  # BF-19
        if new & STATUS_DRIVER_OK and not self.features_valid():
            # Without FEATURES_OK before it: some small drivers leave that out, and may.
            new &= ~STATUS_DRIVER_OK
            self.guest_error(GuestError("DRIVER_OK with features that cannot be"))
        if not new:
            return
        state.status |= new
        if new & STATUS_FEATURES_OK or (
            new & STATUS_DRIVER_OK and not state.status & STATUS_FEATURES_OK
        ):
            self.negotiated()
        self.refresh_rings()
        if new & STATUS_DRIVER_OK:
            self.service.look()  # what was kicked too early (BF-51) is not lost

    @locked
    def reset(self) -> None:
        """Back to the state after power-on; queues are let go of (BF-27 to BF-29)."""
        for queue in self.queues:
            queue.drop()
        self.service.drain()  # before the status reads 0
        state = self.state
        state.status = 0
        state.driver_features = 0
        state.broken = False
        self._violation = None
        self._config_due = False
        self.resets += 1
        for queue in self.queues:
            self._forget(queue)
        state.queues = [queue.state for queue in self.queues]
        self.was_reset()

    def _forget(self, queue: Queue) -> None:
        max_size = queue.state.max_size
        queue.state = QueueState(max_size, max_size)

    @locked
    def guest_error(self, error: GuestError) -> None:
        """The driver has done what only a reset can mend (BF-07): stop until then."""
        _log.warning("%s needs a reset: %s", type(self).__name__, error)
        self.stop_working()
        if self.strict:
            raise error

    @locked
    def stop_working(self) -> None:
        """An error was met that only a reset can mend: let go of the queues, and say so."""
        state = self.state
        state.broken = True
        state.status = suspension.shown(state.status)  # it is not to be suspended any more (BF-70)
        for queue in self.queues:
            queue.drop()
        if not self.legacy and not state.status & STATUS_NEEDS_RESET:
            state.status |= STATUS_NEEDS_RESET
            if state.status & STATUS_DRIVER_OK:
                self.config_due()  # BF-08

    # -- queues ------------------------------------------------------------------------------

    @property
    def num_queues(self) -> int:
        """How many there are."""
        return len(self.queues)

    def queue_state(self, index: int) -> QueueState | None:
        """Queue ``index`` as plain data, None if there is none; see
        :class:`~.transport.TransportDevice`."""
        return self.queues[index].state if 0 <= index < len(self.queues) else None

    @locked
    def enable_queue(self, index: int) -> None:
        """See :class:`~.transport.TransportDevice`. A second time changes nothing."""
        queue = self.queues[index]
        if queue.state.ready or self.state.broken:
            return
        try:
            ring = self.make_ring(queue.state, self.state.driver_features)
        except GuestError as error:
            self.guest_error(error)
            return
        queue.state.ready = True
        if self._may_serve() and not suspension.is_suspending(self.state.status):
            self._go_live(queue, ring)

    @locked
    def disable_queue(self, index: int) -> None:
        """The driver takes queue ``index`` back; what is in it is not served any more (MMIO-08)."""
        self.stop_queue(index)
        self.queues[index].state.rewind()

    @locked
    def stop_queue(self, index: int) -> None:
        """Stop using queue ``index`` when its requests under way are done; its indices stay.

        A request that is held for a retry is dropped: it is the driver's to give again.
        """
        queue = self.queues[index]
        queue.park()
        self.service.drain(queue)
        queue.drop()
        queue.state.ready = False
        suspension.finish(self)

    @locked
    def reset_queue(self, index: int) -> None:
        """Queue ``index`` is as after a reset of the device (§2.6.1; BF-38 to BF-40).

        It is complete unless :meth:`resetting`: a request that is being done at that moment (this
        is called from inside it) is done to its end. Ignored unless RING_RESET was accepted.
        """
        if self.accepted(VIRTIO_F_RING_RESET):
            self.queues[index].drop()
            self.queues[index].state.ready = False  # from here on it goes on: :meth:`resetting`
            self.service.drain(self.queues[index])
            self._forget(self.queues[index])
            self.state.queues[index] = self.queues[index].state
            suspension.finish(self)

    def resetting(self, index: int) -> bool:
        """A request that was being done when queue ``index`` was reset still is (MMIO-12)."""
        queue = self.queues[index]
        return queue.serving and not queue.state.ready

    def _may_serve(self) -> bool:
        """Queues may be served: after DRIVER_OK (BF-05), on a legacy device always (BF-54)."""
        state = self.state
        if state.broken or state.status & STATUS_FAILED or self.service.paused:
            return False
        return self.legacy or bool(state.status & STATUS_DRIVER_OK)

    def refresh_rings(self) -> None:
        """Bring every queue's ring in line with status and features."""
        live = self._may_serve()
        suspending = suspension.is_suspending(self.state.status)
        for queue in self.queues:
            if not (live and queue.state.ready):
                queue.ring = queue.express = None
            elif queue.ring is None and (queue.held or not suspending):
                try:
                    self._go_live(queue, self.make_ring(queue.state, self.state.driver_features))
                except GuestError as error:
                    self.guest_error(error)
                    return

    def _go_live(self, queue: Queue, ring: Ring) -> None:
        if self.wrap_ring is not None:
            ring = self.wrap_ring(queue.index, ring)
        queue.ring = ring
        queue.express = self._express(queue, ring)

    # -- serving -----------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop serving: returns when requests under way are done (but for one that this is called
        from inside of). What the driver kicks for meanwhile is served at :meth:`resume`.

        A device that is paused can be saved. It answers the driver's other actions as ever.
        """
        self.service.pause()
        self.service.drain()

    def resume(self) -> None:
        """Go on serving. What an error has stopped is tried again, first."""
        if self.service.inside():
            raise ValueError("a device is not resumed from inside one of its requests")
        self.service.drain()
        self._resume()

    @locked
    def _resume(self) -> None:
        if self.service.paused:
            self.service.paused = False
            self.refresh_rings()
            self.service.resume()

    def close(self) -> None:
        """The device is not used any more: requests under way are done, its threads end."""
        self.pause()
        self.service.close()

    @property
    def paused(self) -> bool:
        """Between :meth:`pause` (or a stop by an error) and :meth:`resume`."""
        return self.service.paused

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Have ``observer`` told what the device does, until what this returns is called."""
        return self.service.observe(observer)

    @locked
    def observed(self) -> None:
        """Others watch now, or nobody: watched queues have no short way."""
        for queue in self.queues:
            if queue.ring is not None:
                queue.express = self._express(queue, queue.ring)

    def _express(self, queue: Queue, ring: Ring) -> Callable[[], None] | None:
        if self.service.inline and self.service.observer is None:
            return self.make_express(queue, ring)
        return None

    def hold(self, error: Exception) -> None:
        """Pause for an error of the host's; called from inside the request that met it."""
        with self.lock:
            self.service.pause()
            self._stopped_by = error
            self.attention = True

    def after_serving(self, failure: Exception | None) -> None:
        """A kick was served, up to an error of the driver's or our own, if there was one."""
        self.attention = False
        self.told()
        stopped_by, self._stopped_by = self._stopped_by, None
        if stopped_by is not None and self.on_stop is not None:
            self.on_stop(stopped_by)
        if failure is not None or self._violation is not None:
            error, self._violation = failure or self._violation, None
            if self.strict and error is not None:
                raise error

    @property
    def silent(self) -> bool:
        """See :class:`Guarded` (BF-68)."""
        return self.suspended

    def told(self) -> None:
        """Something that was under way is done: a device that is to be suspended may be ready."""
        if suspension.is_suspending(self.state.status):
            self.attention = True
            suspension.finish(self)

    def violation(self, error: GuestError) -> None:
        """The driver broke a rule and has its answer; under ``strict`` raise when that is out."""
        if self.strict and self._violation is None:
            self._violation = error
            self.attention = True

    # -- saving and loading --------------------------------------------------------------------

    state_version = 2
    """Of what :meth:`save_state` writes."""

    def save_state(self, stream: StateWriter) -> None:
        """Write everything but guest memory and the transport's registers.

        No request may be under way: none is between two calls of the device's methods, unless it
        has worker threads; :meth:`pause` it then. What the driver has made available and was not
        taken is in guest memory; what was taken and is held is written.
        """
        with self.lock:
            if not self.service.idle():
                raise ValueError("a device is not saved from inside one of its requests")
            if not self.service.inline and not self.service.paused:
                raise ValueError("a device with worker threads is saved while it is paused")
            save_device(self, stream)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read what :meth:`save_state` has written; returns how to put it in force.

        Nothing is changed before that. Raises ImageError for the state of another kind of device,
        of one with other queues or features, or attached in another way; UnsupportedError for a
        newer one.
        """
        return load_device(self, stream)

    def make_ring(self, state: QueueState, features: int) -> Ring:
        """A ring for a queue, under ``features``. Raises GuestError for one that cannot work."""
        return make_ring(state, features, self._memory, self.structs)

    # -- what a kind of device provides --------------------------------------------------------

    @abstractmethod
    def save_own(self, stream: StateWriter) -> None:
        """Write what this kind of device has in addition to every one; see :meth:`save_state`."""

    @abstractmethod
    def load_own(self, stream: StateReader) -> Callable[[], object]:
        """Read it again; see :meth:`load_state`. The rest is in force when what it returns is
        called."""

    @abstractmethod
    def process(self, chain: Chain, queue: Queue) -> int:
        """Do one request of ``queue`` and give the number of bytes written into the chain.

        :data:`~.service.HELD` for one that is to be done again, when the device is resumed: it is
        paused then. Raises GuestError for a chain that cannot be answered.
        """

    def make_express(self, queue: Queue, ring: Ring) -> Callable[[], None] | None:
        """A function that serves a queue as :class:`~.service.Service` does, only faster; or
        None."""
        return None

    @abstractmethod
    def negotiated(self) -> None:
        """The driver has settled for ``state.driver_features``."""

    @abstractmethod
    def was_reset(self) -> None:
        """Everything is as it was at the start again."""

    @abstractmethod
    def woken(self) -> None:
        """The device was suspended and goes on: tell the driver what has changed meanwhile."""

    @abstractmethod
    def memory_changed(self) -> None:
        """Guest memory is another one now."""

    @abstractmethod
    def read_config(self, offset: int, length: int) -> bytes:
        """``length`` bytes of device configuration; zeroes where there is none."""

    @abstractmethod
    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes device configuration; ignored where it may not."""

    @property
    def config_generation(self) -> int:
        """Another number after every change of the configuration that the driver did not make."""
        with self.lock:
            return self.state.config_generation

    def config_changed(self) -> None:
        """The configuration is another now: new generation, interrupt (MMIO-07, BLK-65).

        Called with the lock held, in which it was changed, so that no driver sees half of it.
        """
        with self.lock:
            self.state.config_generation = (self.state.config_generation + 1) & 0xFFFF_FFFF
            if self.state.status & STATUS_DRIVER_OK:
                self.config_due()
        self.announce()
