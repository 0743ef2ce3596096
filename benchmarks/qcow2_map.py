"""``map`` of a million extents beside ``qemu-img map``, in one run: medians, and ours over theirs.

    python benchmarks/qcow2_map.py [--extents N] [--repeat N]

Every second cluster of the image is there. Both sides put the same JSON together; qemu-img's
figure contains the start of a process, ours the opening of the image.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pyvirtio
from pyvirtio.backend.map import json_lines

CLUSTER = 65536
COPIED = 1 << 63


def make(path: Path, extents: int) -> None:
    """An image with that many runs. Its tables are right, its refcounts do not matter to a map."""
    with pyvirtio.create_disk(path, extents * CLUSTER) as disk:
        end = disk.children["file"].size
    per_table = CLUSTER // 8
    tables = -(-extents // per_table)
    data = -(-end // CLUSTER) + tables
    with path.open("r+b") as file:
        file.seek(40)
        (l1_offset,) = struct.unpack(">Q", file.read(8))
        l1 = array("Q", [end + i * CLUSTER | COPIED for i in range(tables)])
        l2 = array(
            "Q",
            [(data + i) * CLUSTER | COPIED if i % 2 == 0 else 0 for i in range(extents)],
        )
        for table, offset in ((l1, l1_offset), (l2, end)):
            table.byteswap()
            file.seek(offset)
            file.write(table.tobytes())
        file.truncate((data + extents) * CLUSTER)


def ours(path: Path, sink: Path) -> None:
    with pyvirtio.open_disk(path, format="qcow2", read_only=True) as disk, sink.open("w") as file:
        file.writelines(json_lines(pyvirtio.map_extents(disk)))


def theirs(path: Path, sink: Path) -> None:
    command = ["qemu-img", "map", "--output=json", "-f", "qcow2", str(path)]
    with sink.open("w") as file:
        subprocess.run(command, check=True, stdout=file)


def alone(path: Path, sink: Path) -> None:
    """Without the JSON."""
    with pyvirtio.open_disk(path, format="qcow2", read_only=True) as disk:
        for _ in pyvirtio.map_extents(disk):
            pass


def median(action: Callable[[Path, Path], None], path: Path, sink: Path, repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        action(path, sink)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extents", type=int, default=1 << 20)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pyvirtio-bench-") as name:
        path, sink = Path(name) / "image.qcow2", Path(name) / "map.json"
        make(path, arguments.extents)
        results = {
            action.__name__: median(action, path, sink, arguments.repeat)
            for action in (theirs, ours, alone)
        }
    print(f"map of {arguments.extents} extents")
    for label, seconds in results.items():
        print(f"{label:8}{seconds * 1000:10.1f} ms   ratio {seconds / results['theirs']:.2f}")


if __name__ == "__main__":
    main()
