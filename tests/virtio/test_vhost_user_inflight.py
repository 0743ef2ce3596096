"""Requests under way are done again after a crash, in order, and none that the driver saw done.

The crash is put between any two stores, to guest memory or to the notes.
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest

import pyvirtio
from pyvirtio.virtio.driver import Arena, Buffer, DriverRing, PackedDriverRing
from pyvirtio.virtio.packed import PackedRing
from pyvirtio.virtio.ring import QueueState
from pyvirtio.virtio.split import SplitRing
from pyvirtio.virtio.vhost_user.channel import VhostUserError
from pyvirtio.virtio.vhost_user.inflight import (
    InflightRing,
    SplitTracker,
    Tracker,
    region_size,
)
from pyvirtio.virtio.vhost_user.inflight_packed import PackedTracker

BASE = 0x1_0000
SIZE = 8


class PowerOff(BaseException):
    """The process was killed."""


class Fuse:
    """Counts stores, and blows at one of them."""

    def __init__(self) -> None:
        self.left = -1

    def store(self) -> None:
        if self.left == 0:
            raise PowerOff
        self.left -= 1


class Watched:
    """A memoryview each of whose stores goes through the fuse."""

    def __init__(self, view: memoryview, fuse: Fuse) -> None:
        self._view = view
        self._fuse = fuse

    def cast(self, kind: Any) -> Watched:
        return Watched(self._view.cast(kind), self._fuse)

    def __getitem__(self, index: int) -> int:
        return self._view[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._fuse.store()
        self._view[index] = value

    def release(self) -> None:
        self._view.release()


class Side:
    """A driver's ring, and a device's with notes, which can crash and come back."""

    def __init__(self, packed: bool, *, steps_before: int = 0) -> None:
        self.packed = packed
        self.ram = bytearray(1 << 16)
        self.fuse = Fuse()
        self.notes = bytearray(region_size(SIZE, packed))
        plain = pyvirtio.GuestMemory.from_buffer(self.ram, BASE)
        self.arena = Arena(BASE, len(self.ram))
        kind: Any = PackedDriverRing if packed else DriverRing
        self.driver = kind.allocate(plain, self.arena, SIZE)
        self._names: dict[int, int] = {}
        self._count = 0
        self.offered: list[int] = []
        self.seen: list[int] = []
        self.start(QueueState(SIZE, SIZE))
        for _ in range(steps_before):
            self.offer(1)
            (chain,) = self.take(1)
            self.finish([chain])
            self.look()
        self.offered.clear()
        self.seen.clear()

    def _write(self, pa: int, data: bytes) -> None:
        self.fuse.store()
        self.ram[pa - BASE : pa - BASE + len(data)] = data

    def _read(self, pa: int, length: int) -> bytes:
        return bytes(self.ram[pa - BASE : pa - BASE + length])

    def start(self, state: QueueState) -> None:
        memory = pyvirtio.GuestMemory.from_callbacks(self._read, self._write)
        state.descriptor_area = self.driver.descriptors
        state.driver_area = self.driver.available
        state.device_area = self.driver.used
        region: Any = Watched(memoryview(self.notes), self.fuse)
        self.tracker: Tracker
        self.tracker = (PackedTracker if self.packed else SplitTracker)(region, SIZE)
        look = lambda address: int.from_bytes(self._read(address, 2), "little")  # noqa: E731
        if not self.packed:
            state.used_index = look(state.device_area + 2)
        self.tracker.recover(state, look)
        ring = (PackedRing if self.packed else SplitRing)(state, memory, indirect=True)
        self.ring = InflightRing(ring, self.tracker)

    def offer(self, count: int) -> None:
        for number in range(count):
            address = BASE + 0x8000 + 16 * self._count  # tells requests apart
            self._count += 1
            buffers = [Buffer(address, 16), Buffer(BASE + 64, 32, True)][: 1 + number % 2]
            self._names[self.driver.add(buffers)] = address
            self.offered.append(address)
        self.driver.publish()

    def take(self, count: int) -> list[Any]:
        assert self.ring.ready() >= count
        return [self.ring.pop() for _ in range(count)]

    def finish(self, chains: list[Any]) -> None:
        for chain in chains:
            self.ring.push(chain, 1)
        self.ring.publish()

    def look(self) -> None:
        self.seen += [self._names.pop(head) for head, _ in self.driver.collect()]


def work(side: Side) -> None:
    """Batches, out of order, with takes between what is used and what is shown."""
    side.offer(4)
    first, second, third, fourth = side.take(4)
    side.finish([second])
    side.look()
    side.finish([fourth, first])
    side.look()
    side.offer(2)
    (fifth,) = side.take(1)
    side.ring.push(third, 1)
    (sixth,) = side.take(1)
    side.ring.push(sixth, 1)
    side.ring.publish()
    side.look()
    side.offer(1)
    side.finish([fifth])
    side.look()


@pytest.mark.parametrize("before", [0, 5, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_a_crash_at_any_store_neither_loses_nor_repeats_a_request(
    packed: bool, before: int
) -> None:
    for stores in range(10_000):
        side = Side(packed, steps_before=before)
        side.fuse.left = stores
        try:
            work(side)
        except PowerOff:
            side.fuse.left = -1
        else:
            assert stores > 40
            return
        side.look()
        side.start(QueueState(SIZE, SIZE))
        again = side.ring.unfinished()
        fresh = side.take(side.ring.ready())
        # In the order that they were taken in; what the driver has not been shown, once each.
        expected = [name for name in side.offered if name not in side.seen]
        assert [chain.readable[0][0] for chain in again + fresh] == expected, stores
        side.finish(again + fresh)
        side.look()
        assert sorted(side.seen) == side.offered, stores
        side.offer(3)  # and it goes on
        more = side.take(3)
        side.finish(more)
        assert len(side.driver.collect()) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_notes_are_kept_across_an_orderly_stop(packed: bool) -> None:
    side = Side(packed, steps_before=11)
    side.offer(2)
    side.start(QueueState(SIZE, SIZE))
    assert side.ring.unfinished() == []
    assert len(side.take(2)) == 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", range(8, 22, 2))
def test_notes_that_cannot_be_are_refused_or_harmless(packed: bool, place: int) -> None:
    side = Side(packed, steps_before=3)
    side.offer(3)
    side.take(3)
    side.notes[place : place + 2] = b"\xff\xff"
    with suppress(VhostUserError, pyvirtio.GuestError):
        side.start(QueueState(SIZE, SIZE))
        side.ring.unfinished()


@pytest.mark.parametrize("packed", [False, True])
def test_random_notes_are_refused_or_harmless(packed: bool) -> None:
    chance = random.Random(7)
    for _ in range(200):
        side = Side(packed, steps_before=3)
        side.offer(3)
        side.take(2)
        for _ in range(4):
            side.notes[chance.randrange(10, len(side.notes))] = chance.randrange(256)
        with suppress(VhostUserError, pyvirtio.GuestError):
            side.start(QueueState(SIZE, SIZE))
            chains = side.ring.unfinished()
            side.finish(chains + side.take(min(side.ring.ready(), 1)))
