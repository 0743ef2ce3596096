"""The drivers ``file``, ``host_device`` and ``host_cdrom``: what FileDisk does, under QEMU's
options."""

from __future__ import annotations

import os
import stat
from functools import partial
from typing import Any

from ..errors import BackendError
from .disk import Disk
from .file import CacheMode, FileDisk, is_device
from .node import Node, check_loop
from .registry import Driver

__all__ = ["FILE", "HOST_CDROM", "HOST_DEVICE"]


def _open(driver: str, node: Node) -> Disk:
    options, context = node.options, node.context
    path = options.text("filename") or ""
    locking = options.choice("locking", ("on", "off", "auto"), "auto")
    aio = options.choice("aio", ("threads", "native", "io_uring"), "threads")
    if aio == "native" and not context.direct:
        raise ValueError(
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
        )
    options.number("aio-max-batch")
    options.boolean("drop-cache", True)
    options.boolean("x-check-cache-dropped", False)
    if options.text("pr-manager") is not None:
        raise ValueError("No persistent reservation manager is available")
    _check_kind(driver, path, context.read_only)
    check_loop(context, path)
    cache: CacheMode = "none" if context.direct else "unsafe" if context.no_flush else "writeback"

    def make(read_only: bool) -> FileDisk:
        return FileDisk(
            path,
            read_only=read_only,
            cache=cache,
            locking=context.locking and locking != "off",
            discard="unmap" if context.discard == "unmap" else "ignore",
            growable=context.growable,
            force_share=context.force_share,
        )

    try:
        disk = make(context.read_only)
    except PermissionError:
        if context.read_only or not context.auto_read_only:
            raise
        disk = make(True)
    return disk


def _check_kind(driver: str, path: str, read_only: bool) -> None:
    """QEMU keeps files and devices apart; what is missing, and what cannot be written at all, is
    FileDisk's to report."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if stat.S_ISDIR(mode) and not read_only:
        return
    if driver != "file" and not is_device(mode):
        message = f"'{driver}' driver requires '{path}' to be either a character or block device"
        raise BackendError(22, message, path)
    if driver == "file" and is_device(mode):
        raise BackendError(22, f"'file' driver requires '{path}' to be a regular file", path)


def _strip(driver: str, name: str, options: dict[str, Any]) -> None:
    options["filename"] = name.removeprefix(f"{driver}:")


def _driver(name: str) -> Driver:
    return Driver(
        name,
        partial(_open, name),
        protocol=True,
        parse_filename=partial(_strip, name),
        needs_filename=True,
    )


FILE = _driver("file")
HOST_DEVICE = _driver("host_device")
HOST_CDROM = _driver("host_cdrom")
