"""NBD over TLS: our server under our client and GnuTLS's, our client on qemu-nbd."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio import BackendError, MemoryDisk, UnsupportedError
from pyvirtio.backend.nbd import NbdDisk
from pyvirtio.backend.tls import TlsCredentials, read_keys
from pyvirtio.tools.serve.nbd_export import Export
from support.certificates import make_certificates
from support.nbd import Program, Running
from support.peers import requires

SIZE = 4 << 20
KEY = "00112233445566778899aabbccddeeff"
HAS_SHARED_KEYS = sys.version_info >= (3, 13)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certificates")
    make_certificates(made)
    make_certificates(made / "others")
    (made / "keys.psk").write_text(f"alice:{KEY}\nbob:{KEY[::-1]}\n")
    return made


@contextmanager
def serving(tmp_path: Path, credentials: TlsCredentials, disk: MemoryDisk) -> Iterator[Running]:
    server = Running(tmp_path / "s", Export("", disk, False), tls=credentials.context())
    try:
        yield server
    finally:
        server.stop()


def client(folder: Path) -> ssl.SSLContext:
    return TlsCredentials(str(folder)).context()


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def img(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pyvirtio.tools.img import main; exit(main())", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_nothing_is_told_in_the_clear(tmp_path: Path, folder: Path) -> None:
    credentials = TlsCredentials(str(folder), server=True, verify_peer=False)
    with (
        serving(tmp_path, credentials, MemoryDisk(SIZE)) as server,
        pytest.raises(BackendError, match="TLS is required"),
    ):
        NbdDisk(server.path)


@pytest.mark.parametrize("verify", [False, True])
def test_data_go_through(tmp_path: Path, folder: Path, verify: bool) -> None:
    credentials = TlsCredentials(str(folder), server=True, verify_peer=verify)
    with serving(tmp_path, credentials, MemoryDisk(SIZE)) as server:
        data = os.urandom(SIZE)
        with NbdDisk(server.path, tls=client(folder), tls_hostname="localhost") as disk:
            disk.write(0, data)
            disk.flush()
            assert disk.read(0, SIZE) == data


def test_a_stranger_is_refused_where_clients_are_verified(tmp_path: Path, folder: Path) -> None:
    credentials = TlsCredentials(str(folder), server=True)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.load_verify_locations(folder / "ca-cert.pem")
    with (
        serving(tmp_path, credentials, MemoryDisk(SIZE)) as server,
        pytest.raises((BackendError, OSError)),
    ):
        NbdDisk(server.path, tls=stranger, tls_hostname="localhost")


@pytest.mark.parametrize(("where", "name"), [("others", "localhost"), (".", "example.org")])
def test_a_server_that_is_another_is_refused(
    tmp_path: Path, folder: Path, where: str, name: str
) -> None:
    credentials = TlsCredentials(str(folder), server=True, verify_peer=False)
    with (
        serving(tmp_path, credentials, MemoryDisk(SIZE)) as server,
        pytest.raises(BackendError, match="certificate"),
    ):
        NbdDisk(server.path, tls=client(folder / where), tls_hostname=name)


def test_the_last_answers_are_encrypted_when_the_server_ends(tmp_path: Path, folder: Path) -> None:
    class Slow(MemoryDisk):
        def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
            reading.set()
            assert go_on.wait(30)
            super()._readv(offset, views, length)

    reading, go_on = threading.Event(), threading.Event()
    credentials = TlsCredentials(str(folder), server=True, verify_peer=False)
    answer = []
    with serving(tmp_path, credentials, Slow(SIZE)) as server:
        disk = NbdDisk(server.path, read_only=True, tls=client(folder), tls_hostname="localhost")
        asking = threading.Thread(target=lambda: answer.append(disk.read(0, 100_000)))
        asking.start()
        assert reading.wait(30)
        server.server.stop()
        time.sleep(0.05)
        go_on.set()
        asking.join(30)
        disk.close()
    assert answer == [bytes(100_000)]


def test_shared_keys_go_where_python_knows_them(tmp_path: Path, folder: Path) -> None:
    credentials = TlsCredentials(str(folder), server=True, shared_key=True)
    if not HAS_SHARED_KEYS:
        with pytest.raises(UnsupportedError, match=r"Python 3\.13"):
            credentials.context()
        return
    ours = TlsCredentials(str(folder), shared_key=True, username="alice").context()
    with serving(tmp_path, credentials, MemoryDisk(SIZE)) as server:
        with NbdDisk(server.path, tls=ours) as disk:
            disk.write(0, b"secret")
            assert disk.read(0, 6) == b"secret"
        wrong = TlsCredentials(str(folder), shared_key=True, username="alice")
        (tmp_path / "keys.psk").write_text(f"alice:{'ff' * 16}\n")
        wrong = TlsCredentials(str(tmp_path), shared_key=True, username="alice")
        with pytest.raises(BackendError):
            NbdDisk(server.path, tls=wrong.context())
        if os.path.exists("/usr/bin/nbdinfo"):
            url = f"nbds+unix://alice@/?socket={server.path}&tls-psk-file={folder}/keys.psk"
            assert run("nbdinfo", "--size", url).strip() == str(SIZE)


def test_a_file_of_shared_keys_is_read_and_nonsense_is_told(folder: Path, tmp_path: Path) -> None:
    assert read_keys(str(folder / "keys.psk"))["alice"] == bytes.fromhex(KEY)
    (tmp_path / "bad").write_text("alice:no key\n")
    with pytest.raises(ValueError, match="no list of names and keys"):
        read_keys(str(tmp_path / "bad"))


@requires("nbdcopy", "nbdinfo", "qemu-img")
def test_programs_with_gnutls_use_our_server(tmp_path: Path, folder: Path) -> None:
    image, copy = tmp_path / "a.qcow2", str(tmp_path / "copy")
    pyvirtio.create_disk(image, SIZE).close()
    (tmp_path / "data").write_bytes(os.urandom(SIZE))
    words = ("--tls-certs", str(folder), "--tls-verify-peer", "--stats", str(image))
    with Program(tmp_path, *words) as program:
        url = f"nbds+unix://localhost/?socket={program.path}&tls-certificates={folder}"
        assert "TLS" in run("nbdinfo", url)
        run("nbdcopy", "--requests=16", "--flush", str(tmp_path / "data"), url)
        run("nbdcopy", "--requests=16", url, copy)
        assert Path(copy).read_bytes() == (tmp_path / "data").read_bytes()
        objects = ("--object", f"tls-creds-x509,id=t,dir={folder},endpoint=client")
        options = f"driver=nbd,path={program.path},tls-creds=t,tls-hostname=localhost"
        run(
            "qemu-img",
            "compare",
            *objects,
            "--image-opts",
            options,
            f"driver=raw,file.filename={copy}",
        )
        status, said = program.end()
    assert status == 0
    assert "at once" in said


@requires("qemu-nbd")
def test_our_programs_take_credentials_for_a_server_of_qemu(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "raw").write_bytes(b"q" * SIZE)
    path = str(tmp_path / "q.sock")
    server = subprocess.Popen(
        [
            *("qemu-nbd", "-r", "-t", "-f", "raw", "-k", path, "--tls-creds", "t"),
            *("--object", f"tls-creds-x509,id=t,dir={folder},endpoint=server"),
            str(tmp_path / "raw"),
        ]
    )
    try:
        deadline = time.monotonic() + 30
        while not os.path.exists(path):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        options = f"driver=nbd,path={path},tls-creds=t,tls-hostname=localhost"
        objects = ("--object", f"tls-creds-x509,id=t,dir={folder},endpoint=client")
        copy = str(tmp_path / "copy")
        done = img("convert", *objects, "--image-opts", options, "-O", "raw", copy)
        assert (done.returncode, done.stderr) == (0, "")
        assert Path(copy).read_bytes() == b"q" * SIZE
        refused = img("info", "--image-opts", f"driver=nbd,path={path}")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "Traceback" not in refused.stderr
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


@requires("qemu-img")
@pytest.mark.parametrize(
    "given",
    [
        "tls-creds-x509,id=t",
        "tls-creds-x509,id=t,dir=@/none",
        "tls-creds-x509,id=t,dir=@,endpoint=nowhere",
        "tls-creds-x509,id=t,dir=@,verify-peer=maybe",
        "tls-creds-x509,id=t,dir=@,endpoint=server",
        "tls-creds-x509,id=t,dir=@,spell=x",
        "tls-creds-x509,id=other,dir=@",
        "secret,id=t,data=x",
    ],
)
def test_credentials_that_are_no_good_are_told_as_qemu_does(folder: Path, given: str) -> None:
    words = ("info", "--object", given.replace("@", str(folder)), "--image-opts")
    options = "driver=nbd,host=127.0.0.1,port=1,tls-creds=t"
    theirs = subprocess.run(
        ["qemu-img", *words, options], capture_output=True, text=True, timeout=100, check=False
    )
    ours = img(*words, options)
    assert ours.returncode == theirs.returncode
    assert ours.stderr.partition(": ")[2] == theirs.stderr.partition(": ")[2]
