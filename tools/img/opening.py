"""Opening the images that a command line names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import PyvirtioError
from ..messages import Failure, text_of, warn
from ..objects import Objects

if TYPE_CHECKING:
    from ...backend.disk import Disk
    from ...backend.file import CacheMode

__all__ = ["CacheChoice", "Source", "cache_mode", "open_image", "open_quietly"]


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
    secrets: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Disk:
    """Open an image; without ``backing`` it stands alone. ``secrets`` are options that name some,
    ``arguments`` the format's own.

    Raises Failure with the message that the user reads.
    """
    try:
        return open_quietly(
            source,
            objects,
            writable=writable,
            cache=cache,
            backing=backing,
            unmap=unmap,
            secrets=secrets,
            **arguments,
        )
    except (PyvirtioError, ValueError, OSError) as error:
        raise Failure(f"Could not open '{source.name}': {text_of(error)}") from error


def open_quietly(
    source: Source,
    objects: Objects,
    *,
    writable: bool = False,
    cache: CacheChoice | None = None,
    backing: bool = True,
    unmap: bool = False,
    secrets: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Disk:
    """As :func:`open_image`, but what the library raises comes out."""
    from ...backend.blockdev import Context, open_node

    options: dict[str, Any] = dict(secrets or {})
    if source.image_opts:
        if source.format is not None:
            raise Failure("--image-opts and --format are mutually exclusive")
        options = _image_options(source, objects)
    elif source.format is not None:
        options["driver"] = source.format
    mode = "writeback" if cache is None else cache.mode
    context = Context(
        objects.graph,
        read_only=not writable,
        direct=mode == "none",
        no_flush=mode == "unsafe",
        discard="unmap" if unmap else "ignore",
        force_share=source.force_share,
        no_backing=not backing,
    )
    name = None if source.image_opts else source.name
    return open_node(context, name, options, arguments=arguments)


def _image_options(source: Source, objects: Objects) -> dict[str, Any]:
    from ...backend.options import parse_keyval

    try:
        options = parse_keyval(source.name, implied="file", warn=objects.graph.warn or warn)
    except ValueError as error:
        raise Failure(text_of(error)) from error
    if source.force_share and options.get("force-share", "on") != "on":
        raise Failure("--force-share/-U conflicts with image options")
    return dict(options)
