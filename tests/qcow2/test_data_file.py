"""External data files, raw and not: alone, and with QEMU's tools at the other end."""

import json
import random
import shutil
import struct
import subprocess

import pytest

import pyvirtio
from pyvirtio.backend.memory import MemoryDisk
from pyvirtio.errors import BackendError, ImageError, UnsupportedError
from pyvirtio.qcow2 import Qcow2Disk
from pyvirtio.qcow2 import create as create_image

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="QEMU's tools are absent"
)
CLUSTER = 65536
MIB = 1 << 20


def qemu(*args, fails=False):
    result = subprocess.run(args, capture_output=True, text=True)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr


def joined(items):
    """(start, length, allocated, data, zero, offset) with runs that continue each other as one.

    QEMU looks for holes in the data file as well: where there is data, ``zero`` says nothing here.
    """
    runs = []
    for start, length, allocated, data, zero, offset in items:
        state = (allocated, data, zero and not data)
        if runs and runs[-1][2] == state:
            last = runs[-1][3]
            if offset == (None if last is None else last + runs[-1][1]):
                runs[-1][1] += length
                continue
        runs.append([start, length, state, offset])
    return runs


def qemu_map(path):
    text = qemu("qemu-img", "map", "--output=json", str(path))
    return joined(
        (e["start"], e["length"], e["present"], e["data"], e["zero"], e.get("offset"))
        for e in json.loads(text)
    )


def our_map(disk):
    def items():
        offset = 0
        for e in disk.extents():
            yield offset, e.length, e.allocated, e.data, e.zero, e.host_offset
            offset += e.length

    return joined(items())


@pytest.fixture(params=[False, True], ids=["plain", "raw"])
def raw(request):
    return request.param


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Relative names of data files are relative to the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def image(tmp_path):
    return tmp_path / "a.qcow2"


@pytest.fixture
def disk(image, raw):
    with pyvirtio.create_disk(image, 4 * MIB, data_file="a.data", data_file_raw=raw) as disk:
        yield disk


def l2_entries(path):
    """The first L2 table's place in the file, and its entries."""
    data = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", data, 40)
    table = struct.unpack_from(">Q", data, l1)[0] & 0x00FF_FFFF_FFFF_FE00
    return table, struct.unpack_from(">64Q", data, table)


def poke_l2(path, index, entry):
    table, _ = l2_entries(path)
    with path.open("r+b") as file:
        file.seek(table + 8 * index)
        file.write(struct.pack(">Q", entry))


def poke(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# -- where the data is ---------------------------------------------------------------------------


def test_the_data_lies_in_the_data_file_where_the_guest_wrote_it(disk, image):
    disk.write(3 * CLUSTER + 5, b"hello")
    disk.write(0, b"first")
    disk.flush()
    data = (image.parent / "a.data").read_bytes()
    assert data[3 * CLUSTER + 5 :][:5] == b"hello"
    assert data[:5] == b"first"
    assert image.stat().st_size < 8 * CLUSTER


def test_cluster_0_is_allocated_at_offset_0(disk, image):
    disk.write(0, b"x" * CLUSTER)
    disk.flush()
    assert l2_entries(image)[1][0] == 1 << 63
    assert disk.read(0, 2) == b"xx"
    extent = disk.block_status(10, 100)
    assert (extent.data, extent.host_offset) == (True, 10)
    assert extent.file is disk.children["data-file"]


def test_cluster_0_can_be_discarded_and_written_again(disk):
    disk.write(0, b"x" * CLUSTER)
    disk.discard(0, CLUSTER)
    assert disk.read(0, CLUSTER) == bytes(CLUSTER)
    assert disk.block_status(0, CLUSTER).zero
    disk.write(7, b"y")
    assert disk.read(0, 9) == bytes(7) + b"y" + bytes(1)
    assert disk.check().clean


def test_old_contents_of_the_data_file_do_not_show_around_a_first_write(tmp_path):
    data = MemoryDisk(4 * MIB)
    file = MemoryDisk(0, growable=True)
    pyvirtio.qcow2.create(file, 4 * MIB, data_file="x", data_disk=data)
    data.write(0, b"\xaa" * 4 * MIB)
    with Qcow2Disk.open(file, data_file=data) as disk:
        disk.write(CLUSTER + 512, b"new")
        assert disk.read(CLUSTER, 1024) == bytes(512) + b"new" + bytes(509)


def test_every_entry_has_the_copied_flag(disk, image):
    disk.write(2 * CLUSTER, b"x" * 3 * CLUSTER)
    disk.flush()
    entries = l2_entries(image)[1]
    assert entries[2:5] == tuple(1 << 63 | i * CLUSTER for i in (2, 3, 4))


def test_guest_clusters_have_no_refcounts(disk):
    before = disk.check().image_end_offset
    disk.write(0, b"x" * 2 * MIB)
    assert disk.check().image_end_offset <= before + CLUSTER
    assert disk.check().clean


def test_a_data_file_is_not_made_longer_than_the_disk(tmp_path):
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, CLUSTER + 1024, data_file="d") as disk:
        disk.write(CLUSTER + 512, b"x" * 512)
        assert disk.read(CLUSTER, 1024) == bytes(512) + b"x" * 512
    assert (tmp_path / "d").stat().st_size == CLUSTER + 1024


