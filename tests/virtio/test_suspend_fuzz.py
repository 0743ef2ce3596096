"""Suspended, woken, paused, resumed, resized, in any order: no request is lost, none done twice."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from pyvirtio import ErrorPolicy
from pyvirtio.virtio import layout as at

PATIENCE = 30
SLOTS = 4
"""Requests at a time: each takes three of sixteen entries, or one with a table."""


class Player:
    """A driver and a host that do as they are told, and know what has to come of it."""

    def __init__(self, machine: Any, chance: random.Random) -> None:
        self.machine = machine
        self.chance = chance
        self.open: dict[int, int] = {}
        """Heads that are to come back, and their sectors."""
        self.expected = bytearray(len(machine.disk.content))
        self.number = 0
        self.asked = False
        """SUSPEND was asked for."""

    def collect(self) -> None:
        for head, done in self.machine.driver.collect().items():
            assert done.status == 0
            del self.open[head]

    def write(self) -> None:
        if self.asked or len(self.open) >= SLOTS:
            return
        self.number += 1
        sector = self.number % 1000  # one that is not under way
        data = self.number.to_bytes(8, "little") * 64
        head = self.machine.driver.submit(at.VIRTIO_BLK_T_OUT, sector, data)
        self.open[head] = sector
        self.expected[512 * sector : 512 * sector + 512] = data
        if self.chance.randrange(3):
            self.machine.driver.kick()
        else:
            self.machine.driver.ring.publish()
            self.machine.registers.notify(0)

    def suspend(self) -> None:
        self.machine.registers.status |= at.STATUS_SUSPEND
        self.asked = True

    def wake(self) -> None:
        """A driver waits for SUSPEND first; that may take until the host goes on."""
        if self.asked and self.machine.device.suspended:
            self.machine.registers.status |= at.STATUS_DRIVER_OK
            self.asked = False

    def look(self) -> None:
        """A suspended device is quiet."""
        if not self.machine.device.suspended:
            return
        self.machine.registers.take_interrupt()
        before = bytes(self.machine.ram)
        self.machine.registers.notify(0)
        self.machine.mmio.poll()
        assert self.machine.registers.take_interrupt() == 0
        assert bytes(self.machine.ram) == before
        assert self.machine.registers.status & 0x14 == at.STATUS_SUSPEND

    def fail(self) -> None:
        self.machine.disk.error = OSError("no")

    def mend(self) -> None:
        self.machine.disk.error = None
        self.machine.device.resume()

    def grow(self) -> None:
        self.machine.disk.truncate(len(self.machine.disk.content) + 512)
        self.expected += bytes(512)

    def step(self) -> None:
        device = self.machine.device
        self.chance.choice(
            [
                *[self.write] * 6,
                *[self.collect] * 3,
                self.machine.mmio.poll,
                self.suspend,
                self.suspend,
                *[self.wake] * 3,
                self.look,
                device.pause,
                device.resume,
                self.fail,
                *[self.mend] * 2,
                self.grow,
            ]
        )()

    def finish(self) -> None:
        """Everything goes on: all has to come back."""
        deadline = time.monotonic() + PATIENCE
        self.mend()
        while self.open or self.asked:
            self.machine.mmio.poll()
            self.wake()
            self.collect()
            assert time.monotonic() < deadline, self.open
        assert self.machine.disk.content == self.expected
        assert self.machine.registers.status == 15
        assert self.machine.driver.capacity == len(self.expected) // 512


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"notify": "deferred"}, {"io_threads": 3}], ids=str)
def test_no_request_is_lost(make_started: Any, options: dict[str, Any], packed: bool) -> None:
    policy = ErrorPolicy(reads="stop", writes="stop")
    for seed in range(12):
        machine = make_started(packed=packed, errors=policy, **options)
        player = Player(machine, random.Random(seed))
        for _ in range(150):
            player.step()
        player.finish()
        machine.device.detach()
