"""Persistent dirty bitmaps: recorded, stored, loaded, guarded by their in-use flags."""

import random
import struct
import threading

import pytest

import pyvirtio
from pyvirtio.backend.memory import MemoryDisk
from pyvirtio.errors import BackendError, ImageError, UnsupportedError
from pyvirtio.qcow2 import Qcow2Disk, bitmaps
from pyvirtio.qcow2 import create as create_image
from support.crash import crash_images
from support.daemon import StorageDaemon, bits_digest
from support.filters import RecordingDisk
from support.peers import requires
from support.qemu import PeerError, QemuIo, qemu_check, qemu_create, qemu_img, qemu_img_json

MIB = 1 << 20
CLUSTER = 65536
SIZE = 10 * MIB


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.qcow2"


@pytest.fixture
def image(path):
    """An image with a bitmap ``b``, closed."""
    with pyvirtio.create_disk(path, SIZE) as disk:
        disk.bitmaps.add("b")
    return path


def dirty(disk, name="b"):
    return list(disk.bitmaps[name].dirty())


def reopened(path, **options):
    return pyvirtio.open_disk(path, **options)


def extension(data):
    """Where the bitmaps extension's data is in the header, and where the directory is."""
    at = struct.unpack_from(">I", data, 100)[0]
    while True:
        kind, length = struct.unpack_from(">II", data, at)
        if kind == 0x23852875:
            return at + 8, struct.unpack_from(">Q", data, at + 24)[0]
        assert kind
        at += 8 + length + -length % 8


def poke(path, format, offset, value):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(format, value))


# -- recording -----------------------------------------------------------------------------------


def test_writes_zeroes_and_discards_are_recorded(image):
    with reopened(image) as disk:
        disk.write(MIB, b"x" * MIB)
        disk.write(4 * MIB + 5, b"x")
        disk.write_zeroes(6 * MIB, 2 * CLUSTER)
        disk.write_zeroes(8 * MIB + 1, 7)
        disk.discard(9 * MIB, CLUSTER)
        expected = [
            (MIB, MIB),
            (4 * MIB, CLUSTER),
            (6 * MIB, 2 * CLUSTER),
            (8 * MIB, CLUSTER),
            (9 * MIB, CLUSTER),
        ]
        assert dirty(disk) == expected
        assert disk.bitmaps["b"].count == MIB + 5 * CLUSTER
    with reopened(image) as disk:
        assert dirty(disk) == expected


def test_reads_are_not_recorded(image):
    with reopened(image) as disk:
        disk.read(0, SIZE)
        disk.flush()
        assert dirty(disk) == []


def test_a_disabled_bitmap_records_nothing(image):
    with reopened(image) as disk:
        disk.bitmaps.disable("b")
        disk.write(0, b"x")
        disk.bitmaps.enable("b")
        disk.write(MIB, b"x")
    with reopened(image) as disk:
        assert dirty(disk) == [(MIB, CLUSTER)]
        assert disk.bitmaps["b"].enabled


class Refusing(MemoryDisk):
    """Refuses writes while asked to."""

    refuse = False

    def _writev(self, offset, views, length):
        if self.refuse:
            raise BackendError(28, "full")
        super()._writev(offset, views, length)


def test_a_write_that_failed_is_recorded():
    file = Refusing(0, growable=True)
    create_image(file, SIZE)
    with Qcow2Disk.open(file) as disk:
        disk.bitmaps.add("b")
        file.refuse = True
        with pytest.raises(BackendError):
            disk.write(MIB, b"x" * CLUSTER)
        file.refuse = False
        assert dirty(disk) == [(MIB, CLUSTER)]


def test_every_enabled_bitmap_records_with_its_own_granularity(path):
    with pyvirtio.create_disk(path, SIZE) as disk:
        disk.bitmaps.add("fine", granularity=512)
        disk.bitmaps.add("coarse", granularity=MIB)
        disk.bitmaps.add("off", enabled=False)
        disk.write(MIB - 1, b"ab")
        assert dirty(disk, "fine") == [(MIB - 512, 1024)]
        assert dirty(disk, "coarse") == [(0, 2 * MIB)]
        assert dirty(disk, "off") == []


def test_the_last_granule_ends_with_the_disk(path):
    with pyvirtio.create_disk(path, MIB + 512) as disk:
        bitmap = disk.bitmaps.add("b", granularity=MIB)
        disk.write(MIB, b"x")
        assert dirty(disk) == [(MIB, 512)]
        assert bitmap.count == MIB  # as QEMU counts


def test_threads_lose_no_bits(path):
    with pyvirtio.create_disk(path, SIZE) as disk:
        disk.bitmaps.add("b", granularity=512)

        def work(part):
            for i in range(part, 2000, 4):
                disk.write(i * 1024, b"x")

        threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert dirty(disk) == [(i * 1024, 512) for i in range(2000)]


# -- the operations --------------------------------------------------------------------------------


def test_bitmaps_are_listed_in_their_order(path):
    with pyvirtio.create_disk(path, SIZE) as disk:
        for name in ("z", "a", "ü" * 20):
            disk.bitmaps.add(name)
    with reopened(path) as disk:
        assert [bitmap.name for bitmap in disk.bitmaps] == ["z", "a", "ü" * 20]
        assert len(disk.bitmaps) == 3
        assert "a" in disk.bitmaps
        assert "b" not in disk.bitmaps


