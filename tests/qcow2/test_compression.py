"""Compressed clusters: written by us, read by QEMU, and the other way round."""

from __future__ import annotations

import random
import struct
import threading
import zlib

import pytest
import zstandard

import pyvirtio
from pyvirtio import ImageError, MemoryDisk
from pyvirtio.qcow2 import Qcow2Disk, layout
from pyvirtio.qcow2.compression import CompressedDataError, compress, decompress
from pyvirtio.qcow2.layout import CompressionType
from support.chains import words
from support.peers import requires
from support.qemu import QemuIo, qemu_check, qemu_create, qemu_img, qemu_img_json, qemu_read

CLUSTER = 65536
KINDS = ["zlib", "zstd"]


def entry_of(disk: Qcow2Disk, cluster: int) -> int:
    with disk._metadata.lock:
        return disk._metadata.tables.entry(cluster)


def make(size=1 << 20, **options):
    return pyvirtio.create_disk(MemoryDisk(growable=True), size, **options)


def assert_clean(disk):
    found = disk.check()
    assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0), found.messages


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits"),
    [(512, 1), (512, 16), (4096, 2), (65536, 1), (65536, 16), (2 << 20, 2)],
)
def test_what_is_written_compressed_reads_back(kind, cluster_size, refcount_bits):
    size = 5 * cluster_size
    disk = make(size, compression_type=kind, cluster_size=cluster_size, refcount_bits=refcount_bits)
    data = words(1, size)
    disk.write_compressed(0, [data])
    assert disk.block_status(0, cluster_size).compressed
    assert disk.read(0, size) == data
    assert_clean(disk)


def test_compressed_clusters_are_packed_byte_after_byte():
    disk = make()
    disk.write_compressed(0, [words(1, 8 * CLUSTER)])
    extents = [disk._metadata.geometry.compressed_extent(entry_of(disk, i)) for i in range(8)]
    offsets = [offset for offset, _ in extents]
    lengths = [
        len(compress(CompressionType.DEFLATE, words(1, 8 * CLUSTER)[i * CLUSTER :][:CLUSTER]))
        for i in range(8)
    ]
    assert offsets == [offsets[0] + sum(lengths[:i]) for i in range(8)]


def test_a_refcount_of_one_bit_gives_every_compressed_cluster_a_host_cluster_of_its_own():
    disk = make(refcount_bits=1)
    disk.write_compressed(0, [words(1, 4 * CLUSTER)])
    entries = [entry_of(disk, i) for i in range(4)]
    offsets = [disk._metadata.geometry.compressed_extent(entry)[0] for entry in entries]
    assert all(offset % CLUSTER == 0 for offset in offsets)
    assert_clean(disk)


def test_a_full_refcount_starts_a_new_host_cluster():
    disk = make(4 << 20, refcount_bits=2)
    disk.write_compressed(0, [bytes(64 * CLUSTER)])
    assert_clean(disk)
    firsts = {
        disk._metadata.geometry.compressed_extent(entry_of(disk, i))[0] >> 16 for i in range(64)
    }
    assert len(firsts) == 22  # three references each


def test_what_does_not_become_smaller_is_written_plain():
    disk = make()
    data = random.Random(1).randbytes(CLUSTER)
    disk.write_compressed(CLUSTER, [data])
    extent = disk.block_status(CLUSTER, CLUSTER)
    assert extent.data
    assert not extent.compressed
    assert disk.read(CLUSTER, CLUSTER) == data


@pytest.mark.parametrize("data", [b"\x22" * 1024, random.Random(2).randbytes(1024)])
def test_the_last_cluster_may_be_cut_short_by_the_end_of_the_disk(data):
    disk = make(CLUSTER + 1024)
    disk.write_compressed(CLUSTER, [data])
    assert disk.read(CLUSTER, 1024) == data
    disk.truncate(2 * CLUSTER)
    assert disk.read(CLUSTER, CLUSTER) == data.ljust(CLUSTER, b"\0")


