"""The power fails while machine snapshots are taken, loaded and deleted: each that is listed loads.

The model of the disk is that of support.crash: after the last flush, sectors are lost, torn apart
from each other and reordered as they like.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

import pyvirtio
from pyvirtio import MemoryDisk
from pyvirtio.machine.snapshots import MachineSnapshots
from support.crash import CrashImage, crash_images, power_cuts
from support.filters import Event, RecordingDisk
from support.workload import dangerous

SCALE = int(os.environ.get("PYVIRTIO_CRASH_SCALE", "1"))

RAM_SIZE = 20_000
DISK_SIZE = 64 << 10


class Board:
    """The toy machine on one disk, or with an image for its RAM beside it."""

    def __init__(self, make_toy: Any, *disks: Any, compress: bool = False) -> None:
        self.toy = make_toy(RAM_SIZE)
        self.disk, *_ = self.disks = disks
        self.snapshots = MachineSnapshots(
            self.toy.machine, self.disks, state_disk=disks[-1], compress=compress
        )

    def run(self, seed: int) -> None:
        self.toy.run(seed)
        self.disk.write(seed * 5000, bytes([seed]) * 9000)

    @property
    def everything(self) -> tuple[Any, ...]:
        return self.toy.everything, self.disk.read(0, DISK_SIZE)


def holding(data: bytes) -> MemoryDisk:
    file = MemoryDisk(growable=True)
    file.write(0, data)
    return file


def judge(board: Board, where: str, lists: Any, wanted: dict[str, Any]) -> None:
    names = [snapshot.name for snapshot in board.snapshots.listvm()]
    assert names in lists, where
    for disk in board.disks:
        assert not dangerous(disk.check()), where
    for name in names:
        board.snapshots.loadvm(name)
        assert board.everything == wanted[name], f"{where}: {name}"
    for disk in board.disks:
        disk.check("all")
        assert disk.check().clean, where
    for name in names:
        board.snapshots.loadvm(name)
        assert board.everything == wanted[name], f"{where}, mended: {name}"
    for disk in board.disks:
        disk.close()


def work(board: Board, wanted: dict[str, Any], mark: Any) -> None:
    """Save, go back, delete; ``mark`` is told which lists there may be from now on."""
    snapshots = board.snapshots
    snapshots.loadvm("one")
    board.run(2)
    wanted["two"] = board.everything
    mark([["one"], ["one", "two"]])
    snapshots.savevm("two")
    mark([["one", "two"]])
    snapshots.loadvm("one")
    board.toy.ram[5000:5100] = bytes(100)
    wanted["three"] = board.everything
    mark([["one", "two"], ["one", "two", "three"]])
    snapshots.savevm("three")
    mark([["one", "two", "three"]])
    snapshots.loadvm("two")
    mark([["one", "two", "three"], ["two", "three"]])
    snapshots.delvm("one")
    mark([["two", "three"]])


@pytest.mark.parametrize(
    ("options", "every"),
    [({}, 3), ({"compression_type": "zstd"}, 8), ({"lazy_refcounts": True}, 6)],
    ids=["plain", "compressed", "lazy"],
)
def test_every_snapshot_in_the_list_loads_after_a_cut(
    make_toy: Any, options: dict[str, Any], every: int
) -> None:
    """``every``: so many images are passed over for one that is looked at, in a short run."""
    compress = "compression_type" in options
    file = MemoryDisk(growable=True)
    disk = pyvirtio.create_disk(file, DISK_SIZE, cluster_size=512, **options)
    board = Board(make_toy, disk, compress=compress)
    board.run(1)
    wanted = {"one": board.everything}
    board.snapshots.savevm("one")
    disk.flush()
    start = file.read(0, file.size)

    recorder = RecordingDisk(holding(start))
    board = Board(make_toy, pyvirtio.open_disk(recorder, format="qcow2"), compress=compress)
    work(board, wanted, recorder.mark)

    lists: Any = [["one"]]
    judged = 0
    every = 1 if SCALE > 1 else every
    for number, (_, thing) in enumerate(
        crash_images(recorder.log, start, seed=1, random_each=SCALE)
    ):
        if isinstance(thing, CrashImage):
            if number % every:
                continue
            disk = pyvirtio.open_disk(holding(thing.data), format="qcow2")
            where = f"event {thing.position}, {thing.story}"
            judge(Board(make_toy, disk), where, lists, wanted)
            judged += 1
        else:
            lists = thing.mark
    assert judged > 20


def test_a_cut_between_two_images_leaves_whole_machine_snapshots(make_toy: Any) -> None:
    files = [MemoryDisk(growable=True), MemoryDisk(growable=True)]
    disks = [
        pyvirtio.create_disk(file, size, cluster_size=512)
        for file, size in zip(files, (DISK_SIZE, 512), strict=True)
    ]
    board = Board(make_toy, *disks)
    board.run(1)
    wanted = {"one": board.everything}
    board.snapshots.savevm("one")
    starts = []
    for disk, file in zip(disks, files, strict=True):
        disk.flush()
        starts.append(file.read(0, file.size))

    recorders = [RecordingDisk(holding(start)) for start in starts]
    joint: list[tuple[int, Any]] = []
    for number, recorder in enumerate(recorders):
        recorder.log = Tap(number, joint)
    opened = [pyvirtio.open_disk(recorder, format="qcow2") for recorder in recorders]
    work(Board(make_toy, *opened), wanted, lambda lists: joint.append((-1, lists)))

    chance = random.Random(1)
    for position in sorted(chance.sample(range(len(joint)), min(len(joint), 25 * SCALE))):
        lists = next((x for n, x in reversed(joint[:position]) if n < 0), [["one"]])
        disks = []
        for number, start in enumerate(starts):
            log = [event for n, event in joint[:position] if n == number]
            # Now and then nothing since the flush: the one in four of power_cuts.
            cuts = list(power_cuts(log, start, [len(log)] * 4, seed=chance.randrange(1 << 30)))
            image = chance.choice(cuts)
            disks.append(pyvirtio.open_disk(holding(image.data), format="qcow2"))
        judge(Board(make_toy, *disks), f"joint event {position}", lists, wanted)


class Tap(list[Event]):
    """A log that is also part of one for several disks."""

    def __init__(self, number: int, joint: list[tuple[int, Any]]) -> None:
        super().__init__()
        self._number, self._joint = number, joint

    def append(self, event: Event) -> None:
        super().append(event)
        self._joint.append((self._number, event))
