"""``snapshot``: list, create, apply and delete internal snapshots."""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from ...errors import BackendError, ImageError, PyvirtioError
from ..getopt import Option, UsageError
from ..messages import Failure, report, say_more, text_of
from ..objects import Objects
from .listing import snapshot_lines
from .opening import Source, open_image
from .shared import FORCE_SHARE, HELP, IMAGE_OPTS, OBJECT, QUIET, one_operand

if TYPE_CHECKING:
    from ...backend.disk import Disk
    from ...qcow2.snapshots import Snapshots

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    QUIET,
    Option(("-l",), None, "List the snapshots."),
    Option(("-a",), "snapshot", "Make the disk what it was at a snapshot."),
    Option(("-c",), "snapshot", "Create a snapshot."),
    Option(("-d",), "snapshot", "Delete a snapshot."),
)

_NO_SUCH = "Failed to load snapshot: No such file or directory"
_MAX_NAME = 255
_MAX_REFCOUNT_TABLE = (8 << 20) // 8
"""Bytes of a name that QEMU keeps."""


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    objects = Objects()
    action, name = "", ""
    for option, value in found:
        if option == "--object":
            objects.add(value)
        elif option in ("-l", "-a", "-c", "-d"):
            if action:
                raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
            action, name = option, value
    given = dict(found)
    filename = one_operand(operands)
    source = Source(filename, None, "--image-opts" in given, "-U" in given)
    with open_image(source, objects, writable=action != "-l") as disk:
        if action == "-l":
            listed = disk.info().snapshots
            if listed:
                print("Snapshot list:", *snapshot_lines(listed), sep="\n")
        elif action:
            try:
                _change(disk, action, name)
            except Failure:
                with suppress(PyvirtioError):  # what came first says more
                    disk.close()
                raise
    return 0


def _change(disk: Disk, action: str, name: str) -> None:
    snapshots: Snapshots | None = getattr(disk, "snapshots", None)
    if snapshots is None:
        raise _refusal(action, name)
    verb = {"-a": "apply", "-c": "create", "-d": "delete"}[action]
    try:
        if action == "-c":
            kept = name.encode(errors="surrogateescape")[:_MAX_NAME]
            snapshots.create(
                kept.decode(errors="surrogateescape"), icount=0, date=time.time_ns() // 1000 / 1e6
            )
        elif action == "-a":
            snapshots.apply(name)
        else:
            snapshots.delete(snapshots.find_by(name=name))
            for _ in range(2):  # what only it used is freed with the flushes
                disk.flush()
    except KeyError:
        if action == "-a":
            raise Failure(f"Could not apply snapshot '{name}': {_NO_SUCH}") from None
        raise Failure(f"Could not delete snapshot '{name}': snapshot not found") from None
    except (PyvirtioError, ValueError, OSError) as error:
        text = text_of(error)
        number = _number(disk, error)
        if action == "-d" and isinstance(error, BackendError):
            say_more(f"qcow2_free_clusters failed: {os.strerror(number)}\n")
            text = f"Failed to free the cluster and L1 table: {os.strerror(number)}"
        if action == "-a" and isinstance(error, ImageError):
            report(text)
            text = f"Failed to load snapshot: {os.strerror(number)}"
        prefix = f"Could not {verb} snapshot '{name}': "
        if action == "-c" and not text.startswith(prefix):
            text = f"-{number} ({os.strerror(number)})"
        raise Failure(text if text.startswith(prefix) else prefix + text) from error


def _number(disk: Disk, error: Exception) -> int:
    """The error's number, as far as it can be told."""
    number: int | None = getattr(error, "errno", None)
    if number:
        return number
    value = getattr(error, "value", None)
    if getattr(error, "field", None) == "refcount" and "below" in str(error):
        # A cluster that is not counted at all. QEMU tries to, with a longer refcount table.
        info = disk.info()
        per_block = 8 * (info.cluster_size or 1) // info.specific.get("refcount-bits", 1)
        fits = isinstance(value, int) and value // per_block < _MAX_REFCOUNT_TABLE
        return errno.EAGAIN if fits else errno.EFBIG
    return errno.EFBIG if re.search("too (big|large|many)", str(error), re.I) else errno.EINVAL


def _refusal(action: str, name: str) -> Failure:
    text = f"-{errno.ENOTSUP} ({os.strerror(errno.ENOTSUP)})"
    if action == "-c":
        return Failure(f"Could not create snapshot '{name}': {text}")
    if action == "-a":
        return Failure(
            f"Could not apply snapshot '{name}': Block driver does not support snapshots"
        )
    return Failure(f"Could not delete snapshot '{name}': snapshot not found")
