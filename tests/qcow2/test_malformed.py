"""Damaged and hostile images: typed errors or right answers, bounded memory, QEMU's verdicts."""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
import tracemalloc
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyvirtio
import pyvirtio.qcow2
from pyvirtio import MemoryDisk
from pyvirtio.qcow2 import layout
from support.filters import CappedDisk
from support.images import new_image
from support.peers import requires

TYPED = (pyvirtio.ImageError, pyvirtio.UnsupportedError, pyvirtio.BackendError)
SIZE = 256 * 1024
CLUSTER = 4096
MEMORY_LIMIT = 96 << 20
"""Bytes: QEMU's largest L1 (32 MiB) and refcount table (8 MiB), copied, and some room."""


class Field(NamedTuple):
    offset: int
    size: int


HEADER = {
    "magic": Field(0, 4),
    "version": Field(4, 4),
    "backing_file_offset": Field(8, 8),
    "backing_file_size": Field(16, 4),
    "cluster_bits": Field(20, 4),
    "size": Field(24, 8),
    "crypt_method": Field(32, 4),
    "l1_size": Field(36, 4),
    "l1_table_offset": Field(40, 8),
    "refcount_table_offset": Field(48, 8),
    "refcount_table_clusters": Field(56, 4),
    "nb_snapshots": Field(60, 4),
    "snapshots_offset": Field(64, 8),
    "incompatible_features": Field(72, 8),
    "compatible_features": Field(80, 8),
    "autoclear_features": Field(88, 8),
    "refcount_order": Field(96, 4),
    "header_length": Field(100, 4),
    "compression_type": Field(104, 1),
}
SNAPSHOT = {
    "snapshot l1_table_offset": Field(0, 8),
    "snapshot l1_size": Field(8, 4),
    "snapshot id_size": Field(12, 2),
    "snapshot name_size": Field(14, 2),
    "snapshot extra_data_size": Field(36, 4),
    "snapshot disk_size": Field(48, 8),
}


def extremes(size: int) -> list[int]:
    """Values for a field of ``size`` bytes: small ones, large ones, odd ones, near every limit."""
    top = (1 << 8 * size) - 1
    values = {0, 1, 2, 3, 7, 8, 9, 22, 31, 63, 64, 104, 105, 511, 512, 4095, 4096, 4097}
    values |= {1 << 12, 1 << 16, 1 << 20, 1 << 22, (1 << 22) + 1, 1 << 31, 1 << 32, 1 << 55}
    values |= {1 << 56, 1 << 62, 1 << 63, (1 << 63) - 1, top, top - 511, top - 4095, top >> 1}
    return sorted(value for value in values if 0 <= value <= top)


def nothing(reference: pyvirtio.FileReference) -> None:
    """The policy for images of strangers: none of the host's files is opened."""


def memory_disk(contents: bytes) -> pyvirtio.MemoryDisk:
    disk = pyvirtio.MemoryDisk(len(contents), growable=True)
    disk.write(0, contents)
    return disk


def make_image(**options: Any) -> bytes:
    """A small image with data, zero clusters, an unused part and a snapshot."""
    below = pyvirtio.MemoryDisk(0, growable=True)
    pyvirtio.qcow2.FORMAT.create(below, SIZE, cluster_size=CLUSTER, **options)
    with pyvirtio.open_disk(below, format="qcow2") as disk:
        disk.write(0, b"a" * 60_000)
        disk.snapshots.create("snap")
        disk.write(20_000, b"b" * 60_000)
        disk.write_zeroes(40_960, 8192)
        disk.flush()
        return below.read(0, below.size)


@pytest.fixture(scope="module")
def image() -> bytes:
    return make_image()


def poke(image: bytes, offset: int, size: int, value: int) -> bytes:
    poked = bytearray(image)
    poked[offset : offset + size] = value.to_bytes(size)
    return bytes(poked)


def snapshots_offset(image: bytes) -> int:
    return int(struct.unpack_from(">Q", image, 64)[0])


