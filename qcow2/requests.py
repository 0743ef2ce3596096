"""Who is at work on the image: requests in flight, operations that want to be alone.

Everything here is protected by the image's metadata lock, which :class:`RequestGate` owns.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Lock

from ..errors import BackendError

__all__ = ["Allocation", "Epoch", "RequestGate"]


@dataclass(slots=True, eq=False)
class Allocation:
    """Guest clusters whose host clusters are being filled; not mapped yet."""

    first: int
    """Guest cluster number."""
    count: int


@dataclass(slots=True, eq=False)
class Epoch:
    """Requests that came in between two points in time."""

    inside: int = 0
    """How many of them have not left."""


class RequestGate:
    """Lets requests in, lets an exclusive operation in alone, and knows who is still inside.

    A request enters with the lock held and gets its epoch; it leaves with it. What is handed to
    :meth:`when_left` is called once every request that was inside at that moment has left.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        """The metadata lock. Never held while data is read or written."""
        self._changed = Condition(self.lock)
        self._epoch = Epoch()
        self._exclusive = False
        """Nobody comes in now (or, once it is shut, ever)."""
        self._shut: str | None = None
        self._waiting = 0
        self._past: deque[tuple[Epoch, Callable[[], None]]] = deque()
        """Former epochs, oldest first, and what to do when all up to this one are empty."""
        self.allocations: list[Allocation] = []

    # -- requests ------------------------------------------------------------------------------

    def enter(self) -> Epoch:
        """Come in (lock held); waits while an exclusive operation runs."""
        while self._exclusive:
            self._refuse_if_shut()
            self._wait()
        epoch = self._epoch
        epoch.inside += 1
        return epoch

    def leave(self, epoch: Epoch) -> None:
        """Go out (lock held)."""
        epoch.inside -= 1
        if not epoch.inside:
            if self._past:
                self._release()
            if self._waiting:
                self._changed.notify_all()

    def when_left(self, action: Callable[[], None]) -> None:
        """Call ``action`` (lock held) once all requests inside now have left; now if none is."""
        self._past.append((self._epoch, action))
        self._epoch = Epoch()
        self._release()

    def _release(self) -> None:
        while self._past and not self._past[0][0].inside:
            self._past.popleft()[1]()

    # -- alone ---------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until nobody is inside, and keep everybody out. The lock is not held inside."""
        with self.lock:
            while self._exclusive:
                self._refuse_if_shut()
                self._wait()
            self._exclusive = True
            try:
                while self._past or self._epoch.inside:
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
        self._exclusive = self._shut is not None
        self._changed.notify_all()

    # -- never again -----------------------------------------------------------------------------

    def shut(self, reason: str) -> None:
        """Let nobody in any more; who is inside may finish. Needs no lock, may hold it."""
        self._shut = reason
        self._exclusive = True

    def _refuse_if_shut(self) -> None:
        if self._shut is not None:
            raise BackendError(
                errno.EIO, f"The image is corrupt and refuses everything: {self._shut}"
            )

    def _wait(self) -> None:
        self._waiting += 1
        try:
            self._changed.wait()
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
            self._changed.notify_all()
