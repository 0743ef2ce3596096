"""commit: the base reads as the overlay did, the overlay still does."""

from __future__ import annotations

import shutil

import pytest

import pyvirtio
from pyvirtio import MemoryDisk, commit
from support.chains import Chain, words
from support.peers import requires
from support.qemu import qemu_check, qemu_compare, qemu_img, qemu_read

CLUSTER = 65536


def own_layer(disk):
    return [e for e in disk.extents() if e.allocated and not e.depth]


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"compat": "0.10"}])
@pytest.mark.parametrize("seed", range(3))
def test_the_backing_file_takes_the_data_and_the_overlay_is_empty(tmp_path, seed, options):
    chain = Chain(tmp_path, seed=seed, **options)
    expected = chain.contents["top"]
    with chain.open() as disk:
        commit(disk)
        assert disk.read(0, disk.size) == expected
        assert not own_layer(disk)
        assert disk.check().clean
        assert disk.backing.read_only
    with chain.open("mid") as mid:
        assert mid.read(0, len(expected)) == expected
        assert mid.check().clean


@requires("qemu-img")
@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"refcount_bits": 1}])
def test_the_base_reads_as_the_one_that_qemu_commits_to(tmp_path, options):
    (tmp_path / "ours").mkdir()
    chain = Chain(tmp_path / "ours", **options)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    qemu_img("commit", "-f", "qcow2", tmp_path / "theirs" / "top")
    with chain.open() as disk:
        commit(disk)
    for name in ("top", "mid"):
        qemu_check(chain.folder / name)
        qemu_compare(chain.folder / name, tmp_path / "theirs" / name, formats="qcow2:qcow2")
    assert qemu_read(chain.top, tmp_path) == chain.contents["top"]


@requires("qemu-img")
def test_a_base_further_down_takes_the_layers_between_too(tmp_path):
    (tmp_path / "ours").mkdir()
    chain = Chain(tmp_path / "ours")
    theirs = tmp_path / "theirs"
    shutil.copytree(tmp_path / "ours", theirs)
    qemu_img("commit", "-f", "qcow2", "-b", theirs / "base", theirs / "top")
    with chain.open() as disk:
        commit(disk, disk.backing.backing)
        assert own_layer(disk)
        assert disk.read(0, disk.size) == chain.contents["top"]
    found = chain.base.read_bytes()
    assert found[: len(chain.contents["top"])] == chain.contents["top"]
    assert found == (theirs / "base").read_bytes()


def test_zeroes_that_a_short_layer_between_shows_reach_the_base():
    base = MemoryDisk(bytearray(b"\x77" * 4 * CLUSTER))
    mid = pyvirtio.create_disk(
        MemoryDisk(growable=True), CLUSTER, backing_file="b", backing=lambda _: base
    )
    top = pyvirtio.create_disk(
        MemoryDisk(growable=True), 3 * CLUSTER, backing_file="m", backing=lambda _: mid
    )
    commit(top, base)
    assert base.read(0, 4 * CLUSTER) == (b"\x77" * CLUSTER + bytes(2 * CLUSTER) + b"\x77" * CLUSTER)


def test_a_base_that_is_smaller_grows(tmp_path):
    (tmp_path / "base").write_bytes(b"\x11" * CLUSTER)
    with pyvirtio.create_disk(
        tmp_path / "top", 4 * CLUSTER, backing_file="base", backing_fmt="raw"
    ) as disk:
        disk.write(3 * CLUSTER, b"\x22" * CLUSTER)
        commit(disk)
        assert disk.backing.size == 4 * CLUSTER
    expected = b"\x11" * CLUSTER + bytes(2 * CLUSTER) + b"\x22" * CLUSTER
    assert (tmp_path / "base").read_bytes() == expected


def test_kept_overlays_keep_their_data(tmp_path):
    chain = Chain(tmp_path)
    with chain.open() as disk:
        commit(disk, keep=True)
        assert own_layer(disk)


def test_snapshots_of_the_overlay_stay(tmp_path):
    chain = Chain(tmp_path)
    with chain.open() as disk:
        before = disk.read(0, disk.size)
        disk.snapshots.create("a")
        disk.write(0, words(9, CLUSTER))
        disk.write_compressed(CLUSTER, [words(10, CLUSTER)])
        commit(disk)
        assert disk.check().clean
        assert not own_layer(disk)
        disk.snapshots.apply("a")
        own = {o for e in own_layer(disk) for o in range(0, e.length, 512)}
        assert own
        assert disk.check().clean
        disk.snapshots.delete("a")
        assert disk.check().clean
    assert len(before) == len(chain.contents["top"])


def test_an_interrupt_leaves_both_valid_and_the_overlay_as_it_was(tmp_path):
    chain = Chain(tmp_path)

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with chain.open() as disk:
        with pytest.raises(KeyboardInterrupt):
            commit(disk, progress=interrupt)
        assert disk.read(0, disk.size) == chain.contents["top"]
        assert disk.backing.read_only
        assert disk.check().clean
        assert disk.backing.check().clean


def test_a_disk_with_nothing_below_cannot_be_committed():
    with pytest.raises(ValueError, match="does not have a backing file"):
        commit(MemoryDisk(4096))


def test_a_base_of_another_chain_is_refused(tmp_path):
    chain = Chain(tmp_path)
    with chain.open(read_only=True) as disk, pytest.raises(ValueError, match="chain"):
        commit(disk, MemoryDisk(4096))


def test_a_read_only_overlay_is_not_emptied(tmp_path):
    chain = Chain(tmp_path)
    with chain.open(read_only=True) as disk, pytest.raises(ValueError, match="read-only"):
        commit(disk)


def test_a_disk_is_not_its_own_base(tmp_path):
    chain = Chain(tmp_path)
    with chain.open() as disk, pytest.raises(ValueError, match="not in the backing chain"):
        commit(disk, disk)
