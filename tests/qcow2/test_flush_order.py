"""In which order metadata reaches the file, and what a failure leaves."""

from __future__ import annotations

import pytest

import pyvirtio
from pyvirtio import BackendError, MemoryDisk
from pyvirtio.qcow2 import Qcow2Disk
from support.filters import FaultyDisk, Filter, RecordingDisk
from support.images import KeptDisk, as_qcow2, assert_clean, copy_of, number_at, reopen

CLUSTER = 512
SIZE = 1 << 18


def recorded(**options: object) -> tuple[RecordingDisk, Qcow2Disk]:
    log = RecordingDisk(KeptDisk(growable=True))
    options.setdefault("cluster_size", CLUSTER)
    disk = as_qcow2(pyvirtio.create_disk(log, SIZE, format="qcow2", **options))
    log.log.clear()
    return log, disk


def kinds(log: RecordingDisk, disk: Qcow2Disk) -> list[str]:
    """What was written, by the structure it belongs to, with repetitions and data left out."""
    below = log.below
    l1_at, l1_size = number_at(below, 40), 8 * number_at(below, 36, 4)
    table_at, table_size = number_at(below, 48), CLUSTER * number_at(below, 56, 4)
    mask = 0x00FF_FFFF_FFFF_FE00
    l2 = {number_at(below, l1_at + at) & mask for at in range(0, l1_size, 8)}
    blocks = {number_at(below, table_at + at) for at in range(0, table_size, 8)}
    found: list[str] = []
    for event in log.log:
        where = event.offset // CLUSTER * CLUSTER
        if event.kind == "flush":
            name = "sync"
        elif event.kind != "write":
            name = event.kind
        elif where == 0:
            name = "header"
        elif l1_at <= event.offset < l1_at + l1_size:
            name = "L1"
        elif table_at <= event.offset < table_at + table_size:
            name = "refcount table"
        elif where in blocks:
            name = "refcounts"
        elif where in l2:
            name = "L2"
        else:
            continue
        if not found or found[-1] != name:
            found.append(name)
    return found


def test_a_flush_goes_up_from_refcounts_to_the_l1_table() -> None:
    log, disk = recorded()
    disk.write(0, b"x" * 512)
    disk.flush()
    log.log.clear()
    disk.write(0, b"x" * SIZE)  # new L2 tables and refcount blocks
    log.log.clear()
    disk.flush()
    assert kinds(log, disk) == [
        *("refcounts", "sync", "refcount table", "sync", "L2", "sync", "L1", "sync"),
    ]


def test_a_flush_of_nothing_is_a_flush_of_the_file() -> None:
    log, disk = recorded()
    disk.flush()
    log.log.clear()
    disk.flush()
    assert [event.kind for event in log.log] == ["flush"]


def test_what_is_flushed_is_whole_without_a_close() -> None:
    log, disk = recorded()
    disk.write(0, b"x" * SIZE)
    disk.flush()
    assert_clean(log.below)
    with reopen(log.below) as found:
        assert found.read(0, SIZE) == b"x" * SIZE


def test_refcounts_fall_only_after_the_reference_is_gone() -> None:
    log, disk = recorded()
    disk.write(0, b"x" * 8 * CLUSTER)
    disk.flush()
    log.log.clear()
    disk.discard(0, 8 * CLUSTER)
    disk.flush()
    assert kinds(log, disk)[:3] == ["sync", "L2", "sync"]
    assert "refcounts" not in kinds(log, disk)
    log.log.clear()
    disk.flush()
    assert "refcounts" in kinds(log, disk)
    assert_clean(log.below)


def test_creating_writes_the_header_last() -> None:
    log = RecordingDisk(KeptDisk(growable=True))
    disk = pyvirtio.create_disk(log, SIZE, format="qcow2", cluster_size=CLUSTER)
    assert disk.size == SIZE
    writes = [event for event in log.log if event.kind in ("write", "flush")]
    first = next(i for i, event in enumerate(writes) if event.kind == "write" and not event.offset)
    assert writes[first - 1].kind == "flush"
    assert all(event.kind == "flush" for event in writes[first + 1 :])


