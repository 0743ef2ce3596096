"""Whether the image may still be written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BackendError

__all__ = ["Health"]


class Health:
    """Remembers that memory and file may no longer agree; from then on nothing is written.

    Reading goes on. What is on the disk is what the last completed steps left there, which is
    consistent at every moment; closing the image keeps it so.
    """

    __slots__ = ("reason",)

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why nothing may be written any more; None as long as all is well."""

    def poison(self, reason: str) -> None:
        """Refuse every write from now on. The first reason stays."""
        if self.reason is None:
            self.reason = reason

    def check(self) -> None:
        """Raise BackendError (EIO) if the image may not be written any more."""
        if self.reason is not None:
            raise BackendError(
                errno.EIO, f"The image is not written any more until it is reopened: {self.reason}"
            )

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A change of metadata that must not stop halfway; whatever does stop it poisons."""
        try:
            yield
        except BaseException as error:
            self.poison(f"{what} was interrupted by {type(error).__name__}: {error}")
            raise
