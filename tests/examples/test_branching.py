"""Another way on from a recorded board's past, with its disks; and disks that change their size."""

from __future__ import annotations

import hashlib

import pytest

import pyvirtio
from pyvirtio.backend.state import StateWriter
from pyvirtio.errors import BackendError

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.branching import Branches
from examples.emulator.layout import RAM_BASE
from examples.emulator.recording import Position, RecordedBoard
from examples.emulator.saving import SavedHart, machine_of
from support.peers import find_program
from support.qemu import qemu_check
from support.riscv import assemble

MIB = 1 << 20
SEEN = RAM_BASE + 0x10_0000
CAPACITY = f"""
    li s1, 0x10001000
    li s2, {SEEN:#x}
again: lw t0, 0x100(s1)
    sd t0, 0(s2)
    j again
"""


def fingerprint(board):
    stream = StateWriter()
    SavedHart(board.cpu).save_state(stream)
    return hashlib.sha256(board.ram).digest(), bytes(stream), board.clock.now()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    with pyvirtio.create_disk(path, MIB) as disk:
        yield disk
    if find_program("qemu-img"):
        qemu_check(path)


def test_run_takes_another_way_with_its_disk(image, u_boot):
    guest = u_boot(image)
    board, branches = guest.board, Branches(guest.board, [image])
    guest.write("a", 1)
    branches.savevm("start")
    guest.write("b", 2)
    middle = board.position
    guest.write("c", 1)
    guest.write("d", 2)
    guest.write("e", 3)
    board.goto(middle)
    then = fingerprint(board)
    assert image.read(512, 1) == b"c", "looking changes nothing"

    branches.branch()
    assert not board.in_past
    assert board.position == middle
    assert fingerprint(board) == then
    assert [image.read(512 * sector, 1) for sector in (1, 2, 3)] == [b"a", b"b", b"\0"]
    assert [guest.read(sector) for sector in (1, 2)] == ["a", "b"]
    guest.write("f", 3)
    branches.savevm("another way")
    assert image.read(3 * 512, 1) == b"f"
    end = fingerprint(board), board.position
    board.goto(Position(1))
    board.goto(end[1])
    assert fingerprint(board) == end[0]


def test_only_a_past_with_a_snapshot_of_the_disks_can_be_gone_on_from(image, u_boot):
    guest = u_boot(image)
    board, branches = guest.board, Branches(guest.board, [image])
    early = board.position
    guest.write("a", 1)
    branches.savevm("late")
    guest.write("b", 1)
    end = board.position
    board.goto(early)
    with pytest.raises(ValueError, match="no machine snapshot"):
        branches.branch()
    board.goto(Position(end.slice - 1, 3))
    with pytest.raises(ValueError, match="between two slices"):
        branches.branch()
    assert image.read(512, 1) == b"b"


def test_no_machine_snapshot_is_taken_in_the_past(image, u_boot):
    guest = u_boot(image)
    branches = Branches(guest.board, [image])
    guest.board.goto(Position(3))
    with pytest.raises(ValueError, match="past"):
        branches.savevm("wrong")
    with pytest.raises(ValueError, match="past"):
        branches.snapshots.savevm("wrong")
    assert not list(image.snapshots)


def test_machine_snapshot_that_is_loaded_starts_a_new_run(image, u_boot):
    guest = u_boot(image)
    board, branches = guest.board, Branches(guest.board, [image])
    guest.write("a", 1)
    branches.savevm("kept")
    guest.write("b", 1)
    branches.snapshots.loadvm("kept")
    assert board.position == Position(0)
    assert len(board.log) == 0
    assert guest.read(1) == "a"
    end = fingerprint(board), board.position
    board.goto(Position(0))
    board.goto(end[1])
    assert fingerprint(board) == end[0]
    board.goto(Position(2))
    with pytest.raises(ValueError, match="no machine snapshot"):
        branches.branch()


