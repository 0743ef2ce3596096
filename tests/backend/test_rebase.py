"""rebase and stream: what is below changes, what the overlay reads as does not."""

from __future__ import annotations

import random
import shutil

import pytest

import pyvirtio
from pyvirtio import MemoryDisk, UnsupportedError, rebase, stream
from support.chains import Chain, words
from support.peers import requires
from support.qemu import qemu_check, qemu_compare, qemu_img, qemu_img_json, qemu_read

CLUSTER = 65536


def other(path, size, seed=7):
    """A backing file that is partly alike."""
    with pyvirtio.create_disk(path, size) as disk:
        disk.write(0, words(seed, min(size, 3 * CLUSTER)))
        if size > 6 * CLUSTER:
            disk.write(5 * CLUSTER + 100, words(seed, 5000))
            disk.write_zeroes(4 * CLUSTER, CLUSTER)


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"cluster_size": 4096}])
@pytest.mark.parametrize("size", [0, 100 * 1024, 2 << 20])
def test_the_overlay_reads_the_same_over_another_backing_file(tmp_path, size, options):
    chain = Chain(tmp_path, **options)
    other(tmp_path / "other", size)
    expected = chain.contents["top"]
    with chain.open() as disk:
        rebase(disk, pyvirtio.open_disk(tmp_path / "other", read_only=True), name="other")
        assert disk.read(0, disk.size) == expected
        assert disk.check().clean
        assert disk.backing.filename == str(tmp_path / "other")
    with chain.open() as disk:
        assert disk.backing_file == "other"
        assert disk.read(0, disk.size) == expected


def test_without_a_backing_file_everything_is_in_the_overlay(tmp_path):
    chain = Chain(tmp_path)
    with chain.open() as disk:
        rebase(disk, None)
        assert disk.backing_file is None
        assert disk.backing is None
    chain.mid.unlink()
    with chain.open() as disk:
        assert disk.read(0, disk.size) == chain.contents["top"]


def test_what_is_alike_is_not_copied(tmp_path):
    chain = Chain(tmp_path)
    shutil.copy(chain.mid, tmp_path / "copy")
    with chain.open() as disk:
        before = [(e.length, e.depth) for e in disk.extents()]
        rebase(disk, pyvirtio.open_disk(tmp_path / "copy", read_only=True), name="copy")
        assert [(e.length, e.depth) for e in disk.extents()] == before


def test_unsafe_changes_the_name_alone(tmp_path):
    chain = Chain(tmp_path)
    other(tmp_path / "other", 2 << 20)
    with chain.open() as disk:
        before = disk.children["file"].size
        rebase(disk, None, name="other", format="qcow2", unsafe=True)
        assert disk.children["file"].size == before
    with chain.open() as disk:
        assert disk.backing_file == "other"
        assert disk.read(5 * CLUSTER, 200)


@requires("qemu-img")
@pytest.mark.parametrize("size", [100 * 1024, 2 << 20])
def test_qemu_rebases_to_the_same_contents(tmp_path, size):
    (tmp_path / "ours").mkdir()
    chain = Chain(tmp_path / "ours")
    other(chain.folder / "other", size)
    theirs = tmp_path / "theirs"
    shutil.copytree(chain.folder, theirs)
    qemu_img("rebase", "-f", "qcow2", "-b", theirs / "other", "-F", "qcow2", theirs / "top")
    with chain.open() as disk:
        rebase(disk, pyvirtio.open_disk(chain.folder / "other", read_only=True))
    qemu_check(chain.top)
    qemu_compare(chain.top, theirs / "top", formats="qcow2:qcow2")
    assert qemu_read(chain.top, tmp_path) == chain.contents["top"]
    found = qemu_img_json("info", chain.top)
    assert found["full-backing-filename"] == str(chain.folder / "other")
    assert found["backing-filename-format"] == "qcow2"


def test_an_interrupt_leaves_the_old_backing_file(tmp_path):
    chain = Chain(tmp_path)

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with chain.open() as disk:
        with pytest.raises(KeyboardInterrupt):
            rebase(disk, None, progress=interrupt)
        with pytest.raises(KeyboardInterrupt):
            stream(disk, progress=interrupt)
        assert disk.backing_file == "mid"
        assert disk.read(0, disk.size) == chain.contents["top"]
        assert disk.check().clean


@pytest.mark.parametrize("operation", [lambda disk: rebase(disk, None), stream])
def test_a_disk_that_cannot_have_a_backing_file_is_refused(operation):
    with pytest.raises(UnsupportedError):
        operation(MemoryDisk(4096))