# -- zeroes and discards -------------------------------------------------------------------------


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_reach_a_raw_data_file(tmp_path, unmap):
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, MIB, data_file="d", data_file_raw=True) as disk:
        disk.write(0, b"x" * MIB)
        disk.write_zeroes(CLUSTER, 2 * CLUSTER, unmap=unmap)
        disk.write_zeroes(5 * CLUSTER + 100, 50, unmap=unmap)
        expected = disk.read(0, MIB)
    assert (tmp_path / "d").read_bytes() == expected


def test_discards_reach_a_raw_data_file(tmp_path):
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, MIB, data_file="d", data_file_raw=True) as disk:
        disk.write(0, b"x" * MIB)
        disk.discard(0, 4 * CLUSTER)
        assert disk.read(0, MIB) == bytes(4 * CLUSTER) + b"x" * (MIB - 4 * CLUSTER)
    assert (tmp_path / "d").read_bytes() == bytes(4 * CLUSTER) + b"x" * (MIB - 4 * CLUSTER)


def test_a_zero_write_that_a_raw_data_file_refuses_changes_nothing(tmp_path):
    class Refusing(MemoryDisk):
        def _write_zeroes(self, offset, length, unmap):
            raise BackendError(5, "no")

    data, file = Refusing(MIB), MemoryDisk(0, growable=True)
    pyvirtio.qcow2.create(file, MIB, data_file="x", data_file_raw=True, data_disk=data)
    with Qcow2Disk.open(file, data_file=data) as disk:
        disk.write(0, b"x" * CLUSTER)
        with pytest.raises(BackendError):
            disk.write_zeroes(0, CLUSTER)
        assert disk.read(0, 2) == b"xx"


def test_a_discard_gives_space_back_in_the_data_file(tmp_path):
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, MIB, data_file="d") as disk:
        disk.write(0, b"x" * MIB)
        disk.flush()
        full = (tmp_path / "d").stat().st_blocks
        disk.discard(0, MIB)
        disk.flush()
        assert (tmp_path / "d").stat().st_blocks < full


# -- flushing ------------------------------------------------------------------------------------


def test_the_data_file_is_flushed_before_an_entry_is_written():
    order = []

    class Noting(MemoryDisk):
        def __init__(self, name, size, **options):
            super().__init__(size, **options)
            self.name = name

        def _flush(self):
            order.append((self.name, "flush"))

        def _writev(self, offset, views, length):
            order.append((self.name, offset))
            super()._writev(offset, views, length)

    data, file = Noting("data", MIB), Noting("file", 0, growable=True)
    pyvirtio.qcow2.create(file, MIB, data_file="x", data_disk=data)
    with Qcow2Disk.open(file, data_file=data) as disk:
        disk.write(0, b"x" * CLUSTER)
        disk.flush()
        order.clear()
        disk.write(CLUSTER, b"y" * CLUSTER)
        disk.flush()
        table = disk._metadata.tables.l2_offset(0)
    entry = next(i for i, (n, what) in enumerate(order) if n == "file" and what == table)
    assert order.index(("data", CLUSTER)) < order.index(("data", "flush")) < entry


