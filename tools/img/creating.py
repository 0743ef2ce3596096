"""Making new images, for every subcommand that does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...backend.file import FileDisk
from ...backend.open import FileReference, create_disk
from ..messages import Failure
from ..objects import Objects
from ..optlist import Given
from .formats import check_protocol

__all__ = ["add_backing", "create_image", "creation_arguments"]

_QCOW2 = (
    "compat",
    "backing_file",
    "backing_fmt",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
    "encryption",
    "encrypt.format",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.hash-alg",
    "encrypt.iter-time",
    "cluster_size",
    "extended_l2",
    "preallocation",
    "compression_type",
    "nocow",
)
_LUKS = ("cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time")
_SECTOR = 512


def create_image(filename: str, format: str, given: Given, objects: Objects) -> None:
    """Make the image, of the size that is given. Raises what the library raises, or Failure."""
    protocol = check_protocol(filename)
    if protocol != "file":
        raise Failure(f"Protocol driver '{protocol}' does not support image creation")
    path = Path(filename.removeprefix("file:"))
    size = given.number("size") or 0
    size = -(-size // _SECTOR) * _SECTOR
    if format == "file":
        preallocation = given.text("preallocation") or "off"
        with FileDisk.create(path) as file:
            file.truncate(size, preallocation=preallocation, shrink=True)
        return
    arguments = creation_arguments(format, given, objects)
    create_disk(path, size, format=format, backing=_no_backing, **arguments).close()


def _no_backing(reference: FileReference) -> str | None:
    """Nothing is read through the new image: its backing file may be missing."""
    return None if reference.role == "backing" else reference.name


def creation_arguments(format: str, given: Given, objects: Objects) -> dict[str, Any]:
    """The options as keyword arguments of the format's ``create``."""
    names = {"qcow2": _QCOW2, "luks": (*_LUKS, "preallocation"), "raw": ("preallocation",)}
    arguments: dict[str, Any] = {}
    for name in names.get(format, tuple(given.values)):
        if name in given.values:
            arguments[name.replace("-", "_").replace(".", "_")] = given.values[name]
    secret = given.text("key-secret" if format == "luks" else "encrypt.key-secret")
    encrypted = format == "luks" or "encrypt_format" in arguments or given.flag("encryption")
    if secret is not None and encrypted:
        arguments["passphrase"] = objects.secret(secret)
    return arguments


def add_backing(given: Given, format: str, name: str | None, kind: str | None) -> None:
    """Take note of ``-b`` and ``-F``. Raises Failure if the format has no backing files."""
    if name is not None:
        if "backing_file" not in given:
            raise Failure(f"Backing file not supported for file format '{format}'")
        given.put("backing_file", name)
    if kind is not None:
        if "backing_fmt" not in given:
            raise Failure(f"Backing file format not supported for file format '{format}'")
        given.put("backing_fmt", kind)
