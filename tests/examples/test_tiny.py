"""examples/tiny.py, run as a reader would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyvirtio

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tiny.py"


def run(*arguments: str) -> list[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_it_reads_the_disk_it_makes() -> None:
    assert run() == ["64 sectors, 1 interrupt", f"{b'Hello from sector 0'.ljust(32, bytes(1))!r}"]


def test_it_reads_a_qcow2_image(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    with pyvirtio.create_disk(image, 1 << 20, format="qcow2") as disk:
        disk.write(0, b"in an image".ljust(512, b"."))
    expected = b"in an image".ljust(32, b".")
    assert run(str(image)) == ["2048 sectors, 1 interrupt", repr(expected)]


def test_it_is_tiny() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 150
