"""Rewriting the header: what is kept, what fits, and what a cut leaves."""

from __future__ import annotations

import struct

import pytest

import pyvirtio
from pyvirtio import MemoryDisk
from pyvirtio.qcow2 import Qcow2Disk
from pyvirtio.qcow2.header import packed_extensions, read_header
from pyvirtio.qcow2.header_update import update_header
from pyvirtio.qcow2.layout import ExtensionType
from support.peers import requires
from support.qemu import qemu_check, qemu_create, qemu_img, qemu_img_json


class RecordingDisk(MemoryDisk):
    """Memory that remembers every write, and where flushes came between them."""

    def __init__(self) -> None:
        super().__init__(growable=True)
        self.writes: list[tuple[int, bytes] | None] = []

    def _writev(self, offset, views, length):
        self.writes.append((offset, b"".join(views)))
        super()._writev(offset, views, length)

    def _flush(self):
        self.writes.append(None)


def make(**options):
    file = RecordingDisk()
    return file, pyvirtio.create_disk(file, 1 << 20, backing=lambda _: None, **options)


def names(file: MemoryDisk) -> tuple[str | None, str | None]:
    header = read_header(file)
    return header.backing_file, header.backing_format


def after_cuts(before: bytes, writes):
    """Every state that a cut may leave: sectors of unflushed writes, each there or not."""
    image = bytearray(before)
    epoch: list[tuple[int, bytes]] = []
    for write in [*writes, None]:
        if write is not None:
            offset, data = write
            for start in range(offset - offset % 512, offset + len(data), 512):
                low, high = max(start, offset), min(start + 512, offset + len(data))
                epoch.append((low, data[low - offset : high - offset]))
            continue
        for present in range(1 << len(epoch)):
            state = bytearray(image)
            for i, (at, data) in enumerate(epoch):
                if present >> i & 1:
                    state[at : at + len(data)] = data
            yield state
        for at, data in epoch:
            image[at : at + len(data)] = data
        epoch = []


NAMES = ["a", "b" * 200, "c" * 360, "d" * 500, "e" * 1023]


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("old", [None, *NAMES])
@pytest.mark.parametrize("new", [None, *NAMES])
def test_a_cut_while_the_backing_file_changes_leaves_the_old_or_the_new_header(compat, old, new):
    options = {} if old is None else {"backing_file": old, "backing_fmt": "raw"}
    file, disk = make(cluster_size=4096, compat=compat, **options)
    disk.flush()
    file.writes.clear()
    before = file.getvalue()
    disk.change_backing_file(new, new and "qcow2")
    expected = {(old, old and "raw"), (new, new and "qcow2")}
    found = {names(MemoryDisk(state)) for state in after_cuts(before, file.writes)}
    assert found == expected
    assert names(file) == (new, new and "qcow2")


def test_many_changes_in_a_row_all_stay_readable():
    file, disk = make(cluster_size=4096)
    for i in range(40):
        name = chr(97 + i % 26) * (i * 97 % 1023 + 1)
        disk.change_backing_file(name, "raw")
        assert names(file) == (name, "raw")


def test_a_name_that_has_no_room_beside_the_old_one_is_written_all_the_same():
    file, disk = make(cluster_size=1024, backing_file="x" * 600, backing_fmt="raw")
    disk.change_backing_file("y" * 601, "raw")
    assert names(file) == ("y" * 601, "raw")


def test_a_name_that_does_not_fit_the_cluster_is_refused_and_nothing_changes():
    file, disk = make(cluster_size=512, backing_file="x", backing_fmt="raw")
    with pytest.raises(pyvirtio.ImageError, match="does not fit"):
        disk.change_backing_file("y" * 500, "raw")
    assert names(file) == ("x", "raw")
    disk.write(0, b"still writable..".ljust(512))


@pytest.mark.parametrize(
    ("name", "format"), [("x" * 1024, None), ("x", "f" * 16), (None, "raw"), ("", "raw")]
)
def test_names_that_the_header_cannot_hold_are_refused(name, format):
    _, disk = make(cluster_size=65536)
    with pytest.raises(ValueError, match="acking"):
        disk.change_backing_file(name, format)


