"""Machine snapshots: what an increment costs beside a full save, and beside QEMU's savevm.

    python benchmarks/machine.py [--ram MIB] [--disk MIB] [--rounds N] [--snapshots N] [--folder F]

A machine of 128 MiB of RAM, random bytes all of it, and a disk with 1 GiB allocated in clusters of
64 KiB. Between two snapshots the guest writes 1 % of its pages, evenly spread, and a little to its
disk. RAM is kept in an image of its own with clusters of 4 KiB, and for comparison in the disk's.
Everything is on disk, with all its fsyncs. Limits: an increment writes at most 1.5 times the dirty
pages and takes at most a tenth of a full save; all in plain Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvirtio
from pyvirtio.backend.file import FileDisk
from pyvirtio.machine.dirty import PAGE, DirtyPages

MIB = 1 << 20
SEED = 1
LOADED = 20
"""Of many snapshots, how many are loaded again."""
MOST_BYTES, MOST_TIME = 1.5, 0.1


class CountingFile(FileDisk):
    """A file that knows what was done to it."""

    written = 0
    flushing = 0.0
    flushes = 0

    def writev(self, offset: int, buffers: Iterable[Any], *, fua: bool = False) -> None:
        buffers = list(buffers)
        self.written += sum(memoryview(buffer).nbytes for buffer in buffers)
        super().writev(offset, buffers, fua=fua)

    def flush(self) -> None:
        start = time.perf_counter()
        super().flush()
        self.flushing += time.perf_counter() - start
        self.flushes += 1

    def reset(self) -> None:
        self.written, self.flushing, self.flushes = 0, 0.0, 0


@dataclass
class Cost:
    """One savevm: seconds by part, bytes by kind."""

    total: float
    busy: float
    """Of the processor."""
    finding: float
    writing: float
    flushing: float
    flushes: int
    tables: float
    """Refcounts and tables: what is left."""
    dirty: int
    ram: int
    stream: int
    metadata: int


class Machine:
    """RAM, its dirty pages, a disk, and where snapshots of them go."""

    def __init__(self, folder: Path, ram_size: int, disk_size: int, *, own_image: bool) -> None:
        self.chance = random.Random(SEED)
        self.ram = bytearray(self.chance.randbytes(ram_size))
        self.dirty = DirtyPages(ram_size)
        self.files = [CountingFile.create(folder / "disk.qcow2", growable=True)]
        self.disk = pyvirtio.create_disk(self.files[0], disk_size)
        for offset in range(0, disk_size, MIB):
            self.disk.write(offset, self.chance.randbytes(MIB))
        self.disk.flush()
        self.disks = [self.disk]
        if own_image:
            self.files.append(CountingFile.create(folder / "ram.qcow2", growable=True))
            self.disks.append(pyvirtio.create_disk(self.files[1], MIB, cluster_size=PAGE))
        self.snapshots = pyvirtio.MachineSnapshots(
            pyvirtio.Machine({}, {"main": self.ram}),
            self.disks,
            state_disk=self.disks[-1],
            dirty={"main": self.dirty},
        )

    def run(self) -> None:
        """1 % of RAM is written, and a few clusters of the disk."""
        for page in self.chance.sample(range(len(self.ram) // PAGE), len(self.ram) // PAGE // 100):
            self.ram[page * PAGE + 8 : page * PAGE + 24] = self.chance.randbytes(16)
            self.dirty.pages[page] = 1
        for _ in range(4):
            offset = self.chance.randrange(self.disk.size // PAGE) * PAGE
            self.disk.write(offset, self.chance.randbytes(PAGE))

    def save(self, name: str) -> Cost:
        for file in self.files:
            file.reset()
        start, busy = time.perf_counter(), time.process_time()
        self.snapshots.savevm(name)
        total, busy = time.perf_counter() - start, time.process_time() - busy
        did = self.snapshots.last_save
        assert did is not None
        written = sum(file.written for file in self.files)
        flushing = sum(file.flushing for file in self.files)
        return Cost(
            total,
            busy,
            did.finding,
            did.writing,
            flushing,
            sum(file.flushes for file in self.files),
            total - did.finding - did.writing - flushing,
            did.pages * PAGE,
            did.ram_bytes,
            did.stream_bytes,
            written - did.ram_bytes - did.stream_bytes,
        )

    def close(self) -> None:
        for disk in self.disks:
            disk.close()


def middle(costs: list[Cost]) -> Cost:
    """The medians."""
    return Cost(*(statistics.median(getattr(c, name) for c in costs) for name in vars(costs[0])))


def show(title: str, cost: Cost) -> None:
    print(
        f"  {title:22}{cost.total * 1e3:8.1f} ms ({cost.busy * 1e3:.1f} busy): "
        f"find dirty {cost.finding * 1e3:.1f}, "
        f"write {cost.writing * 1e3:.1f}, refcounts and tables {cost.tables * 1e3:.1f}, "
        f"{cost.flushes:.0f} fsyncs {cost.flushing * 1e3:.1f}\n"
        f"  {'':22}{cost.ram / 1024:8.0f} KiB of RAM ({cost.ram / cost.dirty:.2f} x dirty), "
        f"stream {cost.stream / 1024:.0f} KiB, metadata {cost.metadata / 1024:.0f} KiB",
        flush=True,
    )


def compare_saves(folder: Path, options: argparse.Namespace, *, own_image: bool) -> bool:
    """Full saves and increments in turns; true if an increment is as cheap as it has to be."""
    where = "an image of its own, 4 KiB clusters" if own_image else "the disk's image, 64 KiB"
    print(f"RAM in {where}:")
    machine = Machine(folder, options.ram * MIB, options.disk * MIB, own_image=own_image)
    machine.save("first")
    full: list[Cost] = []
    increments: list[Cost] = []
    for number in range(options.rounds):
        for _ in range(4):
            machine.run()
            increments.append(machine.save(f"increment {len(increments)}"))
        machine.run()
        machine.snapshots.forget()
        full.append(machine.save(f"full {number}"))
    machine.close()
    one, other = middle(full), middle(increments)
    show("full save", one)
    show("increment", other)
    ratio, factor = other.total / one.total, other.ram / other.dirty
    print(f"  time {ratio:.3f} of a full save, RAM written {factor:.2f} x the dirty pages")
    return ratio <= MOST_TIME and factor <= MOST_BYTES


LOAD = """
import hashlib, json, sys, time, pyvirtio
folder, size, names = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
ram = bytearray(size)
disks = [pyvirtio.open_disk(f"{folder}/{name}.qcow2") for name in ("disk", "ram")]
snapshots = pyvirtio.MachineSnapshots(
    pyvirtio.Machine({}, {"main": ram}), disks, state_disk=disks[1]
)
for name in names:
    start, busy = time.perf_counter(), time.process_time()
    snapshots.loadvm(name)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    print(json.dumps([name, seconds, busy, hashlib.sha256(ram).hexdigest()]), flush=True)
