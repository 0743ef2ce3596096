"""Bytes as a hostile driver: accesses to registers, writes to guest memory, kicks, in any order.

``python -m support.ring_fuzz [libFuzzer's options]`` has atheris look for new ways through the
device for ten minutes. Whatever the bytes say: nothing is raised, no error of our own is logged, a
kick's work is bounded, no byte outside the guest's memory changes, and a device that is told the
same again and again does not grow.
"""

from __future__ import annotations

import gc
import logging
import random
import struct
import sys
from typing import Any

import pyvirtio
from pyvirtio.virtio.driver import Arena, BlockDriver, DriverError, Registers
from pyvirtio.virtio.driver.pci import PciFunction, PciRegisters
from pyvirtio.virtio.driver.ring import Buffer

BASE = 0x8000_0000
RAM_SIZE = 1 << 18
_CANARY = b"\xa5" * 4096
_QUEUE = 16
_OUTGOING = (1, 11, 13, 14)
_KINDS = (0, 0, *_OUTGOING, *range(16), 16, 18, 20, 22, 24, 26, 99)
"""Types of requests; the usual ones more often."""
_MOST_STEPS = 200
_MOST_REQUESTS = 64 * (_QUEUE + 1)
"""Requests of the disk that one access may lead to: a ring's heads, with room to spare."""
_MOST_DESCRIPTORS = _MOST_REQUESTS * 1200
"""Descriptors that are read for these: 1024 of an indirect table each, and those of the ring."""
_ROUNDS = 12
"""How often a device is told the same, to see that it does not grow."""
_GROWTH = 400
"""Blocks of memory by which Python itself may grow between two looks at it."""


class Bytes:
    """Numbers out of bytes; zeroes once these have ended."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, length: int) -> bytes:
        """The next bytes."""
        part = self._data[self._at : self._at + length]
        self._at += length
        return part.ljust(length, b"\0")

    def number(self, length: int) -> int:
        """The next bytes as a number."""
        return int.from_bytes(self.take(length), "little")


class _Errors(logging.Handler):
    """Notes what is logged as an error of ours."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record)


