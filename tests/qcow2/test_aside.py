"""VM state built aside: what is shared, what it costs, and that nothing is lost on the way."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

import pyvirtio
from pyvirtio import BackendError, ImageError, UnsupportedError
from pyvirtio.qcow2.overlap import Section
from pyvirtio.qcow2.refcount_codec import codec_for
from pyvirtio.qcow2.reference_vector import ReferenceVector
from support.filters import CappedDisk
from support.images import KeptDisk, assert_clean, new_image, reopen

CLUSTER = 512
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"cluster_size": 16384, "extended_l2": True},
    {"compat": "0.10"},
    {"refcount_bits": 4},
    {"refcount_bits": 8},
    {"refcount_bits": 64},
    {"encrypt_format": "luks", "passphrase": "x", "encrypt_iter_time": 10},
    {"encrypt_format": "aes", "passphrase": "x"},
]


def keep(disk: Any, name: str, pieces: Any, base: Any = None, **how: Any) -> Any:
    """A snapshot whose VM state is that of ``base``, with these pieces (position, data)."""
    with disk.snapshots.draft(base) as draft:
        if how.get("compressed"):
            draft.write_compressed((at, memoryview(data)) for at, data in pieces)
        else:
            draft.write((at, memoryview(data)) for at, data in pieces)
        draft.write_zeroes(how.get("zeroes", ()))
        return disk.snapshots.create(name, vm_state_size=how["size"], draft=draft)


def state(disk: Any, snapshot: Any) -> bytes:
    with disk.snapshots.open(snapshot) as view:
        return bytes(view.vmstate.reader().read())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_draft_has_what_its_base_has_and_what_was_written(layout: dict[str, Any]) -> None:
    _, disk = new_image(1 << 20, **layout)
    cluster, chance = disk.info().cluster_size or 0, random.Random(1)
    disk.write(0, b"disk" * 1000)
    model = bytearray(chance.randbytes(40 * cluster + 100))
    one = keep(disk, "one", [(0, bytes(model))], size=len(model))
    wanted = [(one, bytes(model))]
    for number in range(2):
        pieces = []
        for at in sorted(chance.sample(range(40), 7)):
            data = chance.randbytes(cluster)
            model[at * cluster : (at + 1) * cluster] = data
            pieces.append((at * cluster, data))
        model[39 * cluster : 40 * cluster] = bytes(cluster)
        last = keep(
            disk, str(number), pieces, wanted[-1][0], zeroes=[39 * cluster], size=len(model)
        )
        wanted.append((last, bytes(model)))
    for snapshot, data in wanted:
        assert state(disk, snapshot) == data
    assert disk.vmstate.size == 0
    assert disk.read(0, 4000) == b"disk" * 1000
    with disk.snapshots.open(one) as view:
        assert view.read(0, 4000) == b"disk" * 1000
    assert disk.check().clean
    for snapshot, data in wanted[::2]:
        assert state(disk, snapshot) == data
        disk.snapshots.delete(snapshot)
    assert state(disk, wanted[1][0]) == wanted[1][1]
    assert disk.check().clean


def test_only_what_changes_takes_clusters() -> None:
    file, disk = new_image(1 << 16)
    one = keep(disk, "one", [(0, bytes(range(256)) * 512)], size=1 << 17)
    disk.flush()
    before = file.size
    keep(disk, "two", [(5 * CLUSTER, b"x" * CLUSTER)], one, size=1 << 17)
    disk.flush()
    # The cluster, its L2 table, an L1 table, a snapshot table.
    assert file.size - before <= 5 * CLUSTER


def test_zeroes_hide_a_longer_backing_file() -> None:
    _, base = new_image(1 << 20)
    base.write(0, b"b" * (1 << 20))
    _, disk = new_image(1 << 16, backing_file="base", backing=lambda reference: base)
    snapshot = keep(disk, "one", [(0, b"x" * CLUSTER)], zeroes=[CLUSTER], size=2 * CLUSTER)
    disk.snapshots.apply(snapshot)
    assert disk.vmstate.read(0, 2 * CLUSTER) == b"x" * CLUSTER + bytes(CLUSTER)
    offset = disk.vmstate.offset
    assert disk.reader.map_own_run(offset + CLUSTER, CLUSTER)[0].name == "ZERO_PLAIN"


def test_a_draft_given_up_leaves_nothing() -> None:
    file, disk = new_image()
    one = keep(disk, "one", [(0, b"1" * 5000)], size=5000)
    with disk.snapshots.draft(one) as draft:
        draft.write([(0, memoryview(b"2" * 5000))])
        draft.write_compressed([(0, memoryview(b"3" * 5000))])
    disk.flush()
    assert_clean(file)
    assert state(disk, one) == b"1" * 5000


def test_a_draft_that_is_open_when_the_image_is_closed_leaves_nothing() -> None:
    file, disk = new_image()
    disk.snapshots.draft().write([(0, memoryview(b"2" * 5000))])
    disk.close()
    assert_clean(file)


def test_what_is_written_twice_leaves_nothing_of_the_first() -> None:
    file, disk = new_image()
    with disk.snapshots.draft() as draft:
        for value in (b"1", b"2"):
            draft.write([(0, memoryview(value * 3000))])
            draft.write_compressed([(4096, memoryview(value * 3000))])
        snapshot = disk.snapshots.create("one", vm_state_size=8000, draft=draft)
    disk.flush()
    assert_clean(file)
    wanted = (b"2" * 3000).ljust(4096, b"\0") + b"2" * 3000
    assert state(disk, snapshot)[:7096] == wanted


def test_few_compressed_clusters_share_a_host_cluster() -> None:
    file, disk = new_image(cluster_size=4096)
    data = b"z" * 4096 * 32
    snapshot = keep(disk, "one", [(0, data)], size=len(data), compressed=True)
    disk.flush()
    assert state(disk, snapshot) == data
    assert_clean(file)
    metadata = disk._metadata
    counts = [n for part in metadata.refcounts.counts(0, file.size // 4096) for n in part]
    assert max(counts) == 8


def test_compressed_clusters_of_an_encrypted_image_are_refused() -> None:
    _, disk = new_image(encrypt_format="aes", passphrase="x")
    with disk.snapshots.draft() as draft, pytest.raises(UnsupportedError, match="encryption"):
        draft.write_compressed([(0, memoryview(b"secret" * 1000))])


def test_a_base_of_another_size_is_not_shared() -> None:
    _, disk = new_image(1 << 16)
    one = keep(disk, "one", [(0, b"1" * 5000)], size=5000)
    disk.truncate(1 << 20)
    with pytest.raises(UnsupportedError, match="another size"):
        disk.snapshots.draft(one)


def test_a_draft_does_not_outlive_its_base() -> None:
    file, disk = new_image()
    one = keep(disk, "one", [(0, b"1" * 5000)], size=5000)
    with disk.snapshots.draft(one) as draft:
        draft.write([(0, memoryview(b"2" * 5000))])
        disk.snapshots.delete(one)
        with pytest.raises(BackendError):
            draft.write([(0, memoryview(b"3" * 5000))])
        with pytest.raises(BackendError):
            disk.snapshots.create("two", vm_state_size=5000, draft=draft)
    disk.flush()
    assert_clean(file)


def test_a_draft_is_the_snapshots_from_the_moment_that_it_is_listed(monkeypatch: Any) -> None:
    """What is thrown right after that frees none of its clusters."""
    file, disk = new_image()

    def interrupted(section: Section, *_: object) -> None:
        if section is Section.INACTIVE_L1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk._metadata.overlap, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keep(disk, "one", [(0, b"1" * 5000)], size=5000)
    disk.flush()
    assert state(disk, disk.snapshots.find("one")) == b"1" * 5000
    assert_clean(file)


def test_a_draft_does_not_outlive_a_repair() -> None:
    file, disk = new_image()
    with disk.snapshots.draft() as draft:
        draft.write([(0, memoryview(b"1" * 5000))])
        disk.check("all")
        with pytest.raises(BackendError):
            draft.write([(0, memoryview(b"1" * 5000))])
        with pytest.raises(BackendError):
            disk.snapshots.create("one", vm_state_size=5000, draft=draft)
    assert len(disk.snapshots) == 0
    disk.flush()
    assert_clean(file)


def test_a_position_inside_a_cluster_is_refused() -> None:
    _, disk = new_image()
    with disk.snapshots.draft() as draft, pytest.raises(ValueError, match="start of a cluster"):
        draft.write([(100, memoryview(b"x"))])


def test_a_vm_state_too_long_for_the_l1_table_is_refused() -> None:
    file, disk = new_image()
    with disk.snapshots.draft() as draft, pytest.raises(BackendError) as caught:
        draft.write_zeroes([1 << 50])
    assert caught.value.errno == errno.EFBIG
    disk.flush()
    assert_clean(file)


def test_a_refcount_at_its_limit_refuses_the_snapshot_and_changes_nothing() -> None:
    file, disk = new_image(refcount_bits=2)
    last = keep(disk, "0", [(0, b"1" * 5000)], size=5000)
    for number in (1, 2):
        last = keep(disk, str(number), [(0, bytes([number]) * CLUSTER)], last, size=5000)
    disk.write(0, b"x" * 5000)
    with pytest.raises(ImageError, match="limit reached"):
        keep(disk, "3", [(0, b"y" * CLUSTER)], last, size=5000)
    assert [snapshot.name for snapshot in disk.snapshots] == ["0", "1", "2"]
    assert state(disk, last) == b"\2" * CLUSTER + b"1" * (5000 - CLUSTER)
    disk.flush()
    assert_clean(file)


@pytest.mark.parametrize("room", range(0, 12 * CLUSTER, CLUSTER))
def test_a_file_that_runs_full_keeps_what_it_has(room: int) -> None:
    file = KeptDisk(growable=True)
    capped = CappedDisk(file, 1 << 40)
    disk: Any = pyvirtio.create_disk(capped, 1 << 16, cluster_size=CLUSTER)
    disk.write(0, b"d" * 3000)
    one = keep(disk, "one", [(0, b"1" * 5000)], size=5000)
    disk.write(0, b"e" * 3000)
    disk.flush()
    capped.cap = file.size + room
    try:
        keep(disk, "two", [(0, b"2" * 2048)], one, size=5000)
    except BackendError:
        assert [snapshot.name for snapshot in disk.snapshots] == ["one"]
    capped.cap = 1 << 40
    disk.flush()
    assert_clean(file)
    two = keep(disk, "again", [(0, b"2" * 2048)], one, size=5000)
    assert (state(disk, one), state(disk, two)) == (b"1" * 5000, b"2" * 2048 + b"1" * 2952)
    disk.flush()
    assert_clean(file)


def test_another_process_finds_it() -> None:
    file, disk = new_image()
    keep(disk, "one", [(0, b"1" * 5000)], size=5000)
    other = reopen(file)
    assert state(other, "one") == b"1" * 5000
    # And may base another one on it.
    two = keep(other, "two", [(512, b"2" * 512)], other.snapshots.find("one"), size=5000)
    assert state(other, two) == b"1" * 512 + b"2" * 512 + b"1" * 3976
    assert other.check().clean


def test_a_base_is_counted_anew_where_refcounts_have_another_width() -> None:
    file, disk = new_image()
    keep(disk, "one", [(0, b"1" * 50_000)], size=50_000)
    disk.amend(refcount_bits=64)
    two = keep(disk, "two", [(512, b"2" * 512)], disk.snapshots.find("one"), size=50_000)
    assert state(disk, two) == b"1" * 512 + b"2" * 512 + b"1" * 48_976
    disk.snapshots.delete(disk.snapshots.find("one"))
    assert state(disk, two) == b"1" * 512 + b"2" * 512 + b"1" * 48_976
    disk.flush()
    assert_clean(file)


def test_going_back_to_where_one_is_writes_nothing() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 5000)
    one = keep(disk, "one", [(0, b"1" * 5000)], size=5000)
    disk.flush()
    before = file.getvalue()
    disk.snapshots.apply(one, vm_state=False)
    disk.flush()
    assert file.getvalue() == before


def test_going_back_brings_no_vm_state_unless_asked() -> None:
    file, disk = new_image()
    disk.write(0, b"x" * 5000)
    one = keep(disk, "one", [(0, b"1" * 5000)], size=5000)
    disk.write(0, b"y" * 5000)
    disk.snapshots.apply(one, vm_state=False)
    disk.flush()
    assert reopen(file).vmstate.size == 0
    assert (disk.read(0, 5000), disk.vmstate.size) == (b"x" * 5000, 0)
    disk.snapshots.apply(one)
    assert disk.vmstate.read(0, 5000) == b"1" * 5000
    disk.flush()
    assert_clean(file)


def test_resizing_drops_vm_state_that_was_brought_back() -> None:
    file, disk = new_image(1 << 16)
    one = keep(disk, "one", [(0, b"1" * 5000)], size=5000)
    disk.snapshots.apply(one)
    disk.truncate(1 << 20)
    assert disk.vmstate.size == 0
    assert disk.read(0, 1 << 20) == bytes(1 << 20)
    assert_clean(file)


@pytest.mark.parametrize("order", range(7))
def test_packed_refcounts_add_up_or_nothing_changes(order: int) -> None:
    chance, codec = random.Random(order), codec_for(order)
    count = 512 * 8 >> order
    for _ in range(20):
        one = [chance.randint(0, codec.max) for _ in range(count)]
        two = [chance.choice((0, 1, codec.max - value)) for value in one]
        packed, deltas = bytearray(512), bytearray(512)
        codec.store(memoryview(packed), 0, one)
        codec.store(memoryview(deltas), 0, two)
        found = codec.add_packed(memoryview(packed), bytes(deltas), 1)
        sums = [a + b for a, b in zip(one, two, strict=True)]
        differences = [a - b for a, b in zip(one, two, strict=True)]
        if max(sums) > codec.max:
            assert found is None
        else:
            assert found is not None
            assert list(codec.load(memoryview(bytearray(found)), 0, count)) == sums
        found = codec.add_packed(memoryview(packed), bytes(deltas), -1)
        if min(differences) < 0:
            assert found is None
        else:
            assert found is not None
            assert list(codec.load(memoryview(bytearray(found)), 0, count)) == differences


def test_slices_that_nothing_refers_to_any_more_are_forgotten() -> None:
    """Else what a snapshot costs grows with the length of the file."""
    _, disk = new_image()
    disk.vmstate.write(0, b"x" * (CLUSTER * 500))
    metadata = disk._metadata
    vector = ReferenceVector(metadata)
    vector.add_clusters([10, 400])
    vector.remove_clusters([10])
    vector.raise_refcounts()()
    assert len(vector._slices) == 1


def test_a_vector_is_raised_whole_or_not_at_all() -> None:
    file, disk = new_image(2 << 20, refcount_bits=2)
    disk.write(0, b"x" * (2 << 20))
    metadata = disk._metadata
    early, late = 100, 4000  # counted in two slices
    with metadata.lock:
        metadata.refcounts.add(late, 1, 2)
        vector = ReferenceVector(metadata)
        vector.add_clusters([early, late])
        with pytest.raises(ImageError, match="limit reached"):
            vector.raise_refcounts()
        assert [metadata.refcounts.get(cluster) for cluster in (early, late)] == [1, 3]
        metadata.refcounts.add(late, 1, -2)
        take_off = vector.raise_refcounts()
        assert [metadata.refcounts.get(cluster) for cluster in (early, late)] == [2, 2]
        take_off()
    disk.flush()
    assert_clean(file)