def test_a_flush_without_changes_of_metadata_flushes_the_data_file():
    flushed = []

    class Noting(MemoryDisk):
        def _flush(self):
            flushed.append(True)

    data, file = Noting(MIB), MemoryDisk(0, growable=True)
    pyvirtio.qcow2.create(file, MIB, data_file="x", data_file_raw=True, data_disk=data)
    with Qcow2Disk.open(file, data_file=data) as disk:
        disk.flush()
        flushed.clear()
        disk.write(0, b"x")
        disk.flush()
        assert flushed


# -- opening -------------------------------------------------------------------------------------


def test_the_data_file_is_found_in_the_current_folder_as_in_qemu(tmp_path):
    (tmp_path / "folder").mkdir()
    pyvirtio.create_disk("folder/a.qcow2", MIB, data_file="d").close()
    assert (tmp_path / "d").stat().st_size == MIB
    with pyvirtio.open_disk(tmp_path / "folder/a.qcow2") as disk:
        assert disk.children["data-file"].size == MIB


def test_an_option_replaces_the_data_file_named(tmp_path):
    pyvirtio.create_disk(tmp_path / "a.qcow2", MIB, data_file="d").close()
    (tmp_path / "d").rename(tmp_path / "e")
    with pytest.raises(BackendError):
        pyvirtio.open_disk(tmp_path / "a.qcow2")
    with pyvirtio.open_disk(tmp_path / "a.qcow2", data_file=tmp_path / "e") as disk:
        disk.write(0, b"x")
    assert (tmp_path / "e").read_bytes()[:1] == b"x"


def test_the_policy_decides_about_the_data_file(tmp_path):
    pyvirtio.create_disk(tmp_path / "a.qcow2", MIB, data_file="d").close()
    seen = []

    def policy(reference):
        seen.append((reference.name, reference.role))

    with pyvirtio.open_disk(tmp_path / "a.qcow2", backing=policy) as disk:
        assert disk.read(0, 10) == bytes(10)
        with pytest.raises(ImageError, match="which was not opened"):
            disk.write(0, b"x")
        assert disk.check().clean
    assert seen == [("d", "data-file")]


def test_data_in_a_file_that_was_not_opened_cannot_be_read(disk, image):
    disk.write(0, b"x")
    disk.close()
    declined = pyvirtio.open_disk(image, backing=lambda reference: None, read_only=True)
    with declined, pytest.raises(ImageError, match="which was not opened"):
        declined.read(0, 1)


def test_a_data_file_for_an_image_without_one_is_refused(tmp_path):
    pyvirtio.create_disk(tmp_path / "a.qcow2", MIB).close()
    with pytest.raises(ValueError, match="'data-file' can only be set for images with an external"):
        pyvirtio.open_disk(tmp_path / "a.qcow2", data_file=tmp_path / "e")


def test_an_image_without_the_data_files_name_needs_the_option(tmp_path):
    path = tmp_path / "a.qcow2"
    pyvirtio.create_disk(path, MIB).close()
    poke(path, 72, struct.pack(">Q", 4))
    with pytest.raises(ImageError, match="'data-file' is required for this image"):
        pyvirtio.open_disk(path)
    pyvirtio.open_disk(path, data_file=MemoryDisk(MIB)).close()


def test_the_raw_bit_without_a_data_file_is_refused(tmp_path):
    path = tmp_path / "a.qcow2"
    pyvirtio.create_disk(path, MIB).close()
    poke(path, 88, struct.pack(">Q", 2))
    with pytest.raises(ImageError, match="data-file-raw requires a data file"):
        pyvirtio.open_disk(path, read_only=True)


def test_a_data_file_that_is_too_short_and_cannot_grow_is_refused(tmp_path):
    path = tmp_path / "a.qcow2"
    pyvirtio.create_disk(path, MIB, data_file="d").close()
    with pytest.raises(ImageError, match="shorter than the disk"):
        pyvirtio.open_disk(path, data_file=MemoryDisk(512))


def test_an_image_that_names_itself_as_its_data_file_is_refused(tmp_path):
    path = tmp_path / "a.qcow2"
    pyvirtio.create_disk(path, MIB, data_file="b.qcow2").close()
    (tmp_path / "b.qcow2").unlink()
    (tmp_path / "b.qcow2").symlink_to(path)
    with pytest.raises(ImageError, match="loop"):
        pyvirtio.open_disk(path)


