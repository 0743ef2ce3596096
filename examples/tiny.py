"""The plug in its simplest form: one file, a bytearray for RAM, no emulator, no driver library.

What a guest's driver would do is written out by hand: it brings the device up through its
registers, lays out one request in RAM, rings the bell and reads the sector.

    python examples/tiny.py [IMAGE]
"""

from __future__ import annotations

import struct
import sys

import pyvirtio

RAM_BASE = 0x8000_0000
SECTOR = 512

# Registers of virtio-mmio (virtio 1.4, section 4.2.2).
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x020, 0x024
QUEUE_SEL, QUEUE_SIZE, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x038, 0x044, 0x050
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x060, 0x064, 0x070
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x080, 0x090, 0x0A0
CONFIG = 0x100

# Where the driver puts things in RAM.
DESCRIPTORS, AVAILABLE, USED, HEADER, STATUS_BYTE, DATA = 0x0, 0x100, 0x200, 0x300, 0x310, 0x400
QUEUE_LENGTH = 4
NEXT, WRITE = 1, 2  # flags of a descriptor
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8


class Guest:
    """A guest that knows how to read one sector."""

    def __init__(self, disk: pyvirtio.Disk) -> None:
        self.ram = bytearray(0x1000)
        memory = pyvirtio.GuestMemory.from_buffer(self.ram, RAM_BASE)
        self.interrupts = 0
        self.mmio = pyvirtio.VirtioMmio(pyvirtio.VirtioBlk(disk), memory, self.interrupt)
        self.requests = 0

    def interrupt(self, level: bool) -> None:
        """The device's interrupt line changes."""
        self.interrupts += level

    def store(self, register: int, value: int) -> None:
        """The guest writes a register."""
        self.mmio.write(register, 4, value)

    def start(self) -> None:
        """Bring the device up (section 3.1.1)."""
        self.store(STATUS, 0)
        self.store(STATUS, ACKNOWLEDGE | DRIVER)
        self.store(DRIVER_FEATURES_SEL, 1)
        self.store(DRIVER_FEATURES, 1)  # VIRTIO_F_VERSION_1 and nothing else
        self.store(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        self.store(QUEUE_SEL, 0)
        self.store(QUEUE_SIZE, QUEUE_LENGTH)
        for register, part in (
            (QUEUE_DESC, DESCRIPTORS),
            (QUEUE_DRIVER, AVAILABLE),
            (QUEUE_DEVICE, USED),
        ):
            self.store(register, RAM_BASE + part)
            self.store(register + 4, 0)
        self.store(QUEUE_READY, 1)
        self.store(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def capacity(self) -> int:
        """Sectors of 512 bytes."""
        return self.mmio.read(CONFIG, 4) | self.mmio.read(CONFIG + 4, 4) << 32

    def read_sector(self, sector: int) -> bytes:
        """One request: a header, room for the data, room for the status (section 5.2.6)."""
        struct.pack_into("<IIQ", self.ram, HEADER, 0, 0, sector)  # type 0: read
        self.ram[STATUS_BYTE] = 0xFF
        for index, (where, length, flags) in enumerate(
            ((HEADER, 16, NEXT), (DATA, SECTOR, NEXT | WRITE), (STATUS_BYTE, 1, WRITE))
        ):
            descriptor = (RAM_BASE + where, length, flags, index + 1)
            struct.pack_into("<QIHH", self.ram, DESCRIPTORS + 16 * index, *descriptor)
        slot = self.requests % QUEUE_LENGTH
        self.requests += 1
        struct.pack_into("<H", self.ram, AVAILABLE + 4 + 2 * slot, 0)  # the chain starts at 0
        struct.pack_into("<H", self.ram, AVAILABLE + 2, self.requests & 0xFFFF)
        self.store(QUEUE_NOTIFY, 0)

        done = struct.unpack_from("<H", self.ram, USED + 2)[0]
        status = self.ram[STATUS_BYTE]
        self.store(INTERRUPT_ACK, self.mmio.read(INTERRUPT_STATUS, 4))
        if done != self.requests & 0xFFFF or status != 0:
            raise OSError(f"sector {sector} cannot be read (status {status})")
        return bytes(self.ram[DATA : DATA + SECTOR])


def main(arguments: list[str]) -> int:
    """Read the first sector of an image, or of a disk made for it, and show its start."""
    if arguments:
        disk = pyvirtio.open_disk(arguments[0], read_only=True)
    else:
        disk = pyvirtio.MemoryDisk(64 * SECTOR)
        disk.write(0, b"Hello from sector 0")
    with disk:
        guest = Guest(disk)
        guest.start()
        data = guest.read_sector(0)
        print(f"{guest.capacity()} sectors, {guest.interrupts} interrupt")
        print(data[:32])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
