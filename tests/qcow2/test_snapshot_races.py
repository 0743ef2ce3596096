"""Snapshots that several threads, views and drafts are after at once."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

import pytest

from pyvirtio import BackendError, MemoryDisk
from pyvirtio.qcow2 import Qcow2Disk
from support.images import assert_clean, copy_of, new_image

CLUSTER = 512


def waiting_together(disk: Qcow2Disk, *works: Callable[[], object]) -> list[BaseException | None]:
    """Start all while nobody gets in, then let them go; what each raised."""
    outcomes: list[BaseException | None] = [None] * len(works)

    def guarded(index: int) -> None:
        try:
            works[index]()
        except (BackendError, KeyError) as error:
            outcomes[index] = error

    threads = [threading.Thread(target=guarded, args=(i,), daemon=True) for i in range(len(works))]
    gate = disk._metadata.gate
    with gate.exclusive():
        for number, thread in enumerate(threads, 1):
            thread.start()
            deadline = time.monotonic() + 30
            while gate._waiting < number and time.monotonic() < deadline:
                time.sleep(0.001)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


def with_snapshot() -> tuple[MemoryDisk, Qcow2Disk]:
    file, disk = new_image()
    disk.write(0, b"o" * 8 * CLUSTER)
    disk.snapshots.create("one")
    disk.write(0, b"n" * 8 * CLUSTER)
    return file, disk


def test_a_snapshot_is_deleted_once_by_two_threads() -> None:
    file, disk = with_snapshot()
    outcomes = waiting_together(
        disk, lambda: disk.snapshots.delete("one"), lambda: disk.snapshots.delete("one")
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["KeyError", "NoneType"]
    assert disk.check().clean
    disk.close()
    assert_clean(file)


def test_what_was_deleted_meanwhile_is_not_applied() -> None:
    file, disk = with_snapshot()
    snapshot = disk.snapshots.find("one")
    outcomes = waiting_together(
        disk, lambda: disk.snapshots.delete(snapshot), lambda: disk.snapshots.apply(snapshot)
    )
    assert disk.check().clean
    assert outcomes[0] is None
    assert disk.read(0, 1) == (b"n" if outcomes[1] else b"o")
    disk.close()
    assert_clean(file)


def test_two_that_are_made_at_once_have_different_ids() -> None:
    _, disk = new_image()
    waiting_together(disk, lambda: disk.snapshots.create("a"), lambda: disk.snapshots.create("b"))
    assert sorted(snapshot.id for snapshot in disk.snapshots) == ["1", "2"]
    disk.close()


def test_what_is_looked_at_is_not_renamed() -> None:
    _, disk = with_snapshot()
    with disk.snapshots.open("one"), pytest.raises(BackendError) as caught:
        disk.snapshots.rename("one", "two")
    assert caught.value.errno == errno.EBUSY
    disk.snapshots.rename("one", "two")
    disk.close()


def test_a_draft_gives_way_to_another_name_of_its_base() -> None:
    file, disk = new_image()
    with disk.snapshots.draft() as draft:
        draft.write([(0, memoryview(b"r" * CLUSTER))])
        base = disk.snapshots.create("base", vm_state_size=CLUSTER, draft=draft)
    with disk.snapshots.draft(base) as draft:
        disk.snapshots.rename("base", "other")
        with pytest.raises(BackendError) as caught:
            draft.write([(0, memoryview(b"s" * CLUSTER))])
    assert caught.value.errno == errno.ESTALE
    disk.close()
    assert_clean(file)


def test_a_view_protects_its_snapshot_when_the_table_was_written_anew() -> None:
    _, disk = with_snapshot()
    with disk.snapshots.open("one"):
        disk.snapshots.rewrite(
            [type(s)(**{n: getattr(s, n) for n in s.__slots__}) for s in disk.snapshots],
            disk.snapshots._list.length,
        )
        with pytest.raises(BackendError) as caught:
            disk.snapshots.delete("one")
        assert caught.value.errno == errno.EBUSY
    disk.close()


def test_an_id_of_thousands_of_digits_does_not_count() -> None:
    file, disk = new_image()
    disk.snapshots.create("one").id = "9" * 5000
    disk.snapshots.write_table()
    assert [disk.snapshots.create("two").id, disk.snapshots.create("three").id] == ["1", "2"]
    disk.close()
    assert_clean(copy_of(file))


def test_the_highest_id_that_counts_is_not_given_twice() -> None:
    _, disk = new_image()
    disk.snapshots.create("one").id = "9" * 19
    assert disk.snapshots.create("two").id != disk.snapshots.create("three").id
    disk.close()


@pytest.mark.parametrize("what", ["vm_clock", "vm_state_size", "icount"])
@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_numbers_that_the_table_cannot_hold_are_refused(what: str, number: int) -> None:
    _, disk = new_image()
    with pytest.raises(ValueError, match=f"the {what} of a snapshot cannot be"):
        disk.snapshots.create("x", **{what: number})
    assert disk.check().clean
    disk.close()


def test_a_new_name_that_is_too_long_is_refused() -> None:
    _, disk = with_snapshot()
    with pytest.raises(ValueError, match="65535"):
        disk.snapshots.rename("one", "n" * 65536)
    disk.close()
