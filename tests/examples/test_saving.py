"""The board's state in a stream: another board goes on from it as the first one did."""

from __future__ import annotations

import hashlib

import pytest

import pyvirtio
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.errors import ImageError

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.board import Board
from examples.emulator.firmware import find_u_boot
from examples.emulator.packages import PackageError
from examples.emulator.saving import SavedHart, machine_of
from examples.emulator.script import Session

PROMPT = "\n=> "
SLICED = """
    la t0, handler
    csrw stvec, t0
    li t0, 0x20
    csrs sie, t0
    li s1, 0
    li s2, 0x10000000
    li t0, 5
    sb t0, 1(s2)
    csrr t0, time
    addi t0, t0, 1000
    csrw stimecmp, t0
    csrrsi zero, sstatus, 2
wait: li t5, 7
    wfi
    bne s1, t5, wait
    sd s1, 0(s0)
    csrr t0, time
    sd t0, 8(s0)
    j finish
.org 0x100
handler: addi s1, s1, 1
    csrr t0, time
    addi t0, t0, 1000
    csrw stimecmp, t0
    sret
"""


def fingerprint(board: Board) -> tuple[object, ...]:
    stream = StateWriter()
    SavedHart(board.cpu).save_state(stream)
    return hashlib.sha256(board.ram).digest(), bytes(stream), board.clock.now()


def saved(board: Board) -> pyvirtio.MemoryDisk:
    target = pyvirtio.MemoryDisk(0, growable=True)
    machine_of(board).save(target)
    return target


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_another_board_goes_on_from_any_slice(guest, steps):
    first = guest(SLICED, supervisor=True)
    for _ in range(steps):
        if first.board.step():
            first.board.sleep()
    stream = saved(first.board)
    second = guest("nop")
    machine_of(second.board).load(stream)
    assert fingerprint(second.board) == fingerprint(first.board)
    assert second.run()[:2] == first.run()[:2]
    assert first.results[0] == 7
    assert fingerprint(second.board) == fingerprint(first.board)


def test_u_boot_goes_on_on_another_board_with_its_disk():
    try:
        u_boot = find_u_boot()
    except PackageError as error:
        pytest.skip(f"no U-Boot: {error}")
    disk = pyvirtio.MemoryDisk(1 << 20)
    disk.write(512, b"on the disk")

    def talk(board: Board, session: Session) -> tuple[object, ...]:
        session.connect(board)
        session.command("virtio read 84000000 1 1", PROMPT)
        said = session.command("md.b 84000000 10", PROMPT)
        assert "on the disk" in said
        return (said, *fingerprint(board))

    session = Session()
    board = Board(session.send_out, disks=[disk])
    session.connect(board)
    board.start(board.load(u_boot))
    session.expect("stop autoboot")
    session.send("\r")
    session.expect(PROMPT)
    session.command("virtio scan", PROMPT)
    session.send("echo half")  # what is typed and not read is state as well
    session.send("\r")
    stream = saved(board)
    session.expect("half\r\nhalf")
    session.expect(PROMPT)
    wanted = talk(board, session)
    board.close()

    other = Session()
    second = Board(other.send_out, disks=[disk])
    machine_of(second).load(stream)
    other.connect(second)
    other.expect("half\r\nhalf")
    other.expect(PROMPT)
    assert talk(second, other) == wanted


def test_protection_and_floating_point_come_back(guest):
    source = """
        li t0, 0x20040000
        csrw pmpaddr0, t0
        li t0, 0x0f
        csrw pmpcfg0, t0
        li t0, 0x6000
        csrs mstatus, t0
        li t1, 0x15
        .word 0x00131073
        .word 0x0023d073
        wfi
        .word 0x00102573
        sd a0, 0(s0)
        .word 0x00202573
        sd a0, 8(s0)
        csrr a0, pmpaddr0
        sd a0, 16(s0)
    """
    first = guest(source)
    first.board.step()
    stream = saved(first.board)
    second = guest("nop")
    machine_of(second.board).load(stream)
    assert second.run()[:3] == [0x15, 7, 0x20040000]


@pytest.mark.parametrize(
    ("word", "value", "reason"),
    [(69, 2, "no mode"), (74, 5 << 60, "no way"), (-1, 17, "too many rules")],
)
def test_registers_that_cannot_be_are_refused(guest, word, value, reason):
    board = guest("nop").board
    stream = StateWriter()
    SavedHart(board.cpu).save_state(stream)
    data = bytearray(bytes(stream))
    count = (len(data) - 9) // 8
    at = 8 * (word % count)
    data[at : at + 8] = value.to_bytes(8, "little")
    with pytest.raises(ImageError, match=reason):
        SavedHart(board.cpu).load_state(StateReader(bytes(data), name="hart", version=1))
