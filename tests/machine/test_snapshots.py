"""Snapshots of a machine with its disks, and QEMU's view of them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import BackendError, ImageError, MemoryDisk, UnsupportedError
from pyvirtio.machine.snapshots import MachineSnapshots
from support.filters import CappedDisk
from support.peers import requires
from support.qemu import QemuIo, qemu_check, qemu_img, qemu_img_json

SIZE = 1 << 20


class Board:
    """The toy machine with two disks."""

    def __init__(self, toy: Any, disks: list[Any]) -> None:
        self.toy = toy
        self.disks = disks
        self.snapshots = MachineSnapshots(toy.machine, disks)

    def run(self, seed: int) -> None:
        self.toy.run(seed)
        for number, disk in enumerate(self.disks):
            disk.write(seed * 1000, bytes([seed, number]) * 3000)

    @property
    def everything(self) -> tuple[Any, ...]:
        return (self.toy.everything, *(disk.read(0, disk.size) for disk in self.disks))

    @property
    def names(self) -> list[list[str]]:
        return [[snapshot.name for snapshot in disk.snapshots] for disk in self.disks]


@pytest.fixture
def board(make_toy: Any) -> Iterator[Board]:
    disks = [
        pyvirtio.create_disk(MemoryDisk(growable=True), size, cluster_size=4096)
        for size in (SIZE, 2 * SIZE)
    ]
    board = Board(make_toy(), disks)
    yield board
    for disk in disks:
        if not disk.closed:
            assert disk.check().clean
            disk.close()


# -- round trips -----------------------------------------------------------------------------------


def test_the_machine_and_its_disks_go_back_together(board: Board) -> None:
    states = {}
    for seed in (1, 2, 3):
        board.run(seed)
        board.snapshots.savevm(f"at {seed}")
        states[seed] = board.everything
    board.run(4)
    for seed in (1, 3, 2, 2):
        board.snapshots.loadvm(f"at {seed}")
        assert board.everything == states[seed]
    board.run(5)
    board.snapshots.savevm("later")
    board.snapshots.loadvm("1")  # an id
    assert board.everything == states[1]


def test_saving_changes_nothing(board: Board) -> None:
    board.run(1)
    before = board.everything
    board.snapshots.savevm("one")
    assert board.everything == before


def test_only_snapshots_hold_ram(board: Board) -> None:
    board.run(1)
    board.snapshots.savevm("one")
    assert board.disks[0].vmstate.size == 0
    board.snapshots.loadvm("one")
    assert board.disks[0].vmstate.size == 0


def test_a_disk_gets_its_size_back(board: Board) -> None:
    board.snapshots.savevm("small")
    board.disks[1].truncate(4 * SIZE)
    board.snapshots.loadvm("small")
    assert board.disks[1].size == 2 * SIZE


def test_the_state_goes_on_the_disk_that_is_named(make_toy: Any) -> None:
    disks: list[Any] = [pyvirtio.create_disk(MemoryDisk(growable=True), SIZE) for _ in range(2)]
    snapshots = MachineSnapshots(make_toy().machine, disks, state_disk=disks[1])
    snapshots.savevm("one")
    assert [disk.snapshots.find("one").vm_state_size > 0 for disk in disks] == [False, True]


def test_another_process_can_load(make_toy: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with pyvirtio.create_disk(path, SIZE) as disk:
        board = Board(make_toy(), [disk])
        board.run(1)
        board.snapshots.savevm("one", vm_clock=5, icount=6, date=7)
        saved = board.everything
    with pyvirtio.open_disk(path) as disk:
        board = Board(make_toy(), [disk])
        found = board.snapshots.loadvm("one")
        assert board.everything == saved
        assert (found.vm_clock_nsec, found.icount, found.date_sec) == (5, 6, 7)


# -- QEMU ------------------------------------------------------------------------------------------


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"compat": "0.10"}])
def test_qemu_lists_checks_and_applies_it(
    make_toy: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    disks = [pyvirtio.create_disk(path, SIZE, **options) for path in paths]
    board = Board(make_toy(), disks)
    board.run(1)
    clock = ((1 * 60 + 2) * 60 + 3) * 10**9 + 4 * 10**6
    saved = board.snapshots.savevm("the one", vm_clock=clock, icount=123456, date=10**9)
    with disks[0].snapshots.open(saved) as view:
        stream = view.vmstate.read(0, saved.vm_state_size)
    wanted = board.everything
    board.run(2)
    board.snapshots.savevm("the two")
    for disk in disks:
        disk.close()
    for path, size in zip(paths, (saved.vm_state_size, 0), strict=True):
        qemu_check(path)
        first = qemu_img_json("info", path)["snapshots"][0]
        assert (first["name"], first["vm-state-size"], first["icount"]) == ("the one", size, 123456)
        assert (first["date-sec"], first["vm-clock-sec"]) == (10**9, clock // 10**9)
        line = qemu_img("snapshot", "-l", path).stdout.splitlines()[2]
        assert "01:02:03.004" in line
        assert line.split()[-1] == "123456"
        qemu_img("snapshot", "-a", "the one", path)
        qemu_check(path)
    # The header as QEMU sees it, and a byte in the middle of RAM.
    with QemuIo(paths[0]) as io:
        shown = io.command("read -b -v 0 512").replace(" ", "")
        assert stream[:16].hex() in shown
        middle = len(stream) // 2 // 512 * 512
        shown = io.command(f"read -b -v {middle} 512").replace(" ", "")
        assert stream[middle : middle + 16].hex() in shown
    qemu_img("snapshot", "-d", "the two", paths[0])
    disks = [pyvirtio.open_disk(path) for path in paths]
    again = Board(make_toy(), disks)
    assert [snapshot.name for snapshot in again.snapshots.listvm()] == ["the one"]
    again.snapshots.loadvm("the one")
    assert again.everything == wanted
    for disk in disks:
        disk.close()
    for path in paths:
        qemu_check(path)


# -- listing and deleting --------------------------------------------------------------------------


def test_only_what_can_be_loaded_is_listed(board: Board) -> None:
    board.snapshots.savevm("whole")
    board.snapshots.savevm("torn")
    board.disks[1].snapshots.delete("torn")
    for disk in board.disks:
        disk.snapshots.create("disks only")
    assert [snapshot.name for snapshot in board.snapshots.listvm()] == ["whole"]


def test_a_deleted_snapshot_is_gone_from_all_disks(board: Board) -> None:
    board.snapshots.savevm("one")
    board.snapshots.savevm("two")
    board.snapshots.delvm("one")
    assert board.names == [["two"], ["two"]]
    board.snapshots.delvm("2")
    assert board.names == [[], []]


def test_what_a_cut_left_can_be_deleted(board: Board) -> None:
    board.disks[1].snapshots.create("left")
    board.snapshots.delvm("left")
    assert board.names == [[], []]
    with pytest.raises(KeyError):
        board.snapshots.delvm("left")


def test_deleting_goes_on_after_a_disk_that_fails(board: Board) -> None:
    found = board.snapshots.savevm("one")
    with board.disks[0].snapshots.open(found):
        with pytest.raises(BackendError) as caught:
            board.snapshots.delvm("one")
        assert caught.value.errno == errno.EBUSY
    assert board.names == [["one"], []]


# -- refusals --------------------------------------------------------------------------------------


def test_a_name_is_taken_once(board: Board) -> None:
    board.disks[1].snapshots.create("one")
    with pytest.raises(ValueError, match="already exists"):
        board.snapshots.savevm("one")
    assert board.names == [[], ["one"]]


def test_a_snapshot_of_disks_alone_is_not_loaded(board: Board) -> None:
    for disk in board.disks:
        disk.snapshots.create("disks")
    with pytest.raises(UnsupportedError, match="disk-only"):
        board.snapshots.loadvm("disks")


def test_a_snapshot_that_a_disk_lacks_changes_nothing(board: Board) -> None:
    board.snapshots.savevm("one")
    board.disks[1].snapshots.delete("one")
    board.run(1)
    before = board.everything
    for name in ("one", "none"):
        with pytest.raises(KeyError):
            board.snapshots.loadvm(name)
    assert board.everything == before


def test_disks_without_snapshots_are_refused(make_toy: Any) -> None:
    with pytest.raises(UnsupportedError, match="does not support snapshots"):
        MachineSnapshots(make_toy().machine, [MemoryDisk(SIZE)])  # type: ignore[list-item]


def test_a_read_only_disk_is_refused(make_toy: Any, tmp_path: Path) -> None:
    pyvirtio.create_disk(tmp_path / "disk", SIZE).close()
    with pyvirtio.open_disk(tmp_path / "disk", read_only=True) as disk:
        snapshots = MachineSnapshots(make_toy().machine, [disk])  # type: ignore[list-item]
        with pytest.raises(BackendError) as caught:
            snapshots.savevm("one")
        assert caught.value.errno == errno.EPERM


def damage_state(board: Board, name: str) -> None:
    """Flip a byte in the middle of the state that a snapshot has."""
    disk = board.disks[0]
    found = disk.snapshots.find(name)
    size = found.vm_state_size
    with disk.snapshots.open(found) as view:
        data = bytearray(view.vmstate.read(0, size))
    data[size // 2] ^= 1
    disk.snapshots.delete(name)
    disk.vmstate.write(0, data)
    disk.snapshots.create(name, vm_state_size=size)


def test_a_damaged_state_changes_neither_machine_nor_disks(board: Board) -> None:
    board.run(1)
    board.snapshots.savevm("one")
    damage_state(board, "one")
    board.run(2)
    before = board.everything
    with pytest.raises(ImageError, match="checksum"):
        board.snapshots.loadvm("one")
    assert board.everything == before


# -- failures --------------------------------------------------------------------------------------


def fail(*_: object, **__: object) -> None:
    raise BackendError(errno.ENOSPC, "the test's disk is full")


@pytest.mark.parametrize("number", [0, 1])
def test_a_disk_that_fails_to_save_undoes_the_others(
    board: Board, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.run(1)
    board.snapshots.savevm("before")
    saved = board.everything
    board.run(2)
    now = board.everything
    with monkeypatch.context() as patch:
        patch.setattr(board.disks[number].snapshots, "create", fail)
        with pytest.raises(BackendError):
            board.snapshots.savevm("one")
    assert board.names == [["before"], ["before"]]
    assert board.disks[0].vmstate.size == 0
    assert board.everything == now
    board.snapshots.loadvm("before")
    assert board.everything == saved


@pytest.mark.parametrize("room", [0, 1 << 20, 2 << 20])
def test_a_disk_that_runs_full_keeps_what_it_has(make_toy: Any, room: int) -> None:
    below = CappedDisk(MemoryDisk(growable=True), 1 << 40)
    with pyvirtio.create_disk(below, SIZE, cluster_size=4096) as disk:
        board = Board(make_toy(), [disk])
        board.run(1)
        board.snapshots.savevm("before")
        saved = board.everything
        board.run(2)
        board.toy.ram[:] = b"full" * (len(board.toy.ram) // 4)
        now = board.everything
        below.cap = below.size + room
        with pytest.raises(BackendError):
            board.snapshots.savevm("one")
        assert board.everything == now
        assert board.names == [["before"]]
        assert disk.check().clean
        below.cap = 1 << 40
        board.snapshots.savevm("one")
        board.snapshots.loadvm("before")
        assert board.everything == saved
        board.snapshots.loadvm("one")
        assert board.everything == now


def test_an_interrupted_save_leaves_nothing(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(board.disks[0].snapshots, "create", interrupt)
    with pytest.raises(KeyboardInterrupt):
        board.snapshots.savevm("one")
    assert board.names == [[], []]
    assert board.disks[0].vmstate.size == 0


def test_a_component_that_fails_to_save_leaves_nothing(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board.toy.cpu, "pc", -1)
    with pytest.raises(OverflowError):
        board.snapshots.savevm("one")
    assert board.names == [[], []]
    assert board.disks[0].vmstate.size == 0


@pytest.mark.parametrize("number", [0, 1])
def test_a_disk_that_fails_to_go_back_leaves_all_as_they_were(
    board: Board, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.run(1)
    board.snapshots.savevm("one")
    saved = board.everything
    board.run(2)
    now = board.everything
    with monkeypatch.context() as patch:
        snapshots = board.disks[number].snapshots
        patch.setattr(snapshots, "apply", fail_once(snapshots.apply))
        with pytest.raises(BackendError) as caught:
            board.snapshots.loadvm("one")
        assert not hasattr(caught.value, "__notes__")
    assert board.everything == now
    assert board.names == [["one"], ["one"]]
    board.snapshots.loadvm("one")
    assert board.everything == saved


def fail_once(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return fail() if len(calls) == 1 else function(*args, **options)

    return call


def test_a_way_back_that_a_cut_left_is_replaced(board: Board) -> None:
    board.run(1)
    board.snapshots.savevm("one")
    saved = board.everything
    board.disks[1].snapshots.create("pyvirtio: before loadvm")
    board.run(2)
    board.snapshots.loadvm("one")
    assert board.everything == saved
    assert board.names == [["one"], ["one"]]


def test_what_cannot_be_undone_is_told_with_the_error(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(board.disks[0].snapshots, "create", fail)
        patch.setattr(board.disks[1].snapshots, "delete", fail)
        with pytest.raises(BackendError) as caught:
            board.snapshots.savevm("one")
    assert "could not be undone" in caught.value.__notes__[0]
    assert board.snapshots.listvm() == []