@pytest.mark.parametrize(
    ("cluster_size", "granularity"), [(512, 4096), (4096, 4096), (65536, 65536), (2 * MIB, 65536)]
)
def test_the_default_granularity_is_qemus(path, cluster_size, granularity):
    with pyvirtio.create_disk(path, SIZE, cluster_size=cluster_size) as disk:
        assert disk.bitmaps.add("b").granularity == granularity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "b"}, "Bitmap already exists: b"),
        ({"name": ""}, "Bitmap name cannot be empty"),
        ({"name": "x" * 1024}, r"Name length exceeds maximum \(1023 characters\)"),
        ({"name": "ü" * 512}, r"Name length exceeds maximum \(1023 characters\)"),
        ({"name": "a\0b"}, "NUL"),
        ({"name": "n", "granularity": 256}, "Granularity must be power of 2 and at least 512"),
        ({"name": "n", "granularity": 1000}, "Granularity must be power of 2 and at least 512"),
        ({"name": "n", "granularity": 1 << 32}, "Granularity must be power of 2 and at least 512"),
    ],
)
def test_what_cannot_be_added_is_refused_with_qemus_text(image, arguments, message):
    with reopened(image) as disk, pytest.raises(ValueError, match=message):
        disk.bitmaps.add(**arguments)


@pytest.mark.parametrize("arguments", [{"name": "x" * 1023}, {"name": "n", "granularity": 1 << 31}])
def test_what_is_at_the_limit_is_stored(image, arguments):
    with reopened(image) as disk:
        disk.bitmaps.add(**arguments)
        disk.write(0, b"x")
    with reopened(image) as disk:
        assert dirty(disk, arguments["name"])[0][0] == 0


def test_a_bitmap_that_is_too_big_is_refused(path):
    with pyvirtio.create_disk(path, 1 << 42) as disk:
        with pytest.raises(ValueError, match="Too much space will be occupied by the bitmap"):
            disk.bitmaps.add("b", granularity=512)
        disk.bitmaps.add("b", granularity=1024)  # 512 MiB


def test_version_2_has_no_bitmaps(path):
    with (
        pyvirtio.create_disk(path, SIZE, compat="0.10") as disk,
        pytest.raises(UnsupportedError, match="Cannot store dirty bitmaps in qcow2 v2 files"),
    ):
        disk.bitmaps.add("b")


def test_an_unknown_bitmap_is_refused(image):
    with reopened(image) as disk:
        bitmaps = disk.bitmaps
        for act in (bitmaps.remove, bitmaps.enable, bitmaps.disable, bitmaps.clear):
            with pytest.raises(KeyError, match="Dirty bitmap 'nope' not found"):
                act("nope")
        with pytest.raises(KeyError):
            bitmaps.merge("b", ["nope"])


def test_clear_forgets_everything(image):
    with reopened(image) as disk:
        disk.write(0, b"x")
        disk.bitmaps.clear("b")
        assert dirty(disk) == []
        disk.write(MIB, b"x")
    with reopened(image) as disk:
        assert dirty(disk) == [(MIB, CLUSTER)]


def test_merge_takes_the_union(path):
    with pyvirtio.create_disk(path, SIZE) as disk:
        disk.bitmaps.add("same")
        disk.bitmaps.add("fine", granularity=512)
        disk.bitmaps.add("coarse", granularity=MIB)
        disk.write(3 * MIB + 512, b"x")
        for name in ("same", "fine", "coarse"):
            disk.bitmaps.disable(name)
        disk.bitmaps.add("target")
        disk.write(0, b"x")
        disk.bitmaps.merge("target", ["same"])
        assert dirty(disk, "target") == [(0, CLUSTER), (3 * MIB, CLUSTER)]
        disk.bitmaps.merge("fine", ["target"])
        assert dirty(disk, "fine") == [(0, CLUSTER), (3 * MIB, CLUSTER)]
        disk.bitmaps.merge("target", ["coarse", "fine"])
        assert dirty(disk, "target") == [(0, CLUSTER), (3 * MIB, MIB)]


