"""Who is at work on the image: requests in flight, operations that want to be alone.

Everything here is protected by the image's metadata lock, which :class:`RequestGate` owns.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Condition, Lock, get_ident

from ..errors import BackendError

__all__ = ["Allocation", "RequestGate"]


_HERE = os.path.dirname(__file__)
_NOBODY = -1
"""No thread has this identifier."""
_PATIENCE = 1.0
"""Seconds after which a waiting thread looks again by itself."""


@dataclass(slots=True, eq=False)
class Allocation:
    """Guest clusters whose host clusters are being filled; not mapped yet."""

    first: int
    """Guest cluster number."""
    count: int
    owner: int
    """The thread that does it."""


@dataclass(slots=True, eq=False)
class Claim:
    """Guest bytes of an encrypted image, whole sectors, that are being changed."""

    start: int
    end: int
    alone: bool
    """No other change of them may come in between."""


class RequestGate:
    """Lets requests in, lets an exclusive operation in alone, and knows who is still inside.

    A request enters with the lock held and leaves without. What is handed to :meth:`when_left` is
    called once every request that was inside at that moment has left.

    A thread has one request at a time. Should an exception that Python can throw anywhere (a
    KeyboardInterrupt) keep one from leaving, the same thread's next one takes its place, and who
    waits for it in vain looks whether that thread is still at work here.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        """The metadata lock. Never held while data is read or written."""
        self._changed = Condition(self.lock)
        self._epoch = 0
        """Counts the calls of :meth:`when_left`."""
        self._inside: dict[int, int] = {}
        """Who is inside, by thread, and since which epoch. Each thread takes itself out, without
        the lock: that is one atomic operation of the dict."""
        self._exclusive: int | None = None
        """The thread that is, or wants to be, alone; no thread's once the gate is shut."""
        self._shut: str | None = None
        self._ended = False
        """The disk is closed: nobody comes in any more."""
        self._waiting = 0
        self._past: deque[tuple[int, Callable[[], None]]] = deque()
        """Former epochs, oldest first, and what to do when nobody is inside since then."""
        self.allocations: list[Allocation] = []
        self._claims: dict[int, Claim] = {}
        """By thread, in the order in which they were asked for."""

    # -- requests ------------------------------------------------------------------------------

    def enter(self, me: int = 0) -> None:
        """Come in (lock held); waits while an exclusive operation runs. ``me`` is the calling
        thread, for those who know it already."""
        me = me or get_ident()
        if self._exclusive is not None or me in self._inside:
            self._enter_slowly(me)
        self._inside[me] = self._epoch

    def leave(self, me: int = 0) -> None:
        """Go out (lock not held); nothing happens where :meth:`enter` was not finished."""
        me = me or get_ident()
        self._inside.pop(me, None)
        if self._past or self._waiting or self.allocations:
            with self.lock:
                self._left(me)

    def _left(self, me: int) -> None:
        """What others wait for when a thread has gone (lock held)."""
        if self.allocations:
            self._drop_allocations(me)
        if self._past:
            self._release()
        if self._waiting:
            self._changed.notify_all()

    def _enter_slowly(self, me: int) -> None:
        self._tidy_up(me)
        while self._exclusive is not None:
            self.check_open()
            if self._shut is not None:
                raise BackendError(
                    errno.EIO, f"The image is corrupt and refuses everything: {self._shut}"
                )
            self._wait()

    def shut(self, reason: str) -> None:
        """Let nobody in any more; who is inside may finish. Needs no lock, may hold it."""
        self._shut = reason
        self._exclusive = _NOBODY

    def end(self) -> None:
        """The disk is closed: let nobody in any more, and wait until nobody is inside."""
        with self.lock:
            self._tidy_up(get_ident())
            self._ended = True
            self._exclusive = _NOBODY
            self._changed.notify_all()
            self._wait_until_empty()

    def check_open(self) -> None:
        """Raise ValueError if the disk is closed. Needs no lock."""
        if self._ended:
            raise ValueError("qcow2: the disk is closed")

    def _tidy_up(self, me: int) -> None:
        """Undo what an interrupted request or operation of this thread left standing."""
        if self._exclusive == me:
            self._exclusive = None
        self._claims.pop(me, None)
        self._inside.pop(me, None)
        self._left(me)

    def _drop_allocations(self, me: int) -> None:
        """An interrupted request has left an allocation: its clusters leak, nobody waits for it."""
        for allocation in [a for a in self.allocations if a.owner == me]:
            self.end_allocation(allocation)

    def when_left(self, action: Callable[[], None]) -> None:
        """Call ``action`` (lock held) once all requests inside now have left; now if none is."""
        self._past.append((self._epoch, action))
        self._epoch += 1
        self._release()

    def _release(self) -> None:
        oldest = min(list(self._inside.values()), default=self._epoch)
        while self._past and self._past[0][0] < oldest:
            self._past.popleft()[1]()

    # -- alone ---------------------------------------------------------------------------------

    def exclusive(self) -> AbstractContextManager[None]:
        """Wait until nobody is inside, and keep everybody out. The lock is not held inside."""
        return _Exclusive(self)

    def close(self) -> None:
        """Wait until nobody is inside, and keep everybody but this thread out."""
        with self.lock:
            me = get_ident()
            self._enter_slowly(me)
            self._exclusive = me
            try:
                self._wait_until_empty()
            except BaseException:
                if self._exclusive == me:
                    self._exclusive = None
                raise

    def open(self) -> None:
        """Let everybody in again."""
        with self.lock:
            if self._exclusive == get_ident():
                self._exclusive = None
            self._changed.notify_all()

    def _wait_until_empty(self) -> None:
        self._waiting += 1  # before looking: who leaves, without the lock, calls us then
        try:
            while self._inside:
                self._wait()
        finally:
            self._waiting -= 1

    def _wait(self) -> None:
        self._waiting += 1
        try:
            if not self._changed.wait(_PATIENCE):
                self._bury()
        finally:
            self._waiting -= 1

    def _bury(self) -> None:
        """Tidy up after threads that were interrupted, or ended, and did not come back."""
        threads = {*list(self._inside), *(allocation.owner for allocation in self.allocations)}
        if self._exclusive is not None and self._exclusive != _NOBODY:
            threads.add(self._exclusive)
        for thread in threads:
            if not _at_work(thread):
                self._tidy_up(thread)

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
        allocation = Allocation(first, count, get_ident())
        self.allocations.append(allocation)
        return allocation

    def end_allocation(self, allocation: Allocation) -> None:
        """The allocation is mapped, or given up."""
        self.allocations.remove(allocation)
        if self._waiting:
            self._changed.notify_all()

    # -- sectors of encrypted images -------------------------------------------------------------
    # A part of a sector is written by reading the sector, and writing all of it back. No other
    # change of it may come in between, so such a request has its sectors alone (QEMU's
    # serialising requests). Requests for whole sectors share. A request has one claim at most.

    def claim(self, start: int, end: int, *, alone: bool = False) -> None:
        """Change guest bytes ``start`` to ``end`` (lock held, inside); waits for earlier requests
        that overlap, if one of the two has to be alone."""
        me = get_ident()
        self._claims.pop(me, None)
        mine = self._claims[me] = Claim(start, end, alone)
        while self._is_blocked(mine):
            self._wait()

    def end_claim(self) -> None:
        """The change is done, or given up (lock not held, before :meth:`leave`)."""
        with self.lock:
            if self._claims.pop(get_ident(), None) is not None and self._waiting:
                self._changed.notify_all()

    def _is_blocked(self, mine: Claim) -> bool:
        for other in self._claims.values():
            if other is mine:
                return False
            if other.start < mine.end and mine.start < other.end and (mine.alone or other.alone):
                return True
        return False


class _Exclusive:
    """See :meth:`RequestGate.exclusive`. No generator: an exception may hit anywhere."""

    __slots__ = ("_gate",)

    def __init__(self, gate: RequestGate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate.close()

    def __exit__(self, *error: object) -> None:
        self._gate.open()


def _at_work(thread: int) -> bool:
    """True if a function of this driver is running, or waiting, in that thread."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if os.path.dirname(frame.f_code.co_filename) == _HERE:
            return True
        frame = frame.f_back
    return False
