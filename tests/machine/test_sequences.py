"""Random sequences of our machine snapshots and of qemu-img's, on images that both use in turns.

``PYVIRTIO_SEQUENCES`` says how many; ten are a slice of the hundred that are run now and then.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio.machine.dirty import DirtyPages
from pyvirtio.machine.snapshots import MachineSnapshots
from pyvirtio.machine.state import Machine
from support.peers import requires
from support.qemu import QemuIo, qemu_check, qemu_img, qemu_img_json

COUNT = int(os.environ.get("PYVIRTIO_SEQUENCES", "10"))
STEPS = 12
DISK, RAM = 1 << 20, 200_000
LAYOUTS: list[dict[str, Any]] = [
    {"cluster_size": 4096},
    {"cluster_size": 512},
    {},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 4096, "compression_type": "zstd"},
]

pytestmark = requires("qemu-img", "qemu-io")


class Sequence:
    """One image, and what every snapshot of it has to hold."""

    def __init__(self, path: Path, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.path = path
        self.options = LAYOUTS[seed % len(LAYOUTS)]
        self.compress = "compression_type" in self.options
        self.ram = bytearray(RAM)
        self.dirty = DirtyPages(RAM) if chance.random() < 0.4 else None
        self.find = chance.choice(("compare", "hash"))
        self.kept: dict[str, tuple[bytes, bytes | None]] = {}
        """By name: the disk, and RAM if it is a snapshot of a machine."""
        pyvirtio.create_disk(path, DISK, **self.options).close()
        self.open()

    def open(self) -> None:
        self.disk: Any = pyvirtio.open_disk(self.path)
        dirty = {} if self.dirty is None else {"main": self.dirty}
        self.snapshots = MachineSnapshots(
            Machine({}, {"main": self.ram}),
            [self.disk],
            dirty=dirty,
            find_dirty=self.find,  # type: ignore[arg-type]
            compress=self.compress,
        )

    def run_guest(self) -> None:
        chance = self.chance
        for _ in range(chance.randrange(8)):
            start = chance.randrange(RAM)
            data = chance.randbytes(chance.randint(1, 6000))[: RAM - start]
            if chance.random() < 0.3:
                data = bytes(len(data))
            self.ram[start : start + len(data)] = data
            if self.dirty is not None:
                self.dirty.mark(start, len(data))
        for _ in range(chance.randrange(4)):
            start = chance.randrange(DISK // 512 - 64) * 512
            self.disk.write(start, bytes([chance.randrange(256)]) * 512 * chance.randint(1, 64))

    def step(self, number: int) -> None:
        chance, names = self.chance, sorted(self.kept)
        machines = [name for name in names if self.kept[name][1] is not None]
        self.run_guest()
        what = chance.choice(("save", "save", "load", "delete", "theirs -c", "-a", "-d"))
        if what == "save":
            name = f"ours {number}"
            self.snapshots.savevm(name, icount=number)
            self.kept[name] = self.contents(), bytes(self.ram)
        elif what == "load" and machines:
            name = chance.choice(machines)
            self.snapshots.loadvm(name)
            assert (self.contents(), bytes(self.ram)) == self.kept[name]
        elif what == "delete" and machines:
            name = chance.choice(machines)
            self.snapshots.delvm(name)
            del self.kept[name]
        elif what == "theirs -c":
            self.theirs("-c", f"theirs {number}")
            self.kept[f"theirs {number}"] = self.contents(), None
        elif what == "-a" and names:
            name = chance.choice(names)
            self.theirs("-a", name)
            assert self.contents() == self.kept[name][0]
        elif what == "-d" and names:
            name = chance.choice(names)
            self.theirs("-d", name)
            del self.kept[name]

    def contents(self) -> bytes:
        return bytes(self.disk.read(0, DISK))

    def theirs(self, flag: str, name: str) -> None:
        """qemu-img's turn: the image is closed, and opened as by another process."""
        self.disk.close()
        qemu_img("snapshot", flag, name, self.path)
        qemu_check(self.path)
        kept = self.kept.get(name)
        if flag == "-a" and kept is not None and kept[1] is not None:
            self.compare_vm_state(name, kept[1])
        self.open()

    def compare_vm_state(self, name: str, ram: bytes) -> None:
        """RAM lies behind the stream, to its end: look at some of it."""
        facts = qemu_img_json("info", self.path)["snapshots"]
        size = next(fact["vm-state-size"] for fact in facts if fact["name"] == name)
        with QemuIo(self.path) as io:
            for _ in range(3):
                at = self.chance.randrange((RAM - 512) // 4096) * 4096
                shown = io.command(f"read -b -v {size - RAM + at} 512").replace(" ", "")
                assert ram[at : at + 16].hex() in shown

    def end(self) -> None:
        """Everything that is listed loads; the image is sound, and small when all is gone."""
        listed = [snapshot.name for snapshot in self.disk.snapshots]
        assert sorted(listed) == sorted(self.kept)
        for name, (disk, ram) in self.kept.items():
            if ram is not None:
                self.snapshots.loadvm(name)
                assert (self.contents(), bytes(self.ram)) == (disk, ram)
        self.disk.close()
        qemu_check(self.path)
        with pyvirtio.open_disk(self.path) as disk:
            for name in listed:
                disk.snapshots.delete(name)  # type: ignore[attr-defined]
            assert disk.check().clean  # type: ignore[attr-defined]
        qemu_check(self.path)


@pytest.mark.parametrize("seed", range(COUNT))
def test_ours_and_qemus_snapshots_mix(tmp_path: Path, seed: int) -> None:
    sequence = Sequence(tmp_path / "disk", seed)
    try:
        for number in range(STEPS):
            sequence.step(number)
        sequence.end()
    finally:
        sequence.disk.close()
