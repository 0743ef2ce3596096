"""A recorded board: any moment again, to the bit; and backwards to what happened last."""

from __future__ import annotations

import hashlib

import pytest

import pyvirtio
from pyvirtio.backend.state import StateWriter

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.clock import WallClock
from examples.emulator.layout import RAM_BASE
from examples.emulator.recording import Position, RecordedBoard
from examples.emulator.saving import SavedHart
from examples.emulator.travel import Points, Traveller
from support.riscv import assemble

COUNTER = RAM_BASE + 0x10_0000
ECHO = f"""
    li s1, 0x10000000
    li s2, {COUNTER:#x}
    li s3, 0x0200bff8
again: ld t0, 0(s3)
    sd t0, 8(s2)
    lbu t0, 5(s1)
    andi t0, t0, 1
    beq t0, zero, again
    lbu t0, 0(s1)
write: sd t0, 0(s2)
    sb t0, 0(s1)
    li t1, 0x71              # 'q' powers off
    bne t0, t1, again
    li t0, 0x100000
    li t1, 0x5555
    sw t1, 0(t0)
hang: j hang
"""
WRITE = RAM_BASE + 16 + 8 + 8 + 6 * 4


def recorded(source=ECHO, typed=b"abq", **options):
    """A board that has run ``source``, with what it sent."""
    sent = bytearray()
    board = RecordedBoard(sent.append, ram=4 << 20, every=3, slice_length=600, **options)
    code = assemble(source)
    board.ram[: len(code)] = code
    board.start(RAM_BASE)
    for key in typed:
        for _ in range(4):
            board.step()
            board.clock.now()  # as a terminal asks, which nobody will do again
        board.receive(bytes((key,)))
    for _ in range(20):
        if board.power is not None:
            break
        if board.step():
            board.sleep()
    return board, sent


def fingerprint(board):
    stream = StateWriter()
    SavedHart(board.cpu).save_state(stream)
    return hashlib.sha256(board.ram).digest(), bytes(stream)


def word(board, address=COUNTER):
    return int.from_bytes(board.ram[address - RAM_BASE : address - RAM_BASE + 8], "little")


def test_present_is_found_again_after_the_past():
    board, sent = recorded()
    end = fingerprint(board), board.clock.now(), board.position
    assert bytes(sent) == b"abq"
    board.goto(Position(0))
    assert word(board) == 0
    board.goto(end[2])
    assert (fingerprint(board), board.clock.now(), board.position) == end
    assert bytes(sent) == b"abq", "nothing is sent twice"


@pytest.mark.parametrize("clock", [None, WallClock])
def test_any_moment_is_the_same_each_time_and_by_any_way(clock):
    board, _ = recorded(clock=clock() if clock else None)
    moments = [Position(n) for n in range(board.present)] + [
        Position(4, 1), Position(4, 99), Position(5, 300), Position(7, 12),
    ]  # fmt: skip
    first = {}
    for moment in moments:
        board.goto(moment)
        first[moment] = fingerprint(board)
    for moment in reversed(moments):
        board.goto(moment)
        assert fingerprint(board) == first[moment], moment


def test_past_cannot_be_changed():
    board, _ = recorded()
    board.goto(Position(2))
    with pytest.raises(ValueError, match="past"):
        board.receive(b"x")


def test_future_cannot_be_gone_to():
    board, _ = recorded()
    for moment in (Position(board.present + 1), Position(board.present, 1), Position(-1)):
        with pytest.raises(ValueError, match="not been yet"):
            board.goto(moment)


def test_board_goes_on_living_in_the_present():
    board, sent = recorded(typed=b"a")
    board.goto(Position(1))
    board.goto(Position(board.present))
    board.receive(b"q")
    for _ in range(8):
        board.step()
    assert bytes(sent) == b"aq"
    assert board.power is not None


def test_back_to_the_writes_of_an_address_one_after_the_other():
    board, _ = recorded()
    traveller = Traveller(board)
    points = Points(writes=[range(COUNTER, COUNTER + 8)])
    seen = []
    while traveller.back_to(points):
        board.cpu.state.load()
        before = word(board)
        assert board.cpu.state.pc == WRITE
        here = board.position
        traveller.step()
        seen.append((before, word(board)))
        board.goto(here)
    a, b, q = b"abq"
    assert seen == [(b, q), (a, b), (0, a)]
    assert board.position == Position(0)


