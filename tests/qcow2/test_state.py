"""Dirty and corrupt images: lazy refcounts, and corruption that is met at run time."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.backend.disk import Disk
from pyvirtio.errors import BackendError, ImageError
from pyvirtio.qcow2 import CorruptionEvent

COPIED = 1 << 63
CLUSTER = 65536

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="qemu-img and qemu-io are not installed",
)


def get(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(8))


def put(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(">Q", value))


def dirty(path: Path) -> bool:
    return bool(get(path, 72) & 1)


def l2_entry(path: Path, index: int) -> int:
    """Where an entry of the first L2 table stands."""
    return (get(path, get(path, 40)) & ~COPIED) + 8 * index


def qemu_check(path: Path, *options: str) -> int:
    done = subprocess.run(["qemu-img", "check", *options, str(path)], capture_output=True)
    return done.returncode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image.qcow2"


def make(path: Path, **options: object) -> Disk:
    return pyvirtio.create_disk(path, 64 << 20, **options)


# -- lazy refcounts --------------------------------------------------------------------------------


def test_lazy_image_is_dirty_from_the_first_flush_until_it_is_closed(path: Path) -> None:
    with make(path, lazy_refcounts=True) as disk:
        disk.write(0, b"a" * 100000)
        assert not dirty(path)
        disk.flush()
        assert dirty(path)
    assert not dirty(path)


@needs_qemu
def test_lazy_image_is_clean_for_qemu_after_it_is_closed(path: Path) -> None:
    with make(path, lazy_refcounts=True) as disk:
        for i in range(20):
            disk.write(i << 20, bytes([i + 1]) * 100000)
            disk.flush()
        disk.discard(0, 1 << 20)
    assert qemu_check(path) == 0


@needs_qemu
def test_lazy_image_cut_off_after_a_flush_is_repaired_when_it_is_opened(
    path: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.qcow2"
    with make(path, lazy_refcounts=True) as disk:
        for i in range(8):
            disk.write(i << 20, bytes([i + 1]) * 100000)
        disk.flush()
        shutil.copy(path, cut)
    assert dirty(cut)
    assert qemu_check(cut) != 0  # refcounts are missing
    with pyvirtio.open_disk(cut, format="qcow2") as disk:
        assert all(disk.read(i << 20, 100000) == bytes([i + 1]) * 100000 for i in range(8))
        disk.write(9 << 20, b"more")
    assert qemu_check(cut) == 0


@needs_qemu
def test_lazy_image_cut_off_is_repaired_by_qemu(path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.qcow2"
    with make(path, lazy_refcounts=True) as disk:
        disk.write(5 << 20, b"q" * CLUSTER)
        disk.flush()
        shutil.copy(path, cut)
    done = subprocess.run(
        ["qemu-io", "-c", "read -P 113 5M 64k", str(cut)], capture_output=True, text=True
    )
    assert "verification failed" not in done.stdout
    assert qemu_check(cut, "-r", "all") == 0


def test_lazy_refcounts_can_be_switched_on_and_off_when_opening(path: Path) -> None:
    make(path).close()
    with pyvirtio.open_disk(path, lazy_refcounts=True) as disk:
        disk.write(0, b"a")
        disk.flush()
        assert dirty(path)
    assert not dirty(path)
    make(path, lazy_refcounts=True).close()
    with pyvirtio.open_disk(path, lazy_refcounts=False) as disk:
        disk.write(0, b"a")
        disk.flush()
        assert not dirty(path)


@needs_qemu
def test_snapshots_of_a_lazy_image(path: Path) -> None:
    with make(path, lazy_refcounts=True) as disk:
        disk.write(0, b"1" * 300000)
        disk.snapshots.create("one")
        disk.write(0, b"2" * 300000)
        disk.flush()
        disk.snapshots.apply("one")
        assert disk.read(0, 5) == b"11111"
        disk.snapshots.delete("one")
    assert qemu_check(path) == 0


def test_check_of_a_lazy_disk_in_use_finds_nothing(path: Path) -> None:
    with make(path, lazy_refcounts=True) as disk:
        disk.write(0, b"1" * 300000)
        disk.flush()
        assert disk.check().clean
        disk.write(1 << 20, b"1" * 300000)
        disk.flush()
        assert dirty(path)


# -- corruption at run time ------------------------------------------------------------------------


def damage(path: Path) -> None:
    """The second guest cluster's entry is not aligned."""
    with make(path) as disk:
        disk.write(0, b"a" * (3 * CLUSTER))
    place = l2_entry(path, 1)
    put(path, place, get(path, place) + 512)


