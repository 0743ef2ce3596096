"""The image formats by name; where others add theirs.

A format is code that turns one Disk (the file) into another (the guest's disk). The library's own
are registered by the package's root and imported at first use; others' come from the entry point
group ``pyvirtio.formats``, each a :class:`Format`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from .disk import Disk
from .names import loaders as _loaders
from .names import register_format

__all__ = [
    "PROBE_SIZE",
    "Format",
    "Measurement",
    "find_format",
    "format_names",
    "formats",
    "register_format",
]

PROBE_SIZE = 2048
"""Bytes at the start of a file that a probe may look at (QEMU's ``BLOCK_PROBE_BUF_SIZE``)."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """How large a file an image needs (``qemu-img measure``); bytes."""

    required: int
    """To hold the source's data, or to be empty."""
    fully_allocated: int
    """To hold data everywhere."""
    bitmaps: int | None = None
    """More of it for the source's persistent bitmaps; None where there can be none."""


@dataclass(frozen=True, slots=True)
class Format:
    """An image format."""

    name: str
    """QEMU's name for it (``qcow2``, ``raw``)."""
    probe: Callable[[bytes], int]
    """How sure the format is, 0 to 100, that a file which starts with these bytes is its own."""
    open: Callable[..., Disk]
    """``open(file, *, read_only, policy, **options) -> Disk``: owns ``file`` once it succeeded."""
    create: Callable[..., None] | None = None
    """``create(file, size, **options)``: write an empty image into the disk ``file``."""
    measure: Callable[..., Measurement] | None = None
    """``measure(size, source, **options) -> Measurement``: what an image of ``size`` bytes made so
    takes, to hold what the disk ``source`` holds unless that is None."""
    shared_options: tuple[str, ...] = ()
    """Options of creating an image that opening it needs, too (its passphrase)."""


@cache
def _register_entry_points() -> None:
    from importlib.metadata import entry_points  # half of the time that importing all else takes

    for point in entry_points(group="pyvirtio.formats"):
        _loaders.setdefault(point.name, cache(point.load))


def format_names() -> list[str]:
    """The names of all formats, sorted."""
    _register_entry_points()
    return sorted(_loaders)


def find_format(name: str) -> Format:
    """The format of that name. Raises ValueError (QEMU's text) if there is none."""
    _register_entry_points()
    try:
        loader = _loaders[name]
    except KeyError:
        raise ValueError(f"Unknown driver '{name}'") from None
    return loader()


def formats() -> Iterator[Format]:
    """All formats."""
    for name in format_names():
        yield _loaders[name]()
