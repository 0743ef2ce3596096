"""map: the same runs as qemu-img's, in its fields."""

from __future__ import annotations

import json

import pytest

import pyvirtio
from pyvirtio import MapEntry, MemoryDisk, map_extents
from pyvirtio.backend.map import json_lines
from support.chains import Chain
from support.peers import requires
from support.qemu import qemu_img


def qemu_map(path, *options):
    return json.loads(qemu_img("map", "--output=json", *options, path).stdout)


@requires("qemu-img")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options", [{}, {"cluster_size": 4096}, {"extended_l2": True}, {"compression_type": "zstd"}]
)
def test_a_chain_is_mapped_as_qemu_maps_it(tmp_path, seed, options):
    chain = Chain(tmp_path, seed=seed, **options)
    expected = qemu_map(chain.top, "-f", "qcow2")
    with chain.open(read_only=True) as disk:
        entries = list(map_extents(disk))
    assert [entry.fields() for entry in entries] == expected


@requires("qemu-img")
def test_a_part_is_mapped_as_qemu_maps_it(tmp_path):
    chain = Chain(tmp_path)
    expected = qemu_map(chain.top, "-f", "qcow2", "-s", "70000", "-l", "200000")
    with chain.open(read_only=True) as disk:
        assert [entry.fields() for entry in map_extents(disk, 70000, 200000)] == expected


@requires("qemu-img")
def test_a_raw_file_is_mapped_as_qemu_maps_it(tmp_path):
    chain = Chain(tmp_path)
    expected = qemu_map(chain.base, "-f", "raw")
    with pyvirtio.open_disk(chain.base, format="raw", read_only=True) as disk:
        assert [entry.fields() for entry in map_extents(disk)] == expected


@requires("qemu-img")
def test_subclusters_that_are_not_allocated_have_a_place_as_with_qemu(tmp_path):
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, 1 << 20, extended_l2=True) as disk:
        for offset in (0, 8192, 70000, 65536 * 5 + 40000):
            disk.write(offset, b"x" * 512)
        disk.write_zeroes(16384, 4096)
        disk.discard(65536 * 5, 65536)
        entries = [entry.fields() for entry in map_extents(disk)]
    assert entries == qemu_map(path)
    assert any("offset" in entry and not entry["present"] for entry in entries)


def test_compressed_runs_say_so_and_have_no_offset():
    disk = pyvirtio.create_disk(MemoryDisk(growable=True), 4 << 16)
    disk.write_compressed(1 << 16, [bytes(2 << 16)])
    first, second, third = map_extents(disk)
    assert second == MapEntry(65536, 131072, 0, True, False, True, True, None)
    assert (first.present, third.present) == (False, False)
    assert second.fields(compressed=True)["compressed"] is True


def test_entries_name_the_file_they_are_in(tmp_path):
    chain = Chain(tmp_path)
    with chain.open(read_only=True) as disk:
        names = {e.depth: e.filename for e in map_extents(disk) if e.offset is not None}
    everything = {0: str(chain.top), 1: str(chain.mid), 2: str(chain.base)}
    assert names.items() <= everything.items()
    assert len(names) > 1


@requires("qemu-img")
def test_the_json_is_that_of_qemu_letter_by_letter(tmp_path):
    chain = Chain(tmp_path)
    with chain.open(read_only=True) as disk:
        text = "".join(json_lines(map_extents(disk)))
    assert text == qemu_img("map", "--output=json", "-f", "qcow2", chain.top).stdout
    assert "".join(json_lines([])) == "[]\n"


def test_nothing_is_mapped_past_the_end():
    assert list(map_extents(MemoryDisk(4096), 4096)) == []
    assert list(map_extents(MemoryDisk(0))) == []
