"""``pyvirtio-serve nbd``: images as exports of an NBD server.

Fixed newstyle negotiation, structured replies, block status (``base:allocation`` and
``qemu:dirty-bitmap:NAME``), TLS, any number of connections to one export.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import ssl
import sys
import threading
from contextlib import ExitStack, suppress
from typing import Any

from ...backend.listener import UnixListener
from ...backend.nbd_protocol import DEFAULT_PORT
from ...backend.open import open_disk
from ...errors import PyvirtioError, UnsupportedError, message_of
from .nbd_session import Export, Session, Statistics

__all__ = ["Server", "run", "tls_context"]

_FIRST_PASSED_FD = 3
"""Where the sockets begin that a service manager passes (sd_listen_fds)."""


def run(program: str, arguments: list[str]) -> int:
    """Serve until told to end; the exit status."""
    parser = _parser(program)
    options = parser.parse_args(arguments)
    if options.image is None and not options.export:
        parser.error("an image is needed")
    try:
        with ExitStack() as stack:
            _serve(options, stack)
    except (OSError, ValueError, PyvirtioError) as error:
        print(f"{program}: {message_of(error)}", file=sys.stderr)
        return 1
    return 0


class Server:
    """Takes connections at a listening socket, and serves each in a thread of its own."""

    def __init__(
        self,
        listener: socket.socket,
        exports: list[Export],
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._listener = listener
        self._exports = {export.name: export for export in exports}
        self._tls = tls
        self.statistics = Statistics()
        self._sessions: dict[Session, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopping = False

    def serve(self) -> None:
        """Serve until :meth:`stop`; returns once every client is done with."""
        while not self._stopping:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._stopping:
                    break
                raise
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = Session(connection, self._exports, tls=self._tls, statistics=self.statistics)
            thread = threading.Thread(target=self._run, args=(session,), daemon=True)
            with self._lock:
                self._sessions[session] = thread
            thread.start()
        with self._lock:
            remaining = list(self._sessions.items())
        for session, thread in remaining:
            session.stop()
            thread.join()

    def _run(self, session: Session) -> None:
        try:
            session.serve()
        finally:
            with self._lock:
                self._sessions.pop(session, None)

    def stop(self) -> None:
        """Take no more connections, finish what is under way, and return from :meth:`serve`."""
        self._stopping = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)


def _serve(options: argparse.Namespace, stack: ExitStack) -> None:
    exports: list[Export] = []
    named = [(options.export_name, options.image)] if options.image is not None else []
    for text in options.export or ():
        name, equals, image = text.partition("=")
        if not equals:
            raise ValueError(f"--export wants NAME=IMAGE, not '{text}'")
        named.append((name, image))
    for name, image in named:
        disk = stack.enter_context(
            open_disk(image, format=options.format, read_only=options.read_only)
        )
        if any(name == export.name for export in exports):
            raise ValueError(f"two exports have the name '{name}'")
        exports.append(
            Export(
                name,
                disk,
                options.read_only,
                options.description,
                _bitmaps(disk, options.bitmap, options.read_only),
            )
        )
    listener = stack.enter_context(_listener(options, stack))
    server = Server(listener, exports, tls=tls_context(options.tls_certs))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: server.stop())
    server.serve()
    if not options.read_only:
        for export in exports:
            export.disk.flush()
    if options.stats:
        print(f"nbd: {server.statistics}", file=sys.stderr)


def _bitmaps(disk: Any, names: list[str], read_only: bool) -> dict[str, list[tuple[int, int]]]:
    """The dirty runs of the bitmaps to be shown; nothing may change them meanwhile."""
    found = {}
    for name in names:
        known = getattr(disk, "bitmaps", None)
        if known is None or name not in known:
            raise ValueError(f"Bitmap '{name}' is not found")
        bitmap = known[name]
        if bitmap.inconsistent:
            raise ValueError(f"Bitmap '{name}' is inconsistent and cannot be used")
        if bitmap.enabled and not read_only:
            raise ValueError(f"Bitmap '{name}' is enabled: export it with --read-only")
        found[name] = [(start, start + length) for start, length in bitmap.dirty()]
    return found


def _listener(options: argparse.Namespace, stack: ExitStack) -> socket.socket:
    """Where clients connect."""
    passed = os.environ.get("LISTEN_PID") == str(os.getpid())
    if (options.socket is not None) + (options.port is not None) + passed > 1:
        raise ValueError("one of --socket, --port and a passed socket is needed")
    if passed:
        if os.environ.get("LISTEN_FDS") != "1":
            raise UnsupportedError("one socket is served, no more", feature="passed sockets")
        return socket.socket(fileno=_FIRST_PASSED_FD)
    if options.socket is not None:
        owned = UnixListener(options.socket, backlog=64)
        stack.callback(owned.close)
        return owned.socket
    port = DEFAULT_PORT if options.port is None else options.port
    return socket.create_server((options.bind, port), backlog=64)


def tls_context(folder: str | None) -> ssl.SSLContext | None:
    """TLS with the certificates in a folder, under the names that QEMU and nbdkit use."""
    if folder is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        os.path.join(folder, "server-cert.pem"), os.path.join(folder, "server-key.pem")
    )
    authority = os.path.join(folder, "ca-cert.pem")
    if os.path.exists(authority):
        context.load_verify_locations(authority)
    return context


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program, description="Serve images over NBD.", allow_abbrev=False
    )
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="any format that pyvirtio knows")
    add("--export-name", default="", metavar="NAME", help="of IMAGE (default: the empty name)")
    add("--export", action="append", metavar="NAME=IMAGE", help="one more; may be repeated")
    add("--socket", metavar="PATH", help="listen at this UNIX socket")
    add("--port", type=int, metavar="N", help=f"listen at this TCP port (default: {DEFAULT_PORT})")
    add("--bind", default="127.0.0.1", metavar="ADDRESS", help="of the TCP port (default: local)")
    add("--format", help="of the images; their first bytes tell if not given")
    add("--read-only", action="store_true", help="nothing is written")
    add("--description", default="", metavar="TEXT", help="what clients are told of the exports")
    add(
        "--bitmap",
        action="append",
        default=[],
        metavar="NAME",
        help="show this dirty bitmap as qemu:dirty-bitmap:NAME; may be repeated",
    )
    add("--tls-certs", metavar="FOLDER", help="require TLS, with the certificates there")
    add("--stats", action="store_true", help="tell at the end what was asked for")
    return parser
