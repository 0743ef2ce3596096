"""Whatever is thrown in savevm, loadvm and delvm: the old list of snapshots or the new, all whole.

Errors of the host come at every request to the file, others (KeyboardInterrupt, MemoryError)
wherever Python may throw them. The machine goes on with the same objects then, as far as they let
it; and what is in the file at that moment is a good image, but for leaks.
"""

from __future__ import annotations

import errno
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import pytest

import pyvirtio
from pyvirtio import BackendError, ImageError, MemoryDisk
from pyvirtio.machine.snapshots import MachineSnapshots
from support.filters import FaultyDisk
from support.workload import dangerous

SCALE = int(os.environ.get("PYVIRTIO_CRASH_SCALE", "1"))

RAM_SIZE = 20_000
DISK_SIZE = 64 << 10


class Board:
    """The toy machine, its disk, and an image for its RAM beside it."""

    def __init__(self, make_toy: Any, contents: list[bytes], how: dict[str, Any]) -> None:
        self.toy = make_toy(RAM_SIZE)
        self.files = [holding(data) for data in contents]
        self.faulty = [FaultyDisk(file, **how) for file in self.files]
        self.disks: list[Any] = [pyvirtio.open_disk(file, format="qcow2") for file in self.faulty]
        self.snapshots = MachineSnapshots(
            self.toy.machine, self.disks, state_disk=self.disks[-1], find_dirty="compare"
        )

    def run(self, seed: int) -> None:
        self.toy.run(seed)
        self.disks[0].write(seed % 12 * 5000, bytes([seed & 0xFF]) * 4000)

    @property
    def everything(self) -> tuple[Any, ...]:
        return self.toy.everything, self.disks[0].read(0, DISK_SIZE)

    @property
    def names(self) -> list[str]:
        return [snapshot.name for snapshot in self.snapshots.listvm()]

    @property
    def contents(self) -> list[bytes]:
        """What is in the files now, as after a power failure without a cache."""
        return [file.read(0, file.size) for file in self.files]


def holding(data: bytes) -> MemoryDisk:
    file = MemoryDisk(growable=True)
    file.write(0, data)
    return file


class Story:
    """A machine with the snapshots "one" and "two", and what it was in each."""

    def __init__(self, make_toy: Any) -> None:
        self.make_toy = make_toy
        empty = []
        for size in (DISK_SIZE, 512):
            file = MemoryDisk(growable=True)
            pyvirtio.create_disk(file, size, cluster_size=512).flush()
            empty.append(file.read(0, file.size))
        board = Board(make_toy, empty, {})
        self.wanted = {}
        for seed, name in enumerate(("one", "two"), 1):
            board.run(seed)
            self.wanted[name] = board.everything
            board.snapshots.savevm(name)
        for disk in board.disks:
            disk.flush()
        self.start = board.contents

    def board(self, **how: Any) -> Board:
        """A machine that has gone on from "two"."""
        board = Board(self.make_toy, self.start, how)
        board.snapshots.loadvm("two")
        board.run(3)
        for faulty in board.faulty:
            faulty.count = 0
        return board


OPERATIONS: dict[str, tuple[Callable[[Board], object], list[list[str]]]] = {
    "savevm": (
        lambda board: board.snapshots.savevm("three"),
        [["one", "two"], ["one", "two", "three"]],
    ),
    "loadvm": (lambda board: board.snapshots.loadvm("one"), [["one", "two"]]),
    "delvm": (lambda board: board.snapshots.delvm("one"), [["one", "two"], ["two"]]),
}


@pytest.fixture(scope="module")
def story(make_toy: Any) -> Story:
    return Story(make_toy)


def judge_files(story: Story, board: Board, lists: list[list[str]], when: str) -> None:
    """The images are good, but for leaks; every snapshot listed loads."""
    wanted = story.wanted
    after = Board(story.make_toy, board.contents, {})
    assert after.names in lists, when
    for disk in after.disks:
        found = disk.check()
        assert (dangerous(found), found.check_errors) == (0, 0), f"{when}: {found}"
    for mended in (False, True):
        for name in after.names:
            after.snapshots.loadvm(name)
            assert after.everything == wanted[name], f"{when}: {name} {mended}"
        for disk in after.disks:
            disk.check("all")
            assert disk.check().clean, when
    for disk in after.disks:
        disk.close()


