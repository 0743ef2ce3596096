"""The rings of a session ("Ring states"), and how they become queues of the device.

A ring is *started* by SET_VRING_KICK and stopped by GET_VRING_BASE; it is *enabled* or not. Where
both are so and its addresses are in guest memory, it is *live*: a queue of the device. A ring that
is started and disabled is not served: a disk has no request that may be dropped.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ...errors import GuestError, PyvirtioError
from .. import layout as at
from ..blk import VirtioBlk
from ..device import VirtioDevice
from ..memory import GuestMemory
from ..ring import Chain, QueueState, Ring
from .channel import VhostUserError
from .inflight import InflightRing, SplitTracker, Tracker, region_size
from .inflight_packed import PackedTracker
from .memory import Mapping, MemoryTable

__all__ = ["Vring", "Vrings"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Vring:
    """What the front-end has said of one ring."""

    index: int
    size: int = 0
    areas: tuple[int, int, int] = (0, 0, 0)
    """User addresses of the descriptor, driver and device area."""
    base: int = 0
    """Where to go on, as SET_VRING_BASE has it."""
    kick: int = -1
    """Event descriptors; -1 is none."""
    call: int = -1
    error: int = -1
    started: bool = False
    enabled: bool = False
    live: bool = False
    tracker: Tracker | None = None
    held: list[Chain] = field(default_factory=list)
    """Taken and to be done when the ring is live again."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """For ``call`` and ``error``, which workers write to."""

    def replace(self, kind: str, fd: int) -> None:
        """Have another descriptor for ``kind`` ("kick", "call", "error"), which is this one's."""
        with self.lock:
            old: int = getattr(self, kind)
            setattr(self, kind, fd)
        if old >= 0:
            os.close(old)

    def signal(self, kind: str) -> bool:
        """Signal "call" or "error"; whether there is a descriptor for it."""
        with self.lock:
            fd: int = getattr(self, kind)
            if fd < 0:
                return False
            try:
                os.eventfd_write(fd, 1)
            except BlockingIOError:  # signalled more often than anyone will count
                pass
            except OSError as error:
                _log.warning("ring %d: its %s descriptor fails: %s", self.index, kind, error)
        return True