def test_unknown_autoclear_bits_are_cleared_and_the_raw_bit_is_kept(tmp_path):
    path = tmp_path / "a.qcow2"
    pyvirtio.create_disk(path, MIB, data_file="d", data_file_raw=True).close()
    poke(path, 88, struct.pack(">Q", 2 | 1 << 40))
    pyvirtio.open_disk(path).close()
    assert path.read_bytes()[88:96] == struct.pack(">Q", 2)


# -- creating ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_file_raw": True}, "data-file-raw requires data-file"),
        (
            {"data_file": "d", "data_file_raw": True, "backing_file": "b", "backing_fmt": "raw"},
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        (
            {"data_file": "d", "compat": "0.10"},
            "External data files are only supported with compatibility level 1.1 and above",
        ),
        ({"data_file": "a.qcow2"}, "cannot be its own data file"),
        ({"data_file": ""}, "Invalid data file name"),
    ],
)
def test_what_cannot_be_created_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pyvirtio.create_disk(tmp_path / "a.qcow2", MIB, **options)


def test_a_raw_data_file_is_mapped_from_the_start(tmp_path):
    with pyvirtio.create_disk(
        tmp_path / "a", 40 * MIB, data_file="d", data_file_raw=True, cluster_size=4096
    ) as disk:
        extents = list(disk.extents())
        assert [(e.data, e.length, e.host_offset) for e in extents] == [(True, 40 * MIB, 0)]
        assert disk.check().clean


# -- what cannot be --------------------------------------------------------------------------------


def test_internal_snapshots_are_refused(disk):
    for act in (disk.snapshots.create, disk.snapshots.apply, disk.snapshots.delete):
        with pytest.raises(UnsupportedError, match="snapshot 'x': -95"):
            act("x")


def test_an_entry_for_another_place_is_refused(disk, image):
    disk.write(0, b"x" * 4 * CLUSTER)
    disk.close()
    poke_l2(image, 2, 1 << 63 | 5 * CLUSTER)
    with pyvirtio.open_disk(image) as disk:
        with pytest.raises(ImageError, match="does not match guest cluster offset: 0x20000"):
            disk.read(2 * CLUSTER, 1)
        with pytest.raises(ImageError, match="does not match guest cluster offset: 0x20000"):
            disk.write(0, b"y" * 4 * CLUSTER)
        with pytest.raises(ImageError, match="does not match guest cluster offset: 0x20000"):
            disk.write_zeroes(2 * CLUSTER, CLUSTER)


def test_cluster_5_cannot_lie_at_offset_0(disk, image):
    disk.write(0, b"x" * 6 * CLUSTER)
    disk.close()
    poke_l2(image, 5, 1 << 63)
    with pyvirtio.open_disk(image) as disk, pytest.raises(ImageError, match="does not match"):
        disk.read(5 * CLUSTER, 1)


def test_compressed_entries_are_refused(disk, image):
    disk.write(0, b"x" * 4 * CLUSTER)
    disk.close()
    poke_l2(image, 3, 1 << 62 | 5 * CLUSTER)
    with pyvirtio.open_disk(image) as disk:
        with pytest.raises(ImageError, match="Compressed cluster entry found in image with ext"):
            disk.read(3 * CLUSTER, 1)
        assert disk.check().corruptions == 1


def test_entries_without_the_copied_flag_are_read_and_rewritten(disk, image):
    disk.write(0, b"x" * 4 * CLUSTER)
    disk.close()
    poke_l2(image, 2, 2 * CLUSTER)
    with pyvirtio.open_disk(image) as disk:
        assert disk.check().corruptions == 1
        assert disk.read(2 * CLUSTER, 2) == b"xx"
        disk.write(2 * CLUSTER + 1, b"y")
        assert disk.read(2 * CLUSTER, 3) == b"xyx"
        assert disk.check().clean


def test_a_plain_image_does_not_take_offset_0_for_data(tmp_path):
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, MIB) as disk:
        disk.write(CLUSTER, b"x")
    poke_l2(path, 0, 1 << 63)
    with pyvirtio.open_disk(path) as disk:
        assert disk.read(0, 4) == bytes(4)
        disk.write(0, b"y" * CLUSTER)
    assert path.read_bytes()[:4] == b"QFI\xfb"


# -- sizes -----------------------------------------------------------------------------------------