@pytest.mark.parametrize(("offset", "length"), [(512, CLUSTER), (0, 512), (0, CLUSTER + 512)])
def test_ranges_that_are_not_whole_clusters_are_refused(offset, length):
    with pytest.raises(ValueError, match="aligned"):
        make().write_compressed(offset, [bytes(length)])


def test_overwriting_frees_what_was_there():
    disk = make()
    for i in range(12):
        disk.write_compressed(0, [words(i, 4 * CLUSTER)])
        disk.flush()
    assert_clean(disk)
    assert disk.children["file"].size < 12 * CLUSTER
    disk.write(100, b"over")
    disk.write_zeroes(CLUSTER, CLUSTER, unmap=True)
    disk.discard(2 * CLUSTER, CLUSTER)
    disk.flush()
    expected = bytearray(words(11, 4 * CLUSTER))
    expected[100:104] = b"over"
    expected[CLUSTER : 3 * CLUSTER] = bytes(2 * CLUSTER)
    assert disk.read(0, 4 * CLUSTER) == expected
    assert_clean(disk)


def test_plain_clusters_can_be_written_over_compressed():
    disk = make()
    disk.write(0, random.Random(1).randbytes(2 * CLUSTER))
    disk.write_compressed(0, [words(1, 2 * CLUSTER)])
    disk.flush()
    assert disk.read(0, 2 * CLUSTER) == words(1, 2 * CLUSTER)
    assert_clean(disk)


def test_a_snapshot_keeps_compressed_clusters():
    disk = make()
    disk.write_compressed(0, [words(1, 4 * CLUSTER)])
    disk.snapshots.create("a")
    disk.write_compressed(0, [words(2, 4 * CLUSTER)])
    assert_clean(disk)
    disk.snapshots.apply("a")
    assert disk.read(0, 4 * CLUSTER) == words(1, 4 * CLUSTER)
    disk.snapshots.delete("a")
    assert_clean(disk)


def test_extended_l2_entries_take_compressed_clusters():
    disk = make(extended_l2=True)
    disk.write(CLUSTER + 4096, b"old" * 1000)
    disk.write_compressed(0, [words(1, 4 * CLUSTER)])
    expected = bytearray(words(1, 4 * CLUSTER))
    disk.write_zeroes(2 * CLUSTER + 2048, 4096)
    expected[2 * CLUSTER + 2048 : 2 * CLUSTER + 6144] = bytes(4096)
    assert disk.read(0, 4 * CLUSTER) == expected
    assert_clean(disk)


def test_a_failed_write_leaves_nothing_behind():
    class Failing(MemoryDisk):
        fail = False

        def _writev(self, offset, views, length):
            if self.fail:
                raise pyvirtio.BackendError(28, "no space")
            super()._writev(offset, views, length)

    file = Failing(growable=True)
    disk = pyvirtio.create_disk(file, 1 << 20)
    disk.write_compressed(0, [words(1, CLUSTER)])
    file.fail = True
    with pytest.raises(pyvirtio.BackendError):
        disk.write_compressed(CLUSTER, [words(2, CLUSTER)])
    file.fail = False
    disk.write_compressed(2 * CLUSTER, [words(3, CLUSTER)])
    assert disk.read(0, 3 * CLUSTER) == words(1, CLUSTER) + bytes(CLUSTER) + words(3, CLUSTER)
    assert_clean(disk)


def test_a_host_cluster_that_was_freed_is_not_filled_further():
    disk = make()
    disk.write_compressed(0, [words(1, CLUSTER)])
    with disk._metadata.lock:
        host = disk._metadata.geometry.compressed_extent(disk._metadata.tables.entry(0))[0]
    disk.discard(0, CLUSTER)
    disk.flush()
    plain = random.Random(1).randbytes(CLUSTER)
    disk.write(CLUSTER, plain)
    assert disk.block_status(CLUSTER, 512).host_offset == host // CLUSTER * CLUSTER
    disk.write_compressed(2 * CLUSTER, [words(2, CLUSTER)])
    assert disk.read(CLUSTER, 2 * CLUSTER) == plain + words(2, CLUSTER)
    assert_clean(disk)