def test_merge_takes_another_disks_bitmap_of_the_same_size(tmp_path):
    with (
        pyvirtio.create_disk(tmp_path / "a", SIZE) as one,
        pyvirtio.create_disk(tmp_path / "b", SIZE) as two,
        pyvirtio.create_disk(tmp_path / "c", MIB) as small,
    ):
        for disk in (one, two, small):
            disk.bitmaps.add("b")
            disk.write(MIB // 2, b"x")
        one.bitmaps.clear("b")
        one.bitmaps.merge("b", [two.bitmaps["b"]])
        assert dirty(one) == [(MIB // 2, CLUSTER)]
        with pytest.raises(ValueError, match="destination size is 10485760, source size is 104857"):
            one.bitmaps.merge("b", [small.bitmaps["b"]])


def test_remove_takes_it_off_the_disk_at_once(image):
    with reopened(image) as disk:
        disk.bitmaps.add("kept")
        disk.write(0, b"x")
    with reopened(image) as disk:
        disk.bitmaps.remove("b")
        with reopened(image, read_only=True, locking=False) as other:
            assert [bitmap.name for bitmap in other.bitmaps] == ["kept"]
        assert disk.check().clean
        disk.bitmaps.remove("kept")
        assert disk.check().clean
    data = image.read_bytes()
    assert data[88:96] == bytes(8)
    with pytest.raises(AssertionError):
        extension(data)


def test_nothing_is_leaked(image):
    for round_ in range(3):
        with reopened(image) as disk:
            disk.write(round_ * MIB, b"x")
            end = disk.check().image_end_offset
            disk.bitmaps.add(f"n{round_}")
            assert disk.check().clean
    with reopened(image) as disk:
        assert disk.check().clean
        for bitmap in disk.bitmaps:
            disk.bitmaps.remove(bitmap.name)
        assert disk.check().clean
        assert disk.check().image_end_offset <= end


def test_a_read_only_image_lists_but_does_not_change(image):
    with reopened(image) as disk:
        disk.write(0, b"x")
    before = image.read_bytes()
    with reopened(image, read_only=True) as disk:
        assert dirty(disk) == [(0, CLUSTER)]
        bitmaps = disk.bitmaps
        for act in (bitmaps.add, bitmaps.remove, bitmaps.enable, bitmaps.disable, bitmaps.clear):
            with pytest.raises(BackendError):
                act("b")
    assert image.read_bytes() == before


def test_nothing_is_written_if_nothing_changed(image):
    before = image.read_bytes()
    with reopened(image) as disk:
        assert dirty(disk) == []
        disk.read(0, 512)
    assert image.read_bytes() == before


def test_info_lists_the_bitmaps(image):
    with reopened(image) as disk:
        disk.bitmaps.add("off", granularity=512, enabled=False)
        assert disk.info().specific["bitmaps"] == [
            {"flags": ["auto"], "name": "b", "granularity": CLUSTER},
            {"flags": [], "name": "off", "granularity": 512},
        ]


def test_info_of_an_image_without_bitmaps_does_not_name_them(path):
    with pyvirtio.create_disk(path, SIZE) as disk:
        assert "bitmaps" not in disk.info().specific


def test_the_all_ones_form_is_read_and_written(path):
    with pyvirtio.create_disk(path, 64 * MIB, cluster_size=512) as disk:
        disk.bitmaps.add("b", granularity=512)
        disk.write_zeroes(0, 40 * MIB)
        before = disk.check().image_end_offset
    with reopened(path) as disk:
        assert dirty(disk) == [(0, 40 * MIB)]
        assert disk.check().image_end_offset < before + 16 * 1024
        table = disk.bitmaps["b"].entry.table_offset
    assert struct.unpack_from(">Q", path.read_bytes(), table)[0] == 1


# -- in use ----------------------------------------------------------------------------------------


def test_a_bitmap_is_in_use_from_the_first_write_to_the_close(image):
    def flags():
        data = image.read_bytes()
        return struct.unpack_from(">I", data, extension(data)[1] + 12)[0]

    disk = reopened(image)
    assert flags() == 2
    disk.write(0, b"x")
    assert flags() == 3
    disk.close()
    assert flags() == 2


@pytest.mark.parametrize("change", ["clear", "disable", "merge"])
def test_a_bitmap_is_in_use_once_it_is_changed(image, change):
    with reopened(image) as disk:
        if change == "merge":
            disk.bitmaps.merge("b", [])
        else:
            getattr(disk.bitmaps, change)("b")
        data = image.read_bytes()
        assert struct.unpack_from(">I", data, extension(data)[1] + 12)[0] & 1


def test_many_bitmaps_are_marked_in_use_with_one_flush(path):
    with pyvirtio.create_disk(path, SIZE) as disk:
        for number in range(20):
            disk.bitmaps.add(f"b{number}")
    below = RecordingDisk(pyvirtio.FileDisk(path, growable=True))
    with pyvirtio.open_disk(below, format="qcow2") as disk:
        disk.bitmaps.begin()
        assert [event.kind for event in below.log] == ["write"] * 20 + ["flush"]
        assert all(bitmap.in_use for bitmap in disk.bitmaps)
        disk.write(0, b"x")
    with reopened(path, read_only=True) as disk:
        assert all(dirty(disk, f"b{number}") == [(0, CLUSTER)] for number in range(20))


def test_bitmaps_that_would_fill_the_memory_are_refused(path, monkeypatch):
    with pyvirtio.create_disk(path, 1 << 30) as disk:
        for name in ("a", "b"):
            disk.bitmaps.add(name, granularity=512)
        disk.write_zeroes(0, 1 << 30)
    monkeypatch.setattr(bitmaps, "_MAX_LOADED", 100)
    with reopened(path) as disk:
        with pytest.raises(ImageError, match="too much in them"):
            disk.write(0, b"x")
        assert disk.read(0, 1) == b"\0"
    with reopened(path, read_only=True) as disk:
        assert len(dirty(disk, "a")) == 1


def test_a_disabled_bitmap_is_not_in_use_by_writes(image):
    with reopened(image) as disk:
        disk.bitmaps.disable("b")
    with reopened(image) as disk:
        disk.write(0, b"x")
        data = image.read_bytes()
        assert struct.unpack_from(">I", data, extension(data)[1] + 12)[0] == 0


@pytest.fixture
def crashed(image, tmp_path):
    """The image as a crash leaves it while ``b`` is in use; ``c`` is not."""
    with reopened(image) as disk:
        disk.bitmaps.add("c", enabled=False)
    with reopened(image) as disk:
        disk.write(0, b"x")
        disk.flush()
        copy = tmp_path / "crashed.qcow2"
        copy.write_bytes(image.read_bytes())
    return copy


def test_a_crash_leaves_it_inconsistent(crashed):
    with reopened(crashed) as disk:
        bitmap = disk.bitmaps["b"]
        assert bitmap.inconsistent
        assert not disk.bitmaps["c"].inconsistent
        assert disk.info().specific["bitmaps"][0]["flags"] == ["in-use", "auto"]


def test_an_inconsistent_bitmap_can_only_be_removed(crashed):
    message = "Bitmap 'b' is inconsistent and cannot be used"
    with reopened(crashed) as disk:
        bitmaps = disk.bitmaps
        for act in (
            lambda: bitmaps["b"].count,
            lambda: list(bitmaps["b"].dirty()),
            lambda: bitmaps.clear("b"),
            lambda: bitmaps.enable("b"),
            lambda: bitmaps.disable("b"),
            lambda: bitmaps.merge("b", []),
            lambda: bitmaps.merge("c", ["b"]),
        ):
            with pytest.raises(ImageError, match=message):
                act()
        with pytest.raises(ValueError, match="already exists"):
            bitmaps.add("b")
        disk.write(MIB, b"x")
        bitmaps.remove("b")
        assert disk.check().clean
        bitmaps.add("b")
    with reopened(crashed) as disk:
        assert dirty(disk) == []


def test_an_inconsistent_bitmap_is_kept_as_it_is(crashed):
    with reopened(crashed) as disk:
        disk.write(5 * MIB, b"x")
        disk.bitmaps.clear("c")
    with reopened(crashed) as disk:
        assert disk.bitmaps["b"].inconsistent
        assert disk.check().clean


def test_a_failed_marking_fails_the_write_and_changes_nothing():
    memory = MemoryDisk(0, growable=True)
    create_image(memory, SIZE)
    with Qcow2Disk.open(_keep(memory)) as disk:
        disk.bitmaps.add("b")

    file = Refusing(memory.size, growable=True)
    file.write(0, memory.read(0, memory.size))
    disk = Qcow2Disk.open(file)
    file.refuse = True
    with pytest.raises(BackendError):
        disk.write(0, b"x" * CLUSTER)
    file.refuse = False
    assert disk.read(0, 1) == b"\0"
    disk.write(MIB, b"x")
    disk.close()


def _keep(memory):
    """A disk to open an image in that leaves ``memory`` open."""
    memory.close = lambda: None
    return memory


# -- what other programs leave -----------------------------------------------------------------


def test_bitmaps_are_dropped_if_the_autoclear_bit_is_clear(image):
    poke(image, ">Q", 88, 0)
    with pytest.warns(UserWarning, match="lacking bitmap support"):
        disk = reopened(image, read_only=True)
    assert len(disk.bitmaps) == 0
    disk.close()
    assert extension(image.read_bytes())
    with pytest.warns(UserWarning, match="lacking bitmap support"):
        disk = reopened(image)
    disk.close()
    with pytest.raises(AssertionError):
        extension(image.read_bytes())
    with reopened(image) as disk:
        assert len(disk.bitmaps) == 0
        assert disk.check().corruptions == 0
        assert disk.check().leaks > 0


def test_unknown_autoclear_bits_go_and_the_bitmaps_stay(image):
    poke(image, ">Q", 88, 1 | 1 << 50)
    reopened(image).close()
    assert image.read_bytes()[88:96] == struct.pack(">Q", 1)
    with reopened(image) as disk:
        assert "b" in disk.bitmaps


def test_the_autoclear_bit_without_the_extension_is_cleared(path):
    pyvirtio.create_disk(path, SIZE).close()
    poke(path, ">Q", 88, 1)
    reopened(path).close()
    assert path.read_bytes()[88:96] == bytes(8)


MALFORMED = {
    # name: (where, format, offset, value, QEMU's message)
    "length": ("ext", ">I", -4, 16, "bitmaps_ext: Invalid extension length"),
    "reserved": ("ext", ">I", 4, 1, "bitmaps_ext: Reserved field is not zero"),
    "none": ("ext", ">I", 0, 0, "found bitmaps extension with zero bitmaps"),
    "many": ("ext", ">I", 0, 70000, "bitmaps_ext: Image has 70000 bitmaps, exceeding the QEMU"),
    "less": ("ext", ">I", 0, 4, "Less bitmaps found than specified in header extension"),
    "more": ("ext", ">I", 0, 1, "More bitmaps found than specified in header extension"),
    "offset": ("ext", ">Q", 16, 512, "bitmaps_ext: invalid bitmap directory offset"),
    "size": ("ext", ">Q", 8, 1 << 40, r"bitmaps_ext: bitmap directory size \(1099511627776\)"),
    "size 0": ("ext", ">Q", 8, 0, "Requested bitmap directory size is zero"),
    "size odd": ("ext", ">Q", 8, 56, "Broken bitmap directory"),
    "size more": ("ext", ">Q", 8, 96, "More bitmaps found than specified in header extension"),
    "type": ("dir", ">B", 16, 2, "Bitmap 'b' doesn't satisfy the constraints"),
    "granularity": ("dir", ">B", 17, 5, "Bitmap 'b' doesn't satisfy the constraints"),
    "granularity high": ("dir", ">B", 17, 32, "Bitmap 'b' doesn't satisfy the constraints"),
    "flags": ("dir", ">I", 12, 4, "Bitmap 'b' doesn't satisfy the constraints"),
    "extra": ("dir", ">I", 20, 8, "Bitmap extra data is not supported"),
    "table offset": ("dir", ">Q", 0, 0x123, "Bitmap 'b' doesn't satisfy the constraints"),
    "no table": ("dir", ">Q", 0, 0, "Bitmap 'b' doesn't satisfy the constraints"),
    "table size 0": ("dir", ">I", 8, 0, "Bitmap 'b' doesn't satisfy the constraints"),
    "table size": ("dir", ">I", 8, 2, "Could not read bitmap 'b' from image: Invalid argument"),
    "table huge": ("dir", ">I", 8, 0x8000000, "Bitmap 'b' doesn't satisfy the constraints"),
    "entry reserved": ("tab", ">Q", 0, 2, "Could not read bitmap_table table from image for bitm"),
    "entry one": ("tab", ">Q", 0, 0x10001, "Could not read bitmap_table table from image for b"),
    "entry odd": ("tab", ">Q", 0, 0x200, "Could not read bitmap_table table from image for bitmap"),
}


def malformed(image, name):
    with reopened(image) as disk:
        disk.bitmaps.add("second")
        disk.write(0, b"x")
    with reopened(image, read_only=True) as disk:
        table = disk.bitmaps["b"].entry.table_offset
    where, format, offset, value, message = MALFORMED[name]
    header, directory = extension(image.read_bytes())
    poke(image, format, {"ext": header, "dir": directory, "tab": table}[where] + offset, value)
    return message


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_directory_is_refused(image, name):
    message = malformed(image, name)
    for read_only in (True, False):
        with pytest.raises(ImageError, match=message):
            reopened(image, read_only=read_only)


@requires("qemu-img")
@pytest.mark.parametrize("name", MALFORMED)
def test_qemu_refuses_the_same_directory_in_the_same_words(image, name):
    message = malformed(image, name)
    with pytest.raises(PeerError, match=message):
        qemu_img("info", image)


def test_a_table_of_a_bitmap_in_use_is_not_looked_at(crashed):
    with reopened(crashed, read_only=True) as disk:
        table = disk.bitmaps["b"].entry.table_offset
    poke(crashed, ">Q", table, 2)
    with reopened(crashed) as disk:
        assert disk.bitmaps["b"].inconsistent


def test_one_cluster_named_again_and_again_does_not_fill_the_memory(path):
    with pyvirtio.create_disk(path, 1 << 37, cluster_size=4096) as disk:
        disk.bitmaps.add("b", granularity=512)
        disk.write(0, b"x")
    with reopened(path, read_only=True) as disk:
        entry = disk.bitmaps["b"].entry
    with path.open("r+b") as file:
        file.seek(entry.table_offset)
        first = file.read(8)
        file.seek(entry.table_offset)
        file.write(first * entry.table_size)
    with reopened(path) as disk:
        with pytest.raises(ImageError, match="more clusters than the image file"):
            dirty(disk)
        with pytest.raises(ImageError, match="more clusters than the image file"):
            disk.write(0, b"x")


# -- sizes and snapshots -----------------------------------------------------------------------


def test_growing_adds_clear_bits(image):
    with reopened(image) as disk:
        disk.write(SIZE - 1, b"x")
        disk.truncate(2 * SIZE)
        assert dirty(disk) == [(SIZE - CLUSTER, CLUSTER)]
        disk.write(2 * SIZE - 1, b"x")
    with reopened(image) as disk:
        assert dirty(disk) == [(SIZE - CLUSTER, CLUSTER), (2 * SIZE - CLUSTER, CLUSTER)]
        assert disk.check().clean


def test_growing_with_an_inconsistent_bitmap_is_refused(crashed):
    with reopened(crashed) as disk:
        with pytest.raises(UnsupportedError, match="Bitmap 'b' is inconsistent and cannot be used"):
            disk.truncate(2 * SIZE)
        assert disk.size == SIZE
        disk.bitmaps.remove("b")
        disk.truncate(2 * SIZE)


def test_a_snapshot_is_not_applied_where_there_are_bitmaps(image):
    with reopened(image) as disk:
        disk.snapshots.create("s")
        with pytest.raises(UnsupportedError, match="Device has active dirty bitmaps"):
            disk.snapshots.apply("s")
        disk.bitmaps.remove("b")
        disk.snapshots.apply("s")


def test_snapshots_leave_the_bitmaps_alone(image):
    with reopened(image) as disk:
        disk.write(0, b"x")
        disk.snapshots.create("s")
        disk.write(MIB, b"x")
        disk.snapshots.delete("s")
        assert disk.check().clean
    with reopened(image) as disk:
        assert dirty(disk) == [(0, CLUSTER), (MIB, CLUSTER)]


# -- crashes -----------------------------------------------------------------------------------


def test_after_any_crash_a_bitmap_tells_the_truth_or_nothing():
    """Whatever the disk kept: the image is sound, and a bitmap that is not inconsistent has every
    change since it was cleared."""
    start = MemoryDisk(0, growable=True)
    create_image(start, 4 * MIB, cluster_size=4096)
    with Qcow2Disk.open(_keep(start)) as disk:
        disk.bitmaps.add("b", granularity=4096)
        disk.bitmaps.add("off", enabled=False)
        disk.write(0, b"o" * 4096)
        disk.bitmaps.clear("b")
    before = start.read(0, start.size)
    contents = disk_contents(before)
    file = RecordingDisk(start)
    with Qcow2Disk.open(file) as disk:
        chance = random.Random(1)
        for i in range(12):
            disk.write(chance.randrange(0, 4 * MIB, 512), bytes([i + 1]) * 512)
            if i % 4 == 3:
                disk.flush()
        disk.bitmaps.remove("off")
        disk.bitmaps.add("late")
    consistent = 0
    for _, crash in crash_images(file.log, before, seed=5, random_each=0):
        assert not hasattr(crash, "mark")
        image = MemoryDisk(len(crash.data), growable=True)
        image.write(0, crash.data)
        with Qcow2Disk.open(image, read_only=True) as disk:
            assert not disk.check().corruptions, crash.story
            bitmap = disk.bitmaps["b"]
            if bitmap.inconsistent:
                continue
            consistent += 1
            marked = {block for at, length in bitmap.dirty() for block in blocks(at, length)}
            now = disk.read(0, disk.size)
        for block in range(len(now) // 4096):
            part = slice(block * 4096, (block + 1) * 4096)
            assert now[part] == contents[part] or block in marked, (crash.position, crash.story)
    assert consistent


def blocks(offset, length):
    return range(offset // 4096, -(-(offset + length) // 4096))


def disk_contents(image):
    memory = MemoryDisk(len(image), growable=True)
    memory.write(0, image)
    with Qcow2Disk.open(memory, read_only=True) as disk:
        return disk.read(0, disk.size)


# -- a model -----------------------------------------------------------------------------------


OPERATIONS = [
    *("write", "write", "zero", "discard", "add", "remove", "toggle", "clear", "merge", "reopen")
]


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_match_a_model(path, seed):
    chance = random.Random(seed)
    size = 3 * MIB + 512
    model = {}  # name: [granularity, enabled, set of granules]
    disk = pyvirtio.create_disk(path, size, cluster_size=chance.choice([512, 4096, 65536]))
    for step in range(120):
        what = chance.choice(OPERATIONS)
        name = chance.choice(list(model)) if model else None
        if what in ("write", "zero", "discard"):
            unit = disk._metadata.cluster_size if what == "discard" else 512
            offset = chance.randrange(0, size, unit)
            length = min(chance.randrange(1, 20) * unit, size - offset)
            if what == "write":
                disk.write(offset, b"x" * length)
            elif what == "zero":
                disk.write_zeroes(offset, length)
            else:
                disk.discard(offset, length)
                if offset + length < size:
                    length -= length % unit
            for granularity, enabled, granules in model.values():
                if enabled and length:
                    granules.update(
                        range(offset // granularity, (offset + length - 1) // granularity + 1)
                    )
        elif what == "add" and len(model) < 6:
            granularity, enabled = 1 << chance.randint(9, 20), chance.random() < 0.7
            disk.bitmaps.add(f"n{step}", granularity=granularity, enabled=enabled)
            model[f"n{step}"] = [granularity, enabled, set()]
        elif what == "reopen":
            assert disk.check().clean
            disk.close()
            disk = pyvirtio.open_disk(path)
        elif name is None:
            continue
        elif what == "remove":
            disk.bitmaps.remove(name)
            del model[name]
        elif what == "toggle":
            model[name][1] = not model[name][1]
            (disk.bitmaps.enable if model[name][1] else disk.bitmaps.disable)(name)
        elif what == "clear":
            disk.bitmaps.clear(name)
            model[name][2].clear()
        elif what == "merge":
            source = chance.choice(list(model))
            disk.bitmaps.merge(name, [source])
            mine, (other, _, granules) = model[name][0], model[source]
            for granule in list(granules):
                end = min((granule + 1) * other, size)
                model[name][2].update(range(granule * other // mine, (end - 1) // mine + 1))
        assert [bitmap.name for bitmap in disk.bitmaps] == list(model)
        for bitmap in disk.bitmaps:
            granularity, enabled, granules = model[bitmap.name]
            assert bitmap.enabled == enabled
            assert bitmap.count == len(granules) * granularity
            found = {
                granule
                for at, length in bitmap.dirty()
                for granule in range(at // granularity, (at + length - 1) // granularity + 1)
            }
            assert found == granules
    disk.close()


# -- both ways ---------------------------------------------------------------------------------


@requires("qemu-storage-daemon", "qemu-img")
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_qemu_reads_our_bitmaps(path, cluster_size):
    chance = random.Random(cluster_size)
    expected = {}
    with pyvirtio.create_disk(path, 40 * MIB + 512, cluster_size=cluster_size) as disk:
        for granularity in (512, 4096, 65536, MIB):
            disk.bitmaps.add(f"g{granularity}", granularity=granularity)
        disk.write_zeroes(8 * MIB, 24 * MIB)
        for _ in range(50):
            disk.write(chance.randrange(0, 40 * MIB), b"x" * chance.randrange(1, 100000))
        disk.write(40 * MIB + 511, b"x")
        disk.bitmaps.disable("g4096")
        for bitmap in disk.bitmaps:
            digest = bits_digest(bitmap.dirty(), bitmap.granularity, disk.size)
            expected[bitmap.name] = (bitmap.granularity, bitmap.enabled, bitmap.count, digest)
    qemu_check(path)
    assert [
        b["name"] for b in qemu_img_json("info", path)["format-specific"]["data"]["bitmaps"]
    ] == (list(expected))
    with StorageDaemon(path) as daemon:
        found = {
            name: (b["granularity"], b["recording"], b["count"], daemon.digest(name))
            for name, b in daemon.bitmaps().items()
        }
    assert found == expected


@requires("qemu-storage-daemon", "qemu-img", "qemu-io")
def test_we_read_qemus_bitmaps(path):
    qemu_create(path, SIZE)
    for options in (("b",), ("-g", "512", "fine"), ("--disable", "off")):
        qemu_img("bitmap", "--add", *options[:-1], path, options[-1])
    with QemuIo(path) as qemu:
        qemu.write(MIB, 3 * CLUSTER, 1)
        qemu.write_zeroes(5 * MIB, CLUSTER, unmap=True)
        qemu.discard(7 * MIB, CLUSTER)
        qemu.write(9 * MIB + 512, 512, 1)
    with StorageDaemon(path, read_only=True) as daemon:
        theirs = {n: (b["count"], daemon.digest(n)) for n, b in daemon.bitmaps().items()}
    with reopened(path) as disk:
        assert dirty(disk) == [
            (MIB, 3 * CLUSTER),
            (5 * MIB, CLUSTER),
            (7 * MIB, CLUSTER),
            (9 * MIB, CLUSTER),
        ]
        assert dirty(disk, "off") == []
        ours = {
            b.name: (b.count, bits_digest(b.dirty(), b.granularity, SIZE)) for b in disk.bitmaps
        }
        assert disk.check().clean
    assert ours == theirs


@requires("qemu-storage-daemon", "qemu-img", "qemu-io")
@pytest.mark.parametrize("seed", range(2))
def test_we_and_qemu_take_turns(path, seed):
    """The same image changed by both; each sees what the other's bitmaps recorded."""
    chance = random.Random(seed)
    qemu_create(path, SIZE)
    qemu_img("bitmap", "--add", "-g", 4096, path, "b")
    granules = set()
    for turn in range(6):
        steps = [
            (chance.choice(["write", "zero", "discard"]), chance.randrange(SIZE // CLUSTER))
            for _ in range(10)
        ]
        if turn % 2:
            with QemuIo(path) as qemu:
                for kind, cluster in steps:
                    at = cluster * CLUSTER
                    if kind == "write":
                        qemu.write(at, 512, 1)
                    elif kind == "zero":
                        qemu.write_zeroes(at, CLUSTER)
                    else:
                        qemu.discard(at, CLUSTER)
        else:
            with reopened(path) as disk:
                for kind, cluster in steps:
                    at = cluster * CLUSTER
                    if kind == "write":
                        disk.write(at, b"x" * 512)
                    elif kind == "zero":
                        disk.write_zeroes(at, CLUSTER)
                    else:
                        disk.discard(at, CLUSTER)
        for kind, cluster in steps:
            first = cluster * 16
            granules.update(range(first, first + (1 if kind == "write" else 16)))
        with StorageDaemon(path, read_only=True) as daemon:
            digest = daemon.digest("b")
        assert digest == bits_digest(((g * 4096, 4096) for g in granules), 4096, SIZE)
        with reopened(path, read_only=True) as disk:
            assert digest == bits_digest(dirty(disk), 4096, SIZE)
        qemu_check(path)


@requires("qemu-img", "qemu-io", "qemu-storage-daemon")
def test_qemu_changes_our_bitmaps(path):
    with pyvirtio.create_disk(path, SIZE) as disk:
        disk.bitmaps.add("a")
        disk.write(MIB, b"x")
        disk.bitmaps.disable("a")
        disk.bitmaps.add("b", granularity=4096)
        disk.write(2 * MIB, b"x")
        disk.bitmaps.add("c")
    qemu_img("bitmap", "--merge", "a", path, "b")
    qemu_img("bitmap", "--enable", path, "a")
    qemu_img("bitmap", "--disable", path, "b")
    qemu_img("bitmap", "--remove", path, "c")
    qemu_check(path)
    with reopened(path) as disk:
        assert [(b.name, b.enabled) for b in disk.bitmaps] == [("a", True), ("b", False)]
        assert dirty(disk) == [(MIB, CLUSTER), (2 * MIB, 4096)]
    qemu_img("bitmap", "--clear", path, "b")
    with reopened(path) as disk:
        assert dirty(disk) == []
        assert dirty(disk, "a") == [(MIB, CLUSTER)]


@requires("qemu-img")
def test_qemu_says_the_same_of_the_image(crashed):
    with reopened(crashed, read_only=True) as disk:
        ours = dict(disk.info().specific)
    assert ours == qemu_img_json("info", crashed)["format-specific"]["data"]


@requires("qemu-img")
def test_qemu_can_remove_what_our_crash_left(crashed):
    with pytest.raises(PeerError, match="Bitmap 'b' is inconsistent and cannot be used"):
        qemu_img("bitmap", "--clear", crashed, "b")
    qemu_img("bitmap", "--remove", crashed, "b")
    qemu_check(crashed)


@requires("qemu-img", "qemu-io")
def test_we_and_qemu_grow_bitmaps_alike(path):
    qemu_create(path, SIZE)
    qemu_img("bitmap", "--add", path, "b")
    with QemuIo(path) as qemu:
        qemu.write(SIZE - 512, 512, 1)
    qemu_img("resize", path, 15 * MIB)
    with reopened(path) as disk:
        assert dirty(disk) == [(SIZE - CLUSTER, CLUSTER)]
        disk.truncate(30 * MIB)
    qemu_check(path)
    with QemuIo(path) as qemu:
        qemu.write(29 * MIB, 512, 1)
    with reopened(path) as disk:
        assert dirty(disk) == [(SIZE - CLUSTER, CLUSTER), (29 * MIB, CLUSTER)]


@requires("qemu-img")
def test_check_counts_the_clusters_of_bitmaps_as_qemu_does(image):
    with reopened(image) as disk:
        disk.write(0, b"x")
    with reopened(image, read_only=True) as disk:
        table = disk.bitmaps["b"].entry.table_offset
    poke(image, ">Q", table, 1)  # the data it had leaks
    with reopened(image, read_only=True) as disk:
        ours = disk.check()
    theirs = qemu_img("check", "--output=json", image, check=False).stdout
    assert f'"leaks": {ours.leaks}' in theirs
    assert ours.leaks == 1


# -- limits and failures -------------------------------------------------------------------------


def test_the_number_of_bitmaps_is_limited(image, monkeypatch):
    monkeypatch.setattr("pyvirtio.qcow2.layout.MAX_BITMAPS", 2)
    with reopened(image) as disk:
        disk.bitmaps.add("c")
        with pytest.raises(ValueError, match="Maximum number of persistent bitmaps is already rea"):
            disk.bitmaps.add("d")


def test_the_size_of_the_directory_is_limited(image, monkeypatch):
    monkeypatch.setattr("pyvirtio.qcow2.layout.MAX_BITMAP_DIRECTORY_SIZE", 64)
    with reopened(image) as disk:
        disk.bitmaps.add("c")
        with pytest.raises(ValueError, match="Not enough space in the bitmap directory"):
            disk.bitmaps.add("d")


def test_a_disk_of_size_0_has_no_bitmaps(path):
    with (
        pyvirtio.create_disk(path, 0) as disk,
        pytest.raises(ValueError, match="A disk of size 0 has no bitmaps"),
    ):
        disk.bitmaps.add("b")


def test_bitmaps_that_cannot_be_stored_are_inconsistent_and_the_data_is_safe(path):
    file = Refusing(0, growable=True)
    create_image(file, SIZE)
    _keep(file)
    with Qcow2Disk.open(file) as disk:
        disk.bitmaps.add("b")
    disk = Qcow2Disk.open(file)
    disk.write(0, b"x")
    disk.flush()
    file.refuse = True
    with pytest.raises(BackendError):
        disk.close()
    assert disk.closed
    file.refuse = False
    with Qcow2Disk.open(file) as disk:
        assert disk.read(0, 1) == b"x"
        assert disk.bitmaps["b"].inconsistent
        assert not disk.check().corruptions


def test_bitmaps_and_a_raw_data_file_go_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pyvirtio.create_disk("a.qcow2", SIZE, data_file="d", data_file_raw=True) as disk:
        disk.bitmaps.add("b")
        disk.write(MIB, b"x")
        disk.write_zeroes(2 * MIB, CLUSTER)
    with pyvirtio.open_disk("a.qcow2") as disk:
        assert dirty(disk) == [(MIB, CLUSTER), (2 * MIB, CLUSTER)]
        assert disk.check().clean
    assert (tmp_path / "a.qcow2").read_bytes()[88:96] == struct.pack(">Q", 3)


def test_bitmaps_stored_while_the_image_is_open_go_on(image):
    with reopened(image) as disk:
        disk.write(0, b"x")
        with disk._metadata.exclusive():
            disk.bitmaps.store()
            disk.bitmaps.reload()
        assert not disk.bitmaps["b"].in_use
        assert dirty(disk) == [(0, CLUSTER)]
        disk.write(MIB, b"x")
        assert disk.bitmaps["b"].in_use
    with reopened(image) as disk:
        assert dirty(disk) == [(0, CLUSTER), (MIB, CLUSTER)]
        assert disk.check().clean


def test_the_data_of_a_bitmap_are_no_leak(image):
    with reopened(image) as disk:
        disk.write(0, b"x" * 100)
    with reopened(image) as disk:
        assert disk.bitmaps["b"].count == CLUSTER
        assert disk.check().clean


def test_a_disabled_bitmap_is_disabled_for_the_next_process(image):
    with reopened(image) as disk:
        disk.bitmaps.disable("b")
    with reopened(image) as disk:
        assert not disk.bitmaps["b"].enabled
