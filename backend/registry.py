"""The image formats and the other block drivers by name; where others add theirs.

A format is code that turns one Disk (the file) into another (the guest's disk). Any other driver
(a protocol, a filter) makes a Disk of its options alone. The library's own are registered by the
package's root and imported at first use; others' come from the entry point groups
``pyvirtio.formats``, each a :class:`Format`, and ``pyvirtio.drivers``, each a :class:`Driver`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from .disk import Disk
from .names import driver_loaders as _drivers
from .names import loaders as _loaders
from .names import protocols as _protocols
from .names import register_driver, register_format

if TYPE_CHECKING:
    from .node import Node

__all__ = [
    "CERTAIN",
    "PROBE_SIZE",
    "Driver",
    "Format",
    "Measurement",
    "find_driver",
    "find_format",
    "find_protocol",
    "format_names",
    "formats",
    "register_driver",
    "register_format",
]

PROBE_SIZE = 2048
"""Bytes at the start of a file that a probe may look at (QEMU's ``BLOCK_PROBE_BUF_SIZE``)."""

CERTAIN = 100
"""What a probe says of a file that is its own beyond doubt."""


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
    """How sure the format is, 0 to CERTAIN, that a file starting with these bytes is its own."""
    open: Callable[..., Disk]
    """``open(file, *, read_only, policy, **options) -> Disk``: owns ``file`` once it succeeded."""
    create: Callable[..., None] | None = None
    """``create(file, size, **options)``: write an empty image into the disk ``file``."""
    measure: Callable[..., Measurement] | None = None
    """``measure(size, source, **options) -> Measurement``: what an image of ``size`` bytes made so
    takes, to hold what the disk ``source`` holds unless that is None."""
    shared_options: tuple[str, ...] = ()
    """Options of creating an image that opening it needs, too (its passphrase)."""
    secret_options: Mapping[str, str] = field(default_factory=dict)
    """Options of opening whose value is the name of a secret, and what they become: the
    passphrase itself under another name."""
    renamed_options: Mapping[str, str] = field(default_factory=dict)
    """Options of opening that have another name there."""
    strong_options: tuple[str, ...] = ()
    """How the names begin of options that decide what the disk holds: where one is given, no
    file name describes the disk (QEMU's strong runtime options)."""


@dataclass(frozen=True, slots=True)
class Driver:
    """A block driver that is no image format."""

    name: str
    """QEMU's name for it (``file``, ``blkdebug``)."""
    open: Callable[[Node], Disk]
    """Makes the disk; it takes its options and opens its children through the node."""
    protocol: bool = False
    """Stands below a format and is never probed; else the driver is a filter or the like."""
    filtering: bool = False
    """It hands on what another disk holds: what is true of that one's use is true of this one's."""
    parse_filename: Callable[[str, dict[str, Any]], None] | None = None
    """Puts what a file name says into the options. Raises ValueError."""
    needs_filename: bool = False
    """The option ``filename`` is the driver's own, and it cannot do without."""


@cache
def _register_entry_points() -> None:
    from importlib.metadata import entry_points  # half of the time that importing all else takes

    for point in entry_points(group="pyvirtio.formats"):
        _loaders.setdefault(point.name, cache(point.load))
    for point in entry_points(group="pyvirtio.drivers"):
        _drivers.setdefault(point.name, cache(point.load))
        _protocols.setdefault(point.name, point.name)


def format_names() -> list[str]:
    """The names of all formats, sorted."""
    _register_entry_points()
    return sorted(_loaders)


def find_format(name: str) -> Format:
    """The format of that name. Raises ValueError (QEMU's text) if there is none."""
    if name not in _loaders:
        _register_entry_points()
    try:
        loader = _loaders[name]
    except KeyError:
        raise ValueError(f"Unknown driver '{name}'") from None
    return loader()


def find_driver(name: str) -> Driver | Format:
    """The driver or format of that name. Raises ValueError (QEMU's text) if there is none."""
    if name not in _drivers and name not in _loaders:
        _register_entry_points()
    loader = _drivers.get(name)
    return find_format(name) if loader is None else loader()


def find_protocol(prefix: str) -> str | None:
    """The driver whose file names begin with ``prefix`` and a colon; None if there is none."""
    if prefix not in _protocols:
        _register_entry_points()
    return _protocols.get(prefix)


def formats() -> Iterator[Format]:
    """All formats: first those that are registered here, then those of others."""
    known = sorted(_loaders)
    for name in known:
        yield _loaders[name]()
    for name in format_names():
        if name not in known:
            yield _loaders[name]()