def test_data_that_end_with_a_sector_do_not_claim_the_next_one():
    size = 4096
    data = next(
        data
        for data in (random.Random(1).randbytes(n).ljust(size, b"\0") for n in range(400, 1600))
        if len(compress(CompressionType.DEFLATE, data)) % 512 == 0
    )
    disk = make(8 * size, cluster_size=size)
    disk.write_compressed(0, [data])
    _, length = disk._metadata.geometry.compressed_extent(entry_of(disk, 0))
    assert length == len(compress(CompressionType.DEFLATE, data))


# -- the cache of decompressed clusters ------------------------------------------------------------


def test_reused_host_clusters_never_show_what_was_decompressed_before():
    disk = make(refcount_bits=1)  # every cluster at the start of a host cluster: same entries
    one, two = (bytes([value]) * CLUSTER for value in (1, 2))
    seen = set()
    for _ in range(6):
        for data in (one, two):
            disk.write_compressed(0, [data])
            seen.add(entry_of(disk, 0))
            assert disk.read(0, CLUSTER) == data
            disk.flush()
    assert len(seen) < 12  # entries did come again


def test_threads_that_read_while_others_overwrite_never_see_anothers_cluster():
    disk = make(8 * CLUSTER, refcount_bits=1)
    stop = threading.Event()
    wrong = []

    def write(cluster):
        for i in range(40):
            value = bytes([cluster * 16 + i % 2]) * CLUSTER
            disk.write_compressed(cluster * CLUSTER, [value])
            if disk.read(cluster * CLUSTER, CLUSTER) != value:
                wrong.append(cluster)
            disk.flush()

    def read():
        while not stop.is_set():
            for cluster in range(8):
                data = disk.read(cluster * CLUSTER, CLUSTER)
                if data[0] and (data[0] >> 4 != cluster or data.strip(data[:1])):
                    wrong.append(cluster)

    writers = [threading.Thread(target=write, args=(n,)) for n in range(1, 5)]
    reader = threading.Thread(target=read)
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not wrong
    assert_clean(disk)


# -- data that lie ---------------------------------------------------------------------------------


def image_with(data: bytes, *, kind="zlib", sectors=None, offset=None) -> Qcow2Disk:
    """An image whose first cluster is compressed, with these data at its place."""
    disk = make(compression_type=kind)
    disk.write_compressed(0, [words(1, CLUSTER)])
    disk.flush()
    entry = entry_of(disk, 0)
    bits = disk._metadata.geometry.compressed_offset_bits
    host = entry & ((1 << bits) - 1)
    if sectors is None:
        sectors = (host % 512 + len(data) - 1) // 512
    disk._file.write(host, data)
    new = layout.COMPRESSED | sectors << bits | (host if offset is None else offset)
    with disk._metadata.lock:
        table = disk._metadata.tables.l2_offset(0)
    disk._file.write(table, struct.pack(">Q", new))
    return Qcow2Disk.open(disk._file, read_only=True)


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    return stream.compress(data) + stream.flush()


LIES = {
    "garbage": (b"\xff" * 4000, {}),
    "a cluster that is too short": (raw_deflate(bytes(CLUSTER - 1)), {}),
    "fewer sectors than it takes": (raw_deflate(words(1, CLUSTER)), {"sectors": 1}),
    "zeroes": (bytes(512), {}),
    "past the end of the file": (b"", {"sectors": 255, "offset": 1 << 40}),
    "past every file": (b"", {"sectors": 255, "offset": (1 << 54) - 1}),
}


@pytest.mark.parametrize("name", LIES)
def test_compressed_data_that_lie_are_refused_and_the_rest_stays_readable(name):
    data, options = LIES[name]
    disk = image_with(data, **options)
    with pytest.raises((ImageError, pyvirtio.BackendError)) as caught:
        disk.read(0, CLUSTER)
    if isinstance(caught.value, ImageError):
        assert caught.value.field == "compressed cluster"
    assert disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("name", LIES)
