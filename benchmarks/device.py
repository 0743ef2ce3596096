"""The device against the machine's limit: ring to file in this process, beside bare system calls.

4 KiB random reads and writes and 1 MiB sequential ones, through virtio-mmio, split ring, request
engine and disk, beside ``os.preadv``/``os.pwritev`` at the same offsets of a plain file, and
``qemu-img bench`` on the same image; all in one run, round by round, so that a busy machine hurts
them alike. Shown are medians of CPU time per request, and of each round's ratio to the bare call.

    python benchmarks/device.py [--format raw|qcow2] [--depth N] [--rounds N] [--requests N]

What the benchmark's own driver costs per request (its stores to the ring and to the header) is
measured apart, in the same round, and taken off; the write to the device's register is not. The
bare calls and the device go to the same offsets of two files with the same contents, both in the
host's page cache, and take turns, a thousand requests at a time. ``qemu-img bench`` has no random
offsets: it strides through the image.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import resource
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyvirtio
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Arena, BlockDriver, Buffer, Registers

BASE = 0x8000_0000
SLOT = 8192
TURN = 1000
"""Requests that one contender does before the next one's turn."""
READ, WRITE = at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT


class Rig:
    """A device on a disk, and a driver that only changes sector numbers in its chains."""

    def __init__(self, disk: pyvirtio.Disk, kind: int, size: int, depth: int) -> None:
        self.ram = mmap.mmap(-1, 2 * depth * (size + SLOT) + (1 << 20))
        memory = pyvirtio.GuestMemory.from_buffer(self.ram, BASE)
        blk = pyvirtio.VirtioBlk(disk, strict=True)
        self.mmio = pyvirtio.VirtioMmio(blk, memory)
        arena = Arena(BASE, len(self.ram))
        driver = BlockDriver(
            Registers(self.mmio.read, self.mmio.write), memory, arena, queue_size=256
        )
        driver.start()
        self.ring = ring = driver.ring
        self.depth = depth
        self.headers = []
        for _ in range(depth):
            header = arena.take(32)
            data = arena.take(size, 4096)
            memory.write(header, struct.pack("<IIQB", kind, 0, 0, 0xFF))
            memory.write(data, os.urandom(size))
            head = ring.add(
                [Buffer(header, 16), Buffer(data, size, kind == READ), Buffer(header + 16, 1, True)]
            )
            self.headers.append((header - BASE, head))
        self.slots = ring.available - BASE + 4
        self.index_at = ring.available - BASE + 2
        self.event_at = ring.available - BASE + 4 + 2 * ring.size
        self.done = 0

    def run(self, sectors: list[int], *, kick: bool = True) -> None:
        """One request per sector, ``depth`` of them to a kick."""
        ram, depth, store = self.ram, self.depth, struct.Struct("<Q").pack_into
        word, notify, headers = struct.Struct("<H").pack_into, self.mmio.write, self.headers
        index_at, slots, size = self.index_at, self.slots, self.ring.size
        event_at, register = self.event_at, at.MMIO_QUEUE_NOTIFY
        done = self.done
        for start in range(0, len(sectors), depth):
            for position, sector in enumerate(sectors[start : start + depth]):
                header, head = headers[position]
                store(ram, header + 8, sector)
                word(ram, slots + 2 * (done % size), head)
                done += 1
            word(ram, index_at, done & 0xFFFF)
            if kick:
                notify(register, 4, 0)
            word(ram, event_at, done & 0xFFFF)
        if kick:
            self.done = done
            if self.ring.used_index != done & 0xFFFF:
                raise RuntimeError("requests are missing")
            if any(ram[header + 16] for header, _ in headers[: len(sectors)]):
                raise RuntimeError("a request failed")
            notify(at.MMIO_INTERRUPT_ACK, 4, 3)
        else:
            word(ram, index_at, self.done & 0xFFFF)
            word(ram, event_at, self.done & 0xFFFF)


@dataclass
class Samples:
    """CPU microseconds per request of one contender, a figure per round."""

    name: str
    figures: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """A new round."""
        self.figures.append(0.0)
        self.wall.append(0.0)

    def measure(self, work: Callable[[], object], share: int) -> None:
        """Add a turn of this round, of which there are ``share`` requests in all."""
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        self.figures[-1] += (time.process_time() - cpu) / share * 1e6
        self.wall[-1] += (time.perf_counter() - wall) / share * 1e6


