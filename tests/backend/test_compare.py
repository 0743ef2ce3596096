"""compare: equal, different and where, sizes, and QEMU's words for it."""

from __future__ import annotations

import pytest

import pyvirtio
from pyvirtio import MemoryDisk, compare
from support.chains import Chain
from support.peers import requires
from support.qemu import qemu_img

CLUSTER = 65536


def disk_with(size, *writes):
    disk = pyvirtio.create_disk(MemoryDisk(growable=True), size)
    for offset, data in writes:
        disk.write(offset, data)
    return disk


def test_equal_contents_are_identical_however_they_are_stored():
    one = disk_with(4 * CLUSTER, (CLUSTER, b"\x11" * CLUSTER))
    two = MemoryDisk(bytearray(one.read(0, one.size)))
    found = compare(one, two)
    assert found.identical
    assert not found.sizes_differ
    assert found.message == "Images are identical."


@pytest.mark.parametrize("at", [0, 1, 511, 512, CLUSTER - 1, 3 * CLUSTER + 77])
@pytest.mark.parametrize("stored", [False, True])
def test_the_first_byte_that_differs_is_told(at, stored):
    one = disk_with(4 * CLUSTER, (0, b"\x11" * 4 * CLUSTER) if stored else (0, b""))
    two = disk_with(4 * CLUSTER, (0, one.read(0, one.size)), (at, b"\x22"), (at + 1, b"\x23"))
    assert compare(one, two).offset == at
    assert compare(two, one).offset == at
    assert not compare(one, two).identical


def test_a_longer_disk_is_identical_if_it_ends_in_zeroes():
    one, two = disk_with(CLUSTER), disk_with(2 * CLUSTER)
    found = compare(one, two)
    assert (found.identical, found.sizes_differ) == (True, True)
    two.write(2 * CLUSTER - 1, b"x")
    assert compare(one, two).offset == compare(two, one).offset == 2 * CLUSTER - 1


def test_strict_wants_equal_sizes_and_states():
    one, two = disk_with(CLUSTER), disk_with(2 * CLUSTER)
    assert compare(one, two, strict=True).message == "Strict mode: Image size mismatch!"
    two = disk_with(CLUSTER, (0, bytes(CLUSTER)))
    assert compare(one, two).identical
    assert not compare(one, two, strict=True).identical


def test_progress_ends_at_the_longer_size():
    seen = []
    compare(
        MemoryDisk(5 << 20), MemoryDisk(7 << 20), progress=lambda *numbers: seen.append(numbers)
    )
    assert seen[-1] == (7 << 20, 7 << 20)


@requires("qemu-img")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("size", "writes"),
    [
        (4 * CLUSTER, []),
        (4 * CLUSTER, [(1000, b"x")]),
        (4 * CLUSTER, [(2 * CLUSTER + 700, b"y" * 2000)]),
        (4 * CLUSTER, [(0, bytes(CLUSTER))]),
        (6 * CLUSTER, []),
        (6 * CLUSTER, [(5 * CLUSTER + 5, b"z")]),
    ],
)
def test_the_verdict_and_the_words_are_those_of_qemu(tmp_path, size, writes, strict):
    paths = tmp_path / "one", tmp_path / "two"
    common = (2 * CLUSTER, b"\x33" * CLUSTER)
    with pyvirtio.create_disk(paths[0], 4 * CLUSTER) as one:
        one.write(*common)
    with pyvirtio.create_disk(paths[1], size) as two:
        for offset, data in [common, *writes]:
            two.write(offset, data)
    options = ["-s"] if strict else []
    done = qemu_img("compare", "-f", "qcow2", "-F", "qcow2", *options, *paths, check=False)
    with (
        pyvirtio.open_disk(paths[0], read_only=True) as one,
        pyvirtio.open_disk(paths[1], read_only=True) as two,
    ):
        found = compare(one, two, strict=strict)
    assert found.identical is (done.returncode == 0)
    assert done.stdout.strip().splitlines()[-1] == found.message


@requires("qemu-img")
def test_a_chain_is_identical_to_its_copy_by_qemu(tmp_path):
    chain = Chain(tmp_path)
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", chain.top, raw)
    with (
        chain.open(read_only=True) as disk,
        pyvirtio.open_disk(raw, format="raw", read_only=True) as copy,
    ):
        assert compare(disk, copy).identical
