"""pyvirtio-serve nbd as a program: its options, its end, and what libnbd and QEMU make of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.backend.nbd import NbdDisk
from support.nbd import Client, Program
from support.peers import requires
from support.qemu import qemu_img

SIZE = 8 << 20
PROGRAM = (sys.executable, "-m", "pyvirtio.tools.serve", "nbd")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, SIZE) as disk:
        disk.write(0, b"a" * 65536)
        disk.bitmaps.add("b")
        disk.write(1 << 20, b"b" * 65536)
        disk.bitmaps.disable("b")
    return path


def run(*words: str) -> str:
    environment = os.environ | {"PATH": f"/usr/bin:{os.environ['PATH']}"}  # nbdsh: Debian's Python
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=100, check=False, env=environment
    )
    assert not done.returncode, done.stderr
    return done.stdout


@requires("nbdcopy", "qemu-img")
def test_a_signal_in_the_middle_of_writing_leaves_what_was_answered(
    image: Path, tmp_path: Path
) -> None:
    with Program(tmp_path, "--stats", str(image)) as program, NbdDisk(program.path) as disk:
        for number in range(20):
            disk.write(number << 16, bytes([number + 1]) * 65536)
        status, said = program.end()
        assert (status, said.count("\n")) == (0, 1)
        assert "20 requests" in said
        assert f"{20 << 16} bytes written" in said
        assert not os.path.exists(program.path)
        disk.read_only = True  # there is nothing left to flush to
    with pyvirtio.open_disk(image) as disk:
        assert all(disk.read(number << 16, 1)[0] == number + 1 for number in range(20))
        assert disk.check().clean
    qemu_img("check", str(image))


def test_a_second_signal_does_not_wait_for_a_client_that_does_not_listen(
    image: Path, tmp_path: Path
) -> None:
    with Program(tmp_path, str(image)) as program, Client(program.path) as client:
        requests = [client.request(0, 0, 1 << 20, cookie) for cookie in range(8)]
        client.socket.sendall(b"".join(requests))
        client.wait_until_taken()
        program.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            program.process.wait(0.5)
        begun = time.monotonic()
        assert program.end() == (0, "")
        assert time.monotonic() - begun < 5


def test_a_socket_that_a_dead_server_left_is_replaced_and_a_living_one_is_not(
    image: Path, tmp_path: Path
) -> None:
    with Program(tmp_path, "--read-only", str(image)) as first:
        first.process.kill()
        first.process.wait()
        with Program(tmp_path, "--read-only", str(image)) as second:
            words = ("--socket", second.path, "--read-only", str(image))
            done = subprocess.run(
                [*PROGRAM, *words], capture_output=True, text=True, timeout=60, check=False
            )
            assert (done.returncode, done.stdout) == (1, "")
            assert "Address already in use" in done.stderr
            assert os.path.exists(second.path)


def test_a_passed_socket_is_served_and_can_be_passed_again(image: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "passed.sock")
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_FDS'] = '1'\n"
        "os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.argv[2], sys.argv[2:])"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        for _ in range(2):
            number = listener.fileno()
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(number), *PROGRAM, str(image)], pass_fds=[number]
            )
            with NbdDisk(path, read_only=True) as disk:
                assert disk.read(0, 1) == b"a"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        assert os.path.exists(path)


@requires("systemd-socket-activate", "nbdinfo")
def test_systemd_starts_it_for_the_first_client(image: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "activated.sock")
    process = subprocess.Popen(
        ["systemd-socket-activate", "-l", path, *PROGRAM, str(image)], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while not os.path.exists(path):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={path}").strip() == str(SIZE)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["@none"], "No such file or directory"),
        (["@"], "directory"),
        (["--export", "nothing", "@a.qcow2"], "NAME=IMAGE"),
        (["--export", "=@a.qcow2", "@a.qcow2"], "two exports"),
        (["--export-name", "n" * 5000, "@a.qcow2"], "longer than"),
        (["--export-name", b"\xff\xfe", "@a.qcow2"], "UTF-8"),
        (["--bitmap", "none", "--read-only", "@a.qcow2"], "Bitmap 'none' is not found"),
        (["--format", "qcow9", "@a.qcow2"], "qcow9"),
        (["--format", "qcow2", "@junk"], "qcow2"),
        (["--port", "99999", "@a.qcow2"], "99999"),
        (["--bind", "no.such.host.invalid", "@a.qcow2"], "no.such.host.invalid"),
        (["--socket", "@a.qcow2", "@a.qcow2"], "Address already in use"),
        (["--socket", "@none/s", "@a.qcow2"], "No such file or directory"),
        (["--socket", "x" * 200, "@a.qcow2"], "too long"),
        (["--tls-certs", "@none", "@a.qcow2"], "server-cert.pem"),
        (["--tls-psk", "@none", "@a.qcow2"], "keys.psk" if sys.version_info >= (3, 13) else "3.13"),
        (["--tls-verify-peer", "@a.qcow2"], "--tls-certs"),
        (["--max-connections", "0", "@a.qcow2"], "--max-connections"),
        (
            [
                "json:{",
            ],
            "JSON",
        ),
        (["json:{}"], "driver"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    image: Path, tmp_path: Path, words: list[str | bytes], message: str
) -> None:
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    before = os.fsencode(tmp_path) + b"/"
    words = [os.fsencode(word) for word in words]
    done = subprocess.run(
        [*PROGRAM, *(word.replace(b"@", before) for word in words)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    said = done.stderr.decode(errors="replace")
    assert (done.returncode, done.stdout) == (1, b"")
    assert message in said
    assert said.count("\n") == 1
    assert said.startswith("pyvirtio-serve nbd: ")


@requires("nbdinfo", "nbdcopy")
def test_several_exports_are_listed_and_hold_their_own_data(image: Path, tmp_path: Path) -> None:
    pyvirtio.create_disk(tmp_path / "two.qcow2", 1 << 20).close()
    words = ("--export", f"two={tmp_path}/two.qcow2", "--description", "of two", str(image))
    with Program(tmp_path, "--read-only", "--bitmap", "b", *words) as program:
        listed = run("nbdinfo", "--list", program.url())
        assert [line for line in listed.splitlines() if line.startswith("export=")] == [
            'export="":',
            'export="two":',
        ]
        assert listed.count("description: of two") == 2
        assert run("nbdinfo", "--size", program.url("two")).strip() == str(1 << 20)
        assert run("nbdinfo", "--size", program.url()).strip() == str(SIZE)
        told = run("nbdinfo", "--map=qemu:dirty-bitmap:b", program.url())
        assert told.splitlines()[1].split()[:3] == [str(1 << 20), "65536", "1"]
        assert program.end() == (0, "")


@requires("nbdcopy")
@pytest.mark.parametrize("many", [1, 64])
def test_nbdcopy_carries_an_image_over_several_connections(
    image: Path, tmp_path: Path, many: int
) -> None:
    data = os.urandom(SIZE)
    (tmp_path / "data").write_bytes(data)
    words = (f"--requests={many}", "--connections=4", "--threads=4", "--request-size=65536")
    with Program(tmp_path, "--stats", str(image)) as program:
        run("nbdcopy", *words, "--flush", str(tmp_path / "data"), program.url())
        run("nbdcopy", *words, program.url(), str(tmp_path / "copy"))
        status, said = program.end()
    assert status == 0
    assert (tmp_path / "copy").read_bytes() == data
    at_once = int(said.partition("(up to ")[2].split()[0])
    assert at_once <= 4 * min(many, 16)
    assert "9 connections" in said  # one was to see that the server is up


NBDSH = """
import errno
assert h.can_multi_conn() and h.can_fua() and h.can_flush() and h.can_trim() and h.can_zero()
assert h.can_fast_zero() and h.can_df() and h.can_cache() and not h.is_read_only()
assert h.get_structured_replies_negotiated()
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.pwrite(b"x" * 65536, 131072, nbd.CMD_FLAG_FUA)
h.zero(65536, 131072, nbd.CMD_FLAG_FAST_ZERO)
h.zero(65536, 262144, nbd.CMD_FLAG_NO_HOLE)
h.trim(65536, 0, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
assert h.pread(65536, 0) == bytes(65536)
whole = []
h.pread_structured(131072, (1 << 20) - 65536, lambda *told: whole.append(told[1:]), nbd.CMD_FLAG_DF)
assert len(whole) == 1, whole
chunks = []
h.pread_structured(131072, (1 << 20) - 65536,
    lambda data, offset, status, error: chunks.append((len(data), offset, status)))
assert chunks == [(65536, (1 << 20) - 65536, nbd.READ_HOLE), (65536, 1 << 20, nbd.READ_DATA)]
found = []
h.block_status(1 << 20, 262144, lambda *told: found.append(told[:3]))
assert found[0][0] == nbd.CONTEXT_BASE_ALLOCATION
assert found[0][2][1] & nbd.STATE_ZERO, found
try:
    h.pread(1, h.get_size())
except nbd.Error as error:
    assert error.errnum == errno.EINVAL
"""


@requires("nbdsh")
def test_libnbd_finds_everything_in_order(image: Path, tmp_path: Path) -> None:
    with Program(tmp_path, str(image)) as program:
        run("nbdsh", "--base-allocation", "-u", program.url(), "-c", NBDSH)
        assert program.end() == (0, "")


@requires("qemu-img", "qemu-io")
def test_qemu_works_on_an_export(image: Path, tmp_path: Path) -> None:
    with Program(tmp_path, str(image)) as program:
        url = program.url()
        words = ("-c", "write -P 7 100k 300k", "-c", "write -z 1M 64k", "-c", "discard 0 64k")
        run("qemu-io", "-f", "raw", *words, "-c", "read -P 7 100k 300k", "-c", "flush", url)
        run(
            "qemu-img",
            "bench",
            "-f",
            "raw",
            "-w",
            "-c",
            "2000",
            "-d",
            "32",
            "--flush-interval=64",
            url,
        )
        told = run("qemu-img", "map", "--output=json", "-f", "raw", url)
        assert '"start": 0' in told
        status, said = program.end()
        assert (status, said) == (0, "")
    qemu_img("check", str(image))