def go_on(story: Story, board: Board, lists: list[list[str]], when: str, whole: bool) -> bool:
    """Save and load with the same objects; False if they refuse to write. ``whole``: the machine
    is not in pieces."""
    wanted = dict(story.wanted)
    assert board.names in lists, when
    if any(disk._metadata.health.reason for disk in board.disks):
        with pytest.raises(BackendError, match="until it is reopened"):
            board.snapshots.savevm("never")
        return False
    if not whole:
        board.snapshots.loadvm("two")
        assert board.everything == wanted["two"], when
    for seed in (0, 3, 5):
        name = f"later {seed}"
        if seed:
            board.run(seed)
        else:  # RAM as it was some saves ago: who still compares with that finds nothing changed
            board.toy.ram[:] = wanted["two"][0][5]
        wanted[name] = board.everything
        board.snapshots.savevm(name)
    for name in board.names:
        board.snapshots.loadvm(name)
        assert board.everything == wanted[name], f"{when}, going on: {name}"
    for name in list(board.names):
        board.snapshots.delvm(name)
    for disk in board.disks:
        found = disk.check()
        assert (dangerous(found), found.check_errors) == (0, 0), f"{when}, going on: {found}"
        disk.close()
    return True


HOSTS: dict[str, dict[str, Any]] = {
    "one read": {"kinds": frozenset({"read"})},
    "one write": {"kinds": frozenset({"write", "truncate"})},
    "one torn write": {"kinds": frozenset({"write"}), "torn": True},
    "one flush": {"kinds": frozenset({"flush"})},
    "no space": {"kinds": frozenset({"write", "truncate"}), "number": errno.ENOSPC},
    "Ctrl-C": {"interrupt": KeyboardInterrupt},
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("case", HOSTS)
def test_a_failure_of_the_host_at_every_point(
    story: Story, case: str, operation: str, persistent: bool
) -> None:
    work, lists = OPERATIONS[operation]
    board = story.board(**HOSTS[case])
    work(board)
    points = [(n, at) for n, faulty in enumerate(board.faulty) for at in range(faulty.count)]
    chance = random.Random(case + operation)
    for number, at in chance.sample(points, min(len(points), 12 * SCALE)):
        when = f"{operation}, {case} {at} of disk {number}, {persistent}"
        board = story.board(**HOSTS[case])
        if operation == "savevm":
            story.wanted["three"] = board.everything
        board.faulty[number].fail_at, board.faulty[number].persistent = at, persistent
        try:
            work(board)
        except (BackendError, ImageError, KeyboardInterrupt):
            assert board.faulty[number].failed, when
        board.faulty[number].fail_at = None
        judge_files(story, board, lists, when)
        go_on(story, board, lists, when, operation != "loadvm")


class Thrown(KeyboardInterrupt):
    """What Python may throw anywhere."""


def throwing(work: Callable[[], object], at: int | None, error: type[BaseException]) -> int:
    """Do ``work``, with an error thrown where Python does it: as one of the library's functions
    begins, or when it is done. ``at`` is the number of that moment; returns how many there were."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "call":
            if not frame.f_globals.get("__name__", "").startswith("pyvirtio."):
                return None
            frame.f_trace_lines = False
        if event != "exception":
            count += 1
            if count - 1 == at:
                raise error("thrown by the test")
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("error", [Thrown, MemoryError])
def test_an_error_thrown_anywhere(story: Story, operation: str, error: type[BaseException]) -> None:
    work, lists = OPERATIONS[operation]
    board = story.board()
    steps = throwing(partial(work, board), None, error)
    chance = random.Random(operation + error.__name__)
    going_on = 0
    times = 30 * SCALE
    for at in chance.sample(range(steps), times):
        when = f"{operation}, {error.__name__} at {at}"
        board = story.board()
        if operation == "savevm":
            story.wanted["three"] = board.everything
        with suppress(error, BackendError):
            throwing(partial(work, board), at, error)
        judge_files(story, board, lists, when)
        going_on += go_on(story, board, lists, when, operation != "loadvm")
    assert going_on > times // 2