def bare(fd: int, kind: int, size: int) -> Callable[[list[int]], None]:
    """The same requests as system calls on a plain file."""
    buffer = [memoryview(mmap.mmap(-1, size))]

    def work(offsets: list[int]) -> None:
        call = os.preadv if kind == READ else os.pwritev
        for offset in offsets:
            call(fd, buffer, offset)

    return work


def qemu_bench(image: Path, form: str, kind: int, size: int, count: int, depth: int) -> float:
    """CPU microseconds per request of ``qemu-img bench``."""
    command = ["qemu-img", "bench", "-f", form, "-c", str(count), "-d", str(depth)]
    command += ["-s", str(size), "-t", "writeback"] + (["-w"] if kind == WRITE else [])
    if size == 4096:
        command += ["-S", str(size * 17)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, str(image)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used / count * 1e6


def make_images(folder: Path, form: str, size: int) -> tuple[Path, Path]:
    """A plain file full of data, and the image with the same data in it."""
    plain = folder / "plain"
    with plain.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    image = folder / f"image.{form}"
    if form == "raw":
        shutil.copyfile(plain, image)
        return plain, image
    with pyvirtio.create_disk(image, size, format=form) as disk, plain.open("rb") as file:
        for offset in range(0, size, 1 << 20):
            disk.write(offset, file.read(1 << 20))
    return plain, image


def compare(title: str, kind: int, size: int, offsets: list[int], options: Options) -> None:
    count = len(offsets)
    direct, device = Samples("bare call"), Samples("device")
    stub, qemu = Samples("driver"), Samples("qemu-img bench")
    for _ in range(options.rounds):
        if options.qemu:
            qemu.figures.append(
                qemu_bench(options.image, options.form, kind, size, count, options.depth)
            )
        for each in (direct, stub, device):
            each.begin()
        fd = os.open(options.plain, os.O_RDWR)
        with pyvirtio.open_disk(options.image, format=options.form) as disk:
            rig = Rig(disk, kind, size, options.depth)
            work = bare(fd, kind, size)
            for start in range(-TURN, count, TURN):
                # The first turn is not counted: caches get warm, code is specialised.
                turn = offsets[max(start, 0) : max(start, 0) + TURN]
                sectors = [offset // 512 for offset in turn]
                for each, task in (
                    (direct, partial(work, turn)),
                    (stub, partial(rig.run, sectors, kick=False)),
                    (device, partial(rig.run, sectors)),
                ):
                    each.measure(task, count) if start >= 0 else task()
        os.close(fd)
    net = [whole - own for whole, own in zip(device.figures, stub.figures, strict=True)]
    ratios = [a / b for a, b in zip(net, direct.figures, strict=True)]
    middle = statistics.median
    print(
        f"{title:24} {middle(direct.figures):9.2f} {middle(net):9.2f} "
        f"{middle(ratios):7.2f} ({min(ratios):.2f}..{max(ratios):.2f}) "
        f"{middle(device.wall):9.2f} {middle(stub.figures):8.2f}",
        f"{middle(qemu.figures):9.2f}" if qemu.figures else "        -",
    )


@dataclass
class Options:
    """What was asked for."""

    plain: Path
    image: Path
    form: str
    rounds: int
    depth: int
    qemu: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--format", default="raw", choices=["raw", "qcow2"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=5000, help="4 KiB requests per round")
    parser.add_argument("--depth", type=int, default=1, help="requests per kick, up to 64")
    parser.add_argument("--size", type=int, default=128, help="of the image, in MiB")
    arguments = parser.parse_args()
    size = arguments.size << 20
    with tempfile.TemporaryDirectory() as folder:
        plain, image = make_images(Path(folder), arguments.format, size)
        qemu = shutil.which("qemu-img") is not None
        options = Options(
            plain, image, arguments.format, arguments.rounds, min(arguments.depth, 64), qemu
        )
        random.seed(1)
        scattered = [random.randrange(size // 4096) * 4096 for _ in range(arguments.requests)]
        in_order = list(range(0, size, 1 << 20))
        print(f"{arguments.format} image of {arguments.size} MiB, {options.depth} to a kick;")
        print("microseconds of CPU per request, medians; ratio of the device to the bare call")
        print(
            f"{'':24} {'bare':>9} {'device':>9} {'ratio':>7} {'(range)':14}"
            f" {'wall':>7} {'driver':>8} {'qemu-img':>9}"
        )
        compare("4 KiB random read", READ, 4096, scattered, options)
        compare("4 KiB random write", WRITE, 4096, scattered, options)
        compare("1 MiB sequential read", READ, 1 << 20, in_order, options)
        compare("1 MiB sequential write", WRITE, 1 << 20, in_order, options)


if __name__ == "__main__":
    main()
