"""What becomes of a request that the disk cannot do (QEMU's ``rerror`` and ``werror``)."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

__all__ = ["ErrorAction", "ErrorPolicy"]

ErrorAction = Literal["report", "stop", "ignore"]
"""``report``: the driver gets IOERR. ``stop``: the device is paused, the request is kept and tried
again when it is resumed; the driver notices nothing. ``ignore``: the driver is told that all went
well."""

_ACTIONS = ("report", "stop", "ignore")


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """An action for each kind of error. QEMU's default is that ``no_space`` stops."""

    reads: ErrorAction = "report"
    writes: ErrorAction = "report"
    """Everything but reads: flushes and discards, too."""
    no_space: ErrorAction | None = None
    """Writes that fail for want of space (ENOSPC); None is as ``writes``."""

    def __post_init__(self) -> None:
        for action in (self.reads, self.writes, self.no_space or self.writes):
            if action not in _ACTIONS:
                raise ValueError(f"{action!r} must be one of {', '.join(_ACTIONS)}")

    def action(self, error: Exception, reading: bool) -> ErrorAction:
        """What to do about ``error``."""
        if reading:
            return self.reads
        if self.no_space is not None and getattr(error, "errno", None) == errno.ENOSPC:
            return self.no_space
        return self.writes
