"""An image that is used without being changed (``-s``)."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

from ...backend.open import create_disk

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["open_snapshot"]


def open_snapshot(below: Disk) -> Disk:
    """A disk that shows ``below``, which it owns, and keeps what is written in a file of its own
    that is gone with the process."""
    folder = os.environ.get("TMPDIR", "/var/tmp")
    number, path = tempfile.mkstemp(prefix="vl.", dir=folder if os.path.isdir(folder) else None)
    os.close(number)
    try:
        return create_disk(
            path,
            below.size,
            backing_file="below",
            backing_fmt="raw",
            backing=lambda reference: below,
            cache="unsafe",
        )
    finally:
        os.unlink(path)
