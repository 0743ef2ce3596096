"""A whole emulator in a hundred lines: a processor with 16 registers, RAM, a disk, an output.

It has nothing to do with snapshots; docs/vmstate.md adds them to it, step by step.

    python examples/toy.py
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable

import pyvirtio

RAM_SIZE = 1 << 20
SECTOR = 512
WORD = 0xFFFF_FFFF

# An instruction is four bytes: what to do, and three operands a, b, c.
HALT, SET, ADD, LOAD, STORE, LOOP, PRINT, READ, WRITE = range(9)


class Toy:
    """The machine. ``disk`` is any Disk."""

    def __init__(self, disk: pyvirtio.Disk, output: Callable[[str], object] = print) -> None:
        self.ram = bytearray(RAM_SIZE)
        self.registers = [0] * 16
        self.pc = 0
        self.count = 0
        """Instructions done."""
        self.halted = False
        self.disk = disk
        self.output = output

    def load_program(self, program: bytes) -> None:
        """Put a program at address 0."""
        self.store(0, program)

    def store(self, address: int, data: bytes) -> None:
        """Everything that changes RAM comes through here."""
        self.ram[address : address + len(data)] = data

    def run(self, instructions: int) -> None:
        """Go on for so many instructions, or until the machine halts."""
        for _ in range(instructions):
            if self.halted:
                break
            self.step()

    def step(self) -> None:
        """One instruction."""
        what, a, b, c = self.ram[self.pc : self.pc + 4]
        r = self.registers
        self.pc += 4
        self.count += 1
        if what == SET:
            r[a] = b | c << 8
        elif what == ADD:
            r[a] = r[b] + r[c] & WORD
        elif what == LOAD:
            r[a] = struct.unpack_from("<I", self.ram, self.address(r[b] + c))[0]
        elif what == STORE:
            self.store(self.address(r[b] + c), struct.pack("<I", r[a]))
        elif what == LOOP:  # count down, and go back as long as something is left
            r[a] = r[a] - 1 & WORD
            if r[a]:
                self.pc = b | c << 8
        elif what == PRINT:
            self.output(str(r[a]))
        elif what == READ:
            self.store(self.address(r[b]), self.disk.read(self.sector(r[a]), SECTOR))
        elif what == WRITE:
            start = self.address(r[b])
            self.disk.write(self.sector(r[a]), self.ram[start : start + SECTOR])
        else:
            self.halted = True

    def address(self, value: int) -> int:
        """Where in RAM; there are no faults, it goes round."""
        return value % (RAM_SIZE - SECTOR)

    def sector(self, value: int) -> int:
        """Where on the disk."""
        return value % (self.disk.size // SECTOR) * SECTOR


# Adds 1 to a word of RAM again and again, and keeps it in a sector of its own each time.
COUNTER = bytes(
    [
        *(SET, 1, 1, 0),  # 0: r1 = 1
        *(SET, 2, 0, 16),  # 4: r2 = 4096, where the word is
        *(SET, 3, 0, 4),  # 8: r3 = 1024 times
        *(LOAD, 0, 2, 0),  # 12: r0 = the word
        *(ADD, 0, 0, 1),  # 16: one more
        *(STORE, 0, 2, 0),  # 20
        *(WRITE, 0, 2, 0),  # 24: 512 bytes at the word go to sector r0
        *(LOOP, 3, 12, 0),  # 28
        *(PRINT, 0, 0, 0),  # 32
        *(HALT, 0, 0, 0),  # 36
    ]
)


def main() -> int:
    """Run the counter."""
    with pyvirtio.MemoryDisk(2048 * SECTOR) as disk:
        toy = Toy(disk)
        toy.load_program(COUNTER)
        toy.run(1_000_000)
        print(f"{toy.count} instructions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