def tables(image: bytes) -> dict[str, int]:
    """Where some entry of each table lies in an image of make_image's."""
    l1 = struct.unpack_from(">Q", image, 40)[0]
    l2 = struct.unpack_from(">Q", image, l1)[0] & 0x00FFFFFFFFFFFE00
    refcount_table = struct.unpack_from(">Q", image, 48)[0]
    block = struct.unpack_from(">Q", image, refcount_table)[0]
    return {
        "l1[0]": l1,
        "l2[0]": l2,
        "l2[3]": l2 + 24,
        "l2[10], a zero cluster": l2 + 80,
        "refcount_table[0]": refcount_table,
        "refcount_block[0:4]": block,
    }


def read_everything(disk: Any) -> None:
    """Read the disk (its ends, where it claims to be huge) and what it says of itself."""
    if disk.size <= 1 << 20:
        disk.read(0, disk.size)
    else:
        disk.read(0, 1 << 20)
        disk.read(disk.size - 4096, 4096)
    disk.info()
    list(disk.snapshots)


def change_everything(disk: Any) -> None:
    """One of each request that changes an image."""
    name = next((snapshot.name for snapshot in disk.snapshots), "snap")
    for change in (
        lambda: disk.write(0, b"x" * 10_000),
        lambda: disk.write(200_000, b"y" * 5000),
        lambda: disk.discard(0, 65_536),
        lambda: disk.write_zeroes(8192, 65_536, unmap=True),
        lambda: disk.snapshots.create("new"),
        lambda: disk.snapshots.apply(name),
        lambda: disk.snapshots.delete(name),
        lambda: disk.truncate(disk.size + 65_536),
        disk.flush,
        disk.check,
    ):
        with suppress(*TYPED, ValueError, KeyError):
            change()


def look_at(contents: bytes) -> None:
    """Open the image and read it."""
    with (
        suppress(*TYPED),
        pyvirtio.open_disk(
            memory_disk(contents), format="qcow2", backing=nothing, passphrase="secret"
        ) as disk,
    ):
        read_everything(disk)


def survive(contents: bytes) -> None:
    """Open the image and use it; nothing but typed errors may come."""
    for act in (change_everything, lambda disk: disk.check()):
        with (
            suppress(*TYPED),
            pyvirtio.open_disk(
                CappedDisk(memory_disk(contents), 8 << 20),
                format="qcow2",
                backing=nothing,
                passphrase="secret",
            ) as disk,
        ):
            act(disk)


