"""Power failures while an image is repaired, and while its refcounts are postponed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import pyvirtio
import pyvirtio.qcow2
from support.crash import CrashImage, crash_images
from support.filters import RecordingDisk

SIZE = 64 * 1024
CLUSTER = 512
COPIED = 1 << 63


def get(image: bytes | bytearray, offset: int) -> int:
    return int.from_bytes(image[offset : offset + 8])


def put(image: bytearray, offset: int, value: int, length: int = 8) -> None:
    image[offset : offset + length] = value.to_bytes(length)


def l2_entry(image: bytearray, index: int) -> int:
    return (get(image, get(image, 40)) & ~COPIED) + 8 * index


def memory(contents: bytes) -> Any:
    disk = pyvirtio.MemoryDisk(len(contents), growable=True)
    disk.write(0, contents)
    return disk


def made(**options: object) -> bytearray:
    """An image with data, a zero cluster with storage and a snapshot."""
    below = pyvirtio.MemoryDisk(0, growable=True)
    disk: Any = pyvirtio.create_disk(below, SIZE, cluster_size=CLUSTER, **options)
    disk.write(0, bytes(range(1, 256)) * 64)
    disk.write(40 * CLUSTER, b"z" * (3 * CLUSTER))
    disk.snapshots.create("one")
    disk.write(0, b"new" * 1000)
    disk.write_zeroes(40 * CLUSTER, CLUSTER)
    disk.flush()
    contents = bytearray(below.getvalue())
    disk.close()
    return contents


def lost_block(image: bytearray) -> None:
    put(image, get(image, 48), 0)


def lost_table(image: bytearray) -> None:
    put(image, 56, 0, 4)


def counts_of_nonsense(image: bytearray) -> None:
    block = get(image, get(image, 48))
    image[block : block + CLUSTER] = bytes(i * 37 & 3 for i in range(CLUSTER))


def counts_too_low(image: bytearray) -> None:
    block = get(image, get(image, 48))
    for i in range(0, CLUSTER, 2):
        if image[block + i + 1] == 2:
            image[block + i + 1] = 1


def leaks(image: bytearray) -> None:
    block = get(image, get(image, 48))
    for i in range(0, CLUSTER, 2):
        image[block + i + 1] += 1


def flags_wrong(image: bytearray) -> None:
    for index in range(20):
        place = l2_entry(image, index)
        put(image, place, get(image, place) ^ COPIED)


def snapshot_without_extra_data(image: bytearray) -> None:
    table = get(image, 64)
    entry = image[table : table + 40]
    entry[36:40] = bytes(4)
    image[table : table + CLUSTER] = (entry + b"1one").ljust(CLUSTER, b"\0")


DAMAGES = [
    lost_block,
    lost_table,
    counts_of_nonsense,
    counts_too_low,
    leaks,
    flags_wrong,
    snapshot_without_extra_data,
]


def opened(file: Any) -> Any:
    return pyvirtio.open_disk(file, format="qcow2", for_check=True)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_repair_that_was_cut_off_is_finished_by_the_next(
    damage: Callable[[bytearray], None],
) -> None:
    image = made()
    with pyvirtio.open_disk(memory(bytes(image)), format="qcow2") as disk:
        expected = disk.read(0, SIZE)
    damage(image)
    recorder = RecordingDisk(memory(bytes(image)))
    with opened(recorder) as disk:
        result = disk.check("all")
        assert result.clean, result.messages
    for _, cut in crash_images(recorder.log, bytes(image), seed=1, random_each=2):
        assert isinstance(cut, CrashImage)
        with opened(memory(cut.data)) as disk:
            result = disk.check("all")
            assert result.clean, (cut.position, cut.story, result.messages)
            assert disk.read(0, SIZE) == expected
            assert disk.check().clean


def test_lazy_refcounts_cut_off_anywhere_lose_nothing_that_was_flushed() -> None:
    below = pyvirtio.MemoryDisk(0, growable=True)
    pyvirtio.qcow2.create(below, SIZE, cluster_size=CLUSTER, lazy_refcounts=True)
    start = below.getvalue()
    recorder = RecordingDisk(below)
    with pyvirtio.open_disk(recorder, format="qcow2") as disk:
        for i in range(6):
            disk.write(i * 9000, bytes([i + 1]) * 5000)
            disk.flush()
            recorder.mark(i + 1)
        disk.discard(0, 9216)
        disk.flush()
        disk.write(3000, b"again" * 500)
    flushed = 0
    for _, thing in crash_images(recorder.log, start, seed=3, random_each=1):
        if not isinstance(thing, CrashImage):
            assert isinstance(thing.mark, int)
            flushed = thing.mark
            continue
        with pyvirtio.open_disk(memory(thing.data), format="qcow2") as disk:
            for i in range(1, flushed):
                assert disk.read(i * 9000 + 1000, 3000) == bytes([i + 1]) * 3000
            disk.write(SIZE - CLUSTER, b"x" * CLUSTER)
            result = disk.check()
            assert not result.corruptions, (thing.position, thing.story, result.messages)
