"""Writes that would hit metadata are refused, whatever the refcounts say."""

from __future__ import annotations

import errno
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.errors import BackendError, ImageError
from pyvirtio.qcow2 import Qcow2Disk
from pyvirtio.qcow2.overlap import TEMPLATES, Overlap

COPIED = 1 << 63
CLUSTER = 65536


def get(path: Path, offset: int, length: int = 8) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(length))


def put(path: Path, offset: int, value: int, form: str = ">Q") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, value))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image with data in the first two guest clusters and a snapshot with other data there."""
    path = tmp_path / "image.qcow2"
    with pyvirtio.create_disk(path, 64 << 20) as disk:
        disk.write(0, b"a" * (2 * CLUSTER))
        disk.snapshots.create("one")
        disk.write(0, b"b" * (2 * CLUSTER))
    return path


def snapshot_l1(path: Path) -> int:
    return get(path, get(path, 64))


PLACES: dict[str, Callable[[Path], int]] = {
    "main_header": lambda path: 0,
    "active_l1": lambda path: get(path, 40),
    "active_l2": lambda path: get(path, get(path, 40)) & ~COPIED,
    "refcount_table": lambda path: get(path, 48),
    "refcount_block": lambda path: get(path, get(path, 48)),
    "snapshot_table": lambda path: get(path, 64),
    "inactive_l1": snapshot_l1,
    "inactive_l2": lambda path: get(path, snapshot_l1(path)) & ~COPIED,
}

NAMES = {
    "main_header": "qcow2_header",
    "active_l1": "active L1 table",
    "active_l2": "active L2 table",
    "refcount_table": "refcount table",
    "refcount_block": "refcount block",
    "snapshot_table": "snapshot table",
    "inactive_l1": "inactive L1 table",
    "inactive_l2": "inactive L2 table",
}


def point_at(path: Path, structure: str) -> None:
    """Make the second guest cluster's entry refer to a structure of the image, as its own."""
    entry = (get(path, get(path, 40)) & ~COPIED) + 8
    put(path, entry, PLACES[structure](path) | COPIED)


def is_refused(path: Path, **options: object) -> bool:
    """Write to the second guest cluster; True if that is refused as an overlap."""
    disk = pyvirtio.open_disk(path, format="qcow2", **options)
    try:
        disk.write(CLUSTER + 100, b"!" * 1000)
    except ImageError as error:
        return "Preventing invalid write on metadata" in str(error)
    else:
        return False
    finally:
        disk.close()


# (The header cannot be pointed at: an entry with offset 0 is no cluster.)
POINTED = [structure for structure in PLACES if structure != "main_header"]


@pytest.mark.parametrize("structure", POINTED)
def test_write_into_the_structure_is_refused(path: Path, structure: str) -> None:
    point_at(path, structure)
    before = path.read_bytes()
    disk = pyvirtio.open_disk(path, format="qcow2", overlap_check="all")
    with pytest.raises(ImageError, match=rf"overlaps with {NAMES[structure]}\)"):
        disk.write(CLUSTER + 100, b"!" * 1000)
    disk.close()
    after = bytearray(path.read_bytes())
    after[72:80] = before[72:80]
    assert after == before, "nothing but the corrupt bit is written"
    assert get(path, 72) & 2


@pytest.mark.parametrize("structure", POINTED)
@pytest.mark.parametrize("template", ["none", "constant", "cached", "all"])
def test_templates_ask_for_what_qemu_asks_for(path: Path, structure: str, template: str) -> None:
    point_at(path, structure)
    constant = {"active_l1", "refcount_table", "snapshot_table"}
    cached = constant | {"active_l2", "refcount_block", "inactive_l1"}
    asked = {"none": set(), "constant": constant, "cached": cached, "all": set(PLACES)}
    assert is_refused(path, overlap_check=template) == (structure in asked[template])


