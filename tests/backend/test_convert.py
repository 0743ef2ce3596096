"""convert: contents, holes, compression, order and interruption."""

from __future__ import annotations

import random
import threading
import time

import pytest

import pyvirtio
from pyvirtio import MemoryDisk, UnsupportedError, convert
from pyvirtio.backend.disk import Extent
from pyvirtio.backend.pump import pump
from pyvirtio.backend.zeroes import first_nonzero, units, zero_runs
from support.chains import Chain, words
from support.peers import requires
from support.qemu import qemu_check, qemu_compare, qemu_img, qemu_img_json, qemu_read

CLUSTER = 65536
SIZE = 4 << 20


def new(size=SIZE, **options):
    return pyvirtio.create_disk(MemoryDisk(growable=True), size, **options)


def patchy(size=SIZE) -> bytes:
    data = bytearray(size)
    data[5 * 4096 : 6 * 4096] = b"\x05" * 4096
    data[1 << 20 : (1 << 20) + 100_000] = words(1, 100_000)
    data[-1000:] = b"\x06" * 1000
    return bytes(data)


def source_of(data: bytes) -> MemoryDisk:
    return MemoryDisk(bytearray(data))


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("out_of_order", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_target_reads_as_the_source(parallel, out_of_order, compressed):
    data = patchy()
    target = new()
    convert(
        source_of(data),
        target,
        target_is_new=True,
        compressed=compressed,
        parallel=parallel,
        out_of_order=out_of_order,
    )
    assert target.read(0, SIZE) == data
    found = target.check()
    assert found.clean, found.messages
    assert bool(found.compressed_clusters) is compressed


def test_zeroes_in_the_data_become_holes():
    target = new()
    convert(source_of(patchy()), target, target_is_new=True)
    assert target.check().allocated_clusters == 4


def test_without_sparse_detection_everything_is_stored():
    target = new()
    convert(source_of(patchy()), target, target_is_new=True, sparse_size=0)
    assert target.check().allocated_clusters == SIZE // CLUSTER


def test_an_old_target_is_overwritten_with_zeroes_too():
    target = new()
    target.write(0, b"\xee" * SIZE)
    convert(source_of(patchy()), target)
    assert target.read(0, SIZE) == patchy()


def test_known_zeroes_of_the_source_are_not_read():
    class Sparse(MemoryDisk):
        def _block_status(self, offset, length):
            return Extent(length, data=False, zero=True, allocated=True)

        def _readv(self, offset, views, length):
            raise AssertionError("read")

    target = new()
    target.write(0, b"\xee" * SIZE)
    convert(Sparse(SIZE), target)
    assert target.read(0, SIZE) == bytes(SIZE)


def test_an_overlay_takes_only_what_the_source_has_itself(tmp_path):
    chain = Chain(tmp_path)
    copy = tmp_path / "copy"
    with (
        chain.open(read_only=True) as disk,
        pyvirtio.create_disk(copy, disk.size, backing_file="mid", backing_fmt="qcow2") as target,
    ):
        convert(disk, target)
        assert target.read(0, disk.size) == chain.contents["top"]
        own = [e.length for e in disk.extents() if e.depth == 0 and e.allocated]
        copied = [e.length for e in target.extents() if e.depth == 0 and e.allocated]
        assert sum(copied) <= sum(own) + 4 * CLUSTER


def test_a_larger_target_keeps_its_end():
    target = MemoryDisk(bytearray(b"\x99" * 8192))
    convert(MemoryDisk(4096), target)
    assert target.read(0, 8192) == bytes(4096) + b"\x99" * 4096


def test_a_compressed_copy_may_end_inside_a_cluster():
    data = words(3, 3 * CLUSTER + 512)
    for extra in (0, 512, CLUSTER):
        target = new(len(data) + extra)
        convert(source_of(data), target, compressed=True, target_is_new=True)
        assert target.read(0, len(data)) == data


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sparse_size": 100}, ValueError),
        ({"sparse_size": -512}, ValueError),
        ({"compressed": True}, UnsupportedError),
    ],
)
def test_what_cannot_be_done_is_refused(options, error):
    with pytest.raises(error):
        convert(MemoryDisk(4096), MemoryDisk(4096), **options)


def test_a_smaller_target_is_refused():
    with pytest.raises(ValueError, match="smaller"):
        convert(MemoryDisk(4096), MemoryDisk(2048))


@pytest.mark.parametrize("parallel", [1, 4])
def test_progress_reaches_the_end_in_the_callers_thread(parallel):
    seen = []
    convert(
        source_of(words(1, 9 << 20)),
        MemoryDisk(9 << 20),
        parallel=parallel,
        progress=lambda *numbers: seen.append((numbers, threading.current_thread())),
    )
    assert [numbers for numbers, _ in seen] == sorted(numbers for numbers, _ in seen)
    assert seen[-1][0] == (9 << 20, 9 << 20)
    assert {thread for _, thread in seen} == {threading.current_thread()}


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("compressed", [False, True])
def test_an_interrupt_leaves_a_valid_image_and_no_thread(parallel, compressed):
    before = threading.active_count()
    target = new(16 << 20)

    def interrupt(done, total):
        if done > 4 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(
            source_of(words(1, 16 << 20)),
            target,
            compressed=compressed,
            parallel=parallel,
            progress=interrupt,
        )
    assert threading.active_count() == before
    assert target.check().clean
    target.write(0, b"usable")


