"""Who is at work on the image: requests in flight, operations that want to be alone.

Everything here is protected by the image's metadata lock, which :class:`RequestGate` owns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Lock

__all__ = ["Allocation", "RequestGate"]


@dataclass(slots=True, eq=False)
class Allocation:
    """Guest clusters whose host clusters are being filled; not mapped yet."""

    first: int
    """Guest cluster number."""
    count: int


class RequestGate:
    """Lets requests in, lets an exclusive operation in alone, and knows who is still inside.

    A request enters with the lock held and gets its epoch; it leaves with it. What is handed to
    :meth:`when_left` is called once every request that was inside at that moment has left.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        """The metadata lock. Never held while data is read or written."""
        self.changed = Condition(self.lock)
        """Notified when an allocation ends, a request leaves a waited-for gate, or a gate opens."""
        self._epoch = 0
        self._inside: dict[int, int] = {}
        """Requests inside by epoch, oldest first; no zero counts but for the newest."""
        self._exclusive = False
        self._waiting = 0
        self._limbo: deque[tuple[int, Callable[[], None]]] = deque()
        self.allocations: list[Allocation] = []

    # -- requests ------------------------------------------------------------------------------

    def enter(self) -> int:
        """Come in (lock held); waits while an exclusive operation runs. The epoch to leave with."""
        while self._exclusive:
            self._wait()
        epoch = self._epoch
        self._inside[epoch] = self._inside.get(epoch, 0) + 1
        return epoch

    def leave(self, epoch: int) -> None:
        """Go out (lock held)."""
        count = self._inside[epoch] - 1
        if count:
            self._inside[epoch] = count
            return
        del self._inside[epoch]
        if self._limbo:
            self._release()
        if self._waiting:
            self.changed.notify_all()

    def when_left(self, action: Callable[[], None]) -> None:
        """Call ``action`` (lock held) once all requests inside now have left; now if none is."""
        self._limbo.append((self._epoch, action))
        self._epoch += 1
        self._release()

    def _release(self) -> None:
        oldest = min(self._inside, default=self._epoch)
        while self._limbo and self._limbo[0][0] < oldest:
            self._limbo.popleft()[1]()

    # -- alone ---------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep everybody out. The lock is not held inside."""
        with self.lock:
            while self._exclusive:
                self._wait()
            self._exclusive = True
            try:
                while self._inside:
                    self._wait()
            except BaseException:
                self._open()
                raise
        try:
            yield
        finally:
            with self.lock:
                self._open()

    def _open(self) -> None:
        self._exclusive = False
        self.changed.notify_all()

    def _wait(self) -> None:
        self._waiting += 1
        try:
            self.changed.wait()
        finally:
            self._waiting -= 1

    # -- allocations in flight -------------------------------------------------------------------

    def wait_for_allocations(self, first: int, count: int) -> bool:
        """Wait (lock held) until no allocation touches these guest clusters; True if one did.

        After True the mapping may have changed: look again.
        """
        waited = False
        while any(a.first < first + count and first < a.first + a.count for a in self.allocations):
            self._wait()
            waited = True
        return waited

    def begin_allocation(self, first: int, count: int) -> Allocation:
        """Note an allocation; requests for these clusters wait until it ends."""
        allocation = Allocation(first, count)
        self.allocations.append(allocation)
        return allocation

    def end_allocation(self, allocation: Allocation) -> None:
        """The allocation is mapped, or given up."""
        self.allocations.remove(allocation)
        if self._waiting:
            self.changed.notify_all()
