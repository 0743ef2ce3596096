"""The adapters for other shapes of bus; and a guest's code in two emulators from PyPI."""

from __future__ import annotations

from typing import Any

import pytest

from pyvirtio.virtio import layout as at
from pyvirtio.virtio.adapters import BytesDevice, WordDevice, map_unicorn
from pyvirtio.virtio.driver import Arena, BlockDriver, Registers


def test_bytes_device(make_machine: Any) -> None:
    machine = make_machine()
    bus = BytesDevice(machine.mmio, base=0x1000_1000)
    machine.driver.registers = Registers(
        lambda offset, n: int.from_bytes(bus.load(0x1000_1000 + offset, n), "little"),
        lambda offset, n, value: bus.store(0x1000_1000 + offset, value.to_bytes(n, "little")),
    )
    assert bus.load(0x1000_1000, 4) == b"virt"
    machine.driver.start()
    machine.driver.write(1, b"b" * 512)
    assert machine.driver.read(1, 1) == b"b" * 512


def test_word_device(make_machine: Any) -> None:
    machine = make_machine()
    bus = WordDevice(machine.mmio, base=0x4000)
    loads = {1: bus.read8, 2: bus.read16, 4: bus.read32}
    stores = {1: bus.write8, 2: bus.write16, 4: bus.write32}
    machine.driver.registers = Registers(
        lambda offset, n: loads[n](0x4000 + offset),
        lambda offset, n, value: stores[n](0x4000 + offset, value),
    )
    machine.driver.start()
    machine.driver.write(2, b"w" * 512)
    assert machine.driver.read(2, 1) == b"w" * 512
    for store, width in ((bus.write8, 1), (bus.write16, 2)):
        store(0x4000 + 0x120, 0)
        assert loads[width](0x4000 + 0x120) & 0xFF == 0
        bus.write8(0x4000 + 0x120, 1)


# -- guest code: RV64 instructions that drive the disk ---------------------------------------------

MMIO = 0x1000_1000
RAM = 0x8000_0000
HEADER, DATA, STATUS = 0x4000, 0x5000, 0x4800
DESCRIPTORS, AVAILABLE, USED = 0x1000, 0x2000, 0x3000
ZERO, T0, T1, T2, S0, S1 = 0, 5, 6, 7, 8, 9


class Assembler:
    """As much of RV64I as a small driver needs."""

    def __init__(self) -> None:
        self.words: list[int] = []

    def lui(self, rd: int, value: int) -> None:
        self.words.append(value & 0xFFFFF000 | rd << 7 | 0x37)

    def addi(self, rd: int, rs: int, value: int, kind: int = 0) -> None:
        self.words.append((value & 0xFFF) << 20 | rs << 15 | kind << 12 | rd << 7 | 0x13)

    def set(self, rd: int, value: int) -> None:
        """A 32-bit value, zero-extended."""
        self.lui(rd, value + 0x800)
        self.words.append((value & 0xFFF) << 20 | rd << 15 | rd << 7 | 0x1B)  # addiw
        self.addi(rd, rd, 32, 1)  # slli
        self.addi(rd, rd, 32, 5)  # srli

    def load(self, rd: int, rs: int, offset: int, width: int = 2) -> None:
        self.words.append((offset & 0xFFF) << 20 | rs << 15 | width << 12 | rd << 7 | 0x03)

    def store(self, source: int, rs: int, offset: int, width: int = 2) -> None:
        high, low = offset >> 5 & 0x7F, offset & 31
        self.words.append(high << 25 | source << 20 | rs << 15 | width << 12 | low << 7 | 0x23)

    def bne(self, a: int, b: int, offset: int) -> None:
        bits = (offset >> 12 & 1) << 31 | (offset >> 5 & 63) << 25
        bits |= (offset >> 1 & 15) << 8 | (offset >> 11 & 1) << 7
        self.words.append(bits | b << 20 | a << 15 | 1 << 12 | 0x63)

    def forever(self) -> None:
        self.words.append(0x6F)  # jal zero, 0

    def register(self, offset: int, value: int) -> None:
        """Write an MMIO register; S0 is the slot."""
        self.set(T0, value)
        self.store(T0, S0, offset)

    def memory(self, address: int, value: int, width: int = 2) -> None:
        """Write guest memory at RAM + address."""
        self.set(T1, RAM + address)
        self.set(T0, value)
        self.store(T0, T1, 0, width)

    def code(self) -> bytes:
        return b"".join(word.to_bytes(4, "little") for word in self.words)


