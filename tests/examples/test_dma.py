"""The disk in its slot: a request by the guest, and code that a request overwrites."""

from __future__ import annotations

import pytest

import pyvirtio
from pyvirtio.virtio.driver import Arena, BlockDriver, Buffer, Registers

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.layout import RAM_BASE, VIRTIO_BASE

ARENA = RAM_BASE + 0x30_0000
HEADER, STATUS, CODE = RAM_BASE + 0x40_0000, RAM_BASE + 0x40_1000, RAM_BASE + 0x40_2000
QUEUE_NOTIFY = 0x50
RETURN_ONE = bytes.fromhex("13051000 67800000")  # addi a0, zero, 1; ret
RETURN_TWO = bytes.fromhex("13052000 67800000")

CALL_KICK_CALL = f"""
    li s1, {CODE:#x}
    ld s2, 0(s0)             # the address of used.idx
    lhu s3, 0(s2)
    li s4, 100
warm: jalr s1
    addi s4, s4, -1
    bne s4, zero, warm
    sd a0, 8(s0)
    li t0, {VIRTIO_BASE:#x}
    sw zero, {QUEUE_NOTIFY}(t0)
wait: lhu t0, 0(s2)
    beq t0, s3, wait
    fence.i
    jalr s1
    sd a0, 16(s0)
"""


@pytest.fixture
def machine(guest):
    """A guest that calls code, notifies the disk, and calls the code again.

    One read of sector 0 over the code is in the ring, and the device set up.
    """
    disk = pyvirtio.MemoryDisk(4096)
    disk.write(0, RETURN_TWO)
    machine = guest(CALL_KICK_CALL, disks=[disk])
    memory = pyvirtio.GuestMemory.from_buffer(machine.board.ram, RAM_BASE)
    slot = machine.board.slots[0]
    driver = BlockDriver(Registers(slot.read, slot.write), memory, Arena(ARENA, 1 << 16))
    driver.start()
    memory.write(HEADER, bytes(16))
    memory.write(STATUS, b"\xff")
    memory.write(CODE, RETURN_ONE)
    driver.ring.add([Buffer(HEADER, 16), Buffer(CODE, 512, True), Buffer(STATUS, 1, True)])
    driver.ring.publish()
    machine.put(0, driver.ring.used + 2)
    return machine


def test_code_that_the_disk_overwrites_is_run_as_it_is_now(machine):
    assert machine.run()[1:3] == [1, 2]
    assert machine.board.ram[STATUS - RAM_BASE] == 0


def test_notification_ends_the_slice_so_a_polling_guest_need_not_spin(machine):
    machine.run(steps=3)
