"""Scripts, the terminal, and the command line, with guests of a few instructions."""

from __future__ import annotations

import os
import pty
import re
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.__main__ import main
from examples.emulator.board import Board
from examples.emulator.console import Console
from examples.emulator.script import ScriptError, Session, run_script
from examples.emulator.syscon import Power
from support.riscv import assemble

ECHO = """
    li s1, 0x10000000
    li t0, 0x3e              # '>'
    sb t0, 0(s1)
again: lbu t0, 5(s1)
    andi t0, t0, 1
    beq t0, zero, again
    lbu t0, 0(s1)
    sb t0, 0(s1)
    li t1, 0x71              # 'q' powers off
    bne t0, t1, again
    li t0, 0x100000
    li t1, {finish}
    sw t1, 0(t0)
hang: j hang
"""


@pytest.fixture
def program(tmp_path):
    """A guest that writes '>', then returns what is typed, and powers off at a 'q'."""
    path = tmp_path / "echo.bin"
    path.write_bytes(assemble(ECHO.format(finish=0x5555)))
    return path


@pytest.fixture
def session(program):
    session = Session()
    board = Board(session.send_out, ram=8 << 20)
    board.start(board.load(program))
    session.connect(board)
    return session


def test_session_gives_what_came_before_the_text_expected(session):
    session.expect(">")
    session.send("hello, guest")
    assert session.expect("guest") == "hello, "


def test_session_finds_a_text_only_once(session):
    session.limit = 0.01
    session.expect(">")
    with pytest.raises(ScriptError, match=r"expected '>' within 0\.01 s of guest time"):
        session.expect(">")


def test_session_says_that_the_board_stopped_instead(session):
    session.send("q")
    with pytest.raises(ScriptError, match="but the board is powered off"):
        session.expect("something else")


def test_script_file_is_carried_out(session, tmp_path):
    script = tmp_path / "talk"
    script.write_text(
        '# a comment\n\nlimit 2\nexpect ">"\nline two words\nexpect "words\\r"\nsend q\npoweroff\n'
    )
    run_script(script, session)
    assert session.transcript == b">two words\rq"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expect", "no such command: expect"),
        ("dance now", "no such command: dance now"),
        ("limit soon", "limit takes a number of seconds"),
        ('send "open', "not a quoted text"),
        ("poweroff now", "no such command"),
        ('limit 0.01\nexpect "never"', "2: expected 'never'"),
    ],
)
def test_script_errors_name_the_line(session, tmp_path, text, message):
    script = tmp_path / "talk"
    script.write_text(text)
    with pytest.raises(ScriptError, match=message):
        run_script(script, session)


class Terminal:
    """A pseudo-terminal whose user types ``keys`` as soon as the guest has written '>'."""

    def __init__(self, keys: bytes) -> None:
        self.user, self.guest = pty.openpty()
        self.seen = b""
        self._keys = keys
        self._thread = threading.Thread(target=self._type, daemon=True)
        self._thread.start()

    def _type(self) -> None:
        while b">" not in self.seen:
            self.seen += os.read(self.user, 100)
        os.write(self.user, self._keys)

    def close(self) -> None:
        self._thread.join()
        os.close(self.user)
        os.close(self.guest)


def on_terminal(program, keys):
    terminal = Terminal(keys)
    before = termios.tcgetattr(terminal.guest)
    with Console(terminal.guest, terminal.guest) as console:
        raw = termios.tcgetattr(terminal.guest)
        board = Board(console.send, ram=8 << 20)
        board.start(board.load(program))
        power = console.run(board)
    after = termios.tcgetattr(terminal.guest)
    terminal.close()
    assert raw[3] & (termios.ICANON | termios.ECHO | termios.ISIG) == 0
    assert after == before
    return power


def test_terminal_is_raw_while_the_guest_runs_and_put_back(program):
    assert on_terminal(program, b"\x03q") is Power.OFF


@pytest.mark.parametrize("key", [b"x", b"X"])
def test_ctrl_a_x_leaves(program, key):
    assert on_terminal(program, b"a\x01h\x01" + key) is Power.QUIT


def test_ctrl_a_twice_sends_it(program):
    assert on_terminal(program, b"\x01\x01q") is Power.OFF


def test_terminal_is_put_back_after_an_exception():
    user, guest = pty.openpty()
    before = termios.tcgetattr(guest)
    with pytest.raises(RuntimeError, match="inside"), Console(guest, guest):
        raise RuntimeError("inside")
    assert termios.tcgetattr(guest) == before
    os.close(user)
    os.close(guest)


def test_command_line_runs_a_program_by_script(program, tmp_path, capfd):
    script = tmp_path / "talk"
    script.write_text("expect >\nsend q\npoweroff\n")
    arguments = ["--bios", str(program), "--ram", "8M", "--script", str(script)]
    assert main(arguments) == 0
    assert capfd.readouterr().out == ">q"


def test_command_line_lets_gdb_have_the_run(program, tmp_path):
    script = tmp_path / "talk"
    script.write_text("expect >\nsend xyq\npoweroff\n")
    command = [sys.executable, "-m", "examples.emulator", "--bios", str(program), "--ram", "8M"]
    with subprocess.Popen(
        [*command, "--gdb", "0", "--script", str(script)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    ) as process:
        port = int(re.search(rb":(\d+)", process.stderr.readline())[1])
        with socket.create_connection(("127.0.0.1", port)) as gdb:
            gdb.sendall(b"$bc#c5")
            answer = b""
            while b"#" not in answer:
                answer += gdb.recv(100)
            assert answer.startswith(b"+$T05replaylog:begin;")
            gdb.sendall(b"$k#6b")
        assert process.wait(60) == 0


def test_command_line_fails_with_the_script(program, tmp_path, capfd):
    script = tmp_path / "talk"
    script.write_text("limit 0.01\nexpect never\n")
    assert main(["--bios", str(program), "--ram", "8M", "--script", str(script)]) == 1
    assert "talk:2: expected 'never'" in capfd.readouterr().err


def test_command_line_refuses_a_disk_that_is_not_there(program, capfd):
    assert main(["--bios", str(program), "--disk", "/nonexistent/vm.qcow2"]) == 1
    assert "/nonexistent/vm.qcow2" in capfd.readouterr().err
