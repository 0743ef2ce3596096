"""Whatever is given to our programs: a message, an exit status, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import pyvirtio

SCRIPT = Path(__file__).parents[1] / "support" / "bad_input.py"
SIZE = 1 << 20
LONG = "x" * 5000

IMAGES = [
    "none.qcow2",
    ".",
    "",
    LONG,
    "fifo",
    "unreadable.qcow2",
    "orphan.qcow2",
    "short.qcow2",
    "garbage.qcow2",
    "zeroes.qcow2",
    "extreme.qcow2",
    "socket",
    "/dev/null",
    "/dev/full",
    "json:{",
    "json:{}",
    'json:{"driver": "qcow2"}',
    'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "good.qcow2"}, "x": 1}',
    'json:{"driver": "qcow2", "file": 5}',
    'json:{"a": ' * 2000,
    "json:[1]",
    "nbd://127.0.0.1:1/x",
    "nbd:unix:/none",
    "nope:good.qcow2",
    "file:none",
    "\xff\xfe-none.qcow2",
    "\xff\xfe.qcow2",
]
READING = [
    "info {}",
    "info --output=json {}",
    "info -f qcow2 {}",
    "check {}",
    "check --output=json {}",
    "map {}",
    "map --output=json {}",
    "measure -O qcow2 {}",
    "snapshot -l {}",
    "compare {} good.qcow2",
    "compare good.qcow2 {}",
    "convert -O qcow2 {} out",
    "convert -f raw -O raw {} out",
    "dd if={} of=out",
    "bench -c 2 {}",
    "show {}",
    "explain {} 0",
    "explain --host {} 65536",
    "diff {} good.qcow2",
    "dump {}",
    "verify-chain {}",
]
WRITING = [
    "check -r all {}",
    "amend -o lazy_refcounts=on {}",
    "bitmap --add {} b",
    "commit {}",
    "rebase -u -b good.qcow2 -F qcow2 {}",
    "rebase -b good.qcow2 -F qcow2 {}",
    "resize {} 2M",
    "resize --shrink {} 64k",
    "snapshot -c s {}",
    "snapshot -a s {}",
    "snapshot -d s {}",
    "bench -w -c 2 {}",
    "convert -n -O qcow2 good.qcow2 {}",
    "convert -O qcow2 good.qcow2 {}",
    "dd if=good.qcow2 of={}",
]
SIZES = ["8E", "7E", "99999999999999999999", "-1", "1Z", "", "0", "9223372036854775807", "1e400"]
WORDS = [
    "create -f qcow2 new {}",
    "create -f raw new {}",
    "create -f qcow2 -o cluster_size={} new 1M",
    "create -f qcow2 -o preallocation={} new 1M",
    "create -f qcow2 -b good.qcow2 -F {} new",
    "resize good.qcow2 {}",
    "resize good.qcow2 +{}",
    "measure --size {} -O qcow2",
    "convert -S {} good.qcow2 out",
    "convert -m {} good.qcow2 out",
    "dd bs={} if=good.qcow2 of=out",
    "dd skip={} if=good.qcow2 of=out",
    "map --start-offset={} good.qcow2",
    "map --max-length={} good.qcow2",
    "explain good.qcow2 {}",
    "explain --host good.qcow2 {}",
    "diff -g {} good.qcow2 good.qcow2",
    "bitmap --add -g {} good.qcow2 b",
    "bench -s {} -c 1 good.qcow2",
    "bench -c {} good.qcow2",
    "show --width={} good.qcow2",
    "show --html={} good.qcow2",
    "snapshot -c {} good.qcow2",
    "info --object {} good.qcow2",
    "info --image-opts {}",
    "info --output={} good.qcow2",
    "completion {}",
    "man {}",
    "{}",
]
VALUES = [*SIZES, "\xff\xfe", LONG, "secret", "secret,id=a,file=none", "/none/x", ".", "a=b,c"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("good.qcow2", b"\xff\xfe.qcow2", "unreadable.qcow2", "readonly.qcow2"):
        with pyvirtio.create_disk(Path(os.fsdecode(name)), SIZE) as disk:
            disk.write(0, b"x" * 100_000)
            disk.snapshots.create("s")
    os.chmod("unreadable.qcow2", 0)
    os.chmod("readonly.qcow2", 0o444)
    pyvirtio.create_disk("base", SIZE).close()
    options: dict[str, Any] = {"backing_file": "base", "backing_fmt": "qcow2"}
    pyvirtio.create_disk("orphan.qcow2", SIZE, **options).close()
    os.unlink("base")
    good = Path("good.qcow2").read_bytes()
    Path("short.qcow2").write_bytes(good[:70])
    Path("garbage.qcow2").write_bytes(good[:8] + b"\xa5" * 65536)
    Path("zeroes.qcow2").write_bytes(good[:8] + bytes(65536))
    extreme = bytearray(good)
    extreme[24:32] = b"\xff" * 8  # the size
    extreme[36:40] = b"\xff" * 4  # entries of the L1 table
    extreme[60:64] = b"\xff" * 4  # snapshots
    Path("extreme.qcow2").write_bytes(extreme)
    os.mkfifo("fifo")
    subprocess.run(
        [sys.executable, "-c", "import socket; socket.socket(socket.AF_UNIX).bind('socket')"],
        check=True,
    )
    return tmp_path


def answers(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def words(command: str, value: str) -> list[str]:
    return [word.replace("{}", value) for word in command.split()]


def check(folder: Path, program: str, lines: list[list[str]], **more: Any) -> list[int]:
    """Each has an end of its own with a message; the statuses."""
    cases = [{"program": program, "words": line, **more} for line in lines]
    found = answers(folder, cases)
    wrong = []
    for line, answer in zip(lines, found, strict=True):
        errors, status = answer["errors"], answer["status"]
        told = bool(errors.strip()) or (status < 2 and line[0] in ("compare", "diff"))
        known = status in (0, 1, 2, 3, 63, 130)
        if "Traceback" in errors or not known or not (status == 0 or told or line[0] in MUTE):
            wrong.append((line, answer))
    shown = [
        f"{[word[:60] for word in line]}: {answer['status']} {answer['errors'][-300:]}"
        for line, answer in wrong
    ]
    assert not shown, "\n".join(shown)
    return [answer["status"] for answer in found]


def some(lines: Iterable[list[str]]) -> list[list[str]]:
    """Each command with some of the words; with PYVIRTIO_BAD_INPUT set, with all."""
    every = list(lines)
    return every if os.environ.get("PYVIRTIO_BAD_INPUT") else every[::5]  # no divisor of any list


MUTE = ("verify-chain", "check", "-c")
"""They say what is wrong on standard output."""


def test_images_that_are_none_or_not_to_be_had(folder: Path) -> None:
    lines = some(words(command, image) for command in READING + WRITING for image in IMAGES)
    statuses = check(folder, "img", lines)
    assert statuses.count(0) < len(statuses) / 4


def test_images_that_may_not_be_written(folder: Path) -> None:
    before = Path("readonly.qcow2").read_bytes()
    statuses = check(folder, "img", [words(command, "readonly.qcow2") for command in WRITING])
    assert sum(bool(status) for status in statuses) >= len(statuses) - 1
    assert Path("readonly.qcow2").read_bytes() == before


def test_sizes_and_words_that_are_none(folder: Path) -> None:
    check(folder, "img", some(words(command, value) for command in WORDS for value in VALUES))
    with pyvirtio.open_disk("good.qcow2") as disk:
        assert disk.check().clean


@pytest.mark.parametrize("stdout", ["full", "gone", "closed"])
def test_output_that_nobody_takes(folder: Path, stdout: str) -> None:
    lines = [words(command, "good.qcow2") for command in READING + WRITING]
    lines += [["--help"], ["--version"], ["man"], ["completion", "bash"], ["create", "-o", "help"]]
    check(folder, "img", lines, stdout=stdout)
    check(folder, "io", [["-c", "help"], ["-c", "map", "good.qcow2"], ["--version"]], stdout=stdout)
    check(folder, "serve", [["--version"], ["--help"], ["nbd", "--help"]], stdout=stdout)


def test_servers_tell_what_they_cannot_serve(folder: Path) -> None:
    lines = [
        ["nbd", "--socket", "s", image] for image in IMAGES if image not in ("\xff\xfe.qcow2",)
    ]
    lines += [["vhost-user-blk", *line[1:]] for line in lines]
    lines += [
        ["nbd", "--socket", where, "good.qcow2"] for where in (".", "/none/s", LONG, "fifo", "")
    ]
    lines += [
        ["vhost-user-blk", "--socket", where, "good.qcow2"] for where in (".", "/none/s", LONG, "")
    ]
    lines += [
        ["vhost-user-blk", "--socket", "s", f"--{name}", "0", "good.qcow2"]
        for name in ("queues", "queue-size")
    ]
    lines += [
        ["vhost-user-blk", "--fd", "99", "good.qcow2"],
        ["vhost-user-blk", "--monitor", "/none/m", "--socket", "s", "good.qcow2"],
    ]
    lines += [["nbd", "--port", port, "good.qcow2"] for port in ("-1", "70000", "x")]
    statuses = check(folder, "serve", [line for line in lines if "/dev/" not in line[-1]])
    assert set(statuses) <= {1, 2}


def test_io_tells_what_it_cannot_open(folder: Path) -> None:
    lines = [
        ["-c", command, image] for command in ("read 0 64k", "map", "info") for image in IMAGES
    ]
    lines += [["-c", f"read 0 {size or 'x'}", "good.qcow2"] for size in SIZES]
    lines += [["-c", f"write {size or 'x'} 512", "good.qcow2"] for size in SIZES]
    lines += [
        ["-c", command, "good.qcow2"] for command in ("open", "\xff", LONG, "read", "aio_write")
    ]
    check(folder, "io", lines)
    with pyvirtio.open_disk("good.qcow2") as disk:
        assert disk.check().clean
