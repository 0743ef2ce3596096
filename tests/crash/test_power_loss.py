"""After a power failure at any moment: flushed data is there, and nothing is worse than leaked."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
import pyvirtio.qcow2
from pyvirtio.qcow2 import layout
from pyvirtio.qcow2.layout import Incompatible
from support.crash import CrashImage, GuestHistory, crash_images
from support.filters import RecordingDisk
from support.peers import find_program
from support.qemu import qemu_read, qemu_verdict
from support.workload import assert_same, dangerous, discarded

SCALE = int(os.environ.get("PYVIRTIO_CRASH_SCALE", "1"))
"""How many times the usual number of random crash images; 1 is for CI."""
QEMU_SAMPLES = 6 * SCALE
"""Images of each workload that qemu-img looks at too."""
SIZE = 96 * 1024
JUDGED = find_program("qemu-img") is not None

Snapshots = dict[str, bytes]


@dataclass
class Guest:
    """Runs requests on a recorded disk and notes in the log what the guest may then see."""

    disk: Any
    recorder: RecordingDisk
    model: bytearray
    cluster_size: int
    keeps_discarded: bool
    chance: random.Random
    snapshots: Snapshots = field(default_factory=dict)
    below: bytes = b""
    """What the backing file holds."""

    @property
    def resizable(self) -> bool:
        """False for version 2 with snapshots, as in QEMU."""
        return not self.snapshots or self.disk.info().specific["compat"] != "0.10"

    def _begin(self) -> None:
        self.recorder.mark(("begin", bytes(self.model), dict(self.snapshots)))

    def write(self, offset: int, length: int) -> None:
        data = self.chance.randbytes(length)
        self.model[offset : offset + length] = data
        self._begin()
        self.disk.write(offset, data)

    def compress(self, cluster: int, clusters: int) -> None:
        """Whole clusters, of data that become smaller (or now and then do not)."""
        offset = cluster * self.cluster_size
        length = clusters * self.cluster_size
        chance = self.chance
        data = b"".join(
            (chance.randbytes(8) if chance.random() < 0.8 else b"") * 64 or chance.randbytes(512)
            for _ in range(0, length, 512)
        )
        self.model[offset : offset + length] = data
        self._begin()
        self.disk.write_compressed(offset, [data])

    def zero(self, offset: int, length: int, *, unmap: bool = False) -> None:
        self.model[offset : offset + length] = bytes(length)
        self._begin()
        self.disk.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        start, end = discarded(offset, length, len(self.model), self.cluster_size)
        if not self.keeps_discarded:
            self.model[start:end] = bytes(end - start)
        self._begin()
        self.disk.discard(offset, length)

    def empty(self) -> None:
        """As a commit does when all is in the backing file."""
        size = len(self.model)
        self.model[:] = self.below[:size].ljust(size, b"\0")
        self._begin()
        self.disk.make_empty()

    def flush(self) -> None:
        self.disk.flush()
        self.recorder.mark("flushed")

    def grow(self, size: int) -> None:
        self.model.extend(bytes(size - len(self.model)))
        self._begin()
        self.disk.truncate(size)

    def resize(self, size: int, preallocation: str = "off") -> None:
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        self._begin()
        self.disk.truncate(size, preallocation=preallocation, shrink=True)

    def amend(self, **options: Any) -> None:
        self._begin()
        self.disk.amend(**options)

    def save_state(self, length: int) -> None:
        self._begin()
        self.disk.vmstate.write(0, self.chance.randbytes(length))

    def create_with_state(self, name: str, length: int) -> None:
        self.save_state(length)
        self.snapshots[name] = bytes(self.model)
        self._begin()
        self.disk.snapshots.create(name, vm_state_size=length)

    def create(self, name: str) -> None:
        self.snapshots[name] = bytes(self.model)
        self._begin()
        self.disk.snapshots.create(name)

    def apply(self, name: str) -> None:
        self.model[:] = self.snapshots[name]
        self._begin()
        self.disk.snapshots.apply(name)

    def delete(self, name: str) -> None:
        del self.snapshots[name]
        self._begin()
        self.disk.snapshots.delete(name)


def anywhere(guest: Guest, longest: int) -> tuple[int, int]:
    """A random range, half of the time of whole sectors."""
    size = len(guest.model)
    start = guest.chance.randrange(size)
    length = guest.chance.randint(1, min(longest, size - start))
    if guest.chance.random() < 0.5:
        start -= start % 512
        length = min(-(-length // 512) * 512, size - start)
    return start, length


def allocating(guest: Guest) -> None:
    for turn in range(24):
        guest.write(*anywhere(guest, 9000))
        if turn % 5 == 4:
            guest.flush()


def overwriting(guest: Guest) -> None:
    guest.write(0, len(guest.model))
    guest.flush()
    for turn in range(12):
        guest.write(*anywhere(guest, 5000))
        if turn % 4 == 3:
            guest.flush()


def zeroing(guest: Guest) -> None:
    guest.write(0, len(guest.model) // 2)
    guest.flush()
    for turn in range(16):
        if turn % 3:
            guest.zero(*anywhere(guest, 20_000), unmap=turn % 2 == 0)
        else:
            guest.write(*anywhere(guest, 9000))
        if turn % 5 == 4:
            guest.flush()


def reusing(guest: Guest) -> None:
    """Clusters freed by a discard are handed out again: to other data, to tables."""
    guest.write(0, len(guest.model) // 2)
    guest.flush()
    for turn in range(16):
        guest.discard(*anywhere(guest, 30_000))
        if turn % 3 == 0:
            guest.flush()
        guest.write(*anywhere(guest, 12_000))
        if turn % 4 == 3:
            guest.flush()


def snapshotting(guest: Guest) -> None:
    guest.write(0, 30_000)
    guest.create("one")
    guest.write(*anywhere(guest, 20_000))
    guest.flush()
    guest.write(*anywhere(guest, 20_000))
    guest.create("two")
    guest.write(0, 10_000)
    guest.flush()
    guest.apply("one")
    guest.write(*anywhere(guest, 9_000))
    guest.discard(4096, 16384)
    guest.flush()
    guest.delete("one")
    guest.write(*anywhere(guest, 20_000))
    guest.apply("two")
    guest.delete("two")
    guest.write(*anywhere(guest, 20_000))
    guest.flush()


def growing(guest: Guest) -> None:
    """The L1 table and the refcount table move to larger places."""
    for turn in range(6):
        guest.write(*anywhere(guest, 9_000))
        guest.grow(len(guest.model) + 64 * 1024)
        guest.write(len(guest.model) - 40_000, 40_000)
        if turn % 2:
            guest.flush()


def resizing(guest: Guest) -> None:
    """Up and down, with and without preallocation, with snapshots."""
    for turn, mode in enumerate(["off", "metadata", "off", "metadata", "metadata"]):
        guest.write(*anywhere(guest, 20_000))
        guest.resize(len(guest.model) + 50_000 // 512 * 512, mode)
        guest.write(len(guest.model) - 30_000, 30_000)
        if turn == 2:
            guest.create("one")
        guest.resize(len(guest.model) - 55_000 // 512 * 512)
        if turn % 2:
            guest.flush()
    guest.delete("one")
    guest.resize(30 * 512)
    guest.resize(SIZE)


def amending(guest: Guest) -> None:
    """Other refcount widths and versions, with shared clusters and zero clusters of all kinds."""
    guest.write(0, 40_000)
    guest.zero(4096, 8192)
    guest.create("one")
    guest.zero(20_480, 8192)
    guest.write(*anywhere(guest, 9_000))
    guest.flush()
    for bits in (64, 4, 16):
        guest.amend(refcount_bits=bits)
        guest.write(*anywhere(guest, 9_000))
    guest.amend(lazy_refcounts=True)
    guest.amend(lazy_refcounts=False, compat="0.10")
    guest.write(*anywhere(guest, 9_000))
    guest.amend(compat="1.1")
    guest.zero(*anywhere(guest, 20_000))
    guest.flush()


def saving_state(guest: Guest) -> None:
    """VM state beside the disk, into snapshots and out of them."""
    guest.write(0, 20_000)
    guest.create_with_state("one", 30_000)
    guest.write(*anywhere(guest, 9_000))
    guest.create_with_state("two", 70_000)
    guest.apply("one")
    guest.flush()
    guest.save_state(50_000)
    guest.delete("one")
    guest.resize(len(guest.model) + 512 * 100)
    guest.apply("two")
    guest.flush()


def mixture(guest: Guest) -> None:
    made = 0
    for _ in range(45):
        choice = guest.chance.random()
        if choice < 0.45:
            guest.write(*anywhere(guest, 9_000))
        elif choice < 0.55:
            guest.zero(*anywhere(guest, 20_000), unmap=guest.chance.random() < 0.5)
        elif choice < 0.7:
            guest.discard(*anywhere(guest, 40_000))
        elif choice < 0.77 and len(guest.snapshots) < 3:
            made += 1
            guest.create(f"snap{made}")
        elif choice < 0.8 and guest.snapshots:
            guest.delete(guest.chance.choice(list(guest.snapshots)))
        elif choice < 0.85 and guest.snapshots:
            guest.apply(guest.chance.choice(list(guest.snapshots)))
        elif choice < 0.9 and len(guest.model) < 4 * SIZE and guest.resizable:
            guest.grow(len(guest.model) + guest.chance.randrange(100) * 512)
        else:
            guest.flush()


def compressing(guest: Guest) -> None:
    """Compressed data share host clusters, which are freed and handed out again."""
    chance = guest.chance
    clusters = len(guest.model) // guest.cluster_size
    for turn in range(24):
        first = chance.randrange(clusters)
        guest.compress(first, chance.randint(1, min(4, clusters - first)))
        if turn % 3 == 1:
            guest.write(*anywhere(guest, 3_000))
        if turn % 4 == 2:
            guest.discard(*anywhere(guest, 30_000))
        if turn % 5 == 4:
            guest.flush()
        if turn == 8:
            guest.create("one")
        if turn == 18:
            guest.delete("one")


def emptying(guest: Guest) -> None:
    for turn in range(4):
        guest.write(*anywhere(guest, 20_000))
        guest.compress(turn, 3)
        if turn == 1:
            guest.create("kept")
        guest.flush()
        guest.write(*anywhere(guest, 20_000))
        guest.empty()
        guest.write(*anywhere(guest, 5_000))


WORKLOADS = [
    *(allocating, overwriting, zeroing, reusing, snapshotting, growing),
    *(resizing, amending, saving_state, compressing, mixture),
]


def memory_disk(contents: bytes) -> pyvirtio.MemoryDisk:
    disk = pyvirtio.MemoryDisk(len(contents), growable=True)
    disk.write(0, contents)
    return disk


@dataclass
class Judge:
    """Looks at each crash image."""

    folder: Path
    history: GuestHistory
    tables: list[Snapshots] = field(default_factory=lambda: [{}])
    """Each list of snapshots that may be found, with their contents; the newest last."""
    emptying: bool = False
    """An image that is being emptied may say that it is dirty; no other may."""
    seen: set[int] = field(default_factory=set)
    looked_at: int = 0

    def heed(self, mark: object) -> None:
        """Follow the guest's doings."""
        if mark == "flushed":
            self.history.flushed()
            del self.tables[:-1]
        elif isinstance(mark, tuple):
            _, contents, snapshots = mark
            self.history.change(contents)
            if snapshots != self.tables[-1]:
                self.tables.append(snapshots)

    def look(self, image: CrashImage) -> None:
        """Check one image with our own driver, and read it."""
        key = hash((image.data, len(self.history.versions), len(self.tables)))
        if key in self.seen:
            return
        self.seen.add(key)
        self.looked_at += 1
        where = f"event {image.position}, {image.story}"
        with pyvirtio.open_disk(memory_disk(image.data), format="qcow2") as disk:
            found = disk.check()
            assert (dangerous(found), found.check_errors) == (0, 0), f"{where}: {found}"
            problem = self.history.problem(disk.read(0, disk.size))
            assert problem is None, f"{where}: {problem}"
            names = [snapshot.name for snapshot in disk.snapshots]
            matching = [table for table in self.tables if list(table) == names]
            assert matching, f"{where}: snapshots {names}"
            if names and self.looked_at % 5 == 0:
                name = names[self.looked_at % len(names)]
                disk.snapshots.apply(name)
                contents = disk.read(0, disk.size)
                assert contents in [table[name] for table in matching], f"{where}: {name}"

    def have_qemu_look(self, image: CrashImage) -> None:
        """qemu-img's check finds nothing but leaks and clear COPIED flags, and mends it whole.

        Refcounts may be wrong in an image that says so itself.
        """
        where = f"event {image.position}, {image.story}"
        path = self.folder / "crashed.qcow2"
        path.write_bytes(image.data)
        verdict = qemu_verdict(path)
        features = image.data[layout.INCOMPATIBLE_FEATURES_OFFSET + 7]
        dirty = self.emptying and bool(features & Incompatible.DIRTY)
        dangerous = 0 if dirty else verdict.dangerous
        assert (dangerous, verdict.check_errors) == (0, 0), f"{where}: {verdict}"
        before = qemu_read(path, self.folder)
        problem = self.history.problem(before)
        assert problem is None, f"{where}: {problem}"
        if not verdict.clean:
            qemu_verdict(path, repair="all")
            verdict = qemu_verdict(path)
            assert verdict.clean, f"{where}: after repair: {verdict}"
            assert_same(qemu_read(path, self.folder), before)


