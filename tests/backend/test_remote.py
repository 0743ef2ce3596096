"""Images behind URLs, through fsspec."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio import BackendError
from pyvirtio.backend.remote import RemoteDisk

fsspec = pytest.importorskip("fsspec", reason="not installed: fsspec")


def test_a_file_is_read_in_parts() -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/image", bytes(range(256)) * 16)
    with RemoteDisk("memory://image") as disk:
        assert disk.size == 4096
        assert disk.read(250, 10) == bytes([250, 251, 252, 253, 254, 255, 0, 1, 2, 3])
        with pytest.raises(BackendError) as caught:
            disk.write(0, b"x")
    assert caught.value.errno == errno.EPERM


def test_a_file_that_is_missing_is_told() -> None:
    with pytest.raises(BackendError, match="Could not open 'memory://nothing'"):
        RemoteDisk("memory://nothing")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_writing_to_a_url_is_refused(server: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="not installed: aiohttp")
    (tmp_path / "disk").write_bytes(bytes(1024))
    with pytest.raises(BackendError, match="http driver does not support writes"):
        pyvirtio.open_disk(f"{server}/disk")