def test_disk_that_fails_to_do_it_again_is_an_error(image, u_boot, monkeypatch):
    guest = u_boot(image)
    board, branches = guest.board, Branches(guest.board, [image])
    branches.savevm("start")
    guest.write("a", 1)
    middle = board.position
    guest.write("b", 1)
    board.goto(middle)
    with monkeypatch.context() as patch:
        patch.setattr(image, "writev", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(BackendError, match="again"):
            branches.branch()
    assert board.in_past
    branches.branch()
    assert guest.read(1) == "a"


def test_every_disk_that_is_written_must_go_back(image):
    board = RecordedBoard(lambda _: None, ram=4 * MIB, disks=[image, pyvirtio.MemoryDisk(MIB)])
    with pytest.raises(ValueError, match="would not go back"):
        Branches(board, [image])


def capacity(board):
    at = SEEN - RAM_BASE
    return int.from_bytes(board.ram[at : at + 8], "little") * 512


def recorded_capacity(disk, **options):
    board = RecordedBoard(
        lambda _: None, ram=4 * MIB, disks=[disk], every=4, slice_length=600, **options
    )
    code = assemble(CAPACITY)
    board.ram[: len(code)] = code
    board.start(RAM_BASE)
    for _ in range(6):
        board.step()
    return board


def test_size_of_a_disk_is_recorded():
    disk = pyvirtio.MemoryDisk(MIB)
    board = recorded_capacity(disk)
    disk.truncate(3 * MIB)
    for _ in range(6):
        board.step()
    end = fingerprint(board), board.position
    assert capacity(board) == 3 * MIB
    for slice_, size in ((5, MIB), (10, 3 * MIB), (3, MIB), (7, 3 * MIB)):
        board.goto(Position(slice_))
        assert capacity(board) == size
    board.goto(end[1])
    assert fingerprint(board) == end[0]


def test_disk_that_is_resized_during_the_past_is_so_in_the_present():
    disk = pyvirtio.MemoryDisk(MIB)
    board = recorded_capacity(disk)
    board.goto(Position(2))
    disk.truncate(2 * MIB)
    board.step()
    assert capacity(board) == MIB
    board.goto(Position(board.present))
    assert capacity(board) == MIB
    board.step()
    assert capacity(board) == 2 * MIB


def test_disk_is_as_long_as_it_was_where_the_run_goes_on(tmp_path):
    with pyvirtio.create_disk(tmp_path / "disk.qcow2", MIB) as disk:
        board = recorded_capacity(disk)
        branches = Branches(board, [disk])
        branches.savevm("short")
        board.step()
        disk.truncate(2 * MIB)
        board.step()
        middle = board.position
        board.step()
        disk.truncate(4 * MIB)
        board.step()
        board.goto(middle)
        branches.branch()
        assert disk.size == 2 * MIB
        board.step()
        assert capacity(board) == 2 * MIB


def test_snapshots_in_memory_share_what_has_not_changed():
    board = recorded_capacity(pyvirtio.MemoryDisk(MIB))
    figures = board.last_save
    assert figures is not None
    assert not figures.whole
    assert figures.pages == 1


def test_snapshots_of_a_run_can_be_kept_in_a_file(tmp_path):
    path = tmp_path / "kept.qcow2"
    with pyvirtio.create_disk(path, 512, cluster_size=4096) as image:
        board = recorded_capacity(pyvirtio.MemoryDisk(MIB), keep=image)
        end = fingerprint(board), board.position
        board.goto(Position(0))
        board.goto(end[1])
        assert fingerprint(board) == end[0]
        assert [snapshot.name for snapshot in image.snapshots] == ["0", "4"]
    if find_program("qemu-img"):
        qemu_check(path)


def test_board_in_the_past_is_not_saved():
    board = recorded_capacity(pyvirtio.MemoryDisk(MIB))
    board.goto(Position(2))
    with pytest.raises(ValueError, match="past"):
        machine_of(board).save(pyvirtio.MemoryDisk(0, growable=True))
