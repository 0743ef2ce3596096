"""Small images in memory, made by us, for tests of single rules."""

from __future__ import annotations

import zlib
from typing import Any

import pyvirtio
from pyvirtio import Disk, MemoryDisk
from pyvirtio.qcow2 import CheckResult, Qcow2Disk


class KeptDisk(MemoryDisk):
    """Stays open whoever closes it, so that a test can look at it and change it."""

    def close(self) -> None:
        """Nothing."""


def new_image(size: int = 1 << 16, **options: Any) -> tuple[MemoryDisk, Qcow2Disk]:
    """An empty image with 512-byte clusters unless told otherwise: (its file, the open disk)."""
    file = KeptDisk(growable=True)
    options.setdefault("cluster_size", 512)
    options.setdefault("backing", lambda reference: None)
    return file, as_qcow2(pyvirtio.create_disk(file, size, format="qcow2", **options))


def copy_of(file: Disk) -> MemoryDisk:
    """What the file holds now, in a file of its own."""
    copy = KeptDisk(growable=True)
    assert isinstance(file, MemoryDisk)
    copy.write(0, file.getvalue())
    return copy


def reopen(file: Disk, **options: Any) -> Qcow2Disk:
    """The image as another process would find it now."""
    return as_qcow2(pyvirtio.open_disk(copy_of(file), format="qcow2", **options))


def as_qcow2(disk: Disk) -> Qcow2Disk:
    """For the type checker."""
    assert isinstance(disk, Qcow2Disk)
    return disk


def checked(file: Disk) -> CheckResult:
    """What a check of the image finds as it is in the file now."""
    with reopen(file, read_only=True) as disk:
        return disk.check()


def assert_clean(file: Disk) -> None:
    """Fail unless nothing is wrong with the image as it is in the file now."""
    found = checked(file)
    assert found.clean, found.messages


def number_at(file: Disk, offset: int, length: int = 8) -> int:
    """A big-endian number in the file."""
    return int.from_bytes(file.read(offset, length))


def poke(file: Disk, offset: int, value: int, length: int = 8) -> None:
    """Put a big-endian number into the file."""
    file.write(offset, value.to_bytes(length))


def l2_entry_at(file: Disk, cluster: int = 0, cluster_size: int = 512) -> int:
    """Where the L2 entry of a guest cluster stands in the file."""
    per_table = cluster_size // 8
    l1 = number_at(file, 40)
    table = number_at(file, l1 + 8 * (cluster // per_table)) & 0x00FF_FFFF_FFFF_FE00
    return table + 8 * (cluster % per_table)


def with_compressed(*contents: bytes, cluster_bits: int = 9) -> MemoryDisk:
    """An image whose first clusters hold these, compressed, one after the other in the file.

    They are put into host clusters that were allocated for them, so that a check finds nothing.
    """
    size = 1 << cluster_bits
    file, disk = new_image(cluster_size=size)
    disk.write(0, b"?" * size * len(contents))
    disk.close()
    hosts = [number_at(file, l2_entry_at(file, i, size)) & ~(1 << 63) for i in range(len(contents))]
    for index, (host, data) in enumerate(zip(hosts, contents, strict=True)):
        engine = zlib.compressobj(9, zlib.DEFLATED, -12)
        packed = engine.compress(data) + engine.flush()
        assert len(packed) <= size
        file.write(host, packed.ljust(size, b"\0"))
        sectors = (len(packed) - 1) // 512
        entry = 1 << 62 | sectors << (62 - (cluster_bits - 8)) | host
        poke(file, l2_entry_at(file, index, size), entry)
    return file