def guest_program() -> bytes:
    """Set the device up, read sector 3 to DATA, add 1 to its first byte, write it to sector 5."""
    a = Assembler()
    a.set(S0, MMIO)
    for status in (0, 1, 3):
        a.register(at.MMIO_STATUS, status)
    a.register(at.MMIO_DRIVER_FEATURES_SEL, 1)
    a.register(at.MMIO_DRIVER_FEATURES, 1)
    a.register(at.MMIO_STATUS, 11)
    a.register(at.MMIO_QUEUE_SEL, 0)
    a.register(at.MMIO_QUEUE_SIZE, 4)
    for low, area in (
        (at.MMIO_QUEUE_DESC_LOW, DESCRIPTORS),
        (at.MMIO_QUEUE_DRIVER_LOW, AVAILABLE),
        (at.MMIO_QUEUE_DEVICE_LOW, USED),
    ):
        a.register(low, RAM + area)
        a.register(low + 4, 0)
    a.register(at.MMIO_QUEUE_READY, 1)
    a.register(at.MMIO_STATUS, 15)
    for number, (kind, sector, flags) in enumerate(((0, 3, 3), (1, 5, 1))):
        a.memory(HEADER, kind)
        a.memory(HEADER + 8, sector)
        for index, (address, length, flag, following) in enumerate(
            ((HEADER, 16, 1, 1), (DATA, 512, flags, 2), (STATUS, 1, 2, 0))
        ):
            a.memory(DESCRIPTORS + 16 * index, RAM + address)
            a.memory(DESCRIPTORS + 16 * index + 8, length)
            a.memory(DESCRIPTORS + 16 * index + 12, following << 16 | flag)
        a.memory(AVAILABLE + 4 + 2 * number, 0, 1)
        a.memory(AVAILABLE + 2, number + 1, 1)
        a.register(at.MMIO_QUEUE_NOTIFY, 0)
        a.set(T1, RAM + USED)  # wait until used.idx says so
        a.set(T2, number + 1)
        a.load(T0, T1, 2, 1)
        a.bne(T0, T2, -4)
        a.load(T0, S0, at.MMIO_INTERRUPT_STATUS)
        a.store(T0, S0, at.MMIO_INTERRUPT_ACK)
        if number == 0:
            a.set(T1, RAM + DATA)
            a.load(T0, T1, 0, 4)
            a.addi(T0, T0, 1)
            a.store(T0, T1, 0, 0)
    a.forever()
    return a.code()


def sector_3() -> bytes:
    return bytes(each % 251 for each in range(512))


def expected_sector_5() -> bytes:
    return bytes([1]) + sector_3()[1:]


def test_guest_code_in_tinyrv(make_disk: Any) -> None:
    """tinyrv (PyPI): MMIO by hooks of 32-bit loads and stores, RAM by copy_in and copy_out."""
    import struct

    import pyvirtio

    tinyrv = pytest.importorskip("tinyrv", reason="tinyrv is not installed")

    class Computer(tinyrv.sim):  # type: ignore[misc, name-defined]
        bus: WordDevice

        def notify_loading(self, addr: int) -> None:
            if MMIO <= addr < MMIO + at.MMIO_SIZE:
                struct.pack_into("<I", *self.page_and_offset(addr), self.bus.read32(addr))

        def notify_stored(self, addr: int) -> None:
            if MMIO <= addr < MMIO + at.MMIO_SIZE:
                (value,) = struct.unpack_from("<I", *self.page_and_offset(addr))
                self.bus.write32(addr, value)

    cpu = Computer(xlen=64)
    disk = make_disk(8192)
    disk.content[3 * 512 : 4 * 512] = sector_3()
    memory = pyvirtio.GuestMemory.from_callbacks(cpu.copy_out, cpu.copy_in)
    levels: list[bool] = []
    mmio = slot_with(disk, memory, levels)
    cpu.bus = WordDevice(mmio, base=MMIO)
    cpu.copy_in(RAM, guest_program())
    cpu.pc = RAM
    for _ in range(2000):
        before = cpu.pc
        cpu.step(trace=False)
        if cpu.pc == before:
            break
    assert cpu.copy_out(RAM + DATA, 512) == expected_sector_5()
    assert disk.content[5 * 512 : 6 * 512] == expected_sector_5()
    assert cpu.copy_out(RAM + STATUS, 1) == b"\0"
    assert levels == [True, False] * 2


def slot_with(disk: Any, memory: Any, levels: list[bool]) -> Any:
    import pyvirtio

    return pyvirtio.VirtioMmio(pyvirtio.VirtioBlk(disk), memory, levels.append)


def test_guest_code_in_unicorn(make_disk: Any) -> None:
    """Unicorn (PyPI): mmio_map, and RAM shared without copies."""
    import ctypes
    import mmap

    import pyvirtio

    unicorn = pytest.importorskip("unicorn", reason="unicorn is not installed")
    uc = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV64)
    ram = mmap.mmap(-1, 1 << 20)
    anchor = ctypes.c_char.from_buffer(ram)
    uc.mem_map_ptr(RAM, len(ram), unicorn.UC_PROT_ALL, ctypes.addressof(anchor))
    disk = make_disk(8192)
    disk.content[3 * 512 : 4 * 512] = sector_3()
    levels: list[bool] = []
    mmio = slot_with(disk, pyvirtio.GuestMemory.from_buffer(ram, RAM), levels)
    map_unicorn(uc, mmio, MMIO)
    ram[: len(guest_program())] = guest_program()
    uc.emu_start(RAM, RAM + len(guest_program()) - 4, count=2000)
    assert ram[DATA : DATA + 512] == expected_sector_5()
    assert disk.content[5 * 512 : 6 * 512] == expected_sector_5()
    assert levels == [True, False] * 2


def test_the_drivers_arena_has_an_end(make_machine: Any) -> None:
    machine = make_machine()
    driver = BlockDriver(machine.registers, machine.memory, Arena(0x8000_0000, 300))
    with pytest.raises(MemoryError, match="guest memory"):
        driver.start()
