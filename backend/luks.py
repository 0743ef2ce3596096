"""The format ``luks``, as far as it is needed to recognise it: cryptography takes long to load."""

from __future__ import annotations

from typing import Any

from .disk import Disk
from .registry import Format, Measurement

__all__ = ["FORMAT"]

_MAGIC = b"LUKS\xba\xbe\0\1"
"""The magic and version 1."""


def _probe(data: bytes) -> int:
    return 100 if data.startswith(_MAGIC) else 0


def _open(file: Disk, **options: Any) -> Disk:
    from .luks_disk import open_luks

    return open_luks(file, **options)


def _create(file: Disk, size: int, **options: Any) -> None:
    from .luks_disk import create_luks

    create_luks(file, size, **options)


def _measure(size: int, source: Disk | None, **options: Any) -> Measurement:
    from .luks_disk import measure_luks

    return measure_luks(size, source, **options)


FORMAT = Format(
    "luks",
    _probe,
    _open,
    _create,
    _measure,
    shared_options=("passphrase",),
    secret_options={"key-secret": "passphrase"},
    strong_options=("key-secret",),
)