def test_unknown_extensions_and_header_fields_are_kept():
    file, disk = make(cluster_size=4096)
    disk.close()
    header = read_header(file) if not file.closed else None
    assert header is None
    image = bytearray(file.getvalue())
    image[100:104] = struct.pack(">I", 120)
    extensions = struct.pack(">II", 0x12345678, 700) + bytes(range(100)) * 7 + bytes(4)
    tail = b"unknown!" + extensions + bytes(8)
    image[112 : 112 + len(tail)] = tail
    file = MemoryDisk(len(image), growable=True)
    file.write(0, image)
    disk = Qcow2Disk.open(file)
    for name in NAMES:
        disk.change_backing_file(name, "raw")
        header = read_header(file)
        assert header.unknown_fields == b"unknown!"
        assert header.unknown_extensions == [(0x12345678, bytes(range(100)) * 7)]
        assert header.backing_file == name


def test_a_change_of_fields_alone_is_one_write_into_the_first_sector():
    file, disk = make(cluster_size=65536, backing_file="x" * 900, backing_fmt="raw")
    disk.flush()
    file.writes.clear()
    with disk._metadata.exclusive():
        file.writes.clear()
        update_header(disk._metadata, compatible_features=1)
        written = [write for write in file.writes if write is not None]
    assert [(offset, len(data)) for offset, data in written] == [(0, 512)]
    assert read_header(file).compatible_features == 1


def test_a_read_only_image_keeps_its_header(tmp_path):
    path = tmp_path / "a.qcow2"
    pyvirtio.create_disk(path, 1 << 20).close()
    with (
        pyvirtio.open_disk(path, read_only=True) as disk,
        pytest.raises(pyvirtio.BackendError, match="read-only"),
    ):
        disk.change_backing_file("b")


def test_without_its_backing_file_the_image_reads_zeroes_there(tmp_path):
    (tmp_path / "base").write_bytes(b"\x11" * 65536)
    path = tmp_path / "a.qcow2"
    disk = pyvirtio.create_disk(path, 65536, backing_file="base", backing_fmt="raw")
    with disk:
        disk.change_backing_file(None)
        former = disk.replace_backing(None)
        assert former is not None
        former.close()
        assert disk.read(0, 65536) == bytes(65536)
        assert disk.block_status(0, 65536).zero


@requires("qemu-img")
@pytest.mark.parametrize("name", NAMES)
def test_qemu_reads_our_headers_and_we_read_its(tmp_path, name):
    path = tmp_path / "a.qcow2"
    qemu_create(path, 1 << 20, cluster_size=4096)
    with pyvirtio.open_disk(path) as disk:
        disk.change_backing_file("q" * 400, "qcow2")
        disk.change_backing_file(name, "raw")
    found = qemu_img_json("info", path)
    assert found["backing-filename"] == name
    assert found["backing-filename-format"] == "raw"
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "other", "-F", "qcow2", path)
    with pyvirtio.open_disk(path, backing=lambda _: None) as disk:
        assert disk.backing_file == "other"
        disk.change_backing_file(None)
    qemu_check(path)


def test_a_header_of_two_sectors_is_back_in_the_plain_order_after_a_change():
    file, disk = make(cluster_size=65536, backing_file="b" * 300, backing_fmt="raw")
    for name in ("c" * 300, "d" * 500, "e" * 300):
        disk.change_backing_file(name, "raw")
        header = read_header(file)
        packed = header.pack()
        assert file.read(0, len(packed)) == packed


def test_the_bitmaps_come_behind_the_feature_names_as_in_other_programs_headers(tmp_path):
    path = tmp_path / "a.qcow2"
    for name in ("one", "two"):
        with (
            pyvirtio.open_disk(path)
            if name == "two"
            else pyvirtio.create_disk(path, 1 << 20) as disk
        ):
            disk.bitmaps.add(name)
        cluster = path.read_bytes()[:65536]
        start = int.from_bytes(cluster[100:104])
        kinds = [kind for kind, _, _ in packed_extensions(cluster, start, len(cluster))]
        assert kinds == [ExtensionType.FEATURE_NAMES, ExtensionType.BITMAPS]
    with pyvirtio.open_disk(path) as disk:
        assert len(disk.bitmaps) == 2
