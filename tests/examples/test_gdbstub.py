"""gdb on a recorded board: gdb-multiarch itself, and a peer that knows the protocol's bytes."""

from __future__ import annotations

import re
import socket
import subprocess
import threading

import pytest

import pyvirtio

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.gdbstub import GdbServer
from examples.emulator.layout import RAM_BASE
from examples.emulator.recording import Position, RecordedBoard
from support.peers import requires
from support.riscv import assemble

COUNTER = RAM_BASE + 0x10_0000
PROGRAM = f"""
    li s1, {COUNTER:#x}
    li s2, 0
again: addi s2, s2, 1
write: sd s2, 0(s1)
    li t0, 200
wait: addi t0, t0, -1
    bne t0, zero, wait
    j again
"""
WRITE = RAM_BASE + 8 + 8 + 8 + 4


@pytest.fixture
def board():
    board = RecordedBoard(lambda byte: None, ram=4 << 20, every=4, slice_length=1000)
    code = assemble(PROGRAM)
    board.ram[: len(code)] = code
    board.start(RAM_BASE)
    for _ in range(10):
        board.step()
    return board


@pytest.fixture
def server(board):
    yield from serve(board)


def serve(board):
    server = GdbServer(board)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield server
    thread.join(60)
    server.close()
    assert not thread.is_alive()


class Peer:
    """Sends packets as gdb does."""

    def __init__(self, port):
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._file = self._socket.makefile("rwb")

    def ask(self, packet):
        body = packet.encode()
        self._file.write(b"$" + body + b"#%02x" % (sum(body) & 0xFF))
        self._file.flush()
        assert self._file.read(1) == b"+"
        assert self._file.read(1) == b"$"
        answer = b""
        while not answer.endswith(b"#"):
            answer += self._file.read(1)
        assert self._file.read(2) == b"%02x" % (sum(answer[:-1]) & 0xFF)
        return answer[:-1].decode()

    def register(self, number):
        data = bytes.fromhex(self.ask("g"))
        return int.from_bytes(data[8 * number : 8 * number + 8], "little")

    def word(self, address=COUNTER):
        return int.from_bytes(bytes.fromhex(self.ask(f"m{address:x},8")), "little")

    def close(self):
        self._file.write(b"$k#6b")
        self._file.close()
        self._socket.close()


@pytest.fixture
def peer(server):
    peer = Peer(server.port)
    yield peer
    peer.close()


def test_it_says_that_it_goes_backwards(peer):
    said = peer.ask("qSupported:swbreak+")
    assert "ReverseStep+" in said
    assert "ReverseContinue+" in said
    assert peer.ask("qXfer:features:read:target.xml:0,10") == 'm<?xml version="1'


def test_back_to_the_last_write_and_the_one_before(peer):
    now = peer.word()
    assert peer.ask(f"Z2,{COUNTER:x},8") == "OK"
    for number in range(2):
        # The write has just been, as gdb wants it for this processor; it steps over it itself.
        assert peer.ask("bc") == f"T05watch:{COUNTER:x};"
        assert (peer.word(), peer.register(32)) == (now - number, WRITE + 4)
        peer.ask("bs")
        assert (peer.word(), peer.register(32)) == (now - number - 1, WRITE)


def test_forward_to_the_next_write(peer):
    peer.ask("bc")
    peer.ask(f"Z2,{COUNTER:x},8")
    for number in range(2):
        assert peer.ask("c") == f"T05watch:{COUNTER:x};"
        assert (peer.word(), peer.register(32)) == (number, WRITE)
        peer.ask("s")
        assert peer.word() == number + 1


def test_breakpoint_stops_in_the_past_and_in_the_present(peer, board):
    last = peer.word()
    peer.ask(f"Z0,{WRITE:x},4")
    assert peer.ask("bc") == "S05"
    assert peer.word() == last - 1
    assert peer.ask("c") == "S05"
    assert (peer.word(), peer.register(32)) == (last, WRITE)
    assert board.position >= Position(9)


