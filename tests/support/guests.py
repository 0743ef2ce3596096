"""A machine with a RAM and nothing else, and its snapshots."""

from __future__ import annotations

import random
from typing import Any

import pyvirtio
from pyvirtio import Machine, MachineSnapshots, MemoryDisk
from pyvirtio.machine.dirty import PAGE

RAM = 100 * PAGE + 1000


class Guest:
    """A machine with one RAM, on a disk or two."""

    def __init__(self, *disks: Any, size: int = RAM, **how: Any) -> None:
        self.disks = disks or (new_disk(),)
        self.chance = random.Random(1)
        self.ram = bytearray(self.chance.randbytes(size))
        self.machine = Machine({}, {"main": self.ram})
        self.snapshots = MachineSnapshots(self.machine, self.disks, **how)

    def touch(self, *pages: int) -> None:
        for page in pages:
            start = page * PAGE
            length = min(PAGE, len(self.ram) - start)
            self.ram[start : start + length] = self.chance.randbytes(length)

    def save(self, name: str) -> Any:
        self.snapshots.savevm(name)
        return self.snapshots.last_save


def new_disk(size: int = 1 << 20, **options: Any) -> Any:
    options.setdefault("cluster_size", PAGE)
    return pyvirtio.create_disk(MemoryDisk(growable=True), size, **options)


def parents(guest: Guest) -> dict[str, str | None]:
    return {
        node.snapshot.name: node.parent.name if node.parent else None
        for node in guest.snapshots.tree()
    }
