"""Opening and creating disks by name: what a caller of the library asks for."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack, suppress
from operator import index
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, UnsupportedError
from .blockdev import Context, Graph, open_node, path_options
from .disk import Disk
from .file import CacheMode, DiscardMode, FileDisk
from .references import FileReference, Policy, protocol_prefix
from .registry import find_format

if TYPE_CHECKING:
    from _typeshed import StrPath

__all__ = ["FileReference", "Policy", "create_disk", "open_disk"]


# -- opening ---------------------------------------------------------------------------------------


def open_disk(
    source: StrPath | Disk,
    *,
    format: str | None = None,
    read_only: bool = False,
    backing: Policy | None = None,
    cache: CacheMode = "writeback",
    locking: bool = True,
    discard: DiscardMode = "unmap",
    **options: Any,
) -> Disk:
    """Open a disk image.

    ``source`` is a path, as a string also any other of QEMU's file names (``nbd://…``,
    ``json:{…}``), or a Disk that holds the image, which the result then owns. Without ``format``
    the image's first bytes decide. Files that the image names are opened read-only as QEMU does,
    unless the policy ``backing`` decides otherwise. ``cache``, ``locking`` and ``discard`` are
    FileDisk's, ``options`` the format's.

    Raises BackendError, InUseError, ImageError or UnsupportedError, with QEMU's messages.
    """
    context = _context(backing, cache, locking, discard, read_only)
    name: str | None = None
    given: dict[str, Any] = {}
    if isinstance(source, Disk):
        given = {"file": source}
    elif isinstance(source, str):
        name = source
    else:
        given = path_options(source)
    if format is not None:
        given["driver"] = find_format(format).name
    return open_node(context, name, given, arguments=options)


def _context(
    policy: Policy | None,
    cache: CacheMode,
    locking: bool,
    discard: DiscardMode,
    read_only: bool,
) -> Context:
    if cache not in ("writeback", "none", "unsafe"):
        raise ValueError(f"Invalid cache option: {cache}")
    if discard not in ("unmap", "ignore"):
        raise ValueError(f"Invalid discard option: {discard}")
    return Context(
        Graph(policy),
        read_only=read_only,
        direct=cache == "none",
        no_flush=cache == "unsafe",
        discard=discard,
        locking=locking,
    )


# -- creating --------------------------------------------------------------------------------------


def create_disk(
    target: StrPath | Disk,
    size: int,
    *,
    format: str = "qcow2",
    backing: Policy | None = None,
    cache: CacheMode = "writeback",
    locking: bool = True,
    discard: DiscardMode = "unmap",
    **options: Any,
) -> Disk:
    """Create an empty image of ``size`` bytes and open it.

    ``target`` is a path, or a growable Disk, which the result then owns. ``options`` are the
    format's for creating. An image that is there already is replaced, if nobody uses it, once the
    new one is complete: if it fails the old one is still there, and nothing half-made.
    """
    if index(size) < 0:
        raise ValueError(f"a disk cannot have {size} bytes")
    kind = find_format(format)
    if kind.create is None:
        raise UnsupportedError(f"Format driver '{format}' does not support image creation")
    context = _context(backing, cache, locking, discard, read_only=False)
    shared = {name: options[name] for name in kind.shared_options if name in options}
    if isinstance(target, Disk):
        kind.create(target, size, **options)
        return open_node(context, None, {"driver": format, "file": target}, arguments=shared)
    path = _path_of(target)

    def make(name: str) -> FileDisk:
        return FileDisk.create(name, cache=cache, locking=locking, discard=discard, growable=True)

    with ExitStack() as cleanup:
        old = _replaceable(path, locking)
        if old is not None:
            cleanup.callback(old.close)
            new_name = _name_beside(path)
            cleanup.callback(_unlink, new_name)
            file = make(new_name)
        else:
            is_new = not os.path.exists(path)
            file = make(path)
            if is_new:
                cleanup.callback(_unlink, path)
        cleanup.callback(file.close)
        file.filename = path  # what it names itself is relative to this
        kind.create(file, size, **options)
        disk = open_node(context, None, {"driver": format, "file": file}, arguments=shared)
        if old is not None:
            cleanup.callback(disk.close)
            disk.flush()
            _move(new_name, os.path.realpath(path))
            old.close()
        cleanup.pop_all()
        return disk


def _path_of(target: StrPath) -> str:
    """The path that a caller means: strings are QEMU's file names, path objects are paths."""
    prefix = protocol_prefix(target) if isinstance(target, str) else None
    if prefix is None:
        return os.fsdecode(target)
    if prefix != "file":
        raise UnsupportedError(f"Unknown protocol '{prefix}'", feature=prefix)
    return os.fsdecode(target)[len("file:") :]


def _replaceable(path: str, locking: bool) -> FileDisk | None:
    """The file that a new one shall replace, locked against everybody.

    None if nothing is there, or nothing worth saving, or if it can only be overwritten: another
    name (a hard link) leads to it, or its folder takes no new file.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    folder = os.path.dirname(os.path.realpath(path))
    if (
        not stat.S_ISREG(status.st_mode)
        or not status.st_size
        or status.st_nlink > 1
        or not os.access(folder, os.W_OK | os.X_OK)
    ):
        return None
    return FileDisk(path, locking=locking)


def _name_beside(path: str) -> str:
    """A new empty file in the folder of the old one, with its mode and owner."""
    path = os.path.realpath(path)
    name = f"{path}.{os.urandom(8).hex()}"
    try:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BackendError.wrap(error, f"Could not create '{path}'", path) from error
    try:
        status = os.stat(path)
        with suppress(PermissionError):
            os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
    finally:
        os.close(fd)
    return name


def _move(source: str, target: str) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        raise BackendError.wrap(error, f"Could not replace '{target}'", target) from error


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
