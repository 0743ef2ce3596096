"""An NBD server in a thread, and a client that says what it likes."""

from __future__ import annotations

import fcntl
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

from pyvirtio.backend import nbd_protocol as nbd
from pyvirtio.tools.serve.nbd_export import Export
from pyvirtio.tools.serve.nbd_server import Server

__all__ = ["Client", "Program", "Reply", "Running"]


class Running:
    """A server at a socket, in a thread."""

    def __init__(
        self, path: Path, *exports: Export, tls: ssl.SSLContext | None = None, **options: Any
    ) -> None:
        self.path = str(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.server = Server([self.listener], exports, tls=tls, **options)
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()

    def url(self, export: str = "") -> str:
        return f"nbd+unix:///{export}?socket={self.path}"

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(60)
        self.listener.close()
        assert not self.thread.is_alive()


class Program:
    """``pyvirtio-serve nbd`` as a process, listening at a UNIX socket in ``folder``."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.path = str(folder / "program.sock")
        command = (sys.executable, "-m", "pyvirtio.tools.serve", "nbd", "--socket", self.path)
        self.process = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as probe:
                if not probe.connect_ex(self.path):
                    return
            time.sleep(0.02)
        raise RuntimeError(f"the server does not start: {self.end()}")

    def url(self, export: str = "") -> str:
        return f"nbd+unix:///{export}?socket={self.path}"

    def end(self, signals: int = 1) -> tuple[int, str]:
        """SIGTERM it; its exit status, and what it has said."""
        for _ in range(signals):
            self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


class Reply(NamedTuple):
    """One chunk of a structured reply."""

    cookie: int
    kind: int
    data: bytes
    last: bool

    @property
    def error(self) -> int:
        """The protocol's number of an error; 0 if it is none."""
        return struct.unpack(">I", self.data[:4])[0] if self.kind & 0x8000 else 0


class Client:
    """A connection to the export ``name``, with structured replies and all it has to tell."""

    def __init__(self, path: str | int, name: str = "", *contexts: str) -> None:
        """At a path, or a local port."""
        self.socket = socket.socket(socket.AF_INET if isinstance(path, int) else socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(("127.0.0.1", path) if isinstance(path, int) else path)
        nbd.receive(self.socket, 18)
        self.socket.sendall(struct.pack(">I", 3))
        self.option(nbd.Option.STRUCTURED_REPLY)
        text = struct.pack(">I", len(name.encode())) + name.encode()
        if contexts:
            queries = b"".join(struct.pack(">I", len(c)) + c.encode() for c in contexts)
            self.option(
                nbd.Option.SET_META_CONTEXT, text + struct.pack(">I", len(contexts)) + queries
            )
        self.option(nbd.Option.GO, text + b"\0\0")

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; the replies, the last with them."""
        self.socket.sendall(nbd.OPTION.pack(nbd.OPTION_MAGIC, option, len(data)) + data)
        replies = []
        while True:
            head = nbd.receive(self.socket, nbd.OPTION_REPLY.size)
            _, _, reply, length = nbd.OPTION_REPLY.unpack(head)
            replies.append((reply, nbd.receive(self.socket, length)))
            if reply == nbd.Reply.ACK or reply >= nbd.Reply.UNSUPPORTED:
                return replies

    def request(
        self, command: int, offset: int, length: int, cookie: int, flags: int = 0, data: bytes = b""
    ) -> bytes:
        """A request as it is to be sent."""
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length)
        return head + data

    def receive(self) -> Reply:
        """The next chunk that the server sends."""
        magic, flags, kind, cookie, length = nbd.CHUNK.unpack(nbd.receive(self.socket, 20))
        assert magic == nbd.CHUNK_MAGIC
        return Reply(cookie, kind, nbd.receive(self.socket, length), bool(flags & nbd.DONE))

    def ask(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
    ) -> Reply:
        """A request and the last chunk of its reply."""
        self.socket.sendall(self.request(command, offset, length, 7, flags, data))
        while not (reply := self.receive()).last:
            pass
        return reply

    def wait_until_taken(self) -> None:
        """Wait until the server has received all that was sent."""
        deadline = time.monotonic() + 30
        while fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)) != bytes(4):
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not receive")
            time.sleep(0.01)

    def hung_up(self) -> bool:
        """True once the server has closed the connection; waits for it."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()
