"""4 KiB random reads over vhost-user: our server beside qemu-storage-daemon, under one front-end.

Both serve qcow2 images with the same contents from the host's page cache, and take turns; medians
of requests per second and of the server's CPU time per request, and the ratios of each round. The
front-end is the library's own, stripped to its stores and kicks: at depth 1 each request is one
trip through both processes, and what is measured is mostly that. QEMU's back-end keeps no notes of
requests under way (INFLIGHT_SHMFD); ours is measured without and with.

    python benchmarks/vhost_user.py [--rounds N] [--requests N]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyvirtio
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import BlockDriver, Buffer, SharedRam, VhostUserFrontEnd
from pyvirtio.virtio.driver.blk import UNDERSTOOD
from pyvirtio.virtio.fence import make_fence

SIZE = 64 << 20
BLOCK = 4096


class Contender:
    """A server in a process of its own."""

    def __init__(self, name: str, command: list[str], socket: Path, inflight: bool = False) -> None:
        self.name = name
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.ram = SharedRam(4 << 20)
        self.front = VhostUserFrontEnd.connect(socket, self.ram, inflight=inflight)
        self.rates: dict[int, list[float]] = {}
        self.costs: dict[int, list[float]] = {}

    def cpu(self) -> float:
        """Seconds of CPU time that the server has used."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def round(self, sectors: list[int], depth: int) -> None:
        """Read them all, ``depth`` at a time."""
        features = UNDERSTOOD & ~(1 << at.VIRTIO_F_RING_PACKED)
        memory, arena = self.ram.memory, self.ram.arena()
        driver = BlockDriver(
            self.front, memory, arena, features=features, queue_size=128, wait=self.front.wait
        )
        driver.start()
        ring, store = driver.ring, struct.Struct("<Q").pack_into
        places = []
        for _ in range(depth):
            header, data = arena.take(32), arena.take(BLOCK, 4096)
            memory.write(header, struct.pack("<IIQ", at.VIRTIO_BLK_T_IN, 0, 0))
            places.append((header, data))
        ram, base = self.ram.buffer, self.ram.base
        kick, call = self.front.vrings[0].kick, self.front.vrings[0].call
        os.set_blocking(call, True)
        fence = make_fence()
        cpu, start = self.cpu(), time.perf_counter()
        for first in range(0, len(sectors), depth):
            batch = sectors[first : first + depth]
            for sector, (header, data) in zip(batch, places, strict=False):
                store(ram, header - base + 8, sector)
                status = Buffer(header + 16, 1, True)
                ring.add([Buffer(header, 16), Buffer(data, BLOCK, True), status])
            left = len(batch)
            if ring.publish():
                os.eventfd_write(kick, 1)
            while left := left - len(ring.collect()):
                ring.want_next_interrupt()
                fence()
                if ring.used_index == ring._next_used:
                    os.eventfd_read(call)
        took, used = time.perf_counter() - start, self.cpu() - cpu
        os.set_blocking(call, False)
        self.rates.setdefault(depth, []).append(len(sectors) / took)
        self.costs.setdefault(depth, []).append(1e6 * used / len(sectors))

    def close(self) -> None:
        """End it."""
        self.front.close()
        self.process.terminate()
        self.process.wait(60)


def start(folder: Path) -> list[Contender]:
    """The contenders, each on an image of its own."""
    content = random.Random(1).randbytes(1 << 20)
    for name in ("qemu", "ours", "noted"):
        with pyvirtio.create_disk(folder / f"{name}.qcow2", SIZE) as disk:
            for offset in range(0, SIZE, len(content)):
                disk.write(offset, content)
    image = folder / "qemu.qcow2"
    export = f"vhost-user-blk,id=e,node-name=q,addr.type=unix,addr.path={folder}/qemu.sock"
    qemu = [
        *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image}"),
        *("--blockdev", "driver=qcow2,node-name=q,file=f", "--export", export),
    ]
    found = [Contender("qemu-storage-daemon", qemu, folder / "qemu.sock")]
    for name, inflight in (("ours", False), ("noted", True)):
        socket = folder / f"{name}.sock"
        command = [sys.executable, "-m", "pyvirtio.tools.serve", "vhost-user-blk"]
        command += ["--socket", str(socket), str(folder / f"{name}.qcow2")]
        label = "pyvirtio, with notes" if inflight else "pyvirtio"
        found.append(Contender(label, command, socket, inflight))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=4000)
    options = parser.parse_args()
    chance = random.Random(2)
    with tempfile.TemporaryDirectory() as scratch:
        contenders = start(Path(scratch))
        try:
            for depth in (1, 32):
                for _ in range(options.rounds):
                    sectors = [
                        chance.randrange(SIZE // BLOCK) * (BLOCK // 512)
                        for _ in range(options.requests)
                    ]
                    for contender in contenders:
                        contender.round(sectors, depth)
        finally:
            for contender in contenders:
                contender.close()
    first = contenders[0]
    for depth in (1, 32):
        print(f"depth {depth}")
        for each in contenders:
            rate, cost = (statistics.median(of[depth]) for of in (each.rates, each.costs))
            ratios = [
                statistics.median(a / b for a, b in zip(mine[depth], theirs[depth], strict=True))
                for mine, theirs in ((each.rates, first.rates), (each.costs, first.costs))
            ]
            print(
                f"  {each.name:<22}{rate:>9.0f} requests/s ({ratios[0]:.2f} x){cost:>8.1f} us of "
                f"CPU each ({ratios[1]:.2f} x)"
            )


if __name__ == "__main__":
    main()
