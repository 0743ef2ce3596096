"""Create, apply and delete a snapshot of a million clusters: ours against qemu-img's.

Each step runs as a process of its own on a copy of the same image, start-up included, in turns; the
best of several rounds counts. The limit is 5 times qemu-img's time, in plain Python. Two images:
clusters in the order of the file, and an eighth as many in random order (with more, qemu-img's
cache of refcount blocks thrashes, and it takes minutes).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = """
import sys, pyvirtio
with pyvirtio.open_disk(sys.argv[1]) as disk:
    getattr(disk.snapshots, sys.argv[2])("one")
"""
STEPS = {"create": "-c", "apply": "-a", "delete": "-d"}
LIMIT = 5.0


def shuffle(path: Path) -> None:
    """Make the guest's clusters lie in random order (everything is mapped)."""
    with path.open("r+b") as file:
        l1_size, l1_offset = struct.unpack_from(">IQ", file.read(48), 36)
        file.seek(l1_offset)
        tables = [e & ~(1 << 63) for e in struct.unpack(f">{l1_size}Q", file.read(8 * l1_size))]
        entries: list[int] = []
        for table in tables:
            file.seek(table)
            entries += struct.unpack(">8192Q", file.read(65536))
        random.Random(1).shuffle(entries)
        for i, table in enumerate(tables):
            file.seek(table)
            file.write(struct.pack(">8192Q", *entries[8192 * i : 8192 * (i + 1)]))


def run(command: list[str], folder: str) -> float:
    """Seconds that a command takes. Python keeps its compiled modules in ``folder``: where they
    are installed they are compiled already."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=int, default=64)
    options = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for order in ("in order", "shuffled"):
            start = Path(folder) / "start.qcow2"
            gib = options.gib if order == "in order" else options.gib // 8
            size = f"{gib}G"
            create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]
            subprocess.run([*create, start, size], check=True)
            if order == "shuffled":
                shuffle(start)
            best: dict[tuple[str, str], float] = {}
            for _ in range(options.rounds):
                for who in ("qemu", "ours"):
                    image = Path(folder) / "image.qcow2"
                    subprocess.run(["cp", "--sparse=always", start, image], check=True)
                    for step, flag in STEPS.items():
                        if who == "qemu":
                            seconds = run(["qemu-img", "snapshot", flag, "one", str(image)], folder)
                        else:
                            command = [sys.executable, "-c", OURS, str(image), step]
                            seconds = run(command, folder)
                        best[who, step] = min(seconds, best.get((who, step), seconds))
            for step in STEPS:
                ratio = best["ours", step] / best["qemu", step]
                worst = max(worst, ratio)
                print(
                    f"{size}, {order}: {step}: {best['ours', step]:.3f} s, "
                    f"qemu-img {best['qemu', step]:.3f} s, ratio {ratio:.2f}"
                )
    print(f"worst ratio {worst:.2f}, limit {LIMIT}")


if __name__ == "__main__":
    if shutil.which("qemu-img") is None:
        sys.exit("qemu-img is not installed")
    main()