def test_beginning_is_told(peer):
    assert peer.ask("bc") == "T05replaylog:begin;"
    assert peer.register(32) == RAM_BASE
    assert peer.ask("bs") == "T05replaylog:begin;"


def test_step_back_and_step(peer):
    here = peer.ask("g")
    assert peer.ask("bs") == "S05"
    before = peer.ask("g")
    assert before != here
    assert peer.ask("s") == "S05"
    assert peer.ask("g") == here


def test_what_is_changed_in_the_present_is_there_when_it_comes_again(peer):
    assert peer.ask(f"M{COUNTER + 8:x},2:5aa5") == "OK"
    registers = bytearray.fromhex(peer.ask("g"))
    registers[8 * 18] ^= 0x40
    assert peer.ask("G" + registers.hex()) == "OK"
    assert peer.ask("bs") == "S05"
    assert peer.word(COUNTER + 8) == 0
    assert peer.ask("g") != registers.hex()
    assert peer.ask("s") == "S05"
    assert peer.word(COUNTER + 8) == 0xA55A
    assert peer.ask("g") == registers.hex()


def test_watchpoint_sees_what_a_disk_writes(u_boot):
    guest = u_boot(pyvirtio.MemoryDisk(bytearray(b"diskdisk" * 64)))
    guest.command("mw.q 82000000 5858585858585858 1")
    guest.command("virtio read 82000000 0 1")
    where, ours, disks = 0x8200_0000, 0x58585858_58585858, int.from_bytes(b"diskdisk", "little")
    for server in serve(guest.board):
        peer = Peer(server.port)
        assert peer.word(where) == disks
        assert peer.ask(f"Z2,{where:x},8") == "OK"
        # gdb makes the step over the write by itself, in its own direction.
        assert peer.ask("bc") == f"T05watch:{where:x};"
        assert peer.word(where) == disks
        peer.ask("bs")
        assert peer.word(where) == ours
        assert peer.ask("c") == f"T05watch:{where:x};"
        assert peer.word(where) == ours
        peer.ask("s")
        assert peer.word(where) == disks
        peer.close()


def test_past_cannot_be_written(peer):
    peer.ask("bs")
    assert peer.ask(f"M{COUNTER:x},1:00") == "E01"


@pytest.mark.parametrize("packet", ["m0,8", "mffffffffffff,1", "m80000000,ffffff", "mx", "Z2,0,8"])
def test_nonsense_is_an_error(peer, packet):
    assert peer.ask(packet) == "E01"


def test_unknown_packets_have_an_empty_answer(peer):
    assert peer.ask("vMustReplyEmpty") == ""
    assert peer.ask("X") == ""


@requires("gdb-multiarch")
def test_gdb_drives_it_backwards(server):
    commands = [
        "set pagination off",
        "set architecture riscv:rv64",
        "set breakpoint always-inserted on",
        f"target remote 127.0.0.1:{server.port}",
        f'printf "now=%ld\\n", *(long *){COUNTER:#x}',
        f"watch *(long *){COUNTER:#x}",
        "reverse-continue",
        f'printf "before=%ld pc=%#lx\\n", *(long *){COUNTER:#x}, (long)$pc',
        "delete",
        "stepi",
        f'printf "after=%ld\\n", *(long *){COUNTER:#x}',
        "reverse-stepi",
        'printf "back=%#lx\\n", (long)$pc',
        f"hbreak *{WRITE:#x}",
        "reverse-continue",
        f'printf "earlier=%ld\\n", *(long *){COUNTER:#x}',
        "kill",
    ]
    arguments = [part for command in commands for part in ("-ex", command)]
    done = subprocess.run(
        ["gdb-multiarch", "-nx", "-batch", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = done.stdout + done.stderr
    values = dict(re.findall(r"(\w+)=(-?\w+)", done.stdout))
    now = int(values["now"])
    assert now > 5, said
    assert int(values["before"]) == now - 1, said
    assert int(values["after"]) == now, said
    assert int(values["pc"], 16) == int(values["back"], 16) == WRITE, said
    assert int(values["earlier"]) == now - 2, said
