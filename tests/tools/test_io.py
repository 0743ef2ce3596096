"""pyvirtio-io: qemu-io's language, word for word where QEMU's own is there to compare."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.tools.io.program import run
from pyvirtio.tools.io.text import hours, show_size
from support.peers import requires

IMAGE = "t.qcow2"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image with some data, and no terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pyvirtio.create_disk(IMAGE, 1 << 20) as disk:
        disk.write(0, b"\7" * (1 << 18))
    return tmp_path


def timeless(text: str) -> str:
    text = re.sub(r"\d+:\d\d:\d\d\.\d\d|\d\d\.\d\d sec", "T", text)
    text = re.sub(r"(?m)^(\d+,\d+,T),.*", r"\1", text)
    return re.sub(r"\([\d.]+ \w+/sec and [\d.]+ ops/sec\)", "(R)", text)


def ours(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = run(["qemu-io", *arguments])
    out, err = capfd.readouterr()
    return status, timeless(out), timeless(err)


COMMANDS = [
    "write 0 512", "write -z -u 0 64k", "write -b 0 512", "write -bz 0 512", "write -P 1 -s x 0 1",
    "write -c 512k 64k", "write -c 0 512", "write 1M 1", "read -P 7 0 64k", "read -P 8 0 64k",
    "read -P 300 0 1", "read -x 0 512", "read -v 262134 40", "read -C 0 512", "read 0 1.5",
    "read -b 0 64k", "readv -P 7 0 1k 2k", "writev 0 2G 2G", "aio_read -P 8 0 1k",
    "aio_write -z 0 64k 64k", "discard 0 64k", "truncate 1", "truncate -m foo 1M", "map",
    "alloc 0 2M", "alloc -1", "length", "length 1", "info", "foo", "help", "help write",
    "break write_aio A", "sleep x", "sigraise 100", "reopen -r -w", "reopen -o foo=bar",
    "reopen -o lazy-refcounts=on", "open x", "quit",
]  # fmt: skip


@requires("qemu-io")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_and_says_what_qemus_does(
    folder: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    before = (folder / IMAGE).read_bytes()
    arguments = ["-f", "qcow2", IMAGE, "-c", command]
    done = subprocess.run(["qemu-io", *arguments], capture_output=True, text=True, check=False)
    with pyvirtio.open_disk(IMAGE, read_only=True) as disk:
        theirs = disk.read(0, disk.size)
    (folder / IMAGE).write_bytes(before)
    expected = (done.returncode, timeless(done.stdout), timeless(done.stderr))
    assert ours(capfd, *arguments) == expected
    with pyvirtio.open_disk(IMAGE, read_only=True) as disk:
        assert disk.read(0, disk.size) == theirs
        assert disk.check().clean  # type: ignore[attr-defined]


def test_commands_come_from_standard_input_after_a_prompt(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"length\n\nfoo\nquit\nlength\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    status, out, err = ours(capfd, IMAGE)
    assert out == "qemu-io> 1 MiB\nqemu-io> qemu-io> qemu-io> "
    assert (status, err) == (1, 'command "foo" not found\n')


def test_requests_wait_at_breakpoints(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = [
        "break write_aio A", "aio_write -P 10 0x48000 0x2000", "wait_break A",
        "aio_write -P 11 0x42000 0x2000", "aio_write -P 12 0x4c000 0x2000", "resume A",
        "aio_flush", "read -P 10 -q 0x48000 0x2000", "read -qP 11 0x42000 0x2000",
        "read -qP 12 0x4c000 0x2000",
    ]  # fmt: skip
    status, out, err = ours(
        capfd, f"blkdebug::{IMAGE}", *(word for text in commands for word in ("-c", text))
    )
    assert (status, err) == (0, "")
    assert out.startswith(
        "blkdebug: Suspended request 'A'\nblkdebug: Resuming request 'A'\nwrote 8192/8192 bytes"
    )
    assert out.count("wrote") == 3


def test_a_snapshot_leaves_the_image_alone(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (folder / IMAGE).read_bytes()
    commands = ("-c", "write -qP 1 0 64k", "-c", "read -qP 1 0 64k", "-c", "read -qP 7 64k 64k")
    assert ours(capfd, "-s", "-f", "qcow2", IMAGE, *commands) == (0, "", "")
    assert (folder / IMAGE).read_bytes() == before


def test_what_cannot_be_opened_is_told(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = "qemu-io: can't open device nope: Could not open 'nope': No such file or directory\n"
    assert ours(capfd, "nope") == (1, "", text)


def test_reopening_with_options_that_are_wrong_leaves_the_image_open(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    commands = ("-c", "reopen -o overlap-check=foo", "-c", "length")
    status, out, err = ours(capfd, "-f", "qcow2", IMAGE, *commands)
    assert (status, out) == (1, "1 MiB\n")
    assert "Unsupported value 'foo'" in err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1.5, "1.500000 bytes"), (1536, "1.500 KiB")],
)
def test_sizes_are_shown_in_the_largest_unit(value: float, text: str) -> None:
    assert show_size(value) == text


def test_times_are_shown_as_short_as_they_are() -> None:
    assert hours(0.25, fixed=False) == "00.25 sec"
    assert hours(0.25, fixed=True) == "0:00:00.25"
    assert hours(3723.5, fixed=False) == "1:02:03.50"


def test_output_into_a_pipe_comes_in_blocks_whatever_python_was_told(folder: Path) -> None:
    program = "import sys; from pyvirtio.tools.io import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-u", "-c", program, "-c", "foo", "-c", "read 0 2M", IMAGE],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    with_output_first = subprocess.run(
        [sys.executable, "-u", "-c", program, "-c", "length", IMAGE, "-c", "open nothing"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.stdout.count("\n") == 2
    assert with_output_first.stdout.splitlines()[-1] == "1 MiB"