def run_and_crash(
    folder: Path,
    workload: Callable[[Guest], None],
    *,
    seed: int,
    cluster_size: int,
    compat: str = "1.1",
    backed: bool = False,
    **caches: int,
) -> None:
    """Run a workload on a recorded image, then judge the crash images of the recording."""
    chance = random.Random(seed)
    options: dict[str, Any] = {"compat": compat, "cluster_size": cluster_size}
    model = bytearray(SIZE)
    if backed:
        base = folder / "base.raw"
        base.write_bytes(chance.randbytes(SIZE * 3 // 4))
        options |= {"backing_file": str(base), "backing_fmt": "raw"}
        model[: SIZE * 3 // 4] = base.read_bytes()
    below = pyvirtio.MemoryDisk(0, growable=True)
    pyvirtio.qcow2.FORMAT.create(below, SIZE, **options)
    start = below.read(0, below.size)
    recorder = RecordingDisk(below)
    disk = pyvirtio.open_disk(recorder, format="qcow2", **caches)
    judge = Judge(folder, GuestHistory(bytes(model)), emptying=workload is emptying)
    guest = Guest(
        disk, recorder, model, cluster_size, backed and compat == "0.10", random.Random(seed)
    )
    if backed:
        guest.below = base.read_bytes()
    workload(guest)
    disk.close()
    recorder.mark("flushed")
    _judge_all(judge, recorder, start, seed)


def _judge_all(judge: Judge, recorder: RecordingDisk, start: bytes, seed: int) -> None:
    total = sum(event.kind != "mark" for event in recorder.log)
    chance = random.Random(seed)
    wanted = max(1, total // QEMU_SAMPLES)
    images = crash_images(recorder.log, start, seed=seed, random_each=SCALE)
    for _, thing in images:
        if isinstance(thing, CrashImage):
            judge.look(thing)
            if JUDGED and chance.randrange(4 * wanted) == 0:
                judge.have_qemu_look(thing)
        else:
            judge.heed(thing.mark)


@pytest.mark.parametrize(
    ("workload", "cluster_size"),
    [(workload, 512) for workload in WORKLOADS]
    + [(workload, 4096) for workload in (reusing, snapshotting, mixture)],
)
def test_power_loss(tmp_path: Path, workload: Callable[[Guest], None], cluster_size: int) -> None:
    run_and_crash(tmp_path, workload, seed=1, cluster_size=cluster_size)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("workload", [zeroing, emptying, mixture])
def test_power_loss_over_a_backing_file(
    tmp_path: Path, workload: Callable[[Guest], None], compat: str
) -> None:
    run_and_crash(tmp_path, workload, seed=2, cluster_size=2048, compat=compat, backed=True)


@pytest.mark.parametrize("workload", [allocating, reusing])
def test_power_loss_with_tiny_caches(tmp_path: Path, workload: Callable[[Guest], None]) -> None:
    tiny = {"l2_cache_size": 1, "refcount_cache_size": 1}
    run_and_crash(tmp_path, workload, seed=4, cluster_size=512, **tiny)


@pytest.mark.parametrize("seed", range(3, 3 + SCALE))
def test_power_loss_in_a_random_workload(tmp_path: Path, seed: int) -> None:
    run_and_crash(tmp_path, mixture, seed=seed, cluster_size=1024)


@pytest.mark.parametrize("workload", [resizing, amending])
def test_power_loss_while_resizing_or_amending_over_a_backing_file(
    tmp_path: Path, workload: Callable[[Guest], None]
) -> None:
    run_and_crash(tmp_path, workload, seed=5, cluster_size=2048, backed=True)