def test_corruption_marks_the_image_and_is_told_once(path: Path) -> None:
    damage(path)
    events: list[CorruptionEvent] = []
    disk = pyvirtio.open_disk(path)
    disk.on_corruption(events.append)
    with pytest.raises(ImageError, match="unaligned"):
        disk.write(CLUSTER, b"x")
    with pytest.raises(BackendError):
        disk.write(CLUSTER, b"x")
    disk.close()
    assert get(path, 72) & 2
    (event,) = events
    assert event.fatal
    assert "unaligned" in event.message


@pytest.mark.parametrize("what", ["read", "write", "zero", "discard", "flush", "status"])
def test_corrupt_image_refuses_everything_afterwards(path: Path, what: str) -> None:
    damage(path)
    disk = pyvirtio.open_disk(path)
    with pytest.raises(ImageError):
        disk.read(CLUSTER, 1)
    requests = {
        "read": lambda: disk.read(0, 1),
        "write": lambda: disk.write(0, b"x"),
        "zero": lambda: disk.write_zeroes(0, CLUSTER),
        "discard": lambda: disk.discard(0, CLUSTER),
        "flush": disk.flush,
        "status": lambda: disk.block_status(0, 1),
    }
    with pytest.raises(BackendError, match="unaligned"):
        requests[what]()
    disk.close()


def test_listener_may_use_the_disk(path: Path) -> None:
    damage(path)
    disk = pyvirtio.open_disk(path)
    refusals = []

    def listen(event: CorruptionEvent) -> None:
        with pytest.raises(BackendError) as refusal:
            disk.read(0, 1)
        refusals.append(refusal)

    disk.on_corruption(listen)
    with pytest.raises(ImageError):
        disk.read(CLUSTER, 1)
    disk.close()
    assert len(refusals) == 1


def test_corruption_met_read_only_refuses_only_that_request(path: Path) -> None:
    damage(path)
    before = path.read_bytes()
    events: list[CorruptionEvent] = []
    with pyvirtio.open_disk(path, read_only=True) as disk:
        disk.on_corruption(events.append)
        for _ in range(2):
            with pytest.raises(ImageError):
                disk.read(CLUSTER, 1)
        assert disk.read(0, 1) == b"a"
    assert [event.fatal for event in events] == [False]
    assert path.read_bytes() == before


def test_corruption_of_a_backing_file_leaves_the_overlay_usable(path: Path, tmp_path: Path) -> None:
    damage(path)
    overlay = tmp_path / "overlay.qcow2"
    with pyvirtio.create_disk(
        overlay, 64 << 20, backing_file=str(path), backing_fmt="qcow2"
    ) as disk:
        with pytest.raises(ImageError):
            disk.read(CLUSTER, 1)
        disk.write(0, b"still writable")
        assert disk.read(0, 5) == b"still"
    assert not get(overlay, 72) & 2


@needs_qemu
def test_image_that_we_marked_corrupt_is_refused_by_qemu(path: Path) -> None:
    damage(path)
    disk = pyvirtio.open_disk(path)
    with pytest.raises(ImageError):
        disk.read(CLUSTER, 1)
    disk.close()
    done = subprocess.run(["qemu-io", "-c", "write 0 1k", str(path)], capture_output=True)
    assert b"Image is corrupt" in done.stdout + done.stderr


@needs_qemu
def test_image_that_qemu_marked_corrupt_is_refused(path: Path) -> None:
    damage(path)
    subprocess.run(["qemu-io", "-c", "write 64k 1k", str(path)], capture_output=True)
    with pytest.raises(ImageError, match="Image is corrupt"):
        pyvirtio.open_disk(path)


def test_version_2_image_has_no_place_for_the_mark(path: Path) -> None:
    make(path, compat="0.10").close()
    with pyvirtio.open_disk(path) as disk:
        disk.write(0, b"a" * (3 * CLUSTER))
    put(path, l2_entry(path, 1), 512 | COPIED)
    before = path.read_bytes()
    disk = pyvirtio.open_disk(path)
    with pytest.raises(ImageError):
        disk.read(CLUSTER, 1)
    with pytest.raises(BackendError):
        disk.write(0, b"x")
    disk.close()
    assert path.read_bytes() == before
