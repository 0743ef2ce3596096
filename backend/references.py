"""Files that images name inside themselves, and who decides about them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ImageError
from .disk import Disk

if TYPE_CHECKING:
    from _typeshed import StrPath

__all__ = ["FileReference", "Policy", "default_name", "protocol_prefix"]

_PROTOCOL = re.compile(r"([^/:]*):")


@dataclass(frozen=True, slots=True)
class FileReference:
    """A file that an image names inside itself.

    A format driver fills in the first three; who named it is added on the way to the policy.
    """

    name: str
    """As it stands in the image."""
    format: str | None = None
    """The format the image says it has, if it says."""
    role: str = "backing"
    """``backing`` or ``data-file``."""
    parent: str | None = None
    """File name of the image that names it."""
    depth: int = 0
    """How deep in the chain: 1 for what the image opened by the caller names, and so on."""


Policy = Callable[[FileReference], "Disk | StrPath | None"]
"""Decides about a file that an image names: a Disk to use (the image then owns it), a path to open
instead (taken as it is, with the format named in the image, or probed), or None not to open it."""


def protocol_prefix(name: str) -> str | None:
    """What stands before the colon in ``nbd://…``, ``blkdebug:…``; None for a path."""
    match = _PROTOCOL.match(name)
    return None if match is None else match[1]


def default_name(reference: FileReference) -> str:
    """What QEMU would open: relative to the image's folder unless it is a protocol's name."""
    name = reference.name
    if not name or "\0" in name:
        raise ImageError(
            f"Invalid {reference.role} file name", field=f"{reference.role} file", value=name
        )
    if protocol_prefix(name) is not None or reference.role == "data-file" or os.path.isabs(name):
        return name  # a data file's is not relative to the image, in QEMU
    if reference.parent is None:
        raise ImageError(
            f"Cannot resolve the relative file name '{name}': the image has no file name itself",
            field=f"{reference.role} file",
            value=name,
        )
    return os.path.join(os.path.dirname(reference.parent), name)
