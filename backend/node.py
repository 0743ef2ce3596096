"""One node of a graph of block drivers, while it is being opened.

A driver gets a :class:`Node`: the options that are its own, what all nodes have in common
(read-only or not, caching, discards), and a way to have its children opened. How names and options
lead from one node to the next is QEMU's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

from ..errors import ImageError
from .disk import Disk
from .file import FileDisk, file_identity
from .options import Options, parse_boolean, subset

if TYPE_CHECKING:
    from .references import Policy

__all__ = ["Context", "Graph", "Node", "Role", "bottom_file", "check_loop"]

_NAME_MAX = 31


class Role(Flag):
    """What a child is for its parent."""

    FILE = auto()
    """What a format or a filter keeps everything in; or a file with metadata. Never probed."""
    FILTERED = auto()
    """What a filter hands on; it is used as the filter is."""
    DATA = auto()
    """Guest data that stand for themselves; their format is probed."""
    BACKING = auto()
    """Read-only, and probed."""


@dataclass(slots=True)
class Graph:
    """What all nodes opened together share."""

    policy: Policy | None = None
    """Decides about files that images name; None: what QEMU would open."""
    secrets: Mapping[str, bytes] = field(default_factory=dict)
    """Passphrases by the names that options give them."""
    objects: Mapping[str, Any] = field(default_factory=dict)
    """Other objects that options name: throttle groups."""
    warn: Callable[[str], None] | None = None
    """Hears QEMU's warnings; without, they are Python's."""
    tell_repairs: Callable[[Iterable[str]], None] | None = None
    """Hears what was repaired in an image while it was opened, in QEMU's words."""
    nodes: dict[str, Disk] = field(default_factory=dict)
    """The nodes that have a name."""

    def secret(self, name: str) -> bytes:
        """The passphrase ``name``. Raises ValueError if there is none."""
        try:
            return self.secrets[name]
        except KeyError:
            raise ValueError(f"No secret with id '{name}'") from None


@dataclass(frozen=True, slots=True)
class Context:
    """How a node is used, as far as it is not a matter of its driver."""

    graph: Graph
    read_only: bool = False
    auto_read_only: bool = False
    direct: bool = False
    no_flush: bool = False
    discard: str = "ignore"
    detect_zeroes: str = "off"
    force_share: bool = False
    locking: bool = True
    growable: bool = False
    protocol: bool = False
    """A bare protocol is wanted: without a driver's name, the file is taken as it is."""
    no_backing: bool = False
    parent: str | None = None
    """File name of the image that names this one."""
    chain: tuple[tuple[int, int], ...] = ()
    """The identities of the files from the first image down to the one that names the next."""
    depth: int = 0

    def absorb(self, options: dict[str, Any]) -> tuple[Context, str | None]:
        """Take the options common to all nodes; the context they make, and the node's name."""
        changes: dict[str, Any] = {}
        for key, attribute in _SWITCHES.items():
            if key in options:
                changes[attribute] = parse_boolean(key, options.pop(key))
        discard = options.pop("discard", None)
        if discard is not None:
            if discard not in ("unmap", "on", "ignore", "off"):
                raise ValueError("Invalid discard option")
            changes["discard"] = "unmap" if discard in ("unmap", "on") else "ignore"
        detect = options.pop("detect-zeroes", None)
        if detect is not None:
            if detect not in ("off", "on", "unmap"):
                raise ValueError(f"invalid parameter value: {detect}")
            changes["detect_zeroes"] = detect
        name = options.pop("node-name", None)
        new = replace(self, **changes)
        if new.force_share and not new.read_only:
            raise ValueError("force-share=on can only be used with read-only images")
        if new.detect_zeroes == "unmap" and new.discard != "unmap":
            raise ValueError(
                "setting detect-zeroes to unmap is not allowed without setting discard operation "
                "to unmap"
            )
        return new, None if name is None else _check_name(self.graph, str(name))


