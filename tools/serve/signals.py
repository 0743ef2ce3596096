"""SIGTERM and SIGINT as the wish that a server ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

__all__ = ["on_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def on_signals(stop: Callable[[], None]) -> None:
    """Have ``stop`` called at every signal that asks for the end, in a thread of its own.

    A handler would run in the main thread, which may just have gone to sleep: the signal that
    comes right before it does would be noticed when something else happens.
    """

    def wait() -> None:
        while True:
            signal.sigwait(_SIGNALS)
            stop()

    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # and in threads that are started later
    threading.Thread(target=wait, daemon=True).start()