def test_back_to_where_an_instruction_was_last_run_and_forward_again():
    board, _ = recorded()
    traveller = Traveller(board)
    points = Points(visits=[WRITE])
    assert traveller.back_to(points)
    assert traveller.back_to(points)
    second = board.position
    assert word(board) == ord("a")
    assert traveller.forward_to(points, lambda: True)
    assert word(board) == ord("b")
    assert traveller.back_to(points)
    assert board.position == second


def test_step_back_undoes_a_step():
    board, _ = recorded()
    traveller = Traveller(board)
    traveller.back_to(Points(visits=[WRITE]))
    before, where = fingerprint(board), board.position
    for _ in range(3):
        traveller.step()
    assert fingerprint(board) != before
    for _ in range(3):
        assert traveller.step_back()
    assert (fingerprint(board), board.position) == (before, where)


def test_step_back_goes_over_the_edge_of_a_slice():
    board, _ = recorded()
    traveller = Traveller(board)
    board.goto(Position(5))
    board.cpu.state.load()
    pc = board.cpu.state.pc
    before = fingerprint(board)
    assert traveller.step_back()
    assert board.position.slice == 4
    board.cpu.state.load()
    assert board.cpu.state.pc != pc
    traveller.step()
    assert fingerprint(board) == before


def test_there_is_nothing_before_the_beginning():
    board, _ = recorded()
    board.goto(Position(0))
    assert not Traveller(board).step_back()
    assert not Traveller(board).back_to(Points(visits=[WRITE]))


def test_log_of_the_run_is_kept_in_a_file(tmp_path):
    from pyvirtio.machine.log import EventLog

    board, _ = recorded()
    with (tmp_path / "log").open("wb") as file:
        board.log.write(file)
    with (tmp_path / "log").open("rb") as file:
        found = EventLog.read(file)
    assert [found[n] for n in range(len(found))] == [board.log[n] for n in range(len(board.log))]


def test_disk_is_not_touched_by_what_happens_again(u_boot):
    guest = u_boot(pyvirtio.MemoryDisk(1 << 20))
    board, disk, command = guest.board, guest.disk, guest.command
    disk.write(512, b"before")
    command("virtio read 82000000 1 1")
    middle = board.position
    assert "before" in command("md.b 82000000 10")
    command("mw.b 82000000 58 200")
    command("virtio write 82000000 1 1")
    assert disk.read(512, 4) == b"XXXX"
    end = fingerprint(board), board.position
    disk.write(512, b"elsewhere")
    board.goto(middle)
    assert bytes(board.ram[0x200_0000:0x200_0006]) == b"before"
    board.goto(end[1])
    assert fingerprint(board) == end[0]
    assert disk.read(512, 9) == b"elsewhere"


def test_back_and_forward_to_what_a_disk_wrote_to_memory(u_boot):
    guest = u_boot(pyvirtio.MemoryDisk(1 << 20))
    board, disk, command = guest.board, guest.disk, guest.command
    disk.write(512, b"diskdisk")
    command("mw.q 82000000 5858585858585858 1")
    command("virtio read 82000000 1 1")
    command("mw.q 82000000 5959595959595959 1")
    traveller = Traveller(board)
    points = Points(writes=[range(0x8200_0000, 0x8200_0008)])

    def contents():
        return board.ram[0x200_0000:0x200_0008]

    assert traveller.back_to(points)
    assert contents() == b"diskdisk"
    assert traveller.back_to(points)
    assert contents() == b"XXXXXXXX"
    eve = board.position
    traveller.step()
    assert contents() == b"diskdisk"
    assert traveller.back_to(points)
    assert board.position == eve
    assert traveller.step_back()
    assert traveller.forward_to(points, lambda: True)
    assert contents() == b"diskdisk"
    assert traveller.eve == eve


def test_start_of_linux_is_the_same_each_time():
    from examples.emulator.linux import RAM, find_linux
    from examples.emulator.packages import PackageError

    try:
        linux = find_linux()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    board = RecordedBoard(lambda byte: None, ram=RAM, every=30)
    board.start_supervisor(board.load_linux(linux.kernel), "earlycon=sbi", linux.initramfs)
    for _ in range(70):
        if board.step():
            board.sleep()
    end = fingerprint(board), board.position
    board.goto(Position(45, 1234))
    middle = fingerprint(board)
    board.goto(Position(3))
    board.goto(Position(45, 1234))
    assert fingerprint(board) == middle
    board.goto(end[1])
    assert fingerprint(board) == end[0]
