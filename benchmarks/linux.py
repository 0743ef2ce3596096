"""The disk as Debian's Linux sees it in the example emulator, and where the host's time goes.

The guest measures with ``dd``, past its page cache (``oflag=direct``) and through it. For each job,
MB/s by the guest's own clock (which instructions make, so it is the same in every run) and by the
host's CPU time; and what that CPU time was spent in:

engine   Unicorn: guest instructions, and translating them
traps    exceptions that Python enters, or carries out
devices  registers of the serial port, the interrupt controllers, …
virtio   the disk's registers, its rings and requests
driver   the qcow2 driver and the file below it
board    the rest: slices, timers, the clock

    python benchmarks/linux.py [--size MIB]

fio is not used: Debian's needs the libraries of Ceph and Gluster, hundreds of MB, to start at all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyvirtio
from examples.emulator.cpu import Cpu
from examples.emulator.guest import LinuxGuest
from examples.emulator.rootfs import make_overlay
from examples.emulator.slots import VirtioSlot

PARTS = ("engine", "traps", "devices", "virtio", "driver", "board")


class Shares:
    """CPU seconds of this thread by part; what is timed inside another is taken off there."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stack = ["board"]
        self._since = time.thread_time()

    def _switch(self) -> None:
        now = time.thread_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted for ``part``."""

        def call(*arguments: Any, **options: Any) -> Any:
            self._switch()
            self._stack.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self._switch()
                self._stack.pop()

        return call

    def take(self) -> dict[str, float]:
        """What has come together since the last time."""
        self._switch()
        taken, self.seconds = dict(self.seconds), Counter()
        return taken


class TimedDevice:
    """A device's registers, timed."""

    def __init__(self, device: Any, shares: Shares) -> None:
        part = "virtio" if isinstance(device, VirtioSlot) else "devices"
        self.read = shares.timed(part, device.read)
        self.write = shares.timed(part, device.write)


@contextmanager
def measured(shares: Shares) -> Iterator[None]:
    """Boards that are made in here have their parts timed."""
    on_exception, map_device = Cpu._on_exception, Cpu.map

    def timed_map(cpu: Cpu, address: int, size: int, device: Any) -> None:
        map_device(cpu, address, size, TimedDevice(device, shares))

    Cpu._on_exception = shares.timed("traps", on_exception)  # type: ignore[method-assign]
    Cpu.map = timed_map  # type: ignore[method-assign]
    try:
        yield
    finally:
        Cpu._on_exception, Cpu.map = on_exception, map_device  # type: ignore[method-assign]


def time_disk(disk: pyvirtio.Disk, shares: Shares) -> None:
    for name in ("readv", "writev", "write_zeroes", "discard", "flush"):
        setattr(disk, name, shares.timed("driver", getattr(disk, name)))


def boot(disks: list[pyvirtio.Disk], shares: Shares) -> LinuxGuest:
    original = Cpu.__init__

    def prepared(cpu: Cpu, *arguments: Any) -> None:
        original(cpu, *arguments)
        cpu.uc.emu_start = shares.timed("engine", cpu.uc.emu_start)

    Cpu.__init__ = prepared  # type: ignore[method-assign]
    try:
        with measured(shares):
            guest = LinuxGuest(disks)
    finally:
        Cpu.__init__ = original  # type: ignore[method-assign]
    for slot in guest.board.slots:
        slot.poll = shares.timed("virtio", slot.poll)  # type: ignore[method-assign]
    return guest


def show(name: str, size: int, ticks: int, spent: dict[str, float]) -> None:
    total = sum(spent.values())
    guest, host = (
        f"{size / seconds / 1e6:8.1f}" if size and seconds else " " * 8
        for seconds in (ticks / 1e7, total)
    )
    parts = " ".join(f"{100 * spent.get(part, 0) / total:7.1f}%" for part in PARTS)
    print(f"{name:26} {guest} {host} {total:7.2f} {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=32, help="what a job moves, in MiB")
    mib = parser.parse_args().size
    size = mib << 20
    shares = Shares()
    print(f"{'':26} {'MB/s':>8} {'MB/s':>8} {'CPU s':>7} " + " ".join(f"{p:>8}" for p in PARTS))
    print(f"{'':26} {'guest':>8} {'host':>8}")
    with tempfile.TemporaryDirectory() as folder:
        make_overlay(Path(folder, "root.qcow2"))
        with (
            pyvirtio.open_disk(Path(folder, "root.qcow2")) as root,
            pyvirtio.create_disk(Path(folder, "data.qcow2"), 2 * size) as data,
        ):
            time_disk(root, shares)
            time_disk(data, shares)
            guest = boot([root, data], shares)
            show("boot", 0, guest.board.clock.now(), shares.take())
            small = size // 16 // 4096
            jobs = [
                ("write, 1 MiB, direct", size, f"if=/dev/zero of=/dev/vdb {{}} count={mib}", "o"),
                ("read, 1 MiB, direct", size, f"if=/dev/vdb of=/dev/null {{}} count={mib}", "i"),
                (
                    "write, 4 KiB, direct",
                    small * 4096,
                    f"if=/dev/zero of=/dev/vdb {{}} count={small}",
                    "o",
                ),
                (
                    "read, 4 KiB, direct",
                    small * 4096,
                    f"if=/dev/vdb of=/dev/null {{}} count={small}",
                    "i",
                ),
            ]
            for name, moved, text, side in jobs:
                block = "1M" if "MiB" in name else "4k"
                command = "dd " + text.format(f"bs={block} {side}flag=direct")
                run(guest, shares, name, moved, f"{command} 2>/dev/null")
            path = "dd if=/dev/vdb of=/dev/null bs=1M"
            run(guest, shares, "read, through the cache", size, f"{path} count={mib} 2>/dev/null")
            run(
                guest,
                shares,
                "write a file, and fsync",
                size // 2,
                f"dd if=/dev/zero of=file bs=1M count={mib // 2} conv=fsync 2>/dev/null",
            )
            run(guest, shares, "files, commits, database", 0, "workload bench 2")
            guest.power_off()


def run(guest: LinuxGuest, shares: Shares, name: str, size: int, command: str) -> None:
    shares.take()
    before = guest.board.clock.now()
    guest.run(command)
    show(name, size, guest.board.clock.now() - before, shares.take())


if __name__ == "__main__":
    main()
