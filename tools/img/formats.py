"""The names of block drivers: which there are, and which a file name asks for."""

from __future__ import annotations

import re

from ..messages import Failure

__all__ = ["DRIVERS", "NOT_HERE", "check_protocol", "is_driver", "prefix_of"]

DRIVERS = (
    "blkdebug",
    "blklogwrites",
    "blkverify",
    "compress",
    "copy-on-read",
    "file",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "luks",
    "nbd",
    "null-aio",
    "null-co",
    "preallocate",
    "qcow2",
    "quorum",
    "raw",
    "throttle",
)
"""What ``--help`` lists."""

NOT_HERE = (
    "bochs",
    "cloop",
    "dmg",
    "ftp",
    "ftps",
    "gluster",
    "iscsi",
    "iser",
    "nfs",
    "nvme",
    "rbd",
    "replication",
    "snapshot-access",
    "ssh",
    "vvfat",
    "copy-before-write",
)
"""QEMU's drivers that cannot make images, and are not here at all."""

_PREFIXES = ("file", "nbd", "http", "https", "blkdebug", "blkverify", "null-co", "null-aio", "json")
_PREFIX = re.compile(r"([^/:]*):")


def prefix_of(filename: str) -> str | None:
    """What stands before the colon of ``nbd:…``; None for a path."""
    match = _PREFIX.match(filename)
    return None if match is None else match[1]


def check_protocol(filename: str) -> str:
    """The protocol that a file name is of. Raises Failure if there is no such."""
    prefix = prefix_of(filename)
    if prefix is None:
        return "file"
    if prefix.partition("+")[0] not in _PREFIXES:
        raise Failure(f"Unknown protocol '{prefix}'")
    return prefix


def is_driver(name: str) -> bool:
    """Whether there is a driver, or a format that somebody else added, of that name."""
    from ...backend.registry import format_names

    return name in DRIVERS or name in format_names()