@pytest.mark.parametrize("structure", POINTED)
def test_each_structure_can_be_switched_on_by_name(path: Path, structure: str) -> None:
    point_at(path, structure)
    on = {f"overlap_check_{structure}": True}
    assert is_refused(path, overlap_check="none", **on)


@pytest.mark.parametrize("structure", POINTED)
def test_each_structure_can_be_switched_off_by_name(path: Path, structure: str) -> None:
    point_at(path, structure)
    off = {f"overlap_check_{structure}": "off"}
    assert not is_refused(path, overlap_check_template="all", **off)


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")
@pytest.mark.parametrize("structure", POINTED)
def test_qemu_names_the_same_structure(path: Path, structure: str) -> None:
    point_at(path, structure)
    done = subprocess.run(
        [
            "qemu-io",
            "-c",
            "open -o overlap-check=all " + str(path),
            "-c",
            "write 65636 1000",
        ],
        capture_output=True,
        text=True,
    )
    assert f"(overlaps with {NAMES[structure]})" in done.stderr + done.stdout


def test_allocation_in_the_header_is_refused(path: Path) -> None:
    block = get(path, get(path, 48))
    put(path, block, 0, ">H")
    disk = pyvirtio.open_disk(path, format="qcow2")
    with pytest.raises(ImageError, match=r"overlaps with qcow2_header"):
        disk.write(8 << 20, b"x" * CLUSTER)
    disk.close()
    assert get(path, 0, 4) == 0x514649FB


def fill(disk: pyvirtio.Disk, offset: int, count: int) -> None:
    """Write so many clusters, one by one: a longer write would pass a gap of one by."""
    for i in range(count):
        disk.write(offset + i * CLUSTER, b"x" * CLUSTER)


