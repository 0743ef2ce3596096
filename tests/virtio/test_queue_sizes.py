"""Queues up to the largest size (§2.7, §2.8), driven by the library's own driver."""

from __future__ import annotations

from typing import Any

import pytest

from pyvirtio import GuestMemory, NullDisk, VirtioBlk, VirtioMmio
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Arena, BlockDriver, Buffer, Registers

SIZE = at.QUEUE_SIZE_MAX


@pytest.mark.parametrize("packed", [False, True])
def test_the_largest_queue_goes_around(packed: bool) -> None:
    ram = bytearray(4 << 20)
    memory = GuestMemory.from_buffer(ram)
    mmio = VirtioMmio(VirtioBlk(NullDisk(1 << 20), queue_size=SIZE, packed=packed), memory)
    driver = BlockDriver(
        Registers(mmio.read, mmio.write), memory, Arena(0, len(ram)), queue_size=SIZE
    )
    driver.start()
    ring: Any = driver.ring
    assert ring.size == SIZE
    header, status = driver.arena.take(16), driver.arena.take(16)
    memory.write(header, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_FLUSH, 0, 0))
    chain = [Buffer(header, 16), Buffer(status, 1, True)]
    for _ in range(5):  # twice around a packed ring, and past 65536 entries
        for _ in range(SIZE // 2):
            ring.add(chain)
        ring.publish()
        mmio.write(at.MMIO_QUEUE_NOTIFY, 4, 0)
        assert len(ring.collect()) == SIZE // 2
    assert not driver.registers.status & at.STATUS_NEEDS_RESET


def test_a_chain_as_long_as_the_largest_queue(make_machine: Any) -> None:
    machine = make_machine(queue_size=SIZE)
    machine.driver.start()
    cuts = [16] + [1] * 20000
    done = machine.driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=20480, cuts=cuts)
    assert (done.status, done.used_length) == (0, 20481)
    done = machine.driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=20480, cuts=cuts, indirect=0)
    assert (done.status, done.used_length) == (0, 20481)
