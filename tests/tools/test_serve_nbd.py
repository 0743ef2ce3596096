"""pyvirtio-serve nbd, judged by our own client, libnbd's programs and qemu-img."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio import BackendError, Disk, MemoryDisk
from pyvirtio.backend import nbd_protocol as nbd
from pyvirtio.backend.nbd import NbdDisk
from pyvirtio.tools.serve.nbd_export import Export
from support.nbd import Running
from support.peers import requires

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Disk]:
    with pyvirtio.create_disk(tmp_path / "a.qcow2", SIZE) as disk:
        disk.write(0, b"a" * 65536)
        yield disk


@pytest.fixture
def running(tmp_path: Path, image: Disk) -> Iterator[Running]:
    dirty = [(65536, 131072)]
    server = Running(
        tmp_path / "socket",
        Export("", image, read_only=False, bitmaps={"b": dirty}),
        Export("ro", image, read_only=True),
    )
    yield server
    server.stop()


def test_a_client_reads_writes_and_asks(running: Running, image: Disk) -> None:
    with pyvirtio.open_disk(running.url(), format="raw") as disk:
        assert disk.size == SIZE
        assert disk.read(65530, 12) == b"a" * 6 + bytes(6)
        disk.write(SIZE - 3, b"end", fua=True)
        disk.write_zeroes(0, 65536, unmap=True)
        assert disk.block_status(0, SIZE).zero
        disk.flush()
    assert image.read(SIZE - 3, 3) == b"end"
    assert image.read(0, 65536) == bytes(65536)


def test_large_requests_are_cut(tmp_path: Path) -> None:
    server = Running(tmp_path / "socket", Export("", MemoryDisk(40 << 20), read_only=False))
    try:
        with NbdDisk(server.path) as disk:
            disk.write(0, b"x" * (40 << 20))
            assert disk.read(0, 40 << 20).count(b"x") == 40 << 20
    finally:
        server.stop()


def test_an_export_may_be_read_only(running: Running) -> None:
    with pytest.raises(BackendError, match="Permission denied"):
        NbdDisk(running.path, "ro")
    with NbdDisk(running.path, "ro", read_only=True) as disk:
        assert disk.read(0, 1) == b"a"


def test_an_export_that_is_not_there_is_told(running: Running) -> None:
    with pytest.raises(BackendError, match="export 'nope' not present"):
        NbdDisk(running.path, "nope")


def test_an_error_of_the_disk_reaches_the_client_with_its_number(
    running: Running, image: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BackendError(28, "full")

    with NbdDisk(running.path) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(image, "writev", fail)
            with pytest.raises(BackendError) as caught:
                disk.write(0, b"x")
        assert caught.value.errno == 28
        disk.write(0, b"x")


def test_a_lost_connection_is_made_anew(running: Running, tmp_path: Path, image: Disk) -> None:
    with NbdDisk(running.path, reconnect_delay=30) as disk:
        disk.read(0, 1)
        running.stop()
        os.unlink(running.path)
        again = Running(tmp_path / "socket", Export("", image, read_only=False, bitmaps={"b": []}))
        assert disk.read(0, 1) == b"a"
    again.stop()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 64,
        struct.pack(">I", 3) + b"\0" * 64,
        struct.pack(">I", 3) + nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.Option.GO, 1 << 30),
        struct.pack(">I", 3) + nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.Option.GO, 4) + b"\xff" * 4,
        struct.pack(">I", 3)
        + nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.Option.EXPORT_NAME, 0)
        + nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.Command.WRITE, 1, 0, 0xFFFFFFFF),
    ],
)
def test_a_client_that_talks_nonsense_harms_nobody(running: Running, garbage: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(running.path)
        client.sendall(garbage)
        client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):  # it hangs up with our nonsense unread
            while client.recv(4096):
                pass
    with NbdDisk(running.path) as disk:
        assert disk.read(0, 1) == b"a"


@requires("nbdinfo", "nbdcopy")
def test_libnbd_agrees(running: Running, tmp_path: Path) -> None:
    def ask(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    assert "can_multi_conn: true" in ask("nbdinfo", running.url())
    rows = [line.split()[:3] for line in ask("nbdinfo", "--map", running.url()).splitlines()]
    assert rows == [["0", "65536", "0"], ["65536", str(SIZE - 65536), "3"]]
    dirty = ask("nbdinfo", "--map=qemu:dirty-bitmap:b", running.url()).splitlines()
    assert [line.split()[:3] for line in dirty[:2]] == [
        ["0", "65536", "0"],
        ["65536", "65536", "1"],
    ]
    data = os.urandom(SIZE)
    (tmp_path / "data").write_bytes(data)
    ask("nbdcopy", "--flush", str(tmp_path / "data"), running.url())
    ask("nbdcopy", running.url(), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == data


@requires("qemu-img")
def test_qemu_img_agrees(running: Running, tmp_path: Path) -> None:
    copy = str(tmp_path / "copy")
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", running.url(), copy]
    subprocess.run(words, check=True, timeout=60)
    with pyvirtio.open_disk(copy) as disk, NbdDisk(running.path) as served:
        assert disk.read(0, SIZE) == served.read(0, SIZE)
