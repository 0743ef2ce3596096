"""A toy machine: a CPU with a few registers, a console, two pieces of RAM."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from pyvirtio.machine.state import Machine

RAM_SIZE = (3 << 20) + 5000


class Cpu:
    """Version 2 has a mode, which version 1 had not."""

    state_version = 2

    def __init__(self) -> None:
        self.pc = 0
        self.registers = [0] * 8
        self.user_mode = False

    def save_state(self, stream: Any) -> None:
        stream.u64(self.pc)
        for value in self.registers:
            stream.u32(value)
        stream.flag(self.user_mode)

    def load_state(self, stream: Any) -> Callable[[], None]:
        pc = stream.u64()
        registers = [stream.u32() for _ in self.registers]
        user_mode = stream.flag() if stream.version >= 2 else False
        if pc % 4:
            raise stream.malformed(f"has a pc of {pc}")

        def adopt() -> None:
            self.pc, self.registers, self.user_mode = pc, registers, user_mode

        return adopt


class Console:
    state_version = 1

    def __init__(self) -> None:
        self.name = "tty"
        self.waiting = b""

    def save_state(self, stream: Any) -> None:
        stream.text(self.name)
        stream.data(self.waiting)
        stream.u16(len(self.waiting))
        stream.u8(7)

    def load_state(self, stream: Any) -> Callable[[], None]:
        name, waiting, length, seven = stream.text(), stream.data(), stream.u16(), stream.u8()
        if length != len(waiting) or seven != 7:
            raise stream.malformed("does not add up")

        def adopt() -> None:
            self.name, self.waiting = name, waiting

        return adopt


class Toy:
    """The parts, their :class:`Machine`, and what a test compares."""

    def __init__(self, ram_size: int = RAM_SIZE) -> None:
        self.cpu = Cpu()
        self.console = Console()
        self.ram = bytearray(ram_size)
        self.rom_shadow = bytearray(4096)
        self.machine = Machine(
            {"cpu": self.cpu, "console": self.console},
            {"main": self.ram, "shadow": self.rom_shadow},
        )

    def run(self, seed: int) -> None:
        """Change everything, some pages of RAM only."""
        chance = random.Random(seed)
        self.cpu.pc = chance.randrange(1 << 40) * 4
        self.cpu.registers = [chance.randrange(1 << 32) for _ in range(8)]
        self.cpu.user_mode = not self.cpu.user_mode
        self.console.waiting = chance.randbytes(chance.randrange(50))
        for _ in range(40):
            length = chance.randrange(1, 20_000)
            start = chance.randrange(max(1, len(self.ram) - length))
            data = chance.choice([chance.randbytes(length), bytes(length)])
            self.ram[start : start + length] = data[: len(self.ram) - start]
        self.rom_shadow[:] = chance.randbytes(4096)

    @property
    def everything(self) -> tuple[Any, ...]:
        return (
            self.cpu.pc,
            tuple(self.cpu.registers),
            self.cpu.user_mode,
            self.console.name,
            self.console.waiting,
            bytes(self.ram),
            bytes(self.rom_shadow),
        )


@pytest.fixture(scope="session")
def make_toy() -> type[Toy]:
    return Toy