def test_zstd_data_that_lie_are_refused(name):
    data, options = LIES[name]
    disk = image_with(data, kind="zstd", **options)
    with pytest.raises((ImageError, pyvirtio.BackendError)):
        disk.read(0, CLUSTER)


@pytest.mark.parametrize("kind", KINDS)
def test_data_for_more_than_a_cluster_give_a_cluster(kind):
    bomb = words(1, CLUSTER) + bytes(30 << 20)
    packed = raw_deflate(bomb) if kind == "zlib" else zstandard.compress(bomb)
    assert image_with(packed, kind=kind).read(0, CLUSTER) == bomb[:CLUSTER]


def test_a_zstd_window_larger_than_any_cluster_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = stream.compress(bytes(CLUSTER)) + stream.flush()
    with pytest.raises(CompressedDataError):
        decompress(CompressionType.ZSTD, packed, CLUSTER)


def test_zstd_data_in_several_frames_are_read():
    data = words(5, CLUSTER)
    packed = zstandard.compress(data[:1000]) + zstandard.compress(data[1000:]) + b"tail"
    assert decompress(CompressionType.ZSTD, packed, CLUSTER) == data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression_type": "lzma"}, "does not accept"),
        ({"compression_type": "zstd", "compat": "0.10"}, "compatibility level 1.1"),
    ],
)
def test_compression_types_that_cannot_be_are_refused_at_creation(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# -- QEMU ------------------------------------------------------------------------------------------


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_qemu_reads_what_we_compress(tmp_path, kind, cluster_size):
    path = tmp_path / "a.qcow2"
    size = 12 * cluster_size + 1024
    data = words(1, 4 * cluster_size) + random.Random(1).randbytes(cluster_size)
    data += words(2, size - len(data))
    with pyvirtio.create_disk(path, size, compression_type=kind, cluster_size=cluster_size) as disk:
        disk.write_compressed(0, [data])
    qemu_check(path)
    assert qemu_read(path, tmp_path) == data
    assert qemu_img_json("info", path)["format-specific"]["data"]["compression-type"] == kind
    with QemuIo(path) as qemu:  # and writes over it
        qemu.write(100, 5 * cluster_size, 7)
    qemu_check(path)


@requires("qemu-img")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_we_read_what_qemu_compresses(tmp_path, kind, cluster_size):
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow2"
    data = words(3, 1 << 20) + random.Random(1).randbytes(1 << 19) + bytes(1 << 20)
    raw.write_bytes(data)
    options = f"compression_type={kind},cluster_size={cluster_size}"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    with pyvirtio.open_disk(path) as disk:
        assert disk.info().specific["compression-type"] == kind
        assert disk.read(0, disk.size) == data
        disk.write_compressed(0, [words(4, cluster_size)])
        assert_clean(disk)
    qemu_check(path)
    assert qemu_read(path, tmp_path)[:cluster_size] == words(4, cluster_size)


@requires("qemu-img", "qemu-io")
def test_our_image_is_as_large_as_the_one_that_qemu_compresses(tmp_path):
    data = words(3, 4 << 20)
    ours, theirs, raw = tmp_path / "ours", tmp_path / "theirs", tmp_path / "raw"
    raw.write_bytes(data)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, theirs)
    with pyvirtio.create_disk(ours, len(data)) as disk:
        disk.write_compressed(0, [data])
    assert ours.stat().st_size <= theirs.stat().st_size + 2 * CLUSTER


@requires("qemu-img", "qemu-io")
def test_version_2_images_take_compressed_clusters(tmp_path):
    path = tmp_path / "a.qcow2"
    qemu_create(path, 1 << 20, compat="0.10")
    with pyvirtio.open_disk(path) as disk:
        disk.write_compressed(0, [words(1, 1 << 20)])
    qemu_check(path)
    assert qemu_read(path, tmp_path) == words(1, 1 << 20)
