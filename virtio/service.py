"""Serving queues: from a kick to used chains and an interrupt.

:class:`Service` works in the thread that kicks, inside the kick, or in the one that polls: a run
is then deterministic. Requests of one queue are done one after the other.

A pause takes the rings of all queues away and gives them new ones at its end, each of which is
served then without a kick: none is lost. A request that an error has stopped stays in
:attr:`.queue.Queue.held` and is done first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import GuestError
from .observe import Observer, Observers
from .queue import Queue
from .ring import Ring
from .suspension import is_suspending

if TYPE_CHECKING:
    from .device import VirtioDevice

__all__ = ["BUDGET", "HELD", "Service"]

_log = logging.getLogger(__name__)

BUDGET = 1024
"""Chains that one kick serves, to the end of the batch in which that is reached; what is left is
for :meth:`Service.poll` or the next kick. Only a driver that runs at the same time can have
that many more, or one that has the device write to its own rings."""

HELD = -1
"""What :meth:`.device.VirtioDevice.process` gives for a request that is to be done again."""


class Service:
    """Serves the queues of ``device`` in the thread that calls."""

    inline = True
    """Requests are done inside the kick or :meth:`poll`."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device
        self._queues = device.queues
        self.defer = False
        """A kick only marks its queue; :meth:`poll` serves it."""
        self.paused = False
        self.observer: Observers | None = None
        """Whoever watches."""
        self._observers: list[Observer] = []

    def kick(self, index: int) -> None:
        """See :class:`~.transport.TransportDevice`.

        Serves the queue here and now, or leaves it to :meth:`poll`. An index that is none, a queue
        that is not enabled, a device that is not started: nothing happens (VQ-S-53).
        """
        if not 0 <= index < len(self._queues):
            return
        queue = self._queues[index]
        ring = queue.ring
        if self.observer is not None:
            self.observer.kicked(index)
        if ring is None:
            return
        if not self.defer and not queue.serving:
            self._serve(queue, ring)
        elif not queue.pending:
            # To be polled, or called from inside an interrupt: the loop outside goes on.
            queue.pending = True
            if not queue.serving:
                try:
                    ring.suppress()
                except GuestError as error:
                    self._device.guest_error(error)

    def poll(self) -> bool:
        """Serve every queue that was kicked and is not done yet; True if there was one."""
        worked = False
        for queue in self._queues:
            ring = queue.ring
            if queue.pending and ring is not None and not queue.serving:
                worked = True
                self._serve(queue, ring)
        return worked

    # -- life --------------------------------------------------------------------------------

    def pause(self) -> None:
        """Take nothing more from the rings. Called from inside a request, that one is done."""
        self.paused = True
        for queue in self._queues:
            queue.park()

    def resume(self) -> None:
        """Go on, after the device has given its queues rings again: serve each, kicked or not."""
        for queue in self._queues:
            if queue.ring is not None:
                queue.ring.suppressed = True  # whatever the driver was told: to kick again
        self.look()

    def look(self) -> None:
        """Serve every queue, kicked or not; deferred, that is left to :meth:`poll`."""
        for queue in self._queues:
            if self.defer:
                queue.pending = queue.ring is not None
            else:
                self.kick(queue.index)

    def drain(self, queue: Queue | None = None) -> None:
        """Wait until no request (of one queue, or any) is under way, but for one that this is
        called from inside of."""

    def idle(self) -> bool:
        """No request is under way."""
        return not any(queue.serving for queue in self._queues)

    def quiet(self) -> bool:
        """No request is under way, nor an interrupt for one."""
        return self.idle()

    def inside(self) -> bool:
        """This is called from inside a request."""
        return not self.idle()

    def close(self) -> None:
        """The device is not used any more."""

    # -- watching ------------------------------------------------------------------------------

    def observe(self, observer: Observer) -> Callable[[], None]:
        """See :meth:`.device.VirtioDevice.observe`."""
        self._observers.append(observer)
        self._set_observers()

        def stop() -> None:
            if observer in self._observers:
                self._observers.remove(observer)
                self._set_observers()

        return stop

    def _set_observers(self) -> None:
        self.observer = Observers(self._observers) if self._observers else None
        self._device.observed()

    # -- one kick ----------------------------------------------------------------------------

    def _serve(self, queue: Queue, ring: Ring) -> None:
        """Do everything that is available on ``queue``, within bounds."""
        queue.serving = True
        queue.interrupt = False
        failure: Exception | None = None
        try:
            if ring.suppressed:
                ring.publish()
            if queue.held:
                self._do_held(queue, ring)
            if queue.ring is ring:
                if queue.express is not None:
                    queue.express()
                else:
                    self._serve_rounds(queue, ring)
            if queue.ring is not ring and queue.parked is not ring:
                return
        except Exception as error:
            failure = error
            self._fail(error, queue, ring)
        finally:
            queue.serving = False
            queue.parked = None
        # Interrupts only now: what they call may come back to this device, or reset it.
        device = self._device
        if device.attention:
            device.announce()
        if queue.interrupt:
            if self.observer is not None:
                self.observer.interrupted(queue.index)
            if device.transport is not None:
                device.transport.queue_interrupt(queue.index)
        if failure is not None or device.attention:
            device.after_serving(failure)

    def publish(self, queue: Queue, ring: Ring) -> None:
        """Show the driver what was used; notes in ``queue`` whether it wants an interrupt."""
        if ring.publish():
            queue.interrupt = True
        elif self.observer is not None:
            self.observer.suppressed(queue.index)

    def _serve_rounds(self, queue: Queue, ring: Ring) -> None:
        """Round after round, until nothing is available or the budget is used up.

        Notes in ``queue`` whether the driver wants an interrupt, and whether something may be left.
        Ends at once where the device is reset from inside, or paused.
        """
        budget = BUDGET
        while budget > 0 and (count := ring.ready()):
            budget -= count
            for _ in range(count):
                self.process_next(queue, ring)
                if queue.ring is not ring:
                    if queue.parked is ring:
                        self.publish(queue, ring)
                        queue.pending = True
                    return
            self.publish(queue, ring)
        queue.pending = budget <= 0

    def process_next(self, queue: Queue, ring: Ring) -> None:
        """Do the next chain; there is one."""
        chain = ring.pop()
        written = self._device.process(chain, queue)
        if queue.ring is ring or queue.parked is ring:  # not reset from inside
            if written == HELD:
                queue.held.append(chain)
            else:
                ring.push(chain, written)

    def _do_held(self, queue: Queue, ring: Ring) -> None:
        """Do what was taken before; what is stopped again stays where it was."""
        held = queue.held
        while held and queue.ring is ring:
            written = self._device.process(held[0], queue)
            if queue.ring is not ring and queue.parked is not ring:
                return
            if written == HELD:
                break
            ring.push(held.pop(0), written)
        if not held and is_suspending(self._device.state.status):
            queue.park()  # and nothing more
        self.publish(queue, ring)

    def _fail(self, failure: Exception, queue: Queue, ring: Ring) -> None:
        """Stop for an error of the driver's or our own."""
        if queue.ring is ring:
            with suppress(GuestError):  # what was done before it is the driver's to see
                queue.interrupt |= ring.publish()
        name = type(self._device).__name__
        if isinstance(failure, GuestError):
            _log.warning("%s needs a reset: %s", name, failure)
        else:
            _log.error("%s: error while serving queue %d", name, queue.index, exc_info=failure)
        self._device.stop_working()