for disk in disks:
    disk.close()
"""


def many(folder: Path, options: argparse.Namespace) -> None:
    """Many snapshots in one image; some are loaded in another process."""
    machine = Machine(folder, options.ram * MIB, options.disk * MIB, own_image=True)
    hashes: dict[str, str] = {}
    costs: list[Cost] = []
    count = options.snapshots
    chosen = set(random.Random(SEED).sample(range(count), min(LOADED, count)))
    for number in range(count):
        machine.run()
        costs.append(machine.save(f"s{number}"))
        if number in chosen:
            hashes[f"s{number}"] = hashlib.sha256(machine.ram).hexdigest()
    machine.close()
    print(f"{count} snapshots, RAM in an image of its own:")
    tenth = max(1, len(costs) // 10)
    show("the first tenth", middle(costs[1 : tenth + 1] or costs))
    show("the last tenth", middle(costs[-tenth:]))
    size = (folder / "ram.qcow2").stat().st_size
    dirty, stream = sum(cost.dirty for cost in costs), sum(cost.stream for cost in costs)
    tables = size_of_tables(folder / "ram.qcow2")
    print(
        f"  the RAM's image has {size / MIB:.0f} MiB; dirty pages {dirty / MIB:.0f}, streams "
        f"{stream / MIB:.0f}, tables {tables / MIB:.0f}: {size / (dirty + stream + tables):.3f} "
        "of their sum"
    )
    subprocess.run(["qemu-img", "check", "-q", folder / "ram.qcow2"], check=True)
    subprocess.run(["qemu-img", "check", "-q", folder / "disk.qcow2"], check=True)
    names = random.Random(SEED).sample(sorted(hashes), len(hashes))
    command = [sys.executable, "-c", LOAD, folder, str(options.ram * MIB), json.dumps(names)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    loads = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [name for name, _, _, found in loads if found != hashes[name]]
    print(f"  {len(loads)} loaded by a fresh process: {len(wrong)} wrong hashes")
    first, half = loads[0], sorted(loads[1:], key=lambda load: int(load[0][1:]))
    print(f"  the first one {first[1] * 1e3:.0f} ms ({first[2] * 1e3:.0f} busy)")
    for title, part in (("earlier", half[: len(half) // 2]), ("later", half[len(half) // 2 :])):
        wall, busy = (statistics.median(load[i] for load in part or [first]) for i in (1, 2))
        print(f"  the {title} half of the others {wall * 1e3:.0f} ms ({busy * 1e3:.0f} busy)")
    if wrong:
        raise SystemExit(f"wrong: {wrong}")


def size_of_tables(path: Path) -> int:
    """Bytes of the metadata that lie in an image: tables of snapshots, refcounts."""
    with pyvirtio.open_disk(path, read_only=True) as disk:
        snapshots, cluster = disk.snapshots, disk.cluster_size
        length = sum(-(-8 * each.l1_size // cluster) for each in snapshots)
        l2 = {entry for each in snapshots for entry in snapshots.l1_table(each) if entry}
        blocks = -(-path.stat().st_size // cluster // (cluster * 8 // 16))
        return (length + len(l2) + blocks) * cluster


class Qemu:
    """qemu-system-x86_64, standing still, spoken to over QMP."""

    def __init__(self, folder: Path, ram: int, disk: int) -> None:
        image, filling = folder / "qemu.qcow2", folder / "filling"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(disk)], check=True)
        with pyvirtio.open_disk(image) as target:
            for offset in range(0, disk, MIB):
                target.write(offset, random.randbytes(MIB))
        filling.write_bytes(random.randbytes(ram - 2 * MIB))
        control = folder / "qmp"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(os.fspath(control))
        listening.listen(1)
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-m", f"{ram // MIB}M", "-S"),
                *("-display", "none", "-nodefaults", "-monitor", "none", "-serial", "none"),
                *("-drive", f"file={image},if=virtio,format=qcow2"),
                *("-device", f"loader,file={filling},addr={MIB},force-raw=on"),
                *("-qmp", f"unix:{control}"),
            ],
            stdin=subprocess.DEVNULL,
        )
        listening.settimeout(30)
        connection, _ = listening.accept()
        listening.close()
        self._stream = connection.makefile("rw")
        connection.close()
        self._answer()
        self.command("qmp_capabilities")

    def _answer(self) -> Any:
        for line in self._stream:
            message = json.loads(line)
            if "event" not in message:
                return message
        raise SystemExit("QEMU has gone")

    def command(self, name: str, **arguments: Any) -> Any:
        self._stream.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._stream.flush()
        answer = self._answer()
        if "error" in answer or answer["return"] not in ("", {}):
            raise SystemExit(f"{name}: {answer}")
        return answer

    def savevm(self, name: str) -> float:
        start = time.perf_counter()
        self.command("human-monitor-command", **{"command-line": f"savevm {name}"})
        return time.perf_counter() - start

    def close(self) -> None:
        self.command("quit")
        self._process.wait()
        self._stream.close()


def qemu(folder: Path, options: argparse.Namespace) -> None:
    """QEMU's savevm of a machine of the same size."""
    if shutil.which("qemu-system-x86_64") is None:
        print("QEMU's savevm: qemu-system-x86_64 is not installed")
        return
    peer = Qemu(folder, options.ram * MIB, options.disk * MIB)
    times = [peer.savevm(f"q{number}") for number in range(options.rounds)]
    peer.close()
    print(
        f"QEMU's savevm (TCG, all of RAM, in the disk's image): "
        f"{statistics.median(times) * 1e3:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ram", type=int, default=128, metavar="MIB")
    parser.add_argument("--disk", type=int, default=1024, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=5, help="full saves; four increments each")
    parser.add_argument("--snapshots", type=int, default=1000)
    parser.add_argument("--folder", default=None, help="where the images go (not a tmpfs)")
    options = parser.parse_args()
    good = True
    for part in ("own image", "disk's image", "many", "QEMU"):
        with tempfile.TemporaryDirectory(prefix="pyvirtio-bench-", dir=options.folder) as name:
            folder = Path(name)
            if part == "own image":
                good = compare_saves(folder, options, own_image=True)
            elif part == "disk's image":
                compare_saves(folder, options, own_image=False)
            elif part == "QEMU":
                qemu(folder, options)
            elif options.snapshots:
                many(folder, options)
        os.sync()
    print("within the limits" if good else "BEYOND THE LIMITS")
    sys.exit(not good)


if __name__ == "__main__":
    main()
