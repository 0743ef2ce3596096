"""What a caller gets wrong is a TypeError or a ValueError, and changes nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import MemoryDisk
from support.images import assert_clean, new_image, reopen

SIZE = 1 << 20


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (lambda d: d.truncate(1.5 * SIZE), TypeError, "float"),
        (lambda d: d.snapshots.create(None), TypeError, "name is a string, not None"),
        (lambda d: d.snapshots.create(b"x"), TypeError, "name is a string"),
        (lambda d: d.snapshots.create("a\0b"), ValueError, "NUL"),
        (lambda d: d.snapshots.create("x", date="now"), TypeError, "multiply"),
        (lambda d: d.snapshots.create("x", vm_clock=1.5), TypeError, "float"),
        (lambda d: d.snapshots.delete(None), TypeError, "named by a string"),
        (lambda d: d.snapshots.rename("kept", "a\0b"), ValueError, "NUL"),
        (lambda d: d.bitmaps.add(b"x"), TypeError, "name is a string"),
        (lambda d: d.change_backing_file("a\0b"), ValueError, "Invalid backing file name"),
        (lambda d: d.amend(backing_file="a\0b"), ValueError, "Invalid backing file name"),
        (lambda d: d.vmstate.reader().seek(0, 9), ValueError, "invalid whence"),
    ],
)
def test_misuse_is_refused(use: Callable[[Any], object], error: type[Exception], text: str) -> None:
    file, disk = new_image(SIZE)
    disk.snapshots.create("kept")
    with pytest.raises(error, match=text):
        use(disk)
    assert [snapshot.name for snapshot in disk.snapshots] == ["kept"]
    assert disk.size == SIZE
    disk.close()
    assert_clean(file)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"bogus": 1}, ValueError, "Invalid parameter 'bogus'"),
        ({"cluster_size": "64k"}, TypeError, "str"),
        ({"refcount_bits": "16"}, TypeError, "str"),
        ({"backing_file": "a\0b", "backing_fmt": "raw"}, ValueError, "Invalid backing file name"),
    ],
)
def test_an_image_is_not_created_with_wrong_options(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        pyvirtio.create_disk(MemoryDisk(growable=True), SIZE, **options)


def test_a_size_is_a_whole_number(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="float"):
        pyvirtio.create_disk(tmp_path / "disk", 1e6)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [Path("base"), b"base"])
def test_a_backing_files_name_may_be_a_path(name: Any) -> None:
    file, disk = new_image(SIZE)
    disk.change_backing_file(name, "raw")
    assert disk.backing_file == "base"
    disk.close()
    with reopen(file, backing=lambda reference: None) as again:
        assert again.backing_file == "base"


def test_a_buffer_that_cannot_be_written_is_no_place_to_read_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(512))
    with (
        pyvirtio.FileDisk(tmp_path / "file") as disk,
        pytest.raises(TypeError, match="must be writable"),
    ):
        disk.readv(0, [memoryview(bytes(10))])


def test_a_stream_of_vm_state_seeks_as_files_do() -> None:
    _, disk = new_image(SIZE)
    disk.vmstate.write(0, b"0123456789")
    stream = disk.vmstate.reader()
    assert [stream.seek(*to) for to in ((3,), (2, io.SEEK_CUR), (-1, io.SEEK_END))] == [3, 5, 9]
    disk.close()