def test_a_snapshot_is_whole_before_the_header_names_it() -> None:
    log, disk = recorded()
    disk.write(0, b"x" * 8 * CLUSTER)
    disk.flush()
    log.log.clear()
    disk.snapshots.create("s")
    events = [event for event in log.log if event.kind in ("write", "flush")]
    header = next(i for i, e in enumerate(events) if e.kind == "write" and e.offset == 60)
    assert events[header].length == 12
    assert events[header - 1].kind == "flush"
    assert events[header + 1].kind == "flush"


def test_applying_switches_size_and_table_in_one_write() -> None:
    log, disk = recorded()
    disk.write(0, b"x" * 8 * CLUSTER)
    disk.snapshots.create("s")
    disk.write(0, b"y" * 8 * CLUSTER)
    disk.flush()
    log.log.clear()
    disk.snapshots.apply("s")
    events = [event for event in log.log if event.kind in ("write", "flush")]
    headers = [i for i, e in enumerate(events) if e.kind == "write" and e.offset < 112]
    assert [(events[i].offset, events[i].length) for i in headers] == [(24, 24)]
    assert events[headers[0] - 1].kind == "flush"
    assert events[headers[0] + 1].kind == "flush"


class FailingAt(Filter):
    """Refuses writes to the part of the file in ``range``, as long as it is not None."""

    def __init__(self, below: MemoryDisk) -> None:
        super().__init__(below)
        self.range: range | None = None

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        if self.range is not None and offset in self.range:
            raise BackendError(5, "refused by the test")
        super()._writev(offset, views, length)


@pytest.mark.parametrize("what", ["L1", "L2", "refcount table"])
def test_what_a_failed_flush_did_not_write_the_next_one_writes(what: str) -> None:
    below = KeptDisk(growable=True)
    file = FailingAt(below)
    disk = as_qcow2(pyvirtio.create_disk(file, SIZE, format="qcow2", cluster_size=CLUSTER))
    disk.write(0, b"0" * 512)
    disk.flush()
    disk.write(0, b"x" * SIZE)
    start = {
        "L1": number_at(below, 40),
        "refcount table": number_at(below, 48),
        "L2": number_at(below, number_at(below, 40)) & 0xFFFF_FFFF,
    }[what]
    file.range = range(start, start + CLUSTER)
    with pytest.raises(BackendError):
        disk.flush()
    file.range = None
    disk.flush()
    disk.flush()
    with reopen(below) as found:
        assert found.read(0, SIZE) == b"x" * SIZE
        assert found.check().clean


def test_dropped_references_survive_a_failed_flush() -> None:
    below = KeptDisk(growable=True)
    file = FaultyDisk(below, kinds=frozenset({"flush"}))
    disk = as_qcow2(pyvirtio.create_disk(file, SIZE, format="qcow2", cluster_size=CLUSTER))
    disk.write(0, b"x" * 8 * CLUSTER)
    disk.flush()
    disk.discard(0, 8 * CLUSTER)
    file.fail_at = file.count
    with pytest.raises(BackendError):
        disk.flush()
    file.fail_at = None
    disk.close()
    assert_clean(below)


class BlindAt(Filter):
    """Refuses to read the part of the file in ``range``, as long as it is not None."""

    def __init__(self, below: MemoryDisk) -> None:
        super().__init__(below)
        self.range: range | None = None
        self.failed = 0

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        if self.range is not None and offset in self.range:
            self.failed += 1
            raise BackendError(5, "refused by the test")
        super()._readv(offset, views, length)


def test_a_reference_is_given_up_once_though_the_refcounts_could_not_be_read_meanwhile() -> None:
    """One run of clusters over two slices of a refcount block: the second cannot be read yet."""
    size, part, options = 8192, 4096, {"cluster_size": 8192, "refcount_bits": 64}
    made = KeptDisk(growable=True)
    disk = pyvirtio.create_disk(made, 8 << 20, format="qcow2", **options)
    disk.write(0, b"x" * (6 << 20))  # 768 clusters; a slice counts 512
    disk.close()
    below = copy_of(made)
    file = BlindAt(below)
    found = as_qcow2(pyvirtio.open_disk(file, format="qcow2"))
    found.discard(0, 6 << 20)
    second = number_at(below, number_at(below, 48)) + part
    file.range = range(second, second + part)
    found.flush()
    assert file.failed
    file.range = None
    found.close()
    assert_clean(below)
    with reopen(below) as again:
        assert again.read(0, size) == bytes(size)
