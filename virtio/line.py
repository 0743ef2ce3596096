"""An interrupt line that is told of changes of its level only, in their order, by any thread."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

__all__ = ["InterruptLine"]


class InterruptLine:
    """``callback(level)`` follows what ``wanted()`` says, as of the last :meth:`update`.

    No lock is held while the callback runs: it may call the device again, or wait for a lock that
    a thread inside the device's registers waits for. A change that comes meanwhile is delivered
    when the callback has returned, by the thread that called it.
    """

    def __init__(
        self, callback: Callable[[bool], object] | None, wanted: Callable[[], bool]
    ) -> None:
        self.level = False
        """What the callback was told last."""
        self._callback = callback
        self._wanted = wanted
        self._lock = Lock()
        self._delivering = False

    def update(self) -> None:
        """Something that ``wanted()`` looks at may have changed."""
        while True:
            with self._lock:
                level = self._wanted()
                if level == self.level or self._delivering:
                    return
                self.level = level
                self._delivering = True
            try:
                if self._callback is not None:
                    self._callback(level)
            finally:
                self._delivering = False
