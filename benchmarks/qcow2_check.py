"""Checking 1 M allocated clusters, beside ``qemu-img check``, in one run: medians, and the ratio.

    python benchmarks/qcow2_check.py [--gib N] [--repeat N]

Images of 4 KiB clusters: preallocated, so that all lies in order; that one with every refcount too
high, found and repaired; the same clusters in random order, as after a life of small writes; and
that one with a snapshot, so that every refcount is 2. qemu-img's figures contain the start of a
process, which is measured by itself (``qemu-img info``) and shown. Ours contain opening and closing
the image.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyvirtio

CLUSTER = 4096
COPIED = 1 << 63
OFFSET = 0x00FF_FFFF_FFFF_FE00


def run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=False, capture_output=True)


def timed(action: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def table(data: bytes) -> array[int]:
    """Big-endian 64-bit values; the other way, too."""
    values = array("Q", data)
    if sys.byteorder == "little":
        values.byteswap()
    return values


def shuffle(path: Path) -> None:
    """Give every guest cluster another one's host cluster."""
    with path.open("r+b") as file:
        header = file.read(104)
        file.seek(int.from_bytes(header[40:48]))
        l1 = table(file.read(8 * int.from_bytes(header[36:40])))
        places = [entry & OFFSET for entry in l1 if entry & OFFSET]
        entries = array("Q")
        for place in places:
            file.seek(place)
            entries += table(file.read(CLUSTER))
        mixed = entries.tolist()
        random.Random(1).shuffle(mixed)
        words = table(array("Q", mixed).tobytes()).tobytes()
        for number, place in enumerate(places):
            file.seek(place)
            file.write(words[number * CLUSTER : (number + 1) * CLUSTER])


def leak_all(path: Path) -> None:
    """Raise every refcount of 1 to 2 in the first refcount blocks."""
    with path.open("r+b") as file:
        header = file.read(104)
        file.seek(int.from_bytes(header[48:56]))
        blocks = [b for b in table(file.read(CLUSTER)) if b]
        for block in blocks:
            file.seek(block)
            counts = file.read(CLUSTER).replace(b"\0\1", b"\0\2")
            file.seek(block)
            file.write(counts)


def check(path: Path, fix: Literal["all"] | None = None) -> None:
    read_only = fix is None
    with pyvirtio.open_disk(path, format="qcow2", read_only=read_only, for_check=True) as disk:
        disk.check(fix)  # type: ignore[attr-defined]


def compare(name: str, image: Path, repeat: int, *, repair: bool = False) -> None:
    """Both in turns, each on its own copy where it repairs."""
    ours, theirs = [], []
    for _ in range(repeat):
        subject = image
        if repair:
            subject = image.with_suffix(".copy")
            shutil.copy(image, subject)
        ours.append(timed(lambda s=subject: check(s, "all" if repair else None)))
        if repair:
            shutil.copy(image, subject)
        options = ["-r", "all"] if repair else []
        theirs.append(timed(lambda s=subject, o=options: run("qemu-img", "check", *o, s)))
    mine, other = statistics.median(ours), statistics.median(theirs)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"{name:34}{mine * 1e3:10.0f}ms{other * 1e3:10.0f}ms{ratio:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gib", type=int, default=4, help="size of the disk (1 GiB: 262144 clusters)"
    )
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    if shutil.which("qemu-img") is None:
        raise SystemExit("qemu-img is not installed: nothing to compare with")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.qcow2"
        options = f"preallocation=metadata,cluster_size={CLUSTER}"
        run("qemu-img", "create", "-f", "qcow2", "-o", options, path, f"{arguments.gib}G")
        print(f"{'':34}{'pyvirtio':>12}{'qemu-img':>12}{'ratio':>8}")
        start = statistics.median(timed(lambda: run("qemu-img", "info", path)) for _ in range(5))
        print(f"{'start of qemu-img':34}{'':12}{start * 1e3:10.0f}ms")
        compare("in order", path, arguments.repeat)
        leaky = path.with_name("leaky.qcow2")
        shutil.copy(path, leaky)
        leak_all(leaky)
        compare("every refcount too high", leaky, arguments.repeat)
        compare("every refcount repaired", leaky, 1, repair=True)
        # qemu-img takes very long for these: once must do.
        shuffle(path)
        compare("in random order", path, 1)
        run("qemu-img", "snapshot", "-c", "one", path)
        compare("in random order, with a snapshot", path, 1)


if __name__ == "__main__":
    main()
