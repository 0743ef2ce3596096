"""The same command lines for pyvirtio-img and qemu-img, on copies of the same images.

``python -m support.img_twins --seed 1 --count 100`` goes on for as long as it is told (without a
count until it is interrupted, or for ``--minutes``) and prints what differs.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Outcome", "command_line", "compare", "make_images", "run_both"]

_OURS = (
    "import sys; from pyvirtio.tools.img import main; sys.argv[0] = 'qemu-img'; sys.exit(main())"
)
_VOLATILE = re.compile(
    r"disk size: .*|\"actual-size\": \d+,?|uuid: .*|#block\d+|date-(n?sec)\": \d+|\d{4}-\d\d-\d\d "
    r"\d\d:\d\d:\d\d|\s+(stride|iters|key offset|max iters): \d+|Run completed in .*"
)
_IMAGES = ("base.qcow2", "top.qcow2", "snap.qcow2", "raw.img")


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    status: int
    output: str
    errors: str
    contents: dict[str, str]


def make_images(folder: Path, seed: int) -> None:
    """A chain of two, an image with snapshots and a bitmap, and a raw one; by QEMU's tools."""
    chance = random.Random(seed)
    size = chance.choice([1 << 20, 3 << 20, (5 << 20) + 512])
    cluster = chance.choice(["4k", "64k", "128k"])
    compat = chance.choice(["0.10", "1.1"])

    def img(*words: object) -> None:
        subprocess.run(["qemu-img", *map(str, words)], cwd=folder, check=True, capture_output=True)

    def write(name: str, kind: str) -> None:
        commands = []
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(size // 512) * 512
            length = min(chance.choice([512, 4096, 65536, 300 << 10]), size - at)
            commands += ["-c", f"write -P {chance.randrange(256)} {at} {length}"]
        command = ["qemu-io", "-f", kind, *commands, name]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    options = f"cluster_size={cluster},compat={compat}"
    img("create", "-f", "qcow2", "-o", options, "base.qcow2", size)
    write("base.qcow2", "qcow2")
    img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", size + 65536)
    write("top.qcow2", "qcow2")
    img("create", "-f", "qcow2", "-o", f"cluster_size={cluster}", "snap.qcow2", size)
    write("snap.qcow2", "qcow2")
    img("snapshot", "-c", "one", "snap.qcow2")
    img("bitmap", "--add", "snap.qcow2", "dirty")
    write("snap.qcow2", "qcow2")
    img("create", "-f", "raw", "raw.img", size)
    write("raw.img", "raw")
    for name in _IMAGES:  # without holes, see qcow2/holes.py
        (folder / name).write_bytes((folder / name).read_bytes())


def command_line(chance: random.Random) -> list[str]:
    """A command with random options; some of them make no sense."""
    image = chance.choice(_IMAGES)
    other = chance.choice(_IMAGES)
    size = chance.choice(["1M", "2097152", "700k", "0x10000", "1.5M", "bad", "+1M", "0"])
    output = chance.choice(["--output=json", "--output=human", ""])
    kind = chance.choice(["qcow2", "raw", "nonsense", "qcow2"])
    settings = chance.sample(
        [
            "cluster_size=4k",
            "compat=0.10",
            "compat=v3",
            "lazy_refcounts=on",
            "refcount_bits=1",
            "refcount_bits=64",
            "preallocation=metadata",
            "preallocation=full",
            "extended_l2=on",
            "cluster_size=3",
            "foo=bar",
            "size=1M",
            "compression_type=zstd",
        ],
        chance.randrange(3),
    )
    chosen = ["-o", ",".join(settings)] if settings else []
    sparse = chance.choice([[], ["-S", chance.choice(["0", "4k", "64k", "512", "3"])]])
    lines: list[list[str]] = [
        ["info", output, image],
        ["info", "--backing-chain", output, image],
        ["check", output, image],
        ["map", output, image],
        ["map", output, "-s", chance.choice(["0", "64k", "1M", "-1"]), "-l", size, image],
        ["create", "-f", kind, *chosen, "new", size],
        ["create", "-f", kind, *chosen, "-b", image, "-F", kind, "new"],
        ["create", "-f", kind, *chosen, "-b", image, "new", size],
        ["convert", "-O", kind, *sparse, *chosen, image, "new"],
        ["convert", "-c", "-O", kind, *chosen, image, "new"],
        ["convert", "-n", "-O", "qcow2", *sparse, image, "top.qcow2"],
        ["convert", "-O", "qcow2", image, other, "new"],
        ["convert", "-O", "qcow2", "-l", chance.choice(["one", "1", "none"]), image, "new"],
        ["convert", "-O", "qcow2", "--bitmaps", image, "new"],
        ["convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", image, "new"],
        ["compare", *chance.choice([[], ["-s"], ["-q"]]), image, other],
        ["dd", "-O", kind, f"bs={chance.choice(['512', '4k', '3', '0'])}", f"if={image}", "of=new"],
        [
            "dd",
            f"count={chance.randrange(99)}",
            f"skip={chance.randrange(99)}",
            f"if={image}",
            "of=n",
        ],
        ["measure", "-O", kind, output, image],
        ["measure", "-O", "qcow2", *chosen, output, "--size", size],
        ["resize", *chance.choice([[], ["--shrink"]]), "-f", kind, image, size],
        ["rebase", "-b", chance.choice(["", "raw.img", "none"]), "-F", "raw", "top.qcow2"],
        ["rebase", "-u", "-b", chance.choice(["", "x", "raw.img"]), "-F", "raw", image],
        ["commit", *chance.choice([[], ["-d"], ["-b", other]]), "top.qcow2"],
        ["amend", *(chosen or ["-o", "lazy_refcounts=off"]), image],
        ["snapshot", "-l", image],
        ["snapshot", chance.choice(["-a", "-d"]), chance.choice(["one", "1", "no"]), "snap.qcow2"],
        ["bitmap", chance.choice(["--remove", "--clear", "--disable", "--add"]), image, "dirty"],
        ["bitmap", "--add", "--merge", "dirty", image, "more"],
    ]
    line = chance.choice(lines)
    return [word for index, word in enumerate(line) if word or line[index - 1] == "-b"]


def run_both(images: Path, words: list[str]) -> tuple[Outcome, Outcome]:
    """QEMU's outcome and ours."""
    return _run(["qemu-img"], images, words), _run([sys.executable, "-c", _OURS], images, words)


def compare(theirs: Outcome, ours: Outcome) -> list[str]:
    """What differs, in words; nothing if all is the same."""
    found = []
    if theirs.status != ours.status:
        found.append(f"status {theirs.status}, ours {ours.status}")
    if theirs.output != ours.output:
        found.append(f"output {theirs.output!r}, ours {ours.output!r}")
    if bool(theirs.errors) != bool(ours.errors):
        found.append(f"errors {theirs.errors!r}, ours {ours.errors!r}")
    if theirs.status == 0 and theirs.contents != ours.contents:
        found.append(f"contents {theirs.contents}, ours {ours.contents}")
    return found


def _run(program: list[str], images: Path, words: list[str]) -> Outcome:
    with tempfile.TemporaryDirectory(dir=images.parent) as name:
        folder = Path(name)
        for image in _IMAGES:
            shutil.copyfile(images / image, folder / image)
        done = subprocess.run(
            [*program, *words],
            cwd=folder,
            capture_output=True,
            timeout=120,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
        )
        contents = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    texts = [
        _VOLATILE.sub("", text.decode(errors="replace")) for text in (done.stdout, done.stderr)
    ]
    return Outcome(done.returncode, texts[0], texts[1], contents)


def _digest(path: Path) -> str:
    """The guest's contents, and for qcow2 whether QEMU finds the image clean."""
    with path.open("rb") as file:
        is_qcow2 = file.read(4) == b"QFI\xfb"
    if not is_qcow2:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    check = subprocess.run(["qemu-img", "check", "-q", path.name], cwd=path.parent).returncode
    raw = path.with_name(path.name + ".raw")
    copy = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path.name, raw.name]
    done = subprocess.run(copy, cwd=path.parent, capture_output=True)
    digest = hashlib.sha256(raw.read_bytes()).hexdigest() if not done.returncode else "unreadable"
    raw.unlink(missing_ok=True)
    return f"check {check}, {digest}"


def main() -> int:
    """Go on until told to stop; 1 if something differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    differing = number = 0
    with tempfile.TemporaryDirectory(prefix="img-twins-") as name:
        while (not options.count or number < options.count) and time.monotonic() < deadline:
            seed = options.seed + number
            images = Path(name) / "images"
            if number % 20 == 0:
                shutil.rmtree(images, ignore_errors=True)
                images.mkdir()
                make_images(images, seed)
            words = command_line(random.Random(seed))
            found = compare(*run_both(images, words))
            number += 1
            if found:
                differing += 1
                print(f"seed {seed}: {' '.join(words)}", *found, sep="\n    ", flush=True)
    print(f"{number} commands, {differing} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
