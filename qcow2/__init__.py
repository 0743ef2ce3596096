"""The format: a qcow2 driver that reads and writes."""

from __future__ import annotations

from typing import Any

from ..backend.disk import Disk
from ..backend.registry import Format, Measurement
from .bitmaps import Bitmap, Bitmaps
from .corruption import CorruptionEvent
from .create import CreateOptions
from .create import create as _create
from .driver import Qcow2Disk
from .header import probe
from .result import CheckResult
from .snapshots import Snapshot, Snapshots

__all__ = [
    "FORMAT",
    "Bitmap",
    "Bitmaps",
    "CheckResult",
    "CorruptionEvent",
    "CreateOptions",
    "Qcow2Disk",
    "Snapshot",
    "Snapshots",
]


def create(file: Disk, size: int, *, data_disk: Disk | None = None, **options: Any) -> None:
    """Write an empty image into ``file``; the options are those of CreateOptions.

    ``data_disk`` is to be the external data file, if one is named, which is made otherwise.
    """
    _create(file, size, CreateOptions.of(**options), data_disk)


def _measure(size: int, source: Disk | None, **options: Any) -> Measurement:
    from .measure import measure

    return measure(size, source, **options)


FORMAT = Format(
    "qcow2",
    probe,
    Qcow2Disk.open,
    create,
    _measure,
    shared_options=("passphrase",),
    secret_options={"encrypt.key-secret": "passphrase"},
    renamed_options={"encrypt.format": "encrypt_format"},
    strong_options=("encrypt.",),
)