@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("side", ["source", "target"])
def test_an_error_comes_out_and_stops_everything(parallel, side):
    class Broken(MemoryDisk):
        def _fail(self, offset, views, length):
            raise pyvirtio.BackendError(5, "broken")

        _readv = _writev = _fail

    disks = {"source": source_of(words(1, 9 << 20)), "target": MemoryDisk(9 << 20)}
    disks[side] = Broken(9 << 20)
    with pytest.raises(pyvirtio.BackendError, match="broken"):
        convert(disks["source"], disks["target"], parallel=parallel)


def test_in_order_writes_come_one_after_the_other():
    written = []

    class Recording(MemoryDisk):
        def _writev(self, offset, views, length):
            written.append(offset)
            super()._writev(offset, views, length)

    convert(source_of(words(1, 20 << 20)), Recording(20 << 20), parallel=4)
    assert written == sorted(written)
    assert len(written) > 4


# -- zeroes ----------------------------------------------------------------------------------------


def test_zero_runs_are_whole_aligned_units():
    data = bytearray(40_000)
    data[10_000] = 1
    runs = list(zero_runs(bytes(data), 1000, 4096))
    assert runs == [(0, 4096 * 2 - 1000, True), (7192, 11288, False), (11288, 40_000, True)]


def test_zero_runs_agree_with_a_plain_search():
    chance = random.Random(5)
    for _ in range(200):
        data = bytearray(chance.randrange(1, 5000))
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] = 1
        offset, unit = chance.randrange(3000), chance.choice([512, 1024])
        seen = 0
        for start, end, zero in zero_runs(bytes(data), offset, unit):
            assert start == seen
            seen = end
            for low, high in units(offset + start, end - start, unit):
                assert (not any(data[start + low : start + high])) is zero
        assert seen == len(data)


@pytest.mark.parametrize(("data", "index"), [(b"", -1), (bytes(9), -1), (bytes(5) + b"x\0", 5)])
def test_the_first_byte_that_is_not_zero_is_found(data, index):
    assert first_nonzero(data) == index


# -- QEMU ------------------------------------------------------------------------------------------


@requires("qemu-img")
@pytest.mark.parametrize(
    ("options", "compressed"),
    [
        ({}, False),
        ({}, True),
        ({"compression_type": "zstd"}, True),
        ({"cluster_size": 4096}, True),
        ({"extended_l2": True}, False),
        ({"compat": "0.10"}, False),
    ],
)
def test_qemu_finds_the_copy_of_a_chain_right(tmp_path, options, compressed):
    chain = Chain(tmp_path)
    copy = tmp_path / "copy"
    with (
        chain.open(read_only=True) as disk,
        pyvirtio.create_disk(copy, disk.size, **options) as target,
    ):
        convert(disk, target, compressed=compressed, target_is_new=True, out_of_order=True)
    qemu_check(copy)
    qemu_compare(chain.top, copy, formats="qcow2:qcow2")
    assert qemu_read(copy, tmp_path) == chain.contents["top"]


@requires("qemu-img")
def test_the_copy_stores_what_the_copy_by_qemu_does(tmp_path):
    chain = Chain(tmp_path)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", chain.top, theirs)
    with chain.open(read_only=True) as disk, pyvirtio.create_disk(ours, disk.size) as target:
        convert(disk, target, target_is_new=True)
    states = []
    for path in (ours, theirs):
        entries = qemu_img_json("map", "-f", "qcow2", path)
        present = [
            range(e["start"] // CLUSTER, -(-(e["start"] + e["length"]) // CLUSTER))
            for e in entries
            if e["present"]
        ]
        states.append({cluster for run in present for cluster in run})
    assert states[0] == states[1]


@requires("qemu-img")
def test_what_qemu_converts_we_convert_back(tmp_path):
    chain = Chain(tmp_path)
    theirs, raw = tmp_path / "theirs", tmp_path / "raw"
    options = "compression_type=zstd"
    qemu_img("convert", "-c", "-o", options, "-f", "qcow2", "-O", "qcow2", chain.top, theirs)
    with (
        pyvirtio.open_disk(theirs, read_only=True) as disk,
        pyvirtio.create_disk(raw, disk.size, format="raw") as target,
    ):
        convert(disk, target, target_is_new=True)
    assert raw.read_bytes() == chain.contents["top"]


def test_one_thread_tells_of_each_piece():
    told = []
    pump(iter(range(5)), lambda n: n, lambda n, m: None, told.append, workers=1, in_order=True)
    assert told == [0, 1, 2, 3, 4]


def test_an_error_in_between_stops_the_threads():
    def fail(piece):
        raise KeyboardInterrupt

    written = []
    with pytest.raises(KeyboardInterrupt):
        pump(
            iter(range(1000)),
            lambda n: time.sleep(0.001),
            lambda n, data: written.append(n),
            fail,
            workers=2,
            in_order=False,
        )
    assert len(written) < 1000