class _CountedDisk(pyvirtio.MemoryDisk):
    """Counts its requests."""

    requests = 0

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.requests += 1
        super()._readv(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self.requests += 1
        super()._writev(offset, views, length)


class Board:
    """A device under attack, of the kind that the first bytes choose."""

    def __init__(self, source: Bytes) -> None:
        kind, options = source.number(1), source.number(1)
        self.whole = bytearray(_CANARY + bytes(RAM_SIZE) + _CANARY)
        self.ram = memoryview(self.whole)[len(_CANARY) : -len(_CANARY)]
        memory: Any
        if options & 1:
            memory = pyvirtio.GuestMemory.from_callbacks(self._read, self._write)
        else:
            memory = pyvirtio.GuestMemory.from_buffer(self.ram, BASE)
        self.memory_reads = 0
        """Of callback memory: each structure is one."""
        self.disk = _CountedDisk(1 << 20)
        blk = pyvirtio.VirtioBlk(
            self.disk,
            queue_size=_QUEUE,
            packed=bool(options & 2),
            in_order=bool(options & 4),
            num_queues=1 + (options >> 3 & 1),
        )
        registers: Any
        self.bus: Any
        if kind & 1:
            self.bus = pyvirtio.VirtioPci(blk, memory, transitional=bool(options & 16))
            function = PciFunction(self.bus)
            function.map_bars()
            registers = PciRegisters(function)
        else:
            legacy = bool(kind & 2)
            self.bus = pyvirtio.VirtioMmio(blk, memory, legacy=legacy)
            registers = Registers(self.bus.read, self.bus.write, legacy=legacy)
        self.driver = BlockDriver(registers, memory, Arena(BASE, RAM_SIZE), queue_size=_QUEUE)
        if options & 0xE0 != 0x20:
            self.driver.start()

    def _read(self, pa: int, length: int) -> bytes:
        self.memory_reads += 1
        if not BASE <= pa <= pa + length <= BASE + RAM_SIZE:
            raise IndexError("no RAM there")
        return bytes(self.ram[pa - BASE : pa - BASE + length])

    def _write(self, pa: int, data: bytes) -> None:
        if not BASE <= pa <= pa + len(data) <= BASE + RAM_SIZE:
            raise IndexError("no RAM there")
        self.ram[pa - BASE : pa - BASE + len(data)] = data

    def step(self, source: Bytes) -> None:
        """One thing that a guest may do."""
        what = source.number(1)
        size = 1 << (what >> 6)
        match what & 7:
            case 0:  # the rings lie at the start of RAM
                offset = source.number(2)
                data = source.take(size * 4)
                self.ram[offset : offset + len(data)] = data
            case 1 | 2 | 3 | 4:
                self._chain(source)
            case 5:
                self._access(source, size, source.number(min(size, 4)))
            case 6:
                self._access(source, size, None)
            case _ if what & 8:
                self.bus.poll()
            case _:
                self.driver.registers.notify(source.number(1) & 3)

    def _chain(self, source: Bytes) -> None:
        """A request that is nearly right, and a kick."""
        kind, sector = _KINDS[source.number(1) % len(_KINDS)], source.number(2)
        parts = []
        for _ in range(source.number(1) % 5):
            flags, where = source.number(1), source.number(3)
            length = source.number(2) if flags & 3 == 3 else 512 * (flags >> 4)
            writable = (kind not in _OUTGOING) != (flags & 12 == 12)
            parts.append(Buffer(BASE + where % (RAM_SIZE + 4096), length, writable))
        header = struct.pack("<IIQ", kind, 0, sector % 2100)
        self.ram[RAM_SIZE // 2 : RAM_SIZE // 2 + 16] = header
        ring = self.driver.ring if hasattr(self.driver, "ring") else None
        if ring is None:
            return
        status = Buffer(BASE + RAM_SIZE - 1, 1, True)
        chain = [Buffer(BASE + RAM_SIZE // 2, 16), *parts, status]
        try:
            ring.collect()
            ring.add(chain)
            ring.publish()
        except (DriverError, ValueError, LookupError, MemoryError):
            return  # the driver's own ring is full, or spoilt by what was written over it
        self.driver.registers.notify(0)

    def _access(self, source: Bytes, size: int, value: int | None) -> None:
        where = source.number(2)
        if isinstance(self.bus, pyvirtio.VirtioMmio):
            offset = where % self.bus.size
            if value is None:
                self.bus.read(offset, size)
            else:
                self.bus.write(offset, size, value)
            return
        size = min(size, 4)
        if where & 0x8000:
            if value is None:
                self.bus.config_read(where & 0xFF, size)
            else:
                self.bus.config_write(where & 0xFF, size, value)
            return
        bars = self.bus.bars
        bar = bars[(where >> 12) % len(bars)].index
        if value is None:
            self.bus.bar_read(bar, where & 0xFFF, size)
        else:
            self.bus.bar_write(bar, where & 0xFFF, size, value)


def play(board: Board, source: Bytes, errors: _Errors) -> None:
    """Do what the bytes say. Raises if the device does something that it must not."""
    for _ in range(_MOST_STEPS):
        if not source:
            break
        requests, reads = board.disk.requests, board.memory_reads
        board.step(source)
        if board.disk.requests - requests > _MOST_REQUESTS:
            raise RuntimeError(f"{board.disk.requests - requests} requests at one step")
        if board.memory_reads - reads > _MOST_DESCRIPTORS:
            raise RuntimeError(f"{board.memory_reads - reads} reads of memory at one step")
        if errors.found:
            raise RuntimeError(errors.found[0].getMessage()) from (
                errors.found[0].exc_info[1] if errors.found[0].exc_info else None
            )
    whole = bytes(board.whole)
    if not (whole.startswith(_CANARY) and whole.endswith(_CANARY)):
        raise RuntimeError("memory outside the guest's was written")


def endure(data: bytes) -> None:
    """Tell one device the same again and again, numbers in it changed. Raises if it grows."""
    source = Bytes(data)
    board = Board(source)
    rest = bytearray(data[2:])
    chance = random.Random(len(data))
    blocks = []
    for number in range(2 * _ROUNDS):
        if rest:
            rest[chance.randrange(len(rest))] = chance.randrange(256)
        play(board, Bytes(bytes(rest)), _Errors())
        if number % _ROUNDS == _ROUNDS - 1:
            gc.collect()
            blocks.append(sys.getallocatedblocks())
    if blocks[1] - blocks[0] > _GROWTH:
        raise RuntimeError(f"{blocks[1] - blocks[0]} blocks of memory more after {_ROUNDS} rounds")


def attack(data: bytes) -> None:
    """Attack a device with these bytes; every so often, more than once. Raises if it does something
    that it must not."""
    errors = _Errors()
    log = logging.getLogger("pyvirtio")
    before = log.level, log.propagate
    log.addHandler(errors)
    log.propagate = False
    try:
        source = Bytes(data)
        play(Board(source), source, errors)
        if len(data) % 32 == 2:
            endure(data)
    finally:
        log.removeHandler(errors)
        log.propagate = before[1]


def main() -> None:
    """Fuzz until a fault is found or the time is over."""
    import atheris

    atheris.instrument_all()
    options = sys.argv[1:]
    if not any(option.startswith(("-max_total_time", "-runs")) for option in options):
        options.append("-max_total_time=600")
    atheris.Setup([sys.argv[0], "-max_len=2048", "-len_control=10", *options], attack)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