@pytest.mark.parametrize("structure", ["active_l1", "active_l2", "refcount_block"])
def test_allocation_of_a_structures_cluster_is_refused(path: Path, structure: str) -> None:
    place = PLACES[structure](path)
    put(path, get(path, get(path, 48)) + 2 * (place // CLUSTER), 0, ">H")
    disk = pyvirtio.open_disk(path, format="qcow2")
    with pytest.raises(ImageError, match="Preventing invalid"):
        fill(disk, 8 << 20, 30)
    disk.close()


def test_long_write_that_touches_a_table_is_refused(path: Path) -> None:
    """A run of clusters in place, one of which is the L2 table."""
    table = get(path, get(path, 40)) & ~COPIED
    for i in range(-1, 2):
        put(path, table + 8 * (20 + i), (table + i * CLUSTER) | COPIED)
    disk = pyvirtio.open_disk(path, format="qcow2")
    with pytest.raises(ImageError, match="overlaps with"):
        disk.write(19 * CLUSTER, b"x" * (3 * CLUSTER))
    disk.close()


def test_cached_table_in_the_place_of_a_refcount_block_is_not_written(path: Path) -> None:
    put(path, get(path, 40), get(path, get(path, 48)) | COPIED)
    disk = pyvirtio.open_disk(path, format="qcow2")
    disk.write_zeroes(CLUSTER * 100, 50 * CLUSTER, unmap=True)
    with pytest.raises(ImageError, match="overlaps with refcount block"):
        disk.flush()
    disk.close()


def test_tables_that_moved_are_known_where_they_are_now(path: Path) -> None:
    with pyvirtio.open_disk(path, format="qcow2", overlap_check="all") as disk:
        for name in ("two", "three"):
            disk.snapshots.create(name)
            disk.write(0, b"c" * (5 * CLUSTER))
        disk.snapshots.delete("two")
        disk.snapshots.apply("three")
        disk.snapshots.delete("one")
        disk.truncate(1 << 40)
        for i in range(64):
            disk.write(i << 34, b"d" * 100000)
        assert disk.check().clean


def test_freed_tables_clusters_take_data(tmp_path: Path) -> None:
    """What was an L2 table and is none any more is written like any other cluster."""
    with pyvirtio.create_disk(tmp_path / "small.qcow2", 8 << 20, cluster_size=512) as disk:
        for round_ in range(3):
            disk.write(0, bytes([round_ + 1]) * (1 << 20))
            disk.snapshots.create("s")
            disk.write(0, b"x" * (1 << 20))
            disk.snapshots.delete("s")
            disk.discard(0, 1 << 20)
            disk.flush()
            disk.write(2 << 20, b"y" * (1 << 20))
        assert disk.check().clean


def structures(overlap: Overlap) -> object:
    return overlap._starts, overlap._ends, overlap._kinds


def test_what_is_kept_while_snapshots_come_and_go_is_what_is_collected_anew() -> None:
    chance = random.Random(1)
    disk = pyvirtio.create_disk(pyvirtio.MemoryDisk(growable=True), 1 << 20, cluster_size=512)
    assert isinstance(disk, Qcow2Disk)
    kept = disk._metadata.overlap
    for _ in range(100):
        disk.write(chance.randrange(2000) * 512, b"x" * 512)
        names = [snapshot.id for snapshot in disk.snapshots]
        what = chance.choice(["create", "create", "apply", "delete"]) if names else "create"
        if what == "create":
            disk.snapshots.create("any")
        elif what == "apply":
            disk.snapshots.apply(chance.choice(names))
        else:
            disk.snapshots.delete(chance.choice(names))
        anew = Overlap(disk._metadata, TEMPLATES["cached"])
        anew.snapshots = kept.snapshots
        anew._collect()
        assert kept._known
        assert structures(kept) == structures(anew)
        assert kept._tables.items() >= anew._tables.items()
    assert disk.check().clean


def test_structure_in_anothers_place_stays_known_when_that_goes(path: Path) -> None:
    table = get(path, 64)
    put(path, table, table)  # the snapshot's L1 table is where the snapshot table is
    disk = pyvirtio.open_disk(path, format="qcow2")
    disk.write(8 << 20, b"x" * CLUSTER)
    assert isinstance(disk, Qcow2Disk)
    disk.snapshots.create("two")  # the snapshot table is another one
    with pytest.raises(ImageError, match="inactive L1 table"):
        disk._metadata.overlap.check(table, 512)


def test_the_header_is_a_structure() -> None:
    with pyvirtio.create_disk(pyvirtio.MemoryDisk(growable=True), 1 << 20) as disk:
        disk._metadata.overlap.check(65536 * 40, 512)
        with pytest.raises(ImageError, match="qcow2_header"):
            disk._metadata.overlap.check(100, 1)


@pytest.mark.parametrize(
    ("field", "value", "number"), [(0, 0x400200, errno.EINVAL), (8, 0x10000000, errno.EFBIG)]
)
def test_a_snapshot_whose_tables_cannot_be_asked_refuses_writes(
    path: Path, field: int, value: int, number: int
) -> None:
    put(path, get(path, 64) + field, value, ">Q" if not field else ">I")
    disk = pyvirtio.open_disk(path, format="qcow2", overlap_check="all")
    with pytest.raises(BackendError) as error:
        disk.write(8 << 20, b"x" * CLUSTER)
    assert error.value.errno == number
    assert isinstance(disk, Qcow2Disk)
    assert disk.unflushed == ("refcount block",)
    with pytest.raises(BackendError):
        disk.close()


def test_a_table_that_a_deleted_snapshot_had_may_be_written(path: Path) -> None:
    with pyvirtio.open_disk(path, overlap_check="all") as disk:
        disk.snapshots.create("two")
        disk.snapshots.delete("two")
        disk.write(0, b"c" * CLUSTER)
        assert disk.check().clean


def test_zero_clusters_of_a_snapshot_are_expanded_under_all_checks(path: Path) -> None:
    with pyvirtio.open_disk(path, overlap_check="all") as disk:
        disk.write_zeroes(0, CLUSTER)
        disk.snapshots.create("zero")
        disk.write(0, b"c" * CLUSTER)
        disk.amend(compat="0.10")
        assert disk.check().clean
