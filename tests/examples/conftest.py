"""A board that runs a few lines of assembly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.board import Board
from examples.emulator.layout import RAM_BASE
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
