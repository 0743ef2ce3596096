"""Watching a device work: what an observer is told, and nothing while there is none.

:meth:`.blk.VirtioBlk.observe` sets one. A device that is watched serves its queues the long way;
see :mod:`.counters` and :mod:`.tracing` for two observers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from . import layout as at

__all__ = ["REQUEST_NAMES", "Observer", "Observers", "RequestRecord"]

REQUEST_NAMES: Final = {
    value: name.removeprefix("VIRTIO_BLK_T_")
    for name, value in vars(at).items()
    if name.startswith("VIRTIO_BLK_T_")
}
"""Of each type of request, its name in the specification."""


class RequestRecord(NamedTuple):
    """One request that was answered."""

    queue: int
    kind: int
    """``VIRTIO_BLK_T_…``, or whatever the driver wrote there."""
    sector: int
    length: int
    """Bytes of data, in either direction."""
    status: int
    started: int
    """Nanoseconds of ``time.monotonic_ns``: taken from the ring."""
    finished: int
    """The same: the status was known."""
    thread: int
    """The thread that did it (``threading.get_ident``)."""

    @property
    def name(self) -> str:
        """The type's name."""
        return REQUEST_NAMES.get(self.kind, f"type {self.kind}")


class Observer(Protocol):
    """Is told of these; with worker threads, from any of them."""

    def kicked(self, queue: int) -> None:
        """The driver has kicked."""

    def done(self, request: RequestRecord) -> None:
        """A request has its answer."""

    def interrupted(self, queue: int) -> None:
        """An interrupt was sent for a queue."""

    def suppressed(self, queue: int) -> None:
        """Something was used, and the driver wanted no interrupt for it."""


class Observers:
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def kicked(self, queue: int) -> None:
        """See :class:`Observer`, as the next ones."""
        for each in self._observers:
            each.kicked(queue)

    def done(self, request: RequestRecord) -> None:
        for each in self._observers:
            each.done(request)

    def interrupted(self, queue: int) -> None:
        for each in self._observers:
            each.interrupted(queue)

    def suppressed(self, queue: int) -> None:
        for each in self._observers:
            each.suppressed(queue)
