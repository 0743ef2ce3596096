"""VM state past the disk's end, and views of snapshots."""

from __future__ import annotations

import errno
import io
import pickle
import random
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import BackendError, MemoryDisk
from support.filters import FaultyDisk
from support.peers import requires
from support.qemu import QemuIo, qemu_check, qemu_create, qemu_img, qemu_img_json

SIZE = 1 << 20
LAYOUTS = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": True},
    {},
]
STATE = random.Random(1).randbytes(300_032)


def make(size: int = SIZE, **options: Any) -> Any:
    return pyvirtio.create_disk(MemoryDisk(growable=True), size, **options)


def clean(disk: Any) -> bool:
    return bool(disk.check().clean)


# -- VM state --------------------------------------------------------------------------------------


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_qemu_reads_our_vm_state_and_we_qemus(tmp_path: Path, layout: dict[str, Any]) -> None:
    path = tmp_path / "disk"
    qemu_create(tmp_path / "base", 300 << 20)
    with QemuIo(tmp_path / "base") as io_:
        io_.command("write -P 7 0 300M")
    options = {"backing_file": "base", "backing_fmt": "qcow2", **layout}
    with pyvirtio.create_disk(path, SIZE, **options) as disk:
        disk.write(5000, b"a" * 3000)
        stream = disk.vmstate.writer()
        stream.write(STATE[:100_001])
        stream.write(STATE[100_001:])
        disk.vmstate.write(400_000, b"Z" * 64)
        disk.snapshots.create("one", vm_state_size=400_064)
        assert disk.vmstate.size == 0
        assert clean(disk)
    qemu_check(path)
    assert qemu_img_json("info", path)["snapshots"][0]["vm-state-size"] == 400_064
    qemu_img("snapshot", "-a", "one", path)
    with QemuIo(path) as io_:
        # What was never written reads as zeroes, not as the backing file.
        assert "failed" not in io_.command("read -b -P 0 300544 99328")
        io_.command("write -b -P 0x33 70144 100352")
    with pyvirtio.open_disk(path) as disk:
        wanted = STATE[:70144] + b"\x33" * 100352 + STATE[170496:]
        assert disk.vmstate.read(0, len(STATE)) == wanted
        assert disk.read(5000, 3000) == b"a" * 3000
        disk.snapshots.apply("one")
        assert disk.vmstate.reader().read() == STATE + bytes(400_000 - len(STATE)) + b"Z" * 64
    qemu_check(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vm_state_never_shows_as_disk_contents(layout: dict[str, Any]) -> None:
    with make(SIZE - 512, **layout) as disk:
        disk.vmstate.write(0, STATE)
        assert disk.read(0, disk.size) == bytes(disk.size)
        disk.truncate(4 * SIZE)
        assert disk.read(0, disk.size) == bytes(disk.size)
        assert disk.vmstate.size == 0
        assert clean(disk)


def test_vm_state_begins_at_the_first_l1_entry_not_used() -> None:
    with make(SIZE + 512, cluster_size=512) as disk:
        assert disk.vmstate.offset == SIZE + 512 * 64
        assert disk.info().vm_state_offset == disk.vmstate.offset


def test_any_position_can_be_written_and_read() -> None:
    with make(cluster_size=4096) as disk:
        model = bytearray(200_000)
        chance = random.Random(3)
        for _ in range(100):
            start = chance.randrange(len(model))
            data = chance.randbytes(chance.randint(1, min(20_000, len(model) - start)))
            disk.vmstate.writev(start, [data[:10], data[10:]])
            model[start : start + len(data)] = data
        assert disk.vmstate.read(0, len(model)) == model
        assert clean(disk)


def test_a_vm_state_beyond_32_bits_keeps_its_size() -> None:
    with make() as disk:
        disk.vmstate.write((5 << 30) - 3, b"end")
        disk.snapshots.create("large", vm_state_size=5 << 30)
        disk.snapshots.apply("large")
        assert disk.vmstate.size == 5 << 30
        assert disk.vmstate.read((5 << 30) - 3, 3) == b"end"
        assert clean(disk)


def test_a_vm_state_beyond_the_l1_tables_limit_is_refused() -> None:
    with make(cluster_size=512) as disk:
        with pytest.raises(BackendError) as caught:
            disk.vmstate.write(1 << 40, b"x")
        assert caught.value.errno == errno.EFBIG
        disk.vmstate.write(0, b"x")
        assert clean(disk)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_write_that_fails_leaves_what_a_snapshot_has(persistent: bool) -> None:
    """At every request to the file: the size is the old one, and what was applied comes again."""
    for number in range(100):
        faulty = FaultyDisk(MemoryDisk(growable=True), kinds=frozenset({"write", "truncate"}))
        disk: Any = pyvirtio.create_disk(faulty, SIZE, cluster_size=4096)
        disk.write(0, b"disk" * 5000)
        disk.vmstate.write(0, STATE)
        disk.snapshots.create("one", vm_state_size=len(STATE))
        disk.snapshots.apply("one")
        faulty.count, faulty.fail_at, faulty.persistent = 0, number, persistent
        with suppress(BackendError):
            disk.vmstate.write(1000, bytes(len(STATE)))
            disk.flush()
        faulty.fail_at = None
        assert disk.vmstate.size in (len(STATE), len(STATE) + 1000)
        with disk.snapshots.open("one") as view:
            assert view.vmstate.read(0, len(STATE)) == STATE
        disk.snapshots.apply("one")
        assert disk.vmstate.size == len(STATE)
        assert disk.vmstate.read(0, len(STATE)) == STATE
        assert disk.read(0, 20_000) == b"disk" * 5000
        disk.check("leaks")
        assert clean(disk)
        if not faulty.failed:
            break
    assert 5 <= number < 99


def test_discarding_the_vm_state_frees_it() -> None:
    with make(cluster_size=4096) as disk:
        disk.vmstate.write(0, STATE)
        disk.vmstate.discard()
        assert disk.vmstate.read(0, 100) == bytes(100)
        assert clean(disk)


def test_the_stream_is_a_file_object() -> None:
    with make() as disk:
        with io.BufferedWriter(disk.vmstate.writer()) as stream:
            for start in range(0, len(STATE), 1000):
                stream.write(STATE[start : start + 1000])
        with disk.vmstate.reader() as stream:
            assert stream.seek(-5, io.SEEK_END) == len(STATE) - 5
            assert stream.read() == STATE[-5:]
            assert stream.read(1) == b""
            assert not stream.writable()


def test_a_read_only_image_takes_no_vm_state(tmp_path: Path) -> None:
    pyvirtio.create_disk(tmp_path / "disk", SIZE).close()
    with pyvirtio.open_disk(tmp_path / "disk", read_only=True) as disk:
        with pytest.raises(BackendError) as caught:
            disk.vmstate.write(0, b"x")
        assert caught.value.errno == errno.EPERM


# -- views of snapshots ----------------------------------------------------------------------------


def test_a_view_shows_the_snapshot_while_the_disk_goes_on() -> None:
    with make(cluster_size=4096) as disk:
        disk.write(0, b"a" * 50_000)
        disk.vmstate.write(0, STATE)
        disk.snapshots.create("one", vm_state_size=len(STATE))
        disk.truncate(2 * SIZE)
        with disk.snapshots.open("one") as view:
            disk.write(0, b"b" * 50_000)
            disk.snapshots.create("two")
            disk.write_zeroes(0, 20_000, unmap=True)
            assert view.size == SIZE
            assert view.read(0, 50_001) == b"a" * 50_000 + b"\0"
            assert view.vmstate.reader().read() == STATE
            assert [e.data for e in view.extents()] == [True, False]
            with pytest.raises(BackendError):
                view.write(0, b"x")


def test_a_snapshot_in_view_is_not_deleted() -> None:
    with make() as disk:
        disk.snapshots.create("one")
        view = disk.snapshots.open("one")
        with pytest.raises(BackendError) as caught:
            disk.snapshots.delete("one")
        assert caught.value.errno == errno.EBUSY
        view.close()
        disk.snapshots.delete("one")


def test_a_view_that_nobody_has_any_more_is_in_nobodys_way() -> None:
    with make() as disk:
        disk.snapshots.create("one")
        disk.snapshots.open("one")  # as if an interrupt came before it could be closed
        disk.snapshots.delete("one")
        assert clean(disk)


def test_closing_the_image_closes_its_views() -> None:
    disk = make()
    disk.snapshots.create("one")
    view = disk.snapshots.open("one")
    disk.close()
    assert view.closed


# -- finding, renaming, extra data -----------------------------------------------------------------


def test_an_id_is_found_before_a_name() -> None:
    with make() as disk:
        disk.snapshots.create("2")
        second = disk.snapshots.create("x")
        assert disk.snapshots.find("2") is second
        assert disk.snapshots.find_by(name="2").id == "1"
        assert disk.snapshots.find_by(id="2", name="x") is second
        with pytest.raises(KeyError):
            disk.snapshots.find_by(id="2", name="2")


def test_a_renamed_snapshot_keeps_the_rest() -> None:
    with make() as disk:
        disk.write(0, b"x")
        disk.snapshots.create("old", vm_clock=5, icount=7)
        disk.snapshots.rename("old", "new")
        found = disk.snapshots.find("new")
        assert (found.id, found.vm_clock_nsec, found.icount) == ("1", 5, 7)
        disk.snapshots.delete("new")
        assert clean(disk)


def test_unknown_extra_data_of_snapshots_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with pyvirtio.create_disk(path, SIZE) as disk:
        disk.snapshots.create("one").unknown_extra_data = b"what is to come!"
        disk.snapshots.create("two")
        disk.snapshots.write_table()
    with pyvirtio.open_disk(path) as disk:
        disk.snapshots.delete("two")
    with pyvirtio.open_disk(path) as disk:
        assert disk.snapshots.find("one").unknown_extra_data == b"what is to come!"
        assert clean(disk)


def test_clusters_shared_unevenly_count_to_the_limit() -> None:
    with make(cluster_size=512, refcount_bits=2) as disk:
        disk.write(0, b"x" * 5000)
        disk.snapshots.create("one")
        disk.snapshots.create("two")
        disk.write(0, b"y" * 5000)  # the old clusters are at 2, the new ones at 1
        disk.snapshots.create("three")
        assert clean(disk)


def test_serializers_work_on_the_streams() -> None:
    with make() as disk:
        with disk.vmstate.writer() as stream, zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("ram", STATE)
            archive.writestr("cpu", pickle.dumps({"pc": 4}))
        with disk.vmstate.reader() as stream, zipfile.ZipFile(stream) as archive:
            assert archive.testzip() is None
            assert archive.read("ram") == STATE
            assert pickle.loads(archive.read("cpu")) == {"pc": 4}
        with io.BufferedWriter(disk.vmstate.writer()) as stream:
            pickle.dump([STATE, 5], stream)
        assert pickle.load(disk.vmstate.reader()) == [STATE, 5]


def test_a_part_of_the_vm_state_is_read_where_it_stands() -> None:
    with make(cluster_size=4096) as disk:
        disk.vmstate.write(0, STATE)
        assert disk.vmstate.read(100, 50) == STATE[100:150]