def test_growing_makes_the_data_file_as_long(disk, image, raw):
    disk.write(4 * MIB - 1, b"x")
    disk.truncate(6 * MIB)
    assert (image.parent / "a.data").stat().st_size == 6 * MIB
    assert disk.read(4 * MIB, 2 * MIB) == bytes(2 * MIB)
    assert disk.block_status(4 * MIB, 2 * MIB).data == raw
    assert disk.check().clean


def test_what_others_left_behind_the_end_does_not_show_after_growing(disk, image):
    disk.close()
    with (image.parent / "a.data").open("r+b") as file:
        file.seek(4 * MIB)
        file.write(b"z" * MIB)
    with pyvirtio.open_disk(image) as disk:
        disk.truncate(5 * MIB)
        assert disk.read(4 * MIB, MIB) == bytes(MIB)


def test_info_names_the_data_file(disk, raw):
    specific = disk.info().specific
    assert specific["data-file"] == "a.data"
    assert specific["data-file-raw"] is raw


# -- both ways -------------------------------------------------------------------------------------


def random_writes(seed, count=60):
    """(kind, offset, length, value) of writes inside 4 MiB; zeroes and discards are aligned."""
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.choice(["write", "write", "zero", "unmap", "discard"])
        if kind == "write":
            offset = rng.randrange(0, 4 * MIB, 512)
            length = min(rng.randrange(512, 5 * CLUSTER, 512), 4 * MIB - offset)
        else:
            offset = rng.randrange(64) * CLUSTER
            length = min(rng.randrange(1, 6) * CLUSTER, 4 * MIB - offset)
        yield kind, offset, length, rng.randrange(1, 256)


def run_random_writes(disk, seed, model):
    for kind, offset, length, value in random_writes(seed):
        if kind == "write":
            disk.write(offset, bytes([value]) * length)
            model[offset : offset + length] = bytes([value]) * length
            continue
        if kind == "discard":
            disk.discard(offset, length)
        else:
            disk.write_zeroes(offset, length, unmap=kind == "unmap")
        model[offset : offset + length] = bytes(length)


@pytest.mark.parametrize("seed", range(3))
def test_random_writes_match_a_model(disk, image, raw, seed):
    model = bytearray(4 * MIB)
    run_random_writes(disk, seed, model)
    assert disk.read(0, 4 * MIB) == model
    assert disk.check().clean
    disk.close()
    if raw:
        assert (image.parent / "a.data").read_bytes() == model
    with pyvirtio.open_disk(image) as disk:
        assert disk.read(0, 4 * MIB) == model


@needs_qemu
def test_qemu_reads_what_we_wrote(disk, image, tmp_path):
    model = bytearray(4 * MIB)
    run_random_writes(disk, 7, model)
    ours = our_map(disk)
    disk.close()
    assert "No errors" in qemu("qemu-img", "check", str(image))
    assert qemu_map(image) == ours
    (tmp_path / "model").write_bytes(model)
    qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(image), str(tmp_path / "model"))


@needs_qemu
def test_we_read_what_qemu_wrote(tmp_path, raw):
    path = tmp_path / "q.qcow2"
    flag = "on" if raw else "off"
    options = f"data_file={tmp_path}/q.data,data_file_raw={flag}"
    qemu("qemu-img", "create", "-f", "qcow2", "-o", options, str(path), "4M")
    commands, model = ["-c", "write -P 3 0 64k"], bytearray(4 * MIB)
    model[:CLUSTER] = b"\3" * CLUSTER
    for kind, offset, length, value in random_writes(9):
        word = {"write": f"write -P {value}", "zero": "write -z", "unmap": "write -z -u"}
        commands += ["-c", f"{word.get(kind, 'discard')} {offset} {length}"]
        contents = bytes([value]) * length if kind == "write" else bytes(length)
        model[offset : offset + length] = contents
    qemu("qemu-io", "-d", "unmap", *commands, str(path))
    theirs = qemu_map(path)
    with pyvirtio.open_disk(path) as disk:
        assert disk.read(0, 4 * MIB) == model
        assert our_map(disk) == theirs
        assert disk.check().clean
        assert disk.children["data-file"].filename == f"{tmp_path}/q.data"


@needs_qemu
def test_qemu_says_the_same_of_the_image(disk, image):
    ours = disk.info().specific
    disk.close()
    theirs = json.loads(qemu("qemu-img", "info", "--output=json", str(image)))
    assert dict(ours) == theirs["format-specific"]["data"]


