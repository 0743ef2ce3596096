"""Dropping what the caches hold and nobody used for a while (QEMU's ``cache-clean-interval``).

One thread serves all images of the process; it exists only while one of them asks for it.
"""

from __future__ import annotations

import time
from threading import Condition, Thread
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from .metadata import Metadata

__all__ = ["CacheCleaner"]

_changed = Condition()
_active: WeakSet[CacheCleaner] = WeakSet()
_thread: Thread | None = None


class CacheCleaner:
    """Cleans one image's caches every ``interval`` seconds; never, if that is 0."""

    def __init__(self, metadata: Metadata, interval: float) -> None:
        self._metadata = metadata
        self._interval = interval
        self._due = time.monotonic() + interval
        if interval:
            self._start()

    def _start(self) -> None:
        global _thread
        with _changed:
            _active.add(self)
            if _thread is None or not _thread.is_alive():  # a fork leaves it behind
                _thread = Thread(target=_run, name="qcow2 cache cleaner", daemon=True)
                _thread.start()
            _changed.notify()

    def stop(self) -> None:
        """Clean no more; once this returns no cleaning goes on."""
        with _changed:
            _active.discard(self)
            _changed.notify()

    def clean(self) -> int:
        """Drop what was not used since the last time; how many slices that were."""
        metadata = self._metadata
        with metadata.lock:
            return metadata.tables.cache.drop_unused() + metadata.refcounts.cache.drop_unused()


def _run() -> None:
    global _thread
    with _changed:
        while True:
            cleaners = list(_active)
            if not cleaners:
                _thread = None
                return
            now = time.monotonic()
            for cleaner in cleaners:
                if cleaner._due <= now:
                    cleaner.clean()
                    cleaner._due = now + cleaner._interval
            wait = min(cleaner._due for cleaner in cleaners) - now
            del cleaners, cleaner
            _changed.wait(max(0.0, wait))