class Vrings:
    """All rings of a session; ``table`` is its guest memory."""

    def __init__(
        self,
        device: VirtioDevice,
        table: MemoryTable,
        on_start: Callable[[], object] = lambda: None,
        on_stop: Callable[[], object] = lambda: None,
    ) -> None:
        """``on_start`` is called before a first ring is served, and may refuse that by an OSError
        or PyvirtioError; ``on_stop`` when the front-end has stopped the last."""
        self._device = device
        self._on_start = on_start
        self._on_stop = on_stop
        self._in_use = False
        self._table = table
        self._memory: GuestMemory = GuestMemory.from_buffer(b"")
        self._inflight: Mapping | None = None
        self._inflight_shape = (0, 0)
        self.all = [Vring(index) for index in range(device.num_queues)]
        device.wrap_ring = self._wrap

    def find(self, index: int) -> Vring:
        """Ring ``index``. Raises VhostUserError if there is none."""
        if index >= len(self.all):
            raise VhostUserError(f"there is no ring {index}")
        return self.all[index]

    # -- coming and going ----------------------------------------------------------------------

    def refresh(self, vring: Vring) -> None:
        """Bring a ring in line with what the front-end has said of it.

        Raises VhostUserError if it cannot be served.
        """
        self.stop(vring)
        if vring.started and vring.enabled and self._device.status & at.STATUS_DRIVER_OK:
            self._start(vring)

    def refresh_all(self) -> None:
        """The same for all; one that cannot be served is told of by its error descriptor."""
        for vring in self.all:
            try:
                self.refresh(vring)
            except VhostUserError as error:
                _log.warning("ring %d cannot be served: %s", vring.index, error)
                vring.signal("error")

    def stop(self, vring: Vring) -> None:
        """Do what is under way and serve it no more; its indices go into ``base``."""
        if not vring.live:
            return
        vring.live = False
        vring.held = list(self._device.queues[vring.index].held)
        self._device.stop_queue(vring.index)
        state = self._state(vring)
        vring.base = state.next_avail
        if self._packed:
            vring.base |= (
                state.avail_wrap << 15 | state.used_index << 16 | int(state.used_wrap) << 31
            )

    def stop_all(self) -> None:
        """The same for all."""
        for vring in self.all:
            self.stop(vring)

    def rest(self) -> None:
        """The front-end has stopped a ring: the disk is not needed if that was the last one."""
        if self._in_use and not any(vring.started for vring in self.all):
            self._in_use = False
            self._on_stop()

    def set_memory(self, memory: GuestMemory, then: Callable[[], object] = lambda: None) -> None:
        """Guest memory is another; ``then`` is called when the old one is not used any more."""
        self.stop_all()
        self._memory = memory
        self._device.set_memory(memory)
        then()
        self.refresh_all()

    def _state(self, vring: Vring) -> QueueState:
        state = self._device.queue_state(vring.index)
        assert state is not None, "find() has checked the index"
        return state

    @property
    def _packed(self) -> bool:
        return self._device.accepted(at.VIRTIO_F_RING_PACKED)

    def _start(self, vring: Vring) -> None:
        device = self._device
        state = self._state(vring)
        if device.state.broken or state.ready:
            return
        state.size = vring.size
        state.descriptor_area, state.driver_area, state.device_area = map(
            self._table.to_guest, vring.areas
        )
        tracker = self._tracker(vring)
        if not self._in_use:
            try:
                self._on_start()
            except (OSError, PyvirtioError) as error:
                raise VhostUserError(f"ring {vring.index} cannot be started: {error}") from error
            self._in_use = True
        try:
            self._set_indices(vring, state, tracker)
            device.enable_queue(vring.index)
            vring.live = state.ready
            ring = device.queues[vring.index].ring
            if ring is None:
                return
            held, vring.held = vring.held, []
            if isinstance(ring, InflightRing):
                held = ring.unfinished()
            device.queues[vring.index].held[:] = held
        except GuestError as error:
            device.guest_error(error)
            return
        device.kick(vring.index)

    def _set_indices(self, vring: Vring, state: QueueState, tracker: Tracker | None) -> None:
        base = vring.base
        if self._packed:
            state.next_avail, state.avail_wrap = base & 0x7FFF, bool(base >> 15 & 1)
            state.used_index, state.used_wrap = base >> 16 & 0x7FFF, bool(base >> 31)
        else:
            state.next_avail = base & 0xFFFF
            state.used_index = self._look(state.device_area + 2)
        if tracker is not None:
            tracker.recover(state, self._look)

    def _look(self, address: int) -> int:
        return int.from_bytes(self._memory.read(address, 2), "little")

    # -- requests under way --------------------------------------------------------------------

    def set_inflight(self, mapping: Mapping | None, queues: int = 0, entries: int = 0) -> None:
        """Have notes of requests kept in ``mapping``, which is this one's to close."""
        self.stop_all()
        self.drop_trackers()
        old, self._inflight = self._inflight, mapping
        self._inflight_shape = queues, entries
        if old is not None:
            old.close()
        self.refresh_all()

    def drop_trackers(self) -> None:
        """Let go of all regions: they will be looked at anew. No ring may be live."""
        for vring in self.all:
            if vring.tracker is not None:
                vring.tracker.close()
                vring.tracker = None

    def forget_inflight(self) -> None:
        """As if nothing had been under way ever: after a reset."""
        for vring in self.all:
            vring.held.clear()
            if vring.tracker is not None:
                vring.tracker.forget()

    def _tracker(self, vring: Vring) -> Tracker | None:
        queues, entries = self._inflight_shape
        if vring.tracker is None and self._inflight is not None and vring.index < queues:
            size = region_size(entries, self._packed)
            buffer = self._inflight.buffer
            start = vring.index * size
            if start + size > len(buffer):
                raise VhostUserError(f"{len(buffer)} bytes for requests under way are too few")
            with memoryview(buffer) as whole:
                region = whole[start : start + size]
            vring.tracker = (PackedTracker if self._packed else SplitTracker)(region, entries)
        return vring.tracker

    def _wrap(self, index: int, ring: Ring) -> Ring:
        tracker = self.all[index].tracker
        return ring if tracker is None else InflightRing(ring, tracker, self._settle)

    def _settle(self) -> None:
        """Have nothing that was written in this process alone: the guest may outlive it, and takes
        what was done for done, as it does with a disk that never lost its power."""
        device = self._device
        if isinstance(device, VirtioBlk) and device.disk.volatile:
            device.disk.flush()

    def close(self) -> None:
        """Do what is under way, and let go of everything."""
        self.stop_all()
        for vring in self.all:
            vring.started = False
        try:
            self.rest()
        except (OSError, PyvirtioError) as error:
            _log.error("the disk is not closed as it should be: %s", error)
        self._device.wrap_ring = None
        self.drop_trackers()
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None
        for vring in self.all:
            for kind in ("kick", "call", "error"):
                vring.replace(kind, -1)
