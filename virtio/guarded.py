"""A lock, and the rule that the emulator is called under none: what is due goes out after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from .transport import Transport

__all__ = ["Guarded", "locked"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_S = TypeVar("_S", bound="Guarded")


class Guarded:
    """Something with a lock that worker threads and the driver's actions share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Never held while data moves, nor while the emulator is called."""
        self.transport: Transport | None = None
        self.attention = False
        """Something besides an interrupt for a queue may be due."""
        self.telling = 0
        """How many threads are just now sending a configuration interrupt."""
        self._depth = 0
        self._config_due = False

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold the lock; a configuration interrupt that is due is sent after that."""
        try:
            with self.quietly():
                yield
        finally:
            self.announce()

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Hold the lock; what is due is left to the next :meth:`announce`, under no lock."""
        with self.lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def config_due(self) -> None:
        """The driver is to hear of a change of the configuration; the lock is held."""
        self._config_due = self.attention = True

    @property
    def silent(self) -> bool:
        """Nothing may be sent now; what is due stays so."""
        return False

    def told(self) -> None:
        """A configuration interrupt was sent."""

    def announce(self) -> None:
        """Send the configuration interrupt if it is due and the lock is not held; if it is, that is
        done when it is given back."""
        if not self._config_due:
            return
        with self.lock:
            if not self._config_due or self._depth or self.silent:
                return
            self._config_due = False
            self.telling += 1
            if self.transport is not None:
                self.transport.note_interrupt(None)
        try:
            if self.transport is not None:
                self.transport.deliver()
        finally:
            with self.lock:
                self.telling -= 1
            self.told()


def locked(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """A method that is :meth:`~Guarded.holding` the lock."""

    @wraps(method)
    def holding(self: _S, /, *arguments: _P.args, **options: _P.kwargs) -> _T:
        with self.holding():
            return method(self, *arguments, **options)

    return holding
