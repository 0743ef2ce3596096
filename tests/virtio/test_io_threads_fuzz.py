"""Worker threads on rings of any contents: whatever a driver writes, a reset mends it."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from pyvirtio.virtio import layout as at


def settle(device: Any) -> None:
    """Wait until no thread has anything to do."""
    while True:
        device.service.drain()
        with device.lock:
            if not device.service._kicked and device.service.idle():
                return


@pytest.mark.parametrize("packed", [False, True])
def test_any_ring_is_survived(make_machine: Any, packed: bool) -> None:
    chance = random.Random(7)
    machine = make_machine(io_threads=3, packed=packed, queue_size=8)
    done = threading.Event()
    machine.mmio._line.callback = lambda level: done.set()
    device, driver = machine.device, machine.driver
    driver._wait = lambda: done.wait(30)
    for _ in range(60):
        machine.arena.give_back(machine.base)
        driver.start()
        header = machine.arena.take(64)
        ring = driver.ring
        for slot in range(8):
            kind = chance.choice([0, 1, 4, 8, 11, 13, 99])
            machine.memory.write(header, at.LITTLE.blk_request.pack(kind, 0, chance.randrange(9)))
            address = chance.choice([header, header, header + 16, ring.descriptors, 0, 1 << 63])
            length = chance.choice([0, 1, 16, 48, 512, 0xFFFF_FFFF])
            flags = chance.randrange(8)
            if packed:
                flags |= chance.choice([at.VIRTQ_DESC_F_AVAIL] * 3 + [0])
            ring.set_descriptor(slot, address, length, flags, chance.randrange(9))
            if not packed:
                ring.set_available(slot, chance.randrange(9))
        if not packed:
            ring.available_index = chance.choice([1, 2, 8, 9, 0xFFFF])
        machine.registers.notify(0)
        if chance.randrange(2):
            settle(device)
        machine.registers.status = 0
        assert machine.registers.status == 0
        assert device.service.idle()
    driver.start()
    head = driver.submit(at.VIRTIO_BLK_T_FLUSH)
    driver.kick()
    settle(device)
    assert driver.collect()[head].status == 0
    assert len([each for each in threading.enumerate() if each in device.service._threads]) == 3
    device.detach()