_SWITCHES = {
    "read-only": "read_only",
    "auto-read-only": "auto_read_only",
    "cache.direct": "direct",
    "cache.no-flush": "no_flush",
    "force-share": "force_share",
}


def _check_name(graph: Graph, name: str) -> str:
    if not (
        name.isascii()
        and name[:1].isalpha()
        and name.replace("-", "a").replace(".", "a").replace("_", "a").isalnum()
    ):
        raise ValueError(f"Invalid node-name: '{name}'")
    if len(name) > _NAME_MAX:
        raise ValueError("Node name too long")
    if name in graph.nodes:
        raise ValueError(f"Duplicate nodes with node-name='{name}'")
    return name


Opener = Callable[[Context, "str | None", "dict[str, Any]", "str | Disk | None"], Disk]


class Node:
    """A node being opened by its driver."""

    def __init__(
        self,
        context: Context,
        driver: str,
        filename: str | None,
        options: dict[str, Any],
        opener: Opener,
        *,
        is_format: bool,
    ) -> None:
        self.context = context
        self.driver = driver
        self.filename = filename
        """The file name that leads to this node, if there is one."""
        self.options = Options(options)
        self._opener = opener
        self._is_format = is_format
        self._opened: list[Disk] = []

    def child(
        self,
        name: str,
        role: Role = Role.FILE,
        *,
        filename: str | None = None,
    ) -> Disk | None:
        """Open the child ``name``, as the options under its name say; ``filename`` is what else
        is known of it. None if nothing is said of it."""
        options = self.options.left
        reference = options.pop(name, None)
        given = subset(options, name + ".")
        if reference is None and filename is None and not given:
            return None
        return self.open(self.inherited(role), filename, given, reference)

    def required(self, name: str, role: Role = Role.FILE, *, filename: str | None = None) -> Disk:
        """A child that there must be."""
        disk = self.child(name, role, filename=filename)
        if disk is None:
            raise ValueError(f'A block device must be specified for "{name}"')
        return disk

    def open(
        self,
        context: Context,
        filename: str | None,
        options: dict[str, Any],
        reference: str | Disk | None = None,
    ) -> Disk:
        """Open a node below this one; it is closed if this one fails in the end."""
        disk = self._opener(context, filename, options, reference)
        if disk is not reference:
            self._opened.append(disk)
        return disk

    def inherited(self, role: Role) -> Context:
        """What a child has from its parent."""
        context = self.context
        changes: dict[str, Any] = {
            "discard": "unmap",
            "detect_zeroes": "off",
            "no_backing": False,
        }
        if Role.FILE in role:
            changes |= {"protocol": True, "growable": self._is_format or context.growable}
        elif Role.FILTERED in role:
            changes |= {"protocol": True}
        elif Role.DATA in role:
            changes |= {"protocol": self._is_format, "growable": self._is_format}
        elif Role.BACKING in role:
            changes |= {
                "read_only": True,
                "auto_read_only": False,
                "protocol": False,
                "growable": False,
            }
        return replace(context, **changes)

    def abandon(self) -> None:
        """Opening failed: close the children."""
        for disk in reversed(self._opened):
            with suppress(OSError, ValueError):
                disk.close()


def bottom_file(disk: Disk) -> FileDisk | None:
    """The file of the host that a disk is in, below formats and filters; None if it is in none."""
    while not isinstance(disk, FileDisk):
        children = disk.children
        below = children.get("file") or children.get("image") or children.get("raw")
        if below is None:
            return None
        disk = below
    return disk


def check_loop(context: Context, path: str) -> None:
    """Raise ImageError if the file at ``path`` is one of those that lead to it."""
    if not context.chain:
        return
    try:
        identity = file_identity(os.stat(path))
    except (OSError, ValueError):
        return  # opening it says what is wrong
    if identity in context.chain:
        raise ImageError(
            f"'{path}' is already part of this backing chain: it is a loop",
            field="backing file",
            value=path,
        )
