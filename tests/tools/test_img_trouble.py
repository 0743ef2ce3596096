"""pyvirtio-img killed, interrupted, or without space in the middle of what it does."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pyvirtio
from support.workload import dangerous

SCRIPT = Path(__file__).parents[1] / "support" / "img_trouble.py"
SIZE = 1 << 20

COMMANDS = [
    "amend -f qcow2 -o lazy_refcounts=on,refcount_bits=64 top.qcow2",
    "bitmap --add -f qcow2 top.qcow2 b",
    "check -r all leaky.qcow2",
    "commit -f qcow2 top.qcow2",
    "convert -O qcow2 top.qcow2 new.qcow2",
    "convert -n -O qcow2 top.qcow2 other.qcow2",
    "create -f qcow2 -o preallocation=falloc new.qcow2 1M",
    "dd -O qcow2 bs=64k if=top.qcow2 of=new.qcow2",
    "rebase -f qcow2 -b other.qcow2 -F qcow2 top.qcow2",
    "rebase -u -f qcow2 -b ./base.qcow2 -F qcow2 top.qcow2",
    "resize --preallocation=falloc top.qcow2 2M",
    "snapshot -c two top.qcow2",
    "snapshot -d one top.qcow2",
    "snapshot -a one top.qcow2",
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    with pyvirtio.create_disk(folder / "base.qcow2", SIZE) as disk:
        disk.write(0, b"base" * 50_000)
    shutil.copy(folder / "base.qcow2", folder / "other.qcow2")
    options = {"backing_file": "base.qcow2", "backing_fmt": "qcow2"}
    with pyvirtio.create_disk(folder / "top.qcow2", SIZE, **options) as disk:
        disk.write(100_000, b"top!" * 20_000)
        disk.snapshots.create("one")
        disk.write(300_000, b"more" * 20_000)
    with pyvirtio.create_disk(folder / "leaky.qcow2", SIZE) as disk:
        disk.write(0, b"x" * 100_000)
    with (folder / "leaky.qcow2").open("r+b") as file:
        file.seek(48)
        file.seek(int.from_bytes(file.read(8)))  # the refcount table
        file.seek(int.from_bytes(file.read(8)) + 2 * 30)  # its first block
        file.write(b"\0\1")  # a leak
        file.truncate(32 << 16)
    return folder


def run(folder: Path, calls: int, how: str, words: list[str]) -> tuple[int, str]:
    command = [sys.executable, str(SCRIPT), str(folder), str(calls), how, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr


def contents(path: Path) -> bytes:
    with pyvirtio.open_disk(path, read_only=True) as disk:
        return disk.read(0, SIZE)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("how", ["kill", "interrupt", "full"])
def test_every_image_stays_valid_and_keeps_its_data(tmp_path, originals, how, command) -> None:
    words = command.split()
    before = contents(originals / "top.qcow2")
    troubled = 0
    for calls in (0, 2, 7):
        folder = tmp_path / str(calls)
        shutil.copytree(originals, folder)
        status, errors = run(folder, calls, how, words)
        assert "Traceback" not in errors
        if how == "kill" and status:
            assert status == -signal.SIGKILL
        if how == "interrupt" and status:
            assert (status, errors) == (-signal.SIGINT, "\n")
        troubled += bool(status)
        assert bool(errors) or how == "kill" or not status
        for path in folder.glob("*.qcow2"):
            if path.name == "new.qcow2" and not path.read_bytes()[:4].strip(b"\0"):
                continue  # no image yet
            with pyvirtio.open_disk(path, format="qcow2") as disk:
                assert not dangerous(disk.check()), (calls, path.name)
        if "-a" not in words:
            assert contents(folder / "top.qcow2") == before
    assert troubled
