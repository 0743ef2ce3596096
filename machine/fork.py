"""Clones of a disk as a snapshot has it: overlays whose backing file is the snapshot.

QEMU knows no backing file that is an internal snapshot, so what an overlay names is a description
that only :func:`open_fork` takes, and that everybody else refuses: nobody opens the base's present
contents by mistake. The base must not be resized away under it, nor the snapshot be deleted.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..backend.disk import Disk
from ..backend.open import FileReference, create_disk, open_disk
from ..backend.references import default_name
from ..errors import ImageError, UnsupportedError
from ..qcow2.driver import Qcow2Disk
from ..qcow2.snapshots import Snapshot

if TYPE_CHECKING:
    from _typeshed import StrPath

__all__ = ["fork_disk", "open_fork"]

_DRIVER = "pyvirtio-snapshot"
_MAX_NAME = 1023


def fork_disk(disk: Qcow2Disk, snapshot: Snapshot, path: StrPath, **options: Any) -> Qcow2Disk:
    """Create an overlay at ``path`` on what ``disk`` was when ``snapshot`` was taken, and open it.

    ``disk`` goes on as it is; as long as the overlay is open the snapshot cannot be deleted.
    ``options`` are create_disk's. Raises ValueError if the names are too long for an image.
    """
    options.setdefault("cluster_size", disk.cluster_size)
    name = _describe(disk, snapshot, path)
    if len(os.fsencode(name)) > _MAX_NAME:
        raise ValueError("Backing file name too long")
    with ExitStack() as stack:
        view = disk.snapshots.open(snapshot)
        stack.callback(view.close)
        size = view.size
        overlay = create_disk(path, size, backing_file=name, backing=lambda _: view, **options)
        stack.pop_all()
    return _qcow2(overlay)


def open_fork(path: StrPath, *, read_only: bool = False, **options: Any) -> Qcow2Disk:
    """Open an overlay made by :func:`fork_disk`, and its base read-only.

    Raises ImageError if the base has no such snapshot any more, and what open_disk raises:
    InUseError if somebody writes to the base. Other images are opened, too.
    """
    return _qcow2(open_disk(path, read_only=read_only, backing=_open_base, **options))


def _describe(disk: Qcow2Disk, snapshot: Snapshot, path: StrPath) -> str:
    base = disk.filename
    if base is None:
        raise UnsupportedError("A disk in no file cannot be forked", feature="fork")
    folder = os.path.dirname(os.path.realpath(os.fsdecode(path)))
    description = {
        "driver": _DRIVER,
        "file": os.path.relpath(os.path.realpath(base), folder),
        "id": snapshot.id,
        "name": snapshot.name,
        "date": [snapshot.date_sec, snapshot.date_nsec],
    }
    return "json:" + json.dumps(description, separators=(",", ":"))


def _open_base(reference: FileReference) -> Disk | str:
    """The policy: the snapshot that a backing file name describes; other files as QEMU does."""
    if not reference.name.startswith("json:"):
        return default_name(reference)
    try:
        if reference.parent is None:
            raise ValueError
        description = json.loads(reference.name[len("json:") :])
        driver, file = description["driver"], description["file"]
        identity = description["id"], description["name"], tuple(description["date"])
        if driver != _DRIVER or not isinstance(file, str):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UnsupportedError("The image is no fork of a snapshot", feature="fork") from None
    folder = os.path.dirname(os.path.realpath(reference.parent))
    with ExitStack() as stack:
        base = _qcow2(open_disk(os.path.join(folder, file), read_only=True, backing=_open_base))
        stack.callback(base.close)
        for snapshot in base.snapshots:
            if (snapshot.id, snapshot.name, (snapshot.date_sec, snapshot.date_nsec)) == identity:
                view = base.snapshots.open(snapshot, closed=base.close)
                stack.pop_all()
                return view
        raise ImageError(
            f"The snapshot '{identity[1]}' that the image is a fork of is gone",
            field="backing_file",
            value=reference.name,
        )


def _qcow2(disk: Disk) -> Qcow2Disk:
    if not isinstance(disk, Qcow2Disk):
        disk.close()
        raise UnsupportedError(
            f"A {disk.format_name} disk does not support snapshots", feature="snapshots"
        )
    return disk
