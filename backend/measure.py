"""How large a file an image would take (``qemu-img measure``)."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedError
from .disk import Disk
from .registry import Measurement, find_format

__all__ = ["Measurement", "measure"]


def measure(source: Disk | int, *, format: str = "qcow2", **options: Any) -> Measurement:
    """What an image of ``format`` takes that ``source`` is converted to; with a number of bytes
    instead of a disk, an empty one of that size. ``options`` are the format's for creating.

    Raises UnsupportedError if the format cannot tell.
    """
    kind = find_format(format)
    if kind.measure is None:
        raise UnsupportedError(
            f"Block driver '{format}' does not support size measurement", feature="measure"
        )
    if isinstance(source, Disk):
        return kind.measure(source.size, source, **options)
    if source < 0:
        raise ValueError(f"a disk cannot have {source} bytes")
    return kind.measure(source, None, **options)