def peak_memory(action: Callable[[], object]) -> int:
    """Bytes that Python had allocated at most, beyond those at the start."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field", [*HEADER, *SNAPSHOT])
def test_extreme_fields_give_typed_errors_in_bounded_memory(image: bytes, field: str) -> None:
    place = HEADER.get(field) or SNAPSHOT[field]
    at = place.offset if field in HEADER else place.offset + snapshots_offset(image)

    values = [
        value
        for value in extremes(place.size)
        # Lawful, but long; the largest one has a test of its own.
        if "l1_size" not in field or not 512 < value <= 1 << 22
    ]
    assert peak_memory(lambda: [look_at(poke(image, at, place.size, v)) for v in values]) < (
        MEMORY_LIMIT
    )
    for value in values:
        survive(poke(image, at, place.size, value))


def test_the_largest_l1_table_that_qemu_allows_is_opened_in_bounded_memory(image: bytes) -> None:
    largest = memory_disk(poke(image, HEADER["l1_size"].offset, 4, 1 << 22))

    def use() -> None:
        with pyvirtio.open_disk(largest, format="qcow2", read_only=True) as disk:
            read_everything(disk)

    assert peak_memory(use) < MEMORY_LIMIT


def test_extreme_table_entries_give_typed_errors(image: bytes) -> None:
    for at in tables(image).values():
        for value in extremes(8):
            survive(poke(image, at, 8, value))


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 103, 104, 111, 4096, 8192, 12_288, 20_000])
def test_a_truncated_file_gives_typed_errors(image: bytes, length: int) -> None:
    survive(image[:length])


def test_tables_that_name_themselves_give_typed_errors(image: bytes) -> None:
    """Every table's first entry pointed at every cluster of the file."""
    for at in tables(image).values():
        for cluster in range(len(image) // CLUSTER + 2):
            copied = cluster % 2 << 63
            survive(poke(image, at, 8, copied | cluster * CLUSTER))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6),
    st.booleans(),
)
def test_random_damage_gives_typed_errors(changes: list[tuple[int, int]], v2: bool) -> None:
    damaged = bytearray(_cached_image(v2))
    starts = [0, snapshots_offset(damaged), *tables(damaged).values()]
    for where, value in changes:
        start = starts[where % len(starts)]
        damaged[(start + where // len(starts) % 128) % len(damaged)] = value
    survive(bytes(damaged))


_images: dict[bool, bytes] = {}


def _cached_image(v2: bool) -> bytes:
    if v2 not in _images:
        _images[v2] = make_image(compat="0.10" if v2 else "1.1")
    return _images[v2]


# -- the same verdict as QEMU's ------------------------------------------------------------------

KNOWN_DIFFERENCES = {
    ("crypt_method", 2): "without a LUKS header QEMU opens it for info, and then crashes",
}
"""(field, value): why we judge otherwise than QEMU 7.2."""


def qemu_opens(path: Path, *, data_file: bool = False) -> bool:
    """``qemu-img info`` looks at no data file, nor whether there should be one: it does no I/O."""
    command = ["qemu-img", "info", "-f", "qcow2", path]
    if data_file:
        command = ["qemu-io", "-r", "-f", "qcow2", "-c", "quit", path]
    done = subprocess.run(
        command,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    return done.returncode == 0


def we_open(path: Path) -> bool:
    try:
        with pyvirtio.open_disk(
            path, format="qcow2", read_only=True, backing=nothing, no_io=True
        ) as disk:
            list(disk.snapshots)
    except TYPED:
        return False
    return True


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("field", [*HEADER, *SNAPSHOT])
def test_opens_what_qemu_opens_and_refuses_what_qemu_refuses(
    tmp_path: Path, image: bytes, field: str
) -> None:
    place = HEADER.get(field) or SNAPSHOT[field]
    at = place.offset if field in HEADER else place.offset + snapshots_offset(image)
    path = tmp_path / "poked.qcow2"
    differing = []
    for value in extremes(place.size):
        path.write_bytes(poke(image, at, place.size, value))
        theirs = qemu_opens(path, data_file=field.endswith("_features"))
        ours = we_open(path)
        if ours != theirs and (field, value) not in KNOWN_DIFFERENCES:
            differing.append(f"{field}={value:#x}: we {_verb(ours)}, QEMU {_verb(theirs)}s")
    assert not differing, "\n".join(differing)


def _verb(opens: bool) -> str:
    return "open" if opens else "refuse"


@requires("qemu-io")
def test_reads_what_qemu_reads_through_odd_table_entries(tmp_path: Path, image: bytes) -> None:
    path = tmp_path / "poked.qcow2"
    differing = []
    for name in ("l1[0]", "l2[0]", "l2[3]", "l2[10], a zero cluster"):
        for value in extremes(8):
            if value >> 62 & 1:
                continue  # compressed
            path.write_bytes(poke(image, tables(image)[name], 8, value))
            ours, theirs = _we_read(path), _qemu_reads(path, tmp_path / "copy.raw")
            if ours != theirs:
                answers = ["an error" if answer is None else "data" for answer in (ours, theirs)]
                differing.append(f"{name}={value:#x}: {answers[0]}, QEMU {answers[1]}")
    assert not differing, "\n".join(differing)


def _we_read(path: Path) -> bytes | None:
    try:
        with pyvirtio.open_disk(path, format="qcow2", read_only=True, backing=nothing) as disk:
            return disk.read(0, disk.size)
    except TYPED:
        return None


def _qemu_reads(path: Path, copy: Path) -> bytes | None:
    done = subprocess.run(
        ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", f"if={path}", f"of={copy}", "bs=64k"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    if done.returncode or os.path.getsize(copy) != SIZE:
        return None
    return copy.read_bytes()


# -- deliberate refusals -------------------------------------------------------------------------


def test_an_image_marked_corrupt_is_not_opened_for_writing(image: bytes) -> None:
    marked = poke(image, 72, 8, 2)
    with pytest.raises(pyvirtio.ImageError):
        pyvirtio.open_disk(memory_disk(marked), format="qcow2")
    with pyvirtio.open_disk(memory_disk(marked), format="qcow2", read_only=True) as disk:
        assert disk.read(0, 5) == b"aaaaa"


@pytest.mark.parametrize("bit", [3, 4, 5, 17, 63])
def test_an_unknown_incompatible_feature_is_refused(image: bytes, bit: int) -> None:
    marked = poke(image, 72, 8, 1 << bit)
    with pytest.raises((pyvirtio.UnsupportedError, pyvirtio.ImageError)):
        pyvirtio.open_disk(memory_disk(marked), format="qcow2", read_only=True)


def test_a_read_only_open_changes_nothing(image: bytes) -> None:
    marked = poke(image, 88, 8, 1 << 40)  # an unknown autoclear bit
    below = memory_disk(marked)
    with pyvirtio.open_disk(below, format="qcow2", read_only=True) as disk:
        disk.read(0, disk.size)
        disk.check()
        found = below.read(0, below.size)
    assert found == marked


def test_unknown_autoclear_bits_are_cleared_by_the_first_writer(image: bytes) -> None:
    below = memory_disk(poke(image, 88, 8, 1 << 40))
    with pyvirtio.open_disk(below, format="qcow2") as disk:
        disk.write(0, b"x")
        disk.flush()
        assert below.read(88, 8) == bytes(8)


def test_a_random_file_is_refused() -> None:
    chance = random.Random(1)
    with pytest.raises(pyvirtio.ImageError):
        pyvirtio.open_disk(memory_disk(chance.randbytes(65_536)), format="qcow2")


def test_a_free_cluster_is_not_looked_for_where_no_entry_can_name_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One full refcount block, named by all of a large table, would take hours."""
    file, disk = new_image(1 << 16)
    limit, table = 1 << 20, disk._metadata.refcounts.table
    monkeypatch.setattr(layout, "MAX_HOST_OFFSET", limit)
    for place in range(disk._metadata.refcounts.block_offset(0), file.size, 2):
        file.write(place, b"\0\1")
        if place % 512 == 510:
            break
    table[:] = array("Q", table[:1] * len(table))
    assert len(table) * 256 * 512 > limit
    looked: list[int] = []
    locate = disk._metadata.refcounts._locate

    def watched(cluster: int) -> tuple[int, int, int]:
        looked.append(cluster)
        return locate(cluster)

    disk._metadata.refcounts._locate = watched  # type: ignore[method-assign]
    disk._metadata.refcounts.cache.clear()
    with pytest.raises(pyvirtio.BackendError) as caught:
        disk.write(0, b"x")
    assert caught.value.errno == errno.EFBIG
    assert max(looked) * 512 <= limit


def on_a_device(size: int, **options: Any) -> Any:
    """An image with some data in something of a fixed size."""
    file, disk = new_image(1 << 30, cluster_size=65536, **options)
    disk.write(0, b"x" * 100_000)
    disk.close()
    device = bytearray(file.getvalue().ljust(size, b"\0"))
    return pyvirtio.open_disk(MemoryDisk(device), format="qcow2")


def test_a_device_that_is_full_is_told_by_its_errno() -> None:
    with on_a_device(1 << 20) as disk:
        for request in (
            lambda: disk.write(1 << 20, b"y" * (1 << 20)),
            lambda: disk.truncate(1 << 46),
            lambda: disk.vmstate.write(0, b"s" * (1 << 20)),
        ):
            with pytest.raises(pyvirtio.BackendError) as caught:
                request()
            assert caught.value.errno in (errno.ENOSPC, errno.EINVAL)
        assert disk.read(0, 100_000) == b"x" * 100_000
        disk.discard(0, 1 << 20)
        disk.flush()
        disk.write(0, b"z" * 65536)  # there is room again
        assert not disk.check().corruptions


def test_what_an_entry_names_past_a_devices_end_reads_as_zeroes() -> None:
    with on_a_device(1 << 20) as disk:
        metadata = disk._metadata
        with metadata.lock:
            position = metadata.prepare(3)
            metadata.tables.set_entries(position, [1 << 40 | layout.COPIED])
            metadata.unpin(position)
        assert not any(disk.read(3 << 16, 65536))
        with pytest.raises(pyvirtio.BackendError) as caught:
            disk.write(3 << 16, b"w" * 512)
        assert caught.value.errno == errno.ENOSPC
