"""What happens when an image turns out to contradict itself while it is in use.

An image that may be written is marked corrupt in its header, and from then on every request is
refused; one that is open read-only refuses the request that found it. Whoever listens is told once.
(QEMU's ``qcow2_signal_corruption``, its event ``BLOCK_IMAGE_CORRUPTED``.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from .header import Header
from .health import Health
from .requests import RequestGate
from .state import mark_corrupt

__all__ = ["REPORTING", "Corruption", "CorruptionError", "CorruptionEvent", "CorruptionListener"]


@dataclass(frozen=True, slots=True)
class CorruptionEvent:
    """A corruption that was met at run time."""

    message: str
    fatal: bool
    """The image is marked corrupt, and refuses everything from now on."""
    filename: str | None = None
    field: str | None = None
    """Which kind of entry or structure it is about."""
    value: object = None


CorruptionListener = Callable[[CorruptionEvent], object]


class CorruptionError(ImageError):
    """An image in use contradicts itself; the request was refused."""

    source: Corruption | None = None
    """Who tells the listeners."""

    def report(self) -> None:
        """Tell the listeners, now that no lock is held."""
        if self.source is not None:
            self.source.deliver()


class _Reporting:
    """To be ``with`` where no lock is held: a corruption that is met inside is reported."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, CorruptionError):
            error.report()


REPORTING = _Reporting()


class Corruption:
    """Reports one image's corruptions."""

    def __init__(
        self, file: Disk, header: Header, health: Health, gate: RequestGate, *, writable: bool
    ) -> None:
        self._file = file
        self._header = header
        self._health = health
        self._gate = gate
        self._writable = writable
        self._signaled = False
        self._pending: list[CorruptionEvent] = []
        self._listeners: list[CorruptionListener] = []

    def add_listener(self, listener: CorruptionListener) -> None:
        """Have ``listener(event)`` called for the first corruption, outside every lock."""
        self._listeners.append(listener)

    def found(
        self, message: str, *, field: str | None = None, value: object = None, limit: object = None
    ) -> CorruptionError:
        """The error to raise for a corruption that was just met. Needs no lock, may hold one.

        Everything that does not need listeners is done at once.
        """
        fatal = self._writable
        if fatal:
            self._health.poison(message)
            self._gate.shut(message)
            with suppress(BackendError):  # the image is refused anyway
                mark_corrupt(self._file, self._header)
        if not self._signaled:
            self._signaled = True
            event = CorruptionEvent(message, fatal, self._file.filename, field, value)
            self._pending.append(event)
        error = CorruptionError(message, field=field, value=value, limit=limit)
        error.source = self
        return error

    def deliver(self) -> None:
        """Tell the listeners what they have not been told. No lock may be held."""
        while self._pending:
            event = self._pending.pop(0)
            for listener in list(self._listeners):
                listener(event)
