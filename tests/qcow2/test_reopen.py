"""Reopening, reading anew, flushing to the OS, and what an image says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pyvirtio
import pyvirtio.qcow2
from pyvirtio import BackendError, ImageError, MemoryDisk
from support.peers import requires
from support.qemu import QemuIo, qemu_check, qemu_img, qemu_img_json

SIZE = 1 << 20
CLUSTER = 65536


def test_read_only_and_back(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with pyvirtio.create_disk(path, SIZE) as disk:
        disk.write(0, b"a" * 5000)
        disk.reopen(read_only=True)
        assert disk.read(0, 5000) == b"a" * 5000
        with pytest.raises(BackendError):
            disk.write(0, b"b")
        disk.reopen(read_only=False)
        disk.write(0, b"b")
        assert disk.read(0, 2) == b"ba"


@requires("qemu-img", "qemu-io")
def test_what_another_program_changed_is_seen_after_invalidate(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    pyvirtio.create_disk(path, SIZE).close()
    with pyvirtio.open_disk(path, read_only=True, locking=False) as disk:
        assert disk.read(0, 1) == b"\0"
        with QemuIo(path) as io:
            io.command("write -P 0x61 0 64k")
        qemu_img("snapshot", "-c", "theirs", path)
        qemu_img("resize", "-q", "-f", "qcow2", path, 2 * SIZE)
        disk.invalidate()
        assert disk.size == 2 * SIZE
        assert disk.read(0, 65537) == b"a" * 65536 + b"\0"
        assert [snapshot.name for snapshot in disk.snapshots] == ["theirs"]


def test_flush_to_os_brings_the_tables_to_the_file() -> None:
    file = MemoryDisk(growable=True)
    with pyvirtio.create_disk(file, SIZE) as disk:
        disk.write(0, b"a" * 100_000)
        disk.flush_to_os()
        copy = MemoryDisk(growable=True)
        copy.write(0, file.read(0, file.size))
        with pyvirtio.open_disk(copy, format="qcow2", read_only=True) as other:
            assert other.read(0, 100_000) == b"a" * 100_000
            assert other.check().clean


def test_an_image_that_cannot_be_read_anew_stays_in_use() -> None:
    file = MemoryDisk(growable=True)
    with pyvirtio.create_disk(file, SIZE) as disk:
        disk.write(0, b"a" * 100)
        disk.flush()
        magic = file.read(0, 4)
        file.write(0, b"none")
        with pytest.raises(pyvirtio.ImageError):
            disk.invalidate()
        file.write(0, magic)
        assert disk.read(0, 100) == b"a" * 100


@requires("qemu-img")
@pytest.mark.parametrize(
    "options",
    [
        {"compat": "0.10"},
        {"compat": "1.1", "lazy_refcounts": True, "refcount_bits": 64, "extended_l2": True},
        {"backing_file": "base", "backing_fmt": "raw"},
    ],
)
def test_the_facts_are_those_of_qemu(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "disk"
    (tmp_path / "base").write_bytes(bytes(512))
    with pyvirtio.create_disk(path, SIZE, **options) as disk:
        disk.snapshots.create("one", vm_clock=3_000_000_005, icount=9)
    theirs = qemu_img_json("info", path)
    with pyvirtio.open_disk(path) as disk:
        info = disk.info()
    assert info.specific == theirs["format-specific"]["data"]
    assert list(info.snapshots) == theirs["snapshots"]
    assert info.virtual_size == theirs["virtual-size"]
    assert info.cluster_size == theirs["cluster-size"]
    assert info.dirty == theirs["dirty-flag"]
    assert info.backing_filename == theirs.get("backing-filename")
    assert info.backing_format == theirs.get("backing-filename-format")
    qemu_check(path)


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


def test_the_data_file_is_reopened_with_the_image(tmp_path: Path) -> None:
    path, data = tmp_path / "disk", tmp_path / "data"
    pyvirtio.create_disk(path, SIZE, data_file=str(data)).close()
    with pyvirtio.open_disk(path, read_only=True) as disk:
        disk.reopen(read_only=False)
        disk.write(0, b"written")
        disk.reopen(read_only=True)
        assert disk.read(0, 7) == b"written"
        with pyvirtio.FileDisk(data, read_only=True) as other:  # nobody writes there any more
            assert other.read(0, 7) == b"written"
        disk.reopen(read_only=False)


def test_an_image_whose_data_file_somebody_else_reads_stays_read_only(tmp_path: Path) -> None:
    path, data = tmp_path / "disk", tmp_path / "data"
    pyvirtio.create_disk(path, SIZE, data_file=str(data)).close()
    with (
        pyvirtio.open_disk(path, read_only=True) as disk,
        pyvirtio.FileDisk(data, read_only=True),
    ):
        with pytest.raises(pyvirtio.InUseError):
            disk.reopen(read_only=False)
        assert disk.read_only
        assert disk.read(0, 1) == b"\0"
        with pyvirtio.open_disk(path, read_only=True):  # the image's lock is that of a reader
            pass


def test_an_image_whose_data_file_was_not_opened_can_be_reopened(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    pyvirtio.create_disk(path, SIZE, data_file=str(tmp_path / "data")).close()
    with pyvirtio.open_disk(path, backing=lambda reference: None) as disk:
        disk.reopen(read_only=True)
        disk.reopen(read_only=False)


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 4096},
        {"extended_l2": True},
        {"data_file": "data"},
        {"encryption": True, "passphrase": "x"},
    ],
)
def test_an_image_that_became_one_of_another_kind_is_not_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = MemoryDisk(growable=True)
    pyvirtio.qcow2.FORMAT.create(other, SIZE, **options)  # type: ignore[misc]
    file = MemoryDisk(growable=True)
    with pyvirtio.create_disk(file, SIZE) as disk:
        disk.write(0, b"a" * 100)
        disk.flush()
        header = file.read(0, CLUSTER)
        file.write(0, other.read(0, CLUSTER))
        with pytest.raises(ImageError, match="another layout"):
            disk.invalidate()
        file.write(0, header)
        assert disk.read(0, 100) == b"a" * 100
