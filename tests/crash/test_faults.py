"""Errors of the host at every single point of a workload: reported, and never worse than leaks."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
import pyvirtio.qcow2
from pyvirtio.backend.filter import FilterDisk
from support.filters import FaultyDisk
from support.peers import find_program
from support.qemu import qemu_verdict
from support.workload import dangerous, discarded

SCALE = int(os.environ.get("PYVIRTIO_CRASH_SCALE", "1"))
SIZE = 64 * 1024
CLUSTER = 512
SECTOR = 512
JUDGED = find_program("qemu-img") is not None


class Possible:
    """What each sector may hold: ``live`` through the open disk, ``kept`` after a reopening."""

    def __init__(self, contents: bytes) -> None:
        self.live = [{contents[at : at + SECTOR]} for at in range(0, len(contents), SECTOR)]
        self.kept = [set(states) for states in self.live]

    def request(self, offset: int, data: bytes, *, done: bool) -> None:
        """A request for whole sectors has succeeded, or has failed and may be done in part."""
        for at in range(0, len(data), SECTOR):
            sector = (offset + at) // SECTOR
            new = data[at : at + SECTOR]
            if done:
                self.live[sector] = {new}
            else:
                self.live[sector].add(new)
            self.kept[sector] |= self.live[sector]

    def flushed(self) -> None:
        self.kept = [set(states) for states in self.live]

    def check(self, found: bytes, allowed: list[set[bytes]], when: str) -> None:
        for sector, states in enumerate(allowed):
            have = found[sector * SECTOR : (sector + 1) * SECTOR]
            wanted = sorted(state[:4].hex() for state in states)
            assert have in states, f"{when}: sector {sector} holds {have[:4].hex()}, not {wanted}"


class Guest:
    """Makes requests, notes which failed, and goes on as long as the disk lets it."""

    def __init__(self, disk: Any, contents: bytes, *, backed: bool, when: str) -> None:
        self.disk = disk
        self.size = len(contents)
        self.possible = Possible(contents)
        self.backed = backed
        self.when = when
        self.errors: list[BaseException] = []

    def _try(self, request: Callable[[], None]) -> bool:
        try:
            request()
        except (pyvirtio.BackendError, pyvirtio.ImageError, KeyboardInterrupt) as error:
            # The host's own error, or the refusal of a disk that gave up writing after one.
            self.errors.append(error)
            return False
        return True

    def write(self, sector: int, data: bytes) -> None:
        offset = sector * SECTOR
        done = self._try(lambda: self.disk.write(offset, data))
        self.possible.request(offset, data, done=done)

    def zero(self, sector: int, sectors: int, *, unmap: bool = False) -> None:
        offset, length = sector * SECTOR, sectors * SECTOR
        done = self._try(lambda: self.disk.write_zeroes(offset, length, unmap=unmap))
        self.possible.request(offset, bytes(length), done=done)

    def discard(self, sector: int, sectors: int) -> None:
        start, end = discarded(sector * SECTOR, sectors * SECTOR, self.size, CLUSTER)
        done = self._try(lambda: self.disk.discard(sector * SECTOR, sectors * SECTOR))
        self.possible.request(start, bytes(end - start), done=done)

    def create(self, name: str) -> None:
        self._try(lambda: self.disk.snapshots.create(name))

    def delete(self, name: str) -> None:
        if name in [snapshot.name for snapshot in self.disk.snapshots]:
            self._try(lambda: self.disk.snapshots.delete(name))

    def flush(self) -> None:
        if self._try(self.disk.flush):
            self.possible.flushed()

    def look(self) -> None:
        """Read the disk; it may refuse only for the injected fault's sake."""
        found: list[bytes] = []
        if self._try(lambda: found.append(self.disk.read(0, self.size))):
            self.possible.check(found[0], self.possible.live, f"{self.when}, live")


