"""pyvirtio: the disk for emulators and VMMs written in Python.

A virtio-blk device model on top, a qcow2 driver below, and a block layer between them. Start at
:func:`open_disk`, :class:`VirtioBlk` and :class:`VirtioMmio`.
"""

from __future__ import annotations

from .backend.names import register_driver as _register_driver
from .backend.names import register_format as _register_format

TYPE_CHECKING = False  # as type checkers know it; importing typing would double the time to start
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_register_format("qcow2", f"{__name__}.qcow2")
_register_format("luks", f"{__name__}.backend.luks")
_register_format("raw", f"{__name__}.backend.raw")
# Drivers that are no formats: module, attribute, and the prefixes of their file names.
for _name, _module, _attribute, _prefixes in (
    ("file", "protocols", "FILE", ("file",)),
    ("host_device", "protocols", "HOST_DEVICE", ("host_device",)),
    ("host_cdrom", "protocols", "HOST_CDROM", ("host_cdrom",)),
    ("null-co", "null", "NULL_CO", ("null-co",)),
    ("null-aio", "null", "NULL_AIO", ("null-aio",)),
    ("blkdebug", "blkdebug", "DRIVER", ("blkdebug",)),
    ("blklogwrites", "blklogwrites", "DRIVER", ()),
    ("blkverify", "blkverify", "DRIVER", ("blkverify",)),
    ("compress", "compress", "DRIVER", ()),
    ("copy-on-read", "copy_on_read", "DRIVER", ()),
    ("nbd", "nbd", "DRIVER", ("nbd", "nbd+tcp", "nbd+unix")),
    ("ftp", "remote", "FTP", ("ftp",)),
    ("http", "remote", "HTTP", ("http",)),
    ("https", "remote", "HTTPS", ("https",)),
    ("s3", "remote", "S3", ("s3",)),
    ("preallocate", "preallocate", "DRIVER", ()),
    ("quorum", "quorum", "DRIVER", ()),
    ("throttle", "throttle", "DRIVER", ()),
):
    _register_driver(_name, f"{__name__}.backend.{_module}", _attribute, prefixes=_prefixes)

# Public name -> module. Imported at first use, so that `import pyvirtio` stays quick.
_HOMES = {
    "BackendError": "errors",
    "GuestError": "errors",
    "ImageError": "errors",
    "InUseError": "errors",
    "PassphraseError": "errors",
    "PyvirtioError": "errors",
    "UnsupportedError": "errors",
    "Disk": "backend.disk",
    "DiskInfo": "backend.disk",
    "Extent": "backend.disk",
    "Limits": "backend.disk",
    "FileDisk": "backend.file",
    "MemoryDisk": "backend.memory",
    "NullDisk": "backend.null",
    "RawDisk": "backend.raw",
    "Comparison": "backend.compare",
    "FileReference": "backend.open",
    "MapEntry": "backend.map",
    "Measurement": "backend.registry",
    "commit": "backend.commit",
    "compare": "backend.compare",
    "convert": "backend.convert",
    "map_extents": "backend.map",
    "measure": "backend.measure",
    "rebase": "backend.rebase",
    "stream": "backend.stream",
    "create_disk": "backend.open",
    "open_disk": "backend.open",
    "DirtyPages": "machine.dirty",
    "open_fork": "machine.fork",
    "Machine": "machine.state",
    "MachineSnapshots": "machine.snapshots",
    "GuestMemory": "virtio.memory",
    "VirtioBlk": "virtio.blk",
    "VirtioMmio": "virtio.mmio",
    "VirtioPci": "virtio.pci",
    "ErrorPolicy": "virtio.error_policy",
    "VhostUserServer": "virtio.vhost_user.server",
    "ZonedDisk": "backend.zoned",
}

__all__ = [
    "BackendError",
    "DirtyPages",
    "Disk",
    "DiskInfo",
    "Extent",
    "FileDisk",
    "FileReference",
    "GuestError",
    "GuestMemory",
    "ImageError",
    "InUseError",
    "Limits",
    "Machine",
    "MachineSnapshots",
    "MemoryDisk",
    "NullDisk",
    "PyvirtioError",
    "RawDisk",
    "UnsupportedError",
    "VhostUserServer",
    "VirtioBlk",
    "VirtioMmio",
    "VirtioPci",
    "ZonedDisk",
    "__version__",
    "create_disk",
    "open_disk",
    "open_fork",
]

if TYPE_CHECKING:
    from .backend.commit import commit
    from .backend.compare import Comparison, compare
    from .backend.convert import convert
    from .backend.disk import Disk, DiskInfo, Extent, Limits
    from .backend.file import FileDisk
    from .backend.map import MapEntry, map_extents
    from .backend.measure import measure
    from .backend.memory import MemoryDisk
    from .backend.null import NullDisk
    from .backend.open import FileReference, create_disk, open_disk
    from .backend.raw import RawDisk
    from .backend.rebase import rebase
    from .backend.registry import Measurement
    from .backend.stream import stream
    from .backend.zoned import ZonedDisk
    from .errors import (
        BackendError,
        GuestError,
        ImageError,
        InUseError,
        PassphraseError,
        PyvirtioError,
        UnsupportedError,
    )
    from .machine.dirty import DirtyPages
    from .machine.fork import open_fork
    from .machine.snapshots import MachineSnapshots
    from .machine.state import Machine
    from .virtio.blk import VirtioBlk
    from .virtio.error_policy import ErrorPolicy
    from .virtio.memory import GuestMemory
    from .virtio.mmio import VirtioMmio
    from .virtio.pci import VirtioPci
    from .virtio.vhost_user.server import VhostUserServer


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
