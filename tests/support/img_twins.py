"""The same command lines for pyvirtio-img and qemu-img, pyvirtio-io and qemu-io, on copies of the
same images.

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

_OURS = "import sys; from pyvirtio.tools.{} import main; sys.argv[0] = 'qemu-{}'; sys.exit(main())"
_VOLATILE = re.compile(
    r"disk size: .*|\"actual-size\": \d+,?|uuid: .*|#block\d+|date-(n?sec)\": \d+|\d{4}-\d\d-\d\d "
    r"\d\d:\d\d:\d\d|\s+(stride|iters|key offset|max iters): \d+|Run completed in .*|"
    r"(?<=ops; ).*|\d+,\d+,\d:\d\d:\d\d.*|(?:    \([0-9.]+/100%\)\r)+(?=\n)|"
    r"\(pyvirtio .*\)|\(Debian .*\)"
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
    lines += _more_lines(chance, image, other, kind, size)
    line = chance.choice(lines)
    if line[0] == "qemu-io":
        return line
    return [word for index, word in enumerate(line) if word or line[index - 1] == "-b"]


def _more_lines(
    chance: random.Random, image: str, other: str, kind: str, size: str
) -> list[list[str]]:
    """Names that are options, options that are seldom used, and what cannot be done."""
    driver = "raw" if image == "raw.img" else "qcow2"
    described = chance.choice(
        [
            f"driver={driver},file.filename={image}",
            f"driver={driver},file.driver=file,file.filename={image},read-only=on",
            f"driver={kind},file.filename={image}",
            f"driver=raw,file.filename={image},offset=512,size=4096",
            f"driver={driver},file.filename={image},file.locking=off,discard=unmap",
            f"file.filename={image}",
            f"driver={driver},file.filename={image},foo=1",
            f"driver=blkdebug,image.filename={image}",
            "driver=null-co,size=64k",
            f"driver=throttle,file.filename={image}",
            f"filename={image}",
            "",
        ]
    )
    named = chance.choice(
        [
            f'json:{{"driver": "{driver}", "file": {{"driver": "file", "filename": "{image}"}}}}',
            f'json:{{"driver": "{driver}", "file.filename": "{image}"}}',
            f"json:{{'driver': '{kind}', 'file': {{'driver': 'file', 'filename': '{image}'}}}}",
            'json:{"driver": "null-co", "size": 65536, "read-zeroes": true}',
            'json:{"driver": "qcow2"}',
            "json:{",
            f"file:{image}",
            f"blkdebug::{image}",
            f"nonsense:{image}",
            "missing.qcow2",
        ]
    )
    output = chance.choice(["--output=json", "--output=human", "--output=xml"])
    quietly = chance.choice([[], ["-q"], ["-p"], ["-U"]])
    return [
        ["info", "--image-opts", output, described],
        ["map", "--image-opts", output, described],
        ["check", "--image-opts", *quietly, described],
        ["compare", "--image-opts", described, f"driver=raw,file.filename={other}"],
        ["convert", "--image-opts", "-O", "raw", described, "new"],
        ["measure", "--image-opts", "-O", "qcow2", described],
        ["info", output, named],
        ["map", output, named],
        ["check", *quietly, named],
        ["convert", "-O", kind, named, "new"],
        ["compare", *quietly, named, image],
        ["convert", "--salvage", "-O", "raw", image, "new"],
        ["convert", "-W", "-m", chance.choice(["1", "8", "0", "17"]), "-O", "raw", image, "new"],
        ["convert", *quietly, "-t", chance.choice(["none", "unsafe", "x"]), image, "new"],
        ["convert", "-n", "--target-is-zero", "-O", "raw", image, "raw.img"],
        ["convert", "-C", "-O", "raw", image, "new"],
        ["convert", "-r", chance.choice(["1G", "x"]), "-O", "raw", image, "new"],
        ["convert", "-O", "qcow2", "--bitmaps", "--skip-broken-bitmaps", "snap.qcow2", "new"],
        ["check", "-r", chance.choice(["leaks", "all", "x"]), output, image],
        ["measure", output, "-O", kind, "-l", chance.choice(["one", "no"]), "snap.qcow2"],
        ["dd", f"if={image}", "of=new", f"bs={chance.choice(['1k', '1M', '-1', 'x'])}", "count=3"],
        ["dd", "-f", kind, "-O", "raw", f"if={image}", "of=new", f"skip={chance.randrange(20000)}"],
        [
            "dd",
            *chance.choice([["bs=1k"], [f"if={image}"], ["of=new"], ["a=b"], [f"if={image}=x"]]),
        ],
        ["bitmap", "--add", "-g", chance.choice(["512", "3", "64k", "4G"]), image, "b"],
        ["bitmap", "--add", "--disable", image, chance.choice(["b", "dirty", "n" * 1024])],
        ["bitmap", "--merge", "dirty", "-b", other, image, "dirty"],
        ["bitmap", "--enable", "--disable", image, "dirty"],
        ["bitmap", image, "dirty"],
        ["resize", *quietly, image, chance.choice(["-1k", "+1k", "-1G", "+0", "9M", "x"])],
        ["resize", "--preallocation", chance.choice(["off", "full", "x"]), image, "6M"],
        ["rebase", "-p", "-b", "raw.img", "-F", "raw", image],
        ["rebase", "-u", "-b", "", image],
        ["rebase", image],
        ["commit", "-p", chance.choice(["top.qcow2", image])],
        ["commit", "-b", chance.choice(["base.qcow2", "none"]), "top.qcow2"],
        [
            "amend",
            "-p",
            "-o",
            chance.choice(["compat=0.10", "compat=1.1", "refcount_bits=8"]),
            image,
        ],
        ["amend", "-p", "-o", "compat=1.1,refcount_bits=64", image],
        [
            "amend",
            "-o",
            chance.choice(["size=8M", "backing_file=x", "cluster_size=4k", "?"]),
            image,
        ],
        ["amend", "-f", kind, "-o", "help"],
        ["create", "-f", kind, "-o", "help"],
        ["snapshot", "-c", chance.choice(["two", "one", ""]), image],
        ["snapshot", "-l", "-c", "x", image],
        ["create", "-q", "-f", "qcow2", "-u", "-b", named, "-F", "raw", "new", size],
        ["create", "new"],
        ["compare", image],
        [chance.choice(["info", "check", "map", "resize", "nothing", "--nothing", "rebase"])],
        [chance.choice(["info", "convert", "commit", "dd"]), "--nothing", image],
        *[_script(chance, image) for _ in range(12)],
    ]


def _script(chance: random.Random, image: str) -> list[str]:
    """A run of qemu-io with some commands."""
    pick = chance.choice

    def place() -> str:
        return pick(["0", "512", "4k", "65536", "1M", "700k", "3", "5M", "-1", "x"])

    def length() -> str:
        return pick(["512", "1k", "64k", "100k", "1M", "1", "0", "3G", "x"])

    def one() -> str:
        read = pick(["", "-v ", "-q ", "-C ", "-P 0 ", "-P 7 "])
        odd_read = pick(["-x", "-b", "-P 300", "-P x", "-s 1", ""])
        write = pick(["", "-f ", "-q ", "-z ", "-c ", "-zu ", "-zn "]) + pick(["", "-P 9 "])
        odd_write = pick(["-z -P 1", "-u", "-n", "-b -z", "-c -z", "-s none"])
        setting = pick(["read-only=on", "x=1", "driver=raw", "lazy-refcounts=on"])
        commands = [
            f"read {read}{place()} {length()}",
            f"read -P 5 -s 512 -l 512 {place()} 2k",
            f"read {odd_read} {place()} {length()}",
            f"write {write}{place()} {length()}",
            f"write {odd_write} 0 64k",
            f"readv {pick(['', '-q ', '-P 0 '])}{place()} {length()} {length()}",
            f"writev {pick(['', '-f ', '-q '])}{place()} {length()} {length()}",
            f"aio_write {pick(['', '-q ', '-z ', '-zu '])}{place()} 64k",
            f"aio_read {pick(['', '-q ', '-P 0 '])}{place()} 4k",
            f"discard {pick(['', '-q ', '-C '])}{place()} {length()}",
            f"alloc {place()} {pick([length(), ''])}",
            f"truncate {pick(['', '-m full ', '-m x '])}{length()}",
            *("map", "length", "info", "flush", "aio_flush", "reopen -r", "reopen", "close"),
            f"reopen -o {setting}",
            f"open {pick(['', '-r ', '-o driver=raw '])}{image}",
            *("help", f"help {pick(['read', 'open', 'nothing'])}", "quit", "nothing"),
            *("sleep 1", "sleep x", "read", "write 0"),
        ]
        return pick(commands)

    words = ["qemu-io"]
    if image == "raw.img":
        words += ["-f", "raw"]
    words += pick([[], ["-t", "writeback"], ["-n"], ["-d", "unmap"], ["-r"], ["-s"], ["-C"]])
    for _ in range(chance.randrange(1, 6)):
        words += ["-c", one()]
    return [*words, image]


def run_both(images: Path, words: list[str]) -> tuple[Outcome, Outcome]:
    """QEMU's outcome and ours."""
    tool = "img"
    if words[0] == "qemu-io":
        tool, words = "io", words[1:]
    ours = [sys.executable, "-c", _OURS.format(tool, tool)]
    return _run([f"qemu-{tool}"], images, words), _run(ours, images, words)


def compare(theirs: Outcome, ours: Outcome, *, exact: bool = False) -> list[str]:
    """What differs, in words; nothing if all is the same. ``exact``: errors to the letter."""
    found = []
    if theirs.status != ours.status:
        found.append(f"status {theirs.status}, ours {ours.status}")
    if theirs.output != ours.output:
        found.append(f"output {theirs.output!r}, ours {ours.output!r}")
    if (exact and theirs.errors != ours.errors) or bool(theirs.errors) != bool(ours.errors):
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
    parser.add_argument("--exact", action="store_true", help="compare messages to the letter, too")
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
            found = compare(*run_both(images, words), exact=options.exact)
            number += 1
            if found:
                differing += 1
                print(f"seed {seed}: {' '.join(words)}", *found, sep="\n    ", flush=True)
    print(f"{number} commands, {differing} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
