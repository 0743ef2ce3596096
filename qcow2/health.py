"""Whether the image may still be written."""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from types import TracebackType

from ..errors import BackendError

__all__ = ["Health"]


class Health:
    """Remembers that memory and file may no longer agree; from then on nothing is written.

    Reading goes on. What is on the disk is what the last completed steps left there, which is
    consistent at every moment; closing the image keeps it so.
    """

    __slots__ = ("errno", "reason")

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why nothing may be written any more; None as long as all is well."""
        self.errno = errno.EIO
        """The number of the error that is the reason, and of every write from then on."""

    def poison(self, reason: str, number: int | None = None) -> None:
        """Refuse every write from now on. The first reason stays."""
        if self.reason is None:
            self.reason = reason
            self.errno = number or errno.EIO

    def check(self) -> None:
        """Raise BackendError if the image may not be written any more."""
        if self.reason is not None:
            raise BackendError(
                self.errno, f"The image is not written any more until it is reopened: {self.reason}"
            )

    def step(self, what: str) -> AbstractContextManager[None]:
        """A change of metadata that must not stop halfway; whatever does stop it poisons."""
        return _Step(self, what)


class _Step:
    """See :meth:`Health.step`. No generator: an exception may hit anywhere."""

    __slots__ = ("_health", "_what")

    def __init__(self, health: Health, what: str) -> None:
        self._health = health
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            number = error.errno if isinstance(error, BackendError) else None
            self._health.poison(f"{self._what} was interrupted by {kind.__name__}: {error}", number)
