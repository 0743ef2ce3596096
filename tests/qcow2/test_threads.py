"""Requests from many threads at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
import pyvirtio.qcow2
from pyvirtio.qcow2 import requests as gates
from support.filters import Gate, GatedDisk, HoldingDisk, JitteryDisk
from support.peers import find_program
from support.qemu import qemu_check
from support.workload import create

SECTOR = 512
SMALLEST_CACHES = {"l2_cache_size": 1, "refcount_cache_size": 1}


@dataclass
class Request:
    """One request's effect, and when it ran on a clock that ticks at each start and end."""

    first: int
    sectors: int
    tag: bytes
    began: int = 0
    ended: int = 0

    def contents(self, sector: int) -> bytes:
        """What it leaves in a sector: zeroes, or bytes that name the request and the sector."""
        return bytes(SECTOR) if not self.tag else (self.tag + sector.to_bytes(4)) * (SECTOR // 8)


@dataclass
class Clock:
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tick(self) -> int:
        with self.lock:
            self.now += 1
            return self.now


def in_threads(*works: Callable[[], None]) -> None:
    """Run all at once; raises the first exception of any."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a request never came back"
    if errors:
        raise errors[0]


def hammer(
    disk: Any, clock: Clock, number: int, cluster_size: int, *, sectors: int
) -> list[Request]:
    """One thread's requests, of all kinds, all over the disk."""
    chance = random.Random(number)
    done = []
    for turn in range(60):
        first = chance.randrange(sectors)
        count = min(chance.randint(1, 3 * cluster_size // SECTOR), sectors - first)
        kind = chance.choice(("write", "write", "write", "zero", "discard", "read", "flush"))
        if kind == "discard":  # whole clusters, so that it is known what it does
            per = cluster_size // SECTOR
            first -= first % per
            count = min(per * chance.randint(1, 3), sectors - first)
        tag = (number * 1000 + turn + 1).to_bytes(4) if kind == "write" else b""
        request = Request(first, count, tag, began=clock.tick())
        if kind == "write":
            data = b"".join(request.contents(first + i) for i in range(count))
            disk.write(first * SECTOR, data)
        elif kind == "zero":
            disk.write_zeroes(first * SECTOR, count * SECTOR, unmap=turn % 2 == 0)
        elif kind == "discard":
            disk.discard(first * SECTOR, count * SECTOR)
        elif kind == "read":
            disk.read(first * SECTOR, count * SECTOR)
        else:
            disk.flush()
        request.ended = clock.tick()
        if kind in ("write", "zero", "discard"):
            done.append(request)
    return done


def assert_some_order(contents: bytes, requests: list[Request], initially: bytes) -> None:
    """Each sector holds what a request left that no other wholly came after."""
    for sector in range(len(contents) // SECTOR):
        at = slice(sector * SECTOR, (sector + 1) * SECTOR)
        touching = [r for r in requests if r.first <= sector < r.first + r.sectors]
        newest = max((r.began for r in touching), default=0)
        allowed = {r.contents(sector) for r in touching if r.ended > newest}
        if not touching:
            allowed.add(initially[at])
        assert contents[at] in allowed, f"sector {sector}: {contents[at][:8].hex()}"


@pytest.mark.parametrize("cluster_size", [512, 4096])
@pytest.mark.parametrize("caches", [{}, SMALLEST_CACHES], ids=["roomy caches", "tiny caches"])
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
def test_overlapping_requests_end_in_some_order(
    tmp_path: Path, cluster_size: int, backed: bool, caches: dict[str, int]
) -> None:
    image = tmp_path / "disk.qcow2"
    size = 48 * 4096
    initially = bytes(size)
    options: dict[str, Any] = {}
    if backed:
        initially = random.Random(1).randbytes(size)
        (tmp_path / "base.raw").write_bytes(initially)
        options = {"backing_file": str(tmp_path / "base.raw"), "backing_fmt": "raw"}
    create(image, size, cluster_size=cluster_size, **options)
    clock = Clock()
    requests: list[Request] = []
    below = JitteryDisk(pyvirtio.FileDisk(image, growable=True), seed=1)
    with pyvirtio.open_disk(below, format="qcow2", **caches) as disk:

        def work(number: int) -> Callable[[], None]:
            return lambda: requests.extend(
                hammer(disk, clock, number, cluster_size, sectors=size // SECTOR)
            )

        in_threads(*(work(number) for number in range(6)))
        contents = disk.read(0, size)
        assert_some_order(contents, requests, initially)
        found = disk.check()
        assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0)
    with pyvirtio.open_disk(image) as disk:
        assert disk.read(0, size) == contents
    if find_program("qemu-img"):
        qemu_check(image)


def test_snapshots_come_and_go_and_the_disk_grows_while_others_write(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    size = 64 * 4096
    create(image, size, cluster_size=512)
    clock = Clock()
    requests: list[Request] = []
    below = JitteryDisk(pyvirtio.FileDisk(image, growable=True), seed=3)
    with pyvirtio.open_disk(below, format="qcow2") as disk:

        def work(number: int) -> Callable[[], None]:
            return lambda: requests.extend(hammer(disk, clock, number, 512, sectors=size // SECTOR))

        def manage() -> None:
            for turn in range(6):
                disk.snapshots.create(f"snap{turn}")
                disk.truncate(disk.size + 100 * SECTOR)
                if turn % 2:
                    disk.snapshots.delete(f"snap{turn - 1}")
                assert disk.check().corruptions == 0

        in_threads(manage, *(work(number) for number in range(4)))
        contents = disk.read(0, size)
        assert_some_order(contents, requests, bytes(size))
        assert not any(disk.read(size, disk.size - size))
        found = disk.check()
        assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0)
    if find_program("qemu-img"):
        qemu_check(image)


@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_writes_to_one_new_cluster_all_arrive(tmp_path: Path, cluster_size: int) -> None:
    image = tmp_path / "disk.qcow2"
    create(image, 4 * cluster_size, cluster_size=cluster_size)
    with pyvirtio.open_disk(
        JitteryDisk(pyvirtio.FileDisk(image, growable=True), seed=2), format="qcow2"
    ) as disk:

        def work(number: int) -> Callable[[], None]:
            part = cluster_size // 8
            return lambda: disk.write(number * part, bytes([number + 1]) * part)

        in_threads(*(work(number) for number in range(16)))
        expected = b"".join(bytes([n + 1]) * (cluster_size // 8) for n in range(16))
        assert disk.read(0, 2 * cluster_size) == expected
    if find_program("qemu-img"):
        qemu_check(image)


WANTED = 4


def _gated(image: Path) -> GatedDisk:
    return GatedDisk(pyvirtio.FileDisk(image, growable=True), smallest=131072)


@pytest.mark.parametrize("allocated", [False, True], ids=["allocating", "in place"])
def test_data_of_independent_writes_is_under_way_at_once(tmp_path: Path, allocated: bool) -> None:
    image = tmp_path / "disk.qcow2"
    create(image, 16 << 20)
    below = _gated(image)
    with pyvirtio.open_disk(below, format="qcow2") as disk:
        if allocated:
            disk.write(0, bytes(16 << 20))
        gate = below.write_gate = Gate(WANTED)
        works = [
            lambda n=n: disk.write(n * (3 << 20), bytes([n + 1]) * 131072) for n in range(WANTED)
        ]
        in_threads(*works)
        assert gate.most == WANTED
        for n in range(WANTED):
            assert disk.read(n * (3 << 20), 131072) == bytes([n + 1]) * 131072


def test_data_of_independent_reads_is_under_way_at_once(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    create(image, 16 << 20)
    below = _gated(image)
    with pyvirtio.open_disk(below, format="qcow2") as disk:
        disk.write(0, b"r" * (16 << 20))
        gate = below.read_gate = Gate(WANTED)
        in_threads(*(lambda n=n: disk.read(n * (3 << 20), 131072) for n in range(WANTED)))
        assert gate.most == WANTED


def test_a_read_goes_on_while_a_write_elsewhere_waits(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    create(image, 16 << 20)
    below = _gated(image)
    with pyvirtio.open_disk(below, format="qcow2") as disk:
        disk.write(8 << 20, b"r" * 4096)
        gate = below.write_gate = Gate(2)
        writer = threading.Thread(target=lambda: disk.write(0, b"w" * 131072), daemon=True)
        writer.start()
        while not gate.most:
            threading.Event().wait(0.001)
        in_threads(lambda: disk.read(8 << 20, 4096))  # fails if it never comes back
        in_threads(lambda: disk.write(4 << 20, b"v" * 131072))  # lets the first one go
        writer.join(60)
        assert gate.most == 2
        assert disk.read(0, 131072) == b"w" * 131072


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_cluster_is_not_handed_out_while_an_old_request_is_on_its_way_to_it(
    tmp_path: Path, kind: str
) -> None:
    image = tmp_path / "disk.qcow2"
    size = 64 * 65536
    create(image, size)
    below = HoldingDisk(pyvirtio.FileDisk(image, growable=True), smallest=65536)
    with pyvirtio.open_disk(below, format="qcow2") as disk:
        disk.write(0, b"o" * 65536)
        disk.flush()
        below.hold = kind
        found: list[bytes] = []
        late = threading.Thread(
            target=lambda: (
                found.append(disk.read(0, 65536)) if kind == "read" else disk.write(0, b"l" * 65536)
            ),
            daemon=True,
        )
        late.start()
        assert below.arrived.wait(60)
        disk.discard(0, 65536)
        disk.flush()
        disk.flush()
        for cluster in range(1, 20):  # takes whatever is free
            disk.write(cluster * 65536, b"n" * 65536)
        below.go.set()
        late.join(60)
        assert not late.is_alive()
        assert disk.read(65536, 19 * 65536) == b"n" * (19 * 65536)
        if found:
            assert found[0] in (b"o" * 65536, bytes(65536))
        disk.flush()
        disk.write(20 * 65536, b"m" * 65536)  # now the old cluster is free again
        found_by_check = disk.check()
        assert (found_by_check.corruptions, found_by_check.leaks) == (0, 0)


def test_who_leaves_while_another_begins_to_wait_wakes_it_up(monkeypatch: Any) -> None:
    """A request that leaves, without the lock, just after it was seen to be inside."""
    monkeypatch.setattr(gates, "_PATIENCE", 60.0)
    gate = gates.RequestGate()
    leaver = threading.Thread(target=gate.leave, args=(1,), daemon=True)

    class Inside(dict[int, int]):
        def __len__(self) -> int:
            if leaver.ident is None:
                leaver.start()
                leaver.join(0.2)
                return 1
            return super().__len__()

    gate._inside = Inside({1: 0})

    def alone() -> None:
        with gate.exclusive():
            pass

    waiter = threading.Thread(target=alone, daemon=True)
    waiter.start()
    waiter.join(10)
    assert not waiter.is_alive()
