"""A board that runs a few lines of assembly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import pyvirtio

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.board import Board
from examples.emulator.firmware import find_u_boot
from examples.emulator.layout import RAM_BASE
from examples.emulator.packages import PackageError
from examples.emulator.recording import RecordedBoard
from examples.emulator.script import Session
from support.riscv import assemble

RESULTS = RAM_BASE + 0x10_0000
"""Where guest programs put what they found out, in 64-bit words (register s0 points there)."""
EPILOGUE = """
    # the end of every program: power off
finish: li t0, 0x100000
    li t1, 0x5555
    sw t1, 0(t0)
hang: j hang
"""


class Guest:
    """A board with a program in it."""

    def __init__(self, source: str, *, supervisor: bool = False, **options: object) -> None:
        self.output = bytearray()
        self.board = Board(self.output.append, ram=8 << 20, **options)  # type: ignore[arg-type]
        code = assemble(f"li s0, {RESULTS:#x}\n{source}\n{EPILOGUE}")
        self.board.ram[: len(code)] = code
        (self.board.start_supervisor if supervisor else self.board.start)(RAM_BASE)

    def run(self, steps: int = 2000, each: Callable[[], object] = lambda: None) -> list[int]:
        """Run until the guest powers off; the results. ``each`` is called between slices."""
        for _ in range(steps):
            if self.board.power is not None:
                break
            if self.board.step():
                self.board.sleep()
            each()
        assert self.board.power is not None, "the guest did not power off"
        return self.results

    def put(self, index: int, value: int) -> None:
        """Set a word of the results before the program runs."""
        at = RESULTS - RAM_BASE + 8 * index
        self.board.ram[at : at + 8] = value.to_bytes(8, "little")

    @property
    def results(self) -> list[int]:
        start = RESULTS - RAM_BASE
        return [
            int.from_bytes(self.board.ram[at : at + 8], "little")
            for at in range(start, start + 64, 8)
        ]


@pytest.fixture
def guest() -> type[Guest]:
    return Guest


class RecordedUBoot:
    """U-Boot at its prompt on a recorded board, and its disk."""

    def __init__(self, disk: pyvirtio.Disk) -> None:
        try:
            program = find_u_boot()
        except PackageError as error:
            pytest.skip(f"no U-Boot: {error}")
        self.disk = disk
        self.session = Session()
        self.board = RecordedBoard(self.session.send_out, ram=64 << 20, disks=[disk], every=40)
        self.session.connect(self.board)
        self.board.start(self.board.load(program))
        self.session.expect("stop autoboot")
        self.session.send("\r")
        self.session.expect("\n=> ")
        self.command("virtio scan")

    def command(self, line: str) -> str:
        return self.session.command(line, "\n=> ")

    def write(self, letter: str, sector: int) -> None:
        """Fill a sector of the disk."""
        self.command(f"mw.b 82000000 {ord(letter):x} 200")
        self.command(f"virtio write 82000000 {sector:x} 1")

    def read(self, sector: int) -> str:
        """The first letter of a sector."""
        self.command(f"virtio read 83000000 {sector:x} 1")
        return chr(self.board.ram[0x300_0000])


@pytest.fixture
def u_boot() -> type[RecordedUBoot]:
    return RecordedUBoot
