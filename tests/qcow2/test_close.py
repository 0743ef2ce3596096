"""Closing an image."""

from __future__ import annotations

import threading
import time

import pytest

import pyvirtio
from support.filters import HoldingDisk


def test_second_close_does_nothing(tmp_path):
    disk = pyvirtio.create_disk(tmp_path / "image.qcow2", 1 << 20)
    disk.close()
    disk.close()
    assert disk.closed


def test_overlay_closes_over_a_base_that_is_closed_already(tmp_path):
    base = pyvirtio.create_disk(tmp_path / "base.qcow2", 1 << 20)
    overlay = pyvirtio.create_disk(
        tmp_path / "overlay.qcow2",
        1 << 20,
        backing_file="base.qcow2",
        backing_fmt="qcow2",
        backing=lambda reference: base,
    )
    base.close()
    overlay.close()
    assert overlay.closed


def test_two_threads_may_close(tmp_path):
    disk = pyvirtio.create_disk(tmp_path / "image.qcow2", 1 << 20)
    disk.write(0, b"x" * 100_000)
    errors = []

    def close():
        try:
            disk.close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=close) for _ in range(4)]
    with disk._metadata.gate.exclusive():
        for thread in threads:
            thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(60)
    assert not errors
    assert_image_holds(tmp_path / "image.qcow2", b"x" * 100_000)


def assert_image_holds(path, data):
    with pyvirtio.open_disk(path, read_only=True) as disk:
        assert disk.read(0, len(data)) == data
        assert disk.check().clean


@pytest.mark.parametrize("read_only", [False, True])
def test_closing_waits_for_a_read_that_is_under_way(tmp_path, read_only):
    path = tmp_path / "image.qcow2"
    with pyvirtio.create_disk(path, 1 << 20) as disk:
        disk.write(0, b"x" * 131072)
    below = HoldingDisk(pyvirtio.FileDisk(path, read_only=read_only, growable=True), smallest=4096)
    disk = pyvirtio.open_disk(below, format="qcow2", read_only=read_only)
    disk.read(0, 1)
    below.hold = "read"
    found = []
    reader = threading.Thread(target=lambda: found.append(disk.read(0, 131072)), daemon=True)
    reader.start()
    assert below.arrived.wait(60)
    closer = threading.Thread(target=disk.close, daemon=True)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    below.go.set()
    closer.join(60)
    reader.join(60)
    assert found == [b"x" * 131072]
    assert disk.closed


def test_closing_waits_for_a_read_of_a_snapshot_that_is_under_way(tmp_path):
    path = tmp_path / "image.qcow2"
    with pyvirtio.create_disk(path, 1 << 20) as disk:
        disk.write(0, b"x" * 131072)
        disk.snapshots.create("one")
    below = HoldingDisk(pyvirtio.FileDisk(path, growable=True), smallest=4096)
    disk = pyvirtio.open_disk(below, format="qcow2")
    view = disk.snapshots.open("one")
    view.read(0, 1)
    below.hold = "read"
    found = []
    reader = threading.Thread(target=lambda: found.append(view.read(0, 131072)), daemon=True)
    reader.start()
    assert below.arrived.wait(60)
    closer = threading.Thread(target=disk.close, daemon=True)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    below.go.set()
    closer.join(60)
    reader.join(60)
    assert found == [b"x" * 131072]


def test_a_request_that_is_late_meets_a_closed_disk(tmp_path):
    """It was let through by the disk, which is closed before it comes to the tables."""
    disk = pyvirtio.create_disk(tmp_path / "image.qcow2", 1 << 20)
    disk.write(0, b"x" * 4096)
    disk.close()
    for late in (
        lambda: disk.reader.read_stored(0, [memoryview(bytearray(512))], 512),
        lambda: disk.reader.read(0, [memoryview(bytearray(512))], 512),
        lambda: disk._writer.write_in_place(0, [memoryview(bytes(512))], 512),
        lambda: disk._writer.write(0, [memoryview(bytes(512))], 512),
    ):
        with pytest.raises(ValueError, match="the disk is closed"):
            late()


@pytest.mark.parametrize(
    "use",
    [
        lambda disk: disk.read(0, 1),
        lambda disk: disk.write(0, b"x"),
        lambda disk: disk.write_zeroes(0, 512),
        lambda disk: disk.discard(0, 65536),
        lambda disk: disk.write_compressed(0, [bytes(65536)]),
        lambda disk: disk.flush(),
        lambda disk: disk.block_status(0, 512),
        lambda disk: list(disk.extents()),
        lambda disk: disk.truncate(2 << 20),
        lambda disk: disk.info(),
        lambda disk: disk.check(),
        lambda disk: disk.amend(size=2 << 20),
        lambda disk: disk.amend(lazy_refcounts=True),
        lambda disk: disk.make_empty(),
        lambda disk: disk.change_backing_file(None),
        lambda disk: disk.reopen(read_only=True),
        lambda disk: disk.invalidate(),
        lambda disk: disk.flush_to_os(),
        lambda disk: disk.drain(),
        lambda disk: disk.snapshots.create("x"),
        lambda disk: disk.snapshots.open("kept"),
        lambda disk: disk.snapshots.delete("kept"),
        lambda disk: disk.snapshots.apply("kept"),
        lambda disk: disk.snapshots.rename("kept", "x"),
        lambda disk: disk.snapshots.draft(),
        lambda disk: disk.bitmaps.add("x"),
        lambda disk: disk.bitmaps.remove("b"),
        lambda disk: disk.bitmaps.clear("b"),
        lambda disk: disk.vmstate.read(0, 10),
        lambda disk: disk.vmstate.write(0, b"x"),
        lambda disk: disk.vmstate.discard(),
    ],
)
def test_a_closed_image_says_that_it_is_closed(tmp_path, use):
    disk = pyvirtio.create_disk(tmp_path / "image.qcow2", 1 << 20)
    disk.snapshots.create("kept")
    disk.bitmaps.add("b")
    disk.close()
    with pytest.raises(ValueError, match="the disk is closed"):
        use(disk)