def rewriting(guest: Guest) -> None:
    """Allocating, overwriting, zeroing, discarding and using again."""
    chance = random.Random(7)
    guest.write(3, chance.randbytes(11 * SECTOR))
    guest.flush()
    guest.write(60, chance.randbytes(40 * SECTOR))
    guest.zero(5, 20, unmap=True)
    guest.discard(62, 10)
    guest.flush()
    guest.write(58, chance.randbytes(8 * SECTOR))
    guest.write(0, chance.randbytes(SIZE // 2))
    guest.look()
    guest.zero(10, 5)
    guest.discard(0, 40)
    guest.flush()
    guest.write(20, chance.randbytes(4 * SECTOR))


def snapshotting(guest: Guest) -> None:
    """Snapshots whose contents the guest knows to be those of the moment."""
    chance = random.Random(8)
    guest.write(0, chance.randbytes(20 * SECTOR))
    guest.create("one")
    guest.write(10, chance.randbytes(20 * SECTOR))
    guest.flush()
    guest.create("two")
    guest.discard(5, 20)
    guest.look()
    guest.delete("one")
    guest.write(15, chance.randbytes(20 * SECTOR))
    guest.flush()
    guest.delete("two")
    guest.write(0, chance.randbytes(20 * SECTOR))


def sharing(guest: Guest) -> None:
    """Giving up, on a cold cache, clusters that a snapshot still needs."""
    chance = random.Random(10)
    guest.discard(0, 120)
    guest.flush()
    guest.write(40, chance.randbytes(30 * SECTOR))
    guest.flush()
    guest.write(0, chance.randbytes(90 * SECTOR))
    guest.flush()


def prepared(start: bytes, contents: bytes) -> tuple[bytes, bytes]:
    """The image filled, with a snapshot of that."""
    below = memory_disk(start)
    with pyvirtio.open_disk(below, format="qcow2") as disk:
        contents = random.Random(11).randbytes(len(contents))
        disk.write(0, contents)
        disk.snapshots.create("kept")
        disk.flush()
        return below.read(0, below.size), contents


def image(folder: Path, *, backed: bool) -> tuple[bytes, bytes]:
    """An empty image and what the guest sees on it."""
    options: dict[str, Any] = {"cluster_size": CLUSTER, "refcount_bits": 64}
    contents = bytes(SIZE)
    if backed:
        contents = random.Random(9).randbytes(SIZE)
        (folder / "base.raw").write_bytes(contents)
        options |= {"backing_file": str(folder / "base.raw"), "backing_fmt": "raw"}
    below = pyvirtio.MemoryDisk(0, growable=True)
    pyvirtio.qcow2.FORMAT.create(below, SIZE, **options)
    return below.read(0, below.size), contents


def memory_disk(contents: bytes) -> pyvirtio.MemoryDisk:
    disk = pyvirtio.MemoryDisk(len(contents), growable=True)
    disk.write(0, contents)
    return disk


def run(
    start: bytes,
    contents: bytes,
    workload: Callable[[Guest], None],
    *,
    fail_at: int | None,
    when: str,
    backed: bool = False,
    **fault: Any,
) -> tuple[FaultyDisk, Guest, bytes]:
    """One run of the workload; also reopens, checks, and compares."""
    persistent = fault.pop("persistent", False)
    below = memory_disk(start)
    faulty = FaultyDisk(below, **fault)
    disk = pyvirtio.open_disk(faulty, format="qcow2")
    faulty.count = 0
    faulty.persistent = persistent
    faulty.fail_at = fail_at
    guest = Guest(disk, contents, backed=backed, when=when)
    workload(guest)
    guest.look()
    guest.flush()
    total = faulty.count
    faulty.fail_at = None  # the host has recovered, if it ever failed
    after = below.read(0, below.size)  # as if killed now
    with suppress(pyvirtio.BackendError, pyvirtio.ImageError):
        disk.close()
    faulty.count = total
    return faulty, guest, after


def judge(after: bytes, guest: Guest, when: str, snapshot: bytes | None) -> None:
    with pyvirtio.open_disk(memory_disk(after), format="qcow2") as disk:
        found = disk.check()
        assert (dangerous(found), found.check_errors) == (0, 0), f"{when}: {found}"
        guest.possible.check(disk.read(0, SIZE), guest.possible.kept, f"{when}, reopened")
        if snapshot is not None:
            disk.snapshots.apply("kept")
            assert disk.read(0, SIZE) == snapshot, f"{when}: the snapshot has changed"


CASES = {
    "one read": {"kinds": frozenset({"read"})},
    "one write": {"kinds": frozenset({"write", "truncate"})},
    "one torn write": {"kinds": frozenset({"write"}), "torn": True},
    "one flush": {"kinds": frozenset({"flush"})},
    "no space from then on": {
        "kinds": frozenset({"write", "truncate"}),
        "number": errno.ENOSPC,
        "persistent": True,
    },
    "everything from then on": {"persistent": True},
    "Ctrl-C": {"interrupt": KeyboardInterrupt},
}


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("workload", [rewriting, snapshotting, sharing])
@pytest.mark.parametrize("case", CASES)
def test_a_failure_of_the_host_at_every_point(
    tmp_path: Path, case: str, workload: Callable[[Guest], None], backed: bool
) -> None:
    start, contents = image(tmp_path, backed=backed)
    if workload is sharing:
        start, contents = prepared(start, contents)
    faultless, guest, after = run(
        start, contents, workload, fail_at=None, when="no fault", **CASES[case]
    )
    assert not guest.errors
    kept = contents if workload is sharing else None
    judge(after, guest, "no fault", kept)
    step = max(1, faultless.count // (25 * SCALE))
    for number in range(random.Random(case).randrange(step), faultless.count, step):
        when = f"{case} ({number})"
        faulty, guest, after = run(
            start, contents, workload, fail_at=number, when=when, **CASES[case]
        )
        assert faulty.failed
        told = any(isinstance(e, pyvirtio.BackendError | KeyboardInterrupt) for e in guest.errors)
        assert told or "read" in faulty.kinds, f"{when}: nobody was told"
        judge(after, guest, when, kept)
        if JUDGED and number // step % 12 == 0:
            path = tmp_path / "after.qcow2"
            path.write_bytes(after)
            verdict = qemu_verdict(path)
            assert (verdict.dangerous, verdict.check_errors) == (0, 0), f"{when}: {verdict}"


def test_a_full_host_refuses_new_clusters_but_still_serves_old_ones(tmp_path: Path) -> None:
    start, _ = image(tmp_path, backed=False)
    faulty = FaultyDisk(memory_disk(start), kinds=frozenset({"truncate"}), number=errno.ENOSPC)
    with pyvirtio.open_disk(faulty, format="qcow2") as disk:
        disk.write(0, b"old" * 1000)
        disk.flush()
        assert disk.read(0, 3000) == b"old" * 1000
        disk.write(0, b"new" * 1000)
        assert disk.read(0, 3000) == b"new" * 1000


def test_clusters_behind_an_area_that_could_not_be_taken_do_not_pass_for_fresh_ones() -> None:
    """Refcount blocks were written there before it failed."""

    class Failing(FilterDisk):
        left = -1

        def debug_event(self, name: str) -> None:
            if name == "refblock_alloc_write":
                self.left -= 1
                if not self.left:
                    raise pyvirtio.BackendError(errno.EIO, "the second block")

    below = Failing(pyvirtio.MemoryDisk(growable=True))
    with pyvirtio.create_disk(below, 1 << 16, cluster_size=512, refcount_bits=64) as disk:
        below.left = 2
        with pytest.raises(pyvirtio.BackendError):
            disk.truncate(1 << 17, preallocation="metadata")
        for at in range(0, disk.size, 512):
            disk.write(at, b"x")
        assert disk.read(0, disk.size) == (b"x" + bytes(511)) * (disk.size // 512)
        assert disk.check().clean
