"""What can be on a disk after the power failed: every image that a log of writes allows.

The model is a volatile cache in front of the disk that keeps whole sectors. A flush makes
everything before it durable. Of what came after the last flush, each 512-byte sector holds, freely
chosen, what it held at the flush or after any one of the later writes to it: writes are lost,
reordered and torn, but a sector is never half one thing. The length of the file is a thing of its
own that may be any that it has had since the flush.

The guest sees the same of its own disk (:class:`GuestHistory`): what it flushed is there, and
what it did not flush is, per sector, one of the states it has had since.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from .filters import Event

SECTOR = 512


@dataclass
class _Epoch:
    """Everything since the last flush."""

    durable: bytearray
    """The disk at the flush, as long as it has ever been."""
    durable_size: int
    versions: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    """By sector: (number of the event, the sector's contents after it)."""
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def current(self, sector: int) -> bytes:
        history = self.versions.get(sector)
        if history:
            return history[-1][1]
        start = sector * SECTOR
        return bytes(self.durable[start : start + SECTOR]).ljust(SECTOR, b"\0")

    def put(self, number: int, offset: int, data: bytes) -> None:
        """Write ``data``: a new version of each sector it touches."""
        at = 0
        while at < len(data):
            sector, start = divmod(offset + at, SECTOR)
            part = data[at : at + SECTOR - start]
            if len(part) < SECTOR:
                old = self.current(sector)
                new = old[:start] + part + old[start + len(part) :]
            else:
                new = part
            self.versions.setdefault(sector, []).append((number, new))
            at += len(part)

    def build(self, chosen: dict[int, bytes], size: int) -> bytes:
        """An image: the durable one, with these sectors in place of its own."""
        longest = max([len(self.durable), size, *((s + 1) * SECTOR for s in chosen)])
        image = bytearray(self.durable)
        image.extend(bytes(longest - len(image)))
        for sector, data in chosen.items():
            image[sector * SECTOR : (sector + 1) * SECTOR] = data
        return bytes(image[:size])

    def settle(self) -> None:
        """A flush: the newest of everything is durable now."""
        newest = {sector: history[-1][1] for sector, history in self.versions.items()}
        size = self.size
        self.durable = bytearray(self.build(newest, size))
        self.durable_size = size
        self.versions.clear()
        self.sizes.clear()

    @property
    def size(self) -> int:
        return self.sizes[-1][1] if self.sizes else self.durable_size


@dataclass(frozen=True)
class CrashImage:
    """One state that the disk may be in after a crash."""

    position: int
    """How many events of the log had happened."""
    story: str
    """How the image came about, for a message."""
    data: bytes


def crash_images(
    log: list[Event], start: bytes, *, seed: int, random_each: int, systematic: bool = True
) -> Iterator[tuple[int, CrashImage | Event]]:
    """Walk through ``log`` from the disk ``start``: yields (position, mark event or CrashImage).

    Before each flush and at the end of the log, the systematic ones: everything since the last
    flush lost; each event alone; all but each one. After each event: everything so far (a killed
    process), ``random_each`` random ones. The marks come in their places between.
    """
    chance = random.Random(seed)
    epoch = _Epoch(bytearray(start), len(start))
    for position, event in enumerate(log):
        if event.kind == "mark":
            yield position, event
            continue
        if event.kind == "flush":
            if systematic:
                for image in _systematic(epoch, position):
                    yield position, image
            epoch.settle()
            continue
        _apply(epoch, position, event)
        newest = {sector: history[-1][1] for sector, history in epoch.versions.items()}
        yield position, CrashImage(position, "all so far", epoch.build(newest, epoch.size))
        for _ in range(random_each):
            yield position, _random(epoch, position, chance)
    if systematic:
        for image in _systematic(epoch, len(log)):
            yield len(log), image


def power_cuts(
    log: list[Event], start: bytes, positions: list[int], *, seed: int
) -> Iterator[CrashImage]:
    """One random image for each of the ``positions`` in ``log``, which are in ascending order.

    The power fails after so many events. Every fourth time nothing since the last flush is there.
    """
    chance = random.Random(seed)
    epoch = _Epoch(bytearray(start), len(start))
    done = 0
    for index, position in enumerate(positions):
        for event in log[done:position]:
            if event.kind == "flush":
                epoch.settle()
            elif event.kind != "mark":
                _apply(epoch, done, event)
            done += 1
        if index % 4 == 3:
            lost = epoch.build({}, epoch.durable_size)
            yield CrashImage(position, "nothing since the flush", lost)
        else:
            yield _random(epoch, position, chance)


def _apply(epoch: _Epoch, number: int, event: Event) -> None:
    end = event.offset + event.length
    if event.kind == "write":
        epoch.put(number, event.offset, event.data)
    elif event.kind == "truncate":
        if event.length < epoch.size:
            epoch.put(number, event.length, bytes(epoch.size - event.length))
        end = event.length
        epoch.sizes.append((number, end))
    else:  # zeroes, or a hole: what is in a hole afterwards is zeroes
        epoch.put(number, event.offset, bytes(event.length))
    if end > epoch.size:
        epoch.sizes.append((number, end))


def _systematic(epoch: _Epoch, position: int) -> Iterator[CrashImage]:
    size = epoch.size
    yield CrashImage(position, "nothing since the flush", epoch.build({}, epoch.durable_size))
    newest = {sector: history[-1][1] for sector, history in epoch.versions.items()}
    numbers = sorted({n for history in epoch.versions.values() for n, _ in history})
    for number in numbers:
        alone = {}
        others = dict(newest)
        for sector, history in epoch.versions.items():
            for index, (n, data) in enumerate(history):
                if n == number:
                    alone[sector] = data
                    if index:
                        others[sector] = history[index - 1][1]
                    else:
                        del others[sector]
        yield CrashImage(position, f"only event {number}", epoch.build(alone, size))
        yield CrashImage(position, f"all but event {number}", epoch.build(others, size))


def _random(epoch: _Epoch, position: int, chance: random.Random) -> CrashImage:
    likely = chance.choice((0.1, 0.5, 0.9))
    chosen = {}
    for sector, history in epoch.versions.items():
        if chance.random() < likely:
            chosen[sector] = chance.choice(history)[1]
    sizes = [epoch.durable_size, *(size for _, size in epoch.sizes)]
    size = chance.choice(sizes) if chance.random() < 0.2 else epoch.size
    return CrashImage(position, f"random, {likely:.0%} kept", epoch.build(chosen, size))


class GuestHistory:
    """What each sector of the guest's disk may hold after a crash."""

    def __init__(self, contents: bytes) -> None:
        self.now = bytearray(contents)
        self.versions: dict[int, set[bytes]] = {}
        self.sizes = {len(contents)}

    def change(self, contents: bytes) -> None:
        """A request that leads to ``contents`` (of the whole disk) has begun."""
        old, new = self.now, bytearray(contents)
        longest = max(len(old), len(new))
        old_padded = bytes(old.ljust(longest, b"\0"))
        new_padded = bytes(new.ljust(longest, b"\0"))
        if old_padded != new_padded:
            for start in range(0, longest, SECTOR):
                before = old_padded[start : start + SECTOR]
                after = new_padded[start : start + SECTOR]
                if before != after:
                    self.versions.setdefault(start // SECTOR, {before}).add(after)
        self.now = new
        self.sizes.add(len(new))

    def flushed(self) -> None:
        """A flush is done: only what is there now is allowed."""
        self.versions.clear()
        self.sizes = {len(self.now)}

    def problem(self, found: bytes) -> str | None:
        """What is wrong with ``found`` as the disk after a crash; None if nothing is."""
        if len(found) not in self.sizes:
            return f"the disk has {len(found)} bytes, not one of {sorted(self.sizes)}"
        common = min(len(found), len(self.now))
        if found[:common] == self.now[:common] and not self.versions:
            return None
        for start in range(0, common, SECTOR):
            have = found[start : start + SECTOR]
            if have == self.now[start : start + len(have)]:
                continue
            allowed = self.versions.get(start // SECTOR, set())
            if have not in allowed:
                wanted = " or ".join(
                    sorted(v[:4].hex() for v in allowed | {bytes(self.now[start : start + SECTOR])})
                )
                return f"guest sector at {start:#x} holds {have[:4].hex()}…, not {wanted}"
        return None
