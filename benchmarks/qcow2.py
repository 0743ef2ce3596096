"""The qcow2 driver beside qemu-img and qemu-io, in one run: medians, and our time over theirs.

    python benchmarks/qcow2.py [--size MIB] [--clusters N] [--repeat N]

Each line does the same thing to equal images with both. qemu-img's figures contain the start of a
process, which is measured by itself (``qemu-img info``) and shown, so that it can be taken off.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyvirtio

MIB = 1 << 20
CHUNK = 1 * MIB


def timed(action: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def qemu(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


class Bench:
    """A folder of images, and the table of results."""

    def __init__(self, folder: Path, repeat: int) -> None:
        self.folder = folder
        self.repeat = repeat
        print(f"{'':34}{'pyvirtio':>12}{'QEMU':>12}{'ratio':>8}")

    def compare(
        self,
        name: str,
        ours: Callable[[Path], object],
        theirs: Callable[[Path], object],
        *,
        template: Path | None = None,
    ) -> None:
        """Median times of both, in turns, each on a fresh copy of ``template`` (or on no file)."""
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.repeat):
            for action, kept in zip((ours, theirs), times, strict=True):
                path = self.folder / "subject.qcow2"
                path.unlink(missing_ok=True)
                if template is not None:
                    qemu("cp", "--sparse=always", template, path)
                kept.append(timed(lambda action=action, path=path: action(path)))
        one, two = map(statistics.median, times)
        print(f"{name:34}{one * 1000:9.1f} ms{two * 1000:9.1f} ms{one / two:8.2f}", flush=True)


def write_all(path: Path, size: int) -> None:
    """Sequential writes over the whole disk, and a flush."""
    data = b"\x5a" * CHUNK
    with pyvirtio.open_disk(path, format="qcow2") as disk:
        for offset in range(0, size, CHUNK):
            disk.write(offset, data)
        disk.flush()


def read_all(path: Path, size: int) -> None:
    buffer = bytearray(CHUNK)
    with pyvirtio.open_disk(path, format="qcow2", read_only=True) as disk:
        for offset in range(0, size, CHUNK):
            disk.readv(offset, (buffer,))


def qemu_bench(path: Path, size: int, *mode: str) -> None:
    """The same requests, one at a time, by ``qemu-img bench``."""
    qemu(
        "qemu-img",
        "bench",
        "-q",
        "-f",
        "qcow2",
        "-c",
        size // CHUNK,
        "-d",
        1,
        "-s",
        CHUNK,
        *mode,
        path,
    )


def create(path: Path, size: int) -> None:
    pyvirtio.create_disk(path, size, format="qcow2").close()


def walk(path: Path) -> None:
    with pyvirtio.open_disk(path, format="qcow2", read_only=True) as disk:
        for _ in disk.extents():
            pass


def check(path: Path) -> None:
    with pyvirtio.open_disk(path, format="qcow2", read_only=True) as disk:
        disk.check()


def snapshot(path: Path, *verbs: str) -> None:
    with pyvirtio.open_disk(path, format="qcow2") as disk:
        for verb in verbs:
            getattr(disk.snapshots, verb)("bench")


def sparse_image(path: Path, clusters: int) -> None:
    """An image of 4 KiB clusters, all allocated, whose data is a hole of the host's."""
    options = "cluster_size=4k,preallocation=metadata"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, clusters * 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="of data written")
    parser.add_argument("--clusters", type=int, default=1 << 20, help="of 4 KiB, for the metadata")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if shutil.which("qemu-img") is None:
        parser.exit(1, "qemu-img is not installed\n")
    size = options.size * MIB
    with tempfile.TemporaryDirectory(prefix="pyvirtio-bench-") as name:
        folder = Path(name)
        bench = Bench(folder, options.repeat)
        empty, full, many, kept = (folder / f"{n}.qcow2" for n in ("empty", "full", "many", "kept"))
        create(empty, size)
        create(full, size)
        write_all(full, size)
        sparse_image(many, options.clusters)
        qemu("cp", "--sparse=always", many, kept)
        qemu("qemu-img", "snapshot", "-c", "bench", kept)

        bench.compare(
            "open, and a process for QEMU's",
            lambda path: pyvirtio.open_disk(path, read_only=True).close(),
            lambda path: qemu("qemu-img", "info", path),
            template=empty,
        )
        bench.compare(
            "create",
            lambda path: create(path, size),
            lambda path: qemu("qemu-img", "create", "-q", "-f", "qcow2", path, size),
        )
        bench.compare(
            f"write {options.size} MiB, new clusters",
            lambda path: write_all(path, size),
            lambda path: qemu_bench(path, size, "-w", "--flush-interval", str(size // CHUNK)),
            template=empty,
        )
        bench.compare(
            f"write {options.size} MiB, in place",
            lambda path: write_all(path, size),
            lambda path: qemu_bench(path, size, "-w", "--flush-interval", str(size // CHUNK)),
            template=full,
        )
        bench.compare(
            f"read {options.size} MiB",
            lambda path: read_all(path, size),
            lambda path: qemu_bench(path, size),
            template=full,
        )
        count = f"{options.clusters} clusters"
        bench.compare(
            f"map {count}", walk, lambda path: qemu("qemu-img", "map", path), template=many
        )
        bench.compare(
            f"check {count}",
            check,
            lambda path: qemu("qemu-img", "check", "-q", path),
            template=many,
        )
        for verb, flag, template in (
            ("create", "-c", many),
            ("apply", "-a", kept),
            ("delete", "-d", kept),
        ):
            bench.compare(
                f"snapshot {verb}, {count}",
                lambda path, verb=verb: snapshot(path, verb),
                lambda path, flag=flag: qemu("qemu-img", "snapshot", flag, "bench", path),
                template=template,
            )


if __name__ == "__main__":
    main()
