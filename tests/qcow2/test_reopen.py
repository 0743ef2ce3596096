"""Changing an open image between read-only and read-write."""

from __future__ import annotations

import pytest

import pyvirtio
from pyvirtio import ImageError

CLUSTER = 65536


def test_a_read_only_image_becomes_writable_and_back(tmp_path):
    path = tmp_path / "a"
    pyvirtio.create_disk(path, 1 << 20).close()
    with pyvirtio.open_disk(path, read_only=True) as disk:
        disk.reopen(read_only=False)
        disk.write(0, b"\x11" * CLUSTER)
        disk.reopen(read_only=True)
        with pytest.raises(pyvirtio.BackendError, match="read-only"):
            disk.write(0, b"\x22" * CLUSTER)
        with pyvirtio.open_disk(path, read_only=True) as other:  # its lock is given up, too
            assert other.read(0, CLUSTER) == b"\x11" * CLUSTER


def test_a_corrupt_image_stays_read_only(tmp_path):
    path = tmp_path / "a"
    pyvirtio.create_disk(path, 1 << 20).close()
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\x02")
    with pyvirtio.open_disk(path, read_only=True) as disk:
        with pytest.raises(ImageError, match="corrupt"):
            disk.reopen(read_only=False)
        assert disk.read_only


def test_an_image_that_somebody_else_reads_stays_read_only(tmp_path):
    path = tmp_path / "a"
    pyvirtio.create_disk(path, 1 << 20).close()
    with (
        pyvirtio.open_disk(path, read_only=True) as disk,
        pyvirtio.open_disk(path, read_only=True),
    ):
        with pytest.raises(pyvirtio.InUseError):
            disk.reopen(read_only=False)
        assert disk.read_only
        assert disk.read(0, 512) == bytes(512)
