"""The power fails while machine snapshots are taken, loaded and deleted: each that is listed loads.

The model of the disk is that of support.crash: after the last flush, sectors are lost, torn apart
from each other and reordered as they like.
"""

from __future__ import annotations

from typing import Any

import pyvirtio
from pyvirtio import MemoryDisk
from pyvirtio.machine.snapshots import MachineSnapshots
from support.crash import CrashImage, crash_images
from support.filters import RecordingDisk

RAM_SIZE = 20_000
DISK_SIZE = 64 << 10


class Board:
    """The toy machine on one disk."""

    def __init__(self, make_toy: Any, disk: Any) -> None:
        self.toy = make_toy(RAM_SIZE)
        self.disk = disk
        self.snapshots = MachineSnapshots(self.toy.machine, [self.disk])

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


def judge(make_toy: Any, image: CrashImage, lists: Any, wanted: dict[str, Any]) -> None:
    where = f"event {image.position}, {image.story}"
    board = Board(make_toy, pyvirtio.open_disk(holding(image.data), format="qcow2"))
    names = [snapshot.name for snapshot in board.snapshots.listvm()]
    assert names in lists, where
    for name in names:
        board.snapshots.loadvm(name)
        assert board.everything == wanted[name], f"{where}: {name}"
    board.disk.check("all")
    assert board.disk.check().clean, where
    for name in names:
        board.snapshots.loadvm(name)
        assert board.everything == wanted[name], f"{where}, mended: {name}"
    board.disk.close()


def test_every_snapshot_in_the_list_loads_after_a_cut(make_toy: Any) -> None:
    file = MemoryDisk(growable=True)
    board = Board(make_toy, pyvirtio.create_disk(file, DISK_SIZE, cluster_size=512))
    board.run(1)
    wanted = {"one": board.everything}
    board.snapshots.savevm("one")
    board.disk.flush()
    start = file.read(0, file.size)

    recorder = RecordingDisk(holding(start))
    board = Board(make_toy, pyvirtio.open_disk(recorder, format="qcow2"))
    board.snapshots.loadvm("one")
    board.run(2)
    wanted["two"] = board.everything
    snapshots = board.snapshots
    recorder.mark([["one"], ["one", "two"]])
    snapshots.savevm("two")
    recorder.mark([["one", "two"]])
    snapshots.loadvm("one")
    recorder.mark([["one", "two"], ["two"]])
    snapshots.delvm("one")
    recorder.mark([["two"]])

    lists: Any = [["one"]]
    judged = 0
    for _, thing in crash_images(recorder.log, start, seed=1, random_each=1):
        if isinstance(thing, CrashImage):
            judge(make_toy, thing, lists, wanted)
            judged += 1
        else:
            lists = thing.mark
    assert judged > 100