@needs_qemu
def test_qemu_refuses_and_counts_the_same_damage(disk, image):
    disk.write(0, b"x" * 8 * CLUSTER)
    disk.close()
    poke_l2(image, 2, 2 * CLUSTER)
    poke_l2(image, 3, 1 << 62 | CLUSTER)
    poke_l2(image, 4, 1 << 63 | 9 * CLUSTER)
    with pyvirtio.open_disk(image, read_only=True) as disk:
        result = disk.check()
    text = subprocess.run(
        ["qemu-img", "check", "--output=json", str(image)], capture_output=True, text=True
    ).stdout
    assert json.loads(text)["corruptions"] == result.corruptions


@needs_qemu
def test_qemu_reads_an_image_that_we_grew(disk, image):
    disk.write(4 * MIB - 5, b"x" * 5)
    disk.truncate(7 * MIB + 512)
    disk.write(7 * MIB, b"y" * 512)
    ours = our_map(disk)
    disk.close()
    assert qemu_map(image) == ours
    assert "No errors" in qemu("qemu-img", "check", str(image))


@pytest.mark.parametrize("seed", range(3))
def test_random_writes_match_a_model_with_subclusters(tmp_path, raw, seed):
    model = bytearray(4 * MIB)
    path = tmp_path / "a.qcow2"
    options = {"data_file": "d", "data_file_raw": raw, "extended_l2": True}
    with pyvirtio.create_disk(path, 4 * MIB, **options) as disk:
        disk.write(0, b"start")
        assert disk.read(0, 6) == b"start\0"
        model[:5] = b"start"
        run_random_writes(disk, seed, model)
        assert disk.read(0, 4 * MIB) == model
        assert disk.check().clean
    if shutil.which("qemu-img"):
        assert "No errors" in qemu("qemu-img", "check", str(path))
        (tmp_path / "model").write_bytes(model)
        qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(path), str(tmp_path / "model"))
    if raw:
        assert (tmp_path / "d").read_bytes() == model


def test_a_subcluster_entry_for_another_place_is_refused(tmp_path):
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, MIB, data_file="d", extended_l2=True) as disk:
        disk.write(0, b"x" * 4 * CLUSTER)
    poke_l2(path, 2, 1 << 63 | 5 * CLUSTER)  # the entry of cluster 1
    with pyvirtio.open_disk(path) as disk, pytest.raises(ImageError, match="does not match guest"):
        disk.read(CLUSTER, 1)


def test_data_written_while_a_flush_runs_is_flushed_before_its_entry():
    """What is mapped when the flush looks at the tables has its data flushed after that."""
    order = []

    class Noting(MemoryDisk):
        late = None

        def _flush(self):
            order.append("data flush")

        def _writev(self, offset, views, length):
            order.append("data write")
            super()._writev(offset, views, length)

    class Image(MemoryDisk):
        table = -1

        def _writev(self, offset, views, length):
            if offset == self.table:
                order.append("entries")
            super()._writev(offset, views, length)

    data, file = Noting(MIB), Image(0, growable=True)
    create_image(file, MIB, data_file="x", data_disk=data)
    with Qcow2Disk.open(file, data_file=data) as disk:
        disk.write(0, b"x")
        disk.flush()
        file.table = disk._metadata.tables.l2_offset(0)
        take_dirty = disk._metadata.tables.cache.take_dirty

        def write_then_take():
            disk._metadata.tables.cache.take_dirty = take_dirty
            disk._metadata.data.write(CLUSTER, b"y")  # mapped by another thread at this moment
            return take_dirty()

        disk.write(2 * CLUSTER, b"z")
        disk._metadata.tables.cache.take_dirty = write_then_take
        order.clear()
        disk.flush()
    last_write = len(order) - 1 - order[::-1].index("data write")
    assert "data flush" in order[last_write : order.index("entries")]


def test_an_image_with_a_data_file_can_be_a_backing_file(tmp_path):
    with pyvirtio.create_disk(tmp_path / "base.qcow2", MIB, data_file="d") as disk:
        disk.write(CLUSTER, b"below")
    overlay = pyvirtio.create_disk(
        tmp_path / "top.qcow2", MIB, backing_file="base.qcow2", backing_fmt="qcow2", data_file="t"
    )
    with overlay as disk:
        assert disk.read(CLUSTER, 5) == b"below"
        disk.write(CLUSTER + 2, b"L")
        assert disk.read(CLUSTER, 5) == b"beLow"
        disk.discard(CLUSTER, CLUSTER)
        assert disk.read(CLUSTER, 5) == bytes(5)
        assert disk.check().clean
    assert (tmp_path / "d").read_bytes()[CLUSTER:][:5] == b"below"


