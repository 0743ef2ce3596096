"""Opening the images that a command line names."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..messages import Failure, say_more, text_of
from ..objects import Objects
from ..optlist import split
from .formats import is_driver

if TYPE_CHECKING:
    from ...backend.disk import Disk
    from ...backend.file import CacheMode

__all__ = ["CacheChoice", "Source", "cache_mode", "open_image"]


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """A cache mode as the command line has it."""

    mode: CacheMode
    writethrough: bool
    """Every write is on stable storage before the next."""


def cache_mode(name: str) -> CacheChoice | None:
    """The cache mode of that name; None if there is none."""
    modes: dict[str, CacheChoice] = {
        "none": CacheChoice("none", False),
        "off": CacheChoice("none", False),
        "directsync": CacheChoice("none", True),
        "writeback": CacheChoice("writeback", False),
        "writethrough": CacheChoice("writeback", True),
        "unsafe": CacheChoice("unsafe", False),
    }
    return modes.get(name)


@dataclass(frozen=True, slots=True)
class Source:
    """Which image, and how it is described."""

    name: str
    """A file name, or with ``image_opts`` a list of options."""
    format: str | None = None
    image_opts: bool = False
    force_share: bool = False
    """The image may be in use by others."""


def open_image(
    source: Source,
    objects: Objects,
    *,
    writable: bool = False,
    cache: CacheChoice | None = None,
    backing: bool = True,
    unmap: bool = False,
    **arguments: Any,
) -> Disk:
    """Open an image; without ``backing`` it stands alone. ``arguments`` are the format's own.

    Raises Failure with the message that the user reads.
    """
    from ...backend.open import open_disk
    from ...errors import PyvirtioError

    warnings.showwarning = _show_warning
    options: dict[str, Any] = {}
    name, format = source.name, source.format
    if source.image_opts:
        if format is not None:
            raise Failure("--image-opts and --format are mutually exclusive")
        options = dict(split(source.name, "file"))
        format = options.pop("driver", None)
        name = options.pop("file", options.pop("file.filename", ""))
    if format is not None and not is_driver(format):
        raise Failure(f"Could not open '{source.name}': Unknown driver '{format}'")
    secret = options.pop("encrypt.key-secret", None)
    if secret is not None:
        options["passphrase"] = objects.secret(secret)
    if not backing:
        options["backing"] = lambda reference: (
            None if reference.role == "backing" else reference.name
        )
    try:
        return open_disk(
            name,
            format=format,
            read_only=not writable,
            cache="writeback" if cache is None else cache.mode,
            locking=not source.force_share,
            discard="unmap" if unmap else "ignore",
            **options,
            **arguments,
        )
    except (PyvirtioError, ValueError, OSError) as error:
        raise Failure(f"Could not open '{source.name}': {text_of(error)}") from error


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    lines = str(message).splitlines()
    say_more("WARNING: " + "\n         ".join(lines) + "\n")
