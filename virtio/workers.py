"""Worker threads that serve a device's queues (``io_threads``).

A kick only notes its queue. A worker takes one chain at a time from it, under the device's lock,
does the request outside every lock, and gives the chain back under the lock. So requests of one
queue run side by side and complete in any order; with IN_ORDER negotiated a queue has one request
under way at a time, and several queues run side by side.

A pause, a reset and a queue that is stopped wait for what is under way, except for a request of
the very thread that asks. Threads are started by the first kick and end with :meth:`close`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

from .queue import Queue
from .ring import Chain, Ring
from .service import HELD, Service
from .suspension import is_suspending

if TYPE_CHECKING:
    from .device import VirtioDevice

__all__ = ["WorkerService"]

_log = logging.getLogger(__name__)


class WorkerService(Service):
    """Serves the queues of ``device`` in ``count`` threads."""

    inline = False

    def __init__(self, device: VirtioDevice, count: int) -> None:
        super().__init__(device)
        self._count = count
        self._lock = device.lock
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._kicked: deque[Queue] = deque()
        """Queues that may have something available; each at most once (``pending``)."""
        self._inside: dict[int, Queue] = {}
        """Requests under way: the thread, and the queue that its request is from."""
        self._busy: set[int] = set()
        """Threads that have a request under way, or an interrupt for one."""
        self._threads: list[threading.Thread] = []
        """A thread that is not in here any more ends."""

    # -- the device's side -------------------------------------------------------------------

    def kick(self, index: int) -> None:
        """See :class:`~.transport.TransportDevice`; returns at once."""
        if not 0 <= index < len(self._queues):
            return
        if self.observer is not None:
            self.observer.kicked(index)
        with self._lock:
            self._note(self._queues[index])

    def poll(self) -> bool:
        """Nothing is left to be polled for."""
        return False

    def pause(self) -> None:
        with self._lock:
            super().pause()

    def resume(self) -> None:
        with self._lock:
            super().resume()

    def look(self) -> None:
        with self._lock:
            for queue in self._queues:
                self._note(queue)

    def drain(self, queue: Queue | None = None) -> None:
        with self._lock:
            me = threading.get_ident()
            self._done.wait_for(
                lambda: (
                    not any(
                        thread != me and (queue is None or each is queue)
                        for thread, each in self._inside.items()
                    )
                )
            )

    def idle(self) -> bool:
        return not self._inside

    def quiet(self) -> bool:
        return not self._busy

    def inside(self) -> bool:
        return threading.get_ident() in self._inside

    def close(self) -> None:
        with self._lock:
            threads, self._threads = self._threads, []
            self._work.notify_all()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    # -- the workers -------------------------------------------------------------------------

    def _note(self, queue: Queue) -> None:
        """Have a worker look at ``queue``; the lock is held."""
        if queue.ring is None or queue.pending:
            return
        queue.pending = True
        self._kicked.append(queue)
        if not self._threads:
            name = f"{type(self._device).__name__}-io"
            self._threads = [
                threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
                for number in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
        self._work.notify()

    def _run(self) -> None:
        me, thread = threading.get_ident(), threading.current_thread()
        while True:
            with self._lock:
                self._work.wait_for(lambda: self._kicked or thread not in self._threads)
                if thread not in self._threads:
                    return
                self._busy.add(me)
                queue = self._kicked.popleft()
                ring, chain = queue.ring, self._take(queue)
                if chain is not None:
                    self._inside[me] = queue
                    queue.under_way += 1
                    queue.serving = True
                interrupt = self._interrupt(queue)
            self._tell(queue, interrupt)
            if ring is not None and chain is not None:
                self._do(queue, ring, chain)
            self._busy.discard(me)
            self._device.told()

    def _take(self, queue: Queue) -> Chain | None:
        """The next chain of a queue that was kicked, which is looked at again if it may have more.

        The lock is held.
        """
        queue.pending = False
        ring = queue.ring
        if ring is None or (ring.in_order and queue.under_way):
            return None  # paused or gone; or the one under way will note it again
        try:
            if queue.held:
                chain = queue.held.pop(0)
            elif is_suspending(self._device.state.status):
                return None
            else:
                if not queue.available:
                    if ring.suppressed:
                        ring.publish()
                    queue.available = ring.ready()
                if not queue.available:
                    # Kicks are wanted from here on, and what came before that is looked for.
                    ring.publish()
                    queue.available = ring.ready()
                    if not queue.available:
                        return None
                queue.available -= 1
                chain = ring.pop()
        except Exception as error:
            self._fail(error, queue, ring)
            return None
        if not ring.in_order:
            self._note(queue)
        return chain

    def _do(self, queue: Queue, ring: Ring, chain: Chain) -> None:
        """One request, and its answer."""
        failure: Exception | None = None
        written = 0
        try:
            written = self._device.process(chain, queue)
        except Exception as error:
            failure = error
        with self._lock:
            if queue.ring is ring or queue.parked is ring:
                try:
                    if failure is not None:
                        self._fail(failure, queue, ring)
                    elif written == HELD:
                        queue.held.append(chain)
                    else:
                        ring.push(chain, written)
                        self.publish(queue, ring)
                except Exception as error:
                    self._fail(error, queue, ring)
                if ring.in_order:
                    self._note(queue)
            interrupt = self._interrupt(queue)
            del self._inside[threading.get_ident()]
            queue.under_way -= 1
            if not queue.under_way:
                queue.serving = False
                queue.parked = None
            self._done.notify_all()
        self._tell(queue, interrupt)

    def _interrupt(self, queue: Queue) -> bool:
        """Whether a queue is to be told of: from here on that shows. The lock is held."""
        interrupt, queue.interrupt = queue.interrupt, False
        if interrupt and self._device.transport is not None:
            self._device.transport.note_interrupt(queue.index)
        return interrupt

    def _fail(self, failure: Exception, queue: Queue, ring: Ring) -> None:
        with self._device.quietly():  # :meth:`_tell` tells of it
            super()._fail(failure, queue, ring)

    def _tell(self, queue: Queue, interrupt: bool) -> None:
        """Call the transport, and who wants to hear of errors; under no lock."""
        try:
            self._device.announce()
            if interrupt:
                if self.observer is not None:
                    self.observer.interrupted(queue.index)
                if self._device.transport is not None:
                    self._device.transport.deliver()
            self._device.after_serving(None)
        except Exception:
            _log.exception("error in a callback of the emulator")