def test_the_data_files_name_is_amended(tmp_path):
    image, data = tmp_path / "a.qcow2", tmp_path / "a.raw"
    pyvirtio.create_disk(image, MIB, data_file=str(data)).close()
    with pyvirtio.open_disk(image) as disk:
        disk.write(0, b"x" * 512)
        disk.amend(data_file=str(tmp_path / "b.raw"))
    data.rename(tmp_path / "b.raw")
    with pyvirtio.open_disk(image) as disk:
        assert disk.read(0, 512) == b"x" * 512


@needs_qemu
def test_amending_what_a_data_file_must_stay_is_refused_as_by_qemu(tmp_path):
    plain, image = tmp_path / "plain.qcow2", tmp_path / "a.qcow2"
    pyvirtio.create_disk(plain, MIB).close()
    pyvirtio.create_disk(image, MIB, data_file=str(tmp_path / "a.raw")).close()
    cases = [
        (plain, {"data_file": "x"}, "data-file can only be set for images that use an external"),
        (plain, {"data_file_raw": True}, "data-file-raw cannot be set on existing images"),
        (image, {"data_file_raw": True}, "data-file-raw cannot be set on existing images"),
    ]
    for path, options, message in cases:
        with pyvirtio.open_disk(path) as disk, pytest.raises(ValueError, match=message):
            disk.amend(**options)
        text = ",".join(f"{k}={'on' if v is True else v}" for k, v in options.items())
        assert message in qemu("qemu-img", "amend", "-o", text, str(path), fails=True)


@needs_qemu
def test_a_data_file_that_is_raw_may_be_said_to_be_so_again(tmp_path):
    image = tmp_path / "a.qcow2"
    pyvirtio.create_disk(image, MIB, data_file=str(tmp_path / "a.raw"), data_file_raw=True).close()
    with pyvirtio.open_disk(image) as disk:
        disk.amend(data_file_raw=True)
        assert disk.info().specific["data-file-raw"]
    qemu("qemu-img", "amend", "-o", "data_file_raw=on", str(image))


def test_shrinking_gives_up_tables_and_no_cluster_of_the_image(tmp_path):
    """What their entries say are places in the data file."""
    data = str(tmp_path / "d.raw")
    path = tmp_path / "image"
    with pyvirtio.create_disk(path, 8 << 20, cluster_size=4096, data_file=data) as disk:
        disk.write(0, b"x" * (8 << 20))
        disk.truncate(1 << 20, shrink=True)
        assert disk.read(0, 1 << 20) == b"x" * (1 << 20)
        assert disk.check().clean
        disk.write(0, b"y" * (1 << 20))
    assert_clean_at(path)


def test_emptying_gives_up_tables_and_no_cluster_of_the_image(tmp_path):
    base = tmp_path / "base"
    base.write_bytes(bytes(4 << 20))
    path = tmp_path / "image"
    options = {"backing_file": str(base), "backing_fmt": "raw", "data_file": str(tmp_path / "d")}
    with pyvirtio.create_disk(path, 4 << 20, cluster_size=4096, **options) as disk:
        disk.write(0, b"x" * (4 << 20))
        pyvirtio.commit(disk)
        assert disk.check().clean
        assert disk.read(0, 4 << 20) == b"x" * (4 << 20)
        disk.write(0, b"y" * (4 << 20))
    assert_clean_at(path)


def test_vm_state_gives_up_tables_and_no_cluster_of_the_image(tmp_path):
    path = tmp_path / "image"
    with pyvirtio.create_disk(
        path, 1 << 20, cluster_size=4096, data_file=str(tmp_path / "d")
    ) as disk:
        disk.write(0, b"x" * 100_000)
        disk.vmstate.write(0, b"v" * 50_000)
        disk.vmstate.discard()
        assert disk.check().clean
    assert_clean_at(path)


def assert_clean_at(path):
    with pyvirtio.open_disk(path, read_only=True) as disk:
        assert disk.check().clean