def test_a_backing_file_without_a_name_needs_one():
    disk = pyvirtio.create_disk(MemoryDisk(growable=True), CLUSTER)
    with pytest.raises(ValueError, match="no name"):
        rebase(disk, MemoryDisk(CLUSTER))


# -- stream ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"compat": "0.10"}])
def test_a_streamed_overlay_needs_no_chain(tmp_path, seed, options):
    chain = Chain(tmp_path, seed=seed, **options)
    with chain.open() as disk:
        stream(disk)
        assert disk.read(0, disk.size) == chain.contents["top"]
        assert disk.backing is None
        assert disk.check().clean
    chain.mid.unlink()
    chain.base.unlink()
    with chain.open() as disk:
        assert disk.read(0, disk.size) == chain.contents["top"]


@requires("qemu-img")
@pytest.mark.parametrize("seed", range(3))
def test_a_chain_streamed_down_to_a_base_keeps_that(tmp_path, seed):
    chain = Chain(tmp_path, seed=seed)
    with chain.open() as disk:
        base = disk.backing.backing
        stream(disk, base)
        assert disk.backing is base
        assert not base.closed
        assert disk.backing_file == "base"
        assert disk.read(0, disk.size) == chain.contents["top"]
    chain.mid.unlink()
    qemu_check(chain.top)
    assert qemu_read(chain.top, tmp_path) == chain.contents["top"]
    assert qemu_img_json("info", chain.top)["backing-filename-format"] == "raw"


def test_zeroes_of_a_short_layer_between_hide_the_base():
    base = MemoryDisk(bytearray(b"\x77" * 4 * CLUSTER))
    mid = pyvirtio.create_disk(
        MemoryDisk(growable=True), CLUSTER, backing_file="b", backing=lambda _: base
    )
    top = pyvirtio.create_disk(
        MemoryDisk(growable=True), 3 * CLUSTER, backing_file="m", backing=lambda _: mid
    )
    stream(top, base, name="b")
    assert top.read(0, 3 * CLUSTER) == b"\x77" * CLUSTER + bytes(2 * CLUSTER)
    assert mid.closed


def test_a_name_relative_to_another_folder_becomes_absolute(tmp_path):
    below, above = tmp_path / "below", tmp_path / "above"
    below.mkdir()
    above.mkdir()
    chain = Chain(below)
    with pyvirtio.create_disk(
        above / "disk", 1 << 20, backing_file="../below/top", backing_fmt="qcow2"
    ) as disk:
        expected = disk.read(0, disk.size)
        stream(disk, disk.backing.backing)
    with pyvirtio.open_disk(above / "disk") as disk:
        assert disk.backing_file == str(chain.mid)
        assert disk.read(0, disk.size) == expected


def test_streaming_without_a_backing_file_does_nothing():
    disk = pyvirtio.create_disk(MemoryDisk(growable=True), CLUSTER)
    stream(disk)
    assert disk.read(0, CLUSTER) == bytes(CLUSTER)


def test_random_overlays_keep_their_contents_through_every_operation(tmp_path):
    for seed in range(6):
        folder = tmp_path / str(seed)
        folder.mkdir()
        chain = Chain(folder, seed=100 + seed, cluster_size=4096)
        other(folder / "other", random.Random(seed).randrange(1 << 20) // 512 * 512)
        with chain.open() as disk:
            rebase(disk, pyvirtio.open_disk(folder / "other", read_only=True), name="other")
            assert disk.read(0, disk.size) == chain.contents["top"]
            pyvirtio.commit(disk)
            assert disk.read(0, disk.size) == chain.contents["top"]
            stream(disk)
            assert disk.read(0, disk.size) == chain.contents["top"]
            assert disk.check().clean


def test_the_former_backing_file_is_closed(tmp_path):
    chain = Chain(tmp_path)
    with chain.open() as disk:
        former = disk.backing
        rebase(disk, None)
        assert former.closed
        assert not disk.closed


def test_what_was_copied_is_stable_before_the_name_changes(tmp_path, monkeypatch):
    chain = Chain(tmp_path)
    events = []
    with chain.open() as disk:
        flush, change = disk.flush, disk.change_backing_file
        monkeypatch.setattr(disk, "flush", lambda: (events.append("flush"), flush())[1])
        monkeypatch.setattr(
            disk, "change_backing_file", lambda *named: (events.append("name"), change(*named))[1]
        )
        rebase(disk, None)
        monkeypatch.undo()
    assert events[:2] == ["flush", "name"]
