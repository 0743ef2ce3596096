"""``pyvirtio-serve nbd``: images as exports of an NBD server.

Fixed newstyle negotiation, structured replies, block status (``base:allocation`` and
``qemu:dirty-bitmap:NAME``), TLS, any number of connections to one export, each with several
requests under way.
"""

from __future__ import annotations

import argparse
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ...backend.listener import UnixListener
from ...backend.nbd_protocol import DEFAULT_PORT, MAX_STRING
from ...backend.open import open_disk
from ...errors import PyvirtioError, message_of
from ..messages import say_more
from .nbd_export import Export
from .nbd_server import MAX_CONNECTIONS, Server
from .signals import on_signals
from .sockets import passed_sockets

if TYPE_CHECKING:
    import ssl

__all__ = ["make_parser", "run"]

_BACKLOG = 64


def run(program: str, arguments: list[str]) -> int:
    """Serve until told to end; the exit status."""
    parser = make_parser(program)
    options = parser.parse_args(arguments)
    if options.image is None and not options.export:
        parser.error("an image is needed")
    try:
        with ExitStack() as stack:
            _serve(options, stack)
    except (OSError, ValueError, PyvirtioError) as error:
        say_more(f"{program}: {message_of(error)}\n")
        return 1
    return 0


def _serve(options: argparse.Namespace, stack: ExitStack) -> None:
    if options.max_connections < 1:
        raise ValueError("--max-connections wants a number from 1 on")
    exports: list[Export] = []
    for name, image in _named(options):
        disk = stack.enter_context(
            open_disk(image, format=options.format, read_only=options.read_only)
        )
        bitmaps = _bitmaps(disk, options.bitmap, options.read_only)
        exports.append(Export(name, disk, options.read_only, options.description, bitmaps))
    for name in options.bitmap:
        if not any(name in export.bitmaps for export in exports):
            raise ValueError(f"Bitmap '{name}' is not found")
    server = Server(
        _listeners(options, stack),
        exports,
        tls=_tls(options),
        max_connections=options.max_connections,
    )
    on_signals(server.stop)
    server.serve()
    for export in exports:
        if not options.read_only:
            export.disk.flush()
    if options.stats:
        say_more(f"nbd: {server.statistics}\n")


def _named(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The names of the exports and their images."""
    named = [] if options.image is None else [(options.export_name, options.image)]
    for text in options.export:
        name, equals, image = text.partition("=")
        if not equals:
            raise ValueError(f"--export wants NAME=IMAGE, not '{text}'")
        named.append((name, image))
    names = [name for name, _ in named]
    for text in (*names, options.description):
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise ValueError("names and descriptions of exports have to be UTF-8") from None
        if len(data) > MAX_STRING:
            raise ValueError(f"a name or description is longer than {MAX_STRING} bytes")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two exports have the name '{name}'")
    return named


def _bitmaps(disk: Any, names: list[str], read_only: bool) -> dict[str, list[tuple[int, int]]]:
    """The dirty runs of the bitmaps to be shown; nothing may change them meanwhile."""
    known = getattr(disk, "bitmaps", None)
    found = {}
    for name in names:
        if known is None or name not in known:
            continue
        bitmap = known[name]
        if bitmap.inconsistent:
            raise ValueError(f"Bitmap '{name}' is inconsistent and cannot be used")
        if bitmap.enabled and not read_only:
            raise ValueError(f"Bitmap '{name}' is enabled: export it with --read-only")
        found[name] = [(start, start + length) for start, length in bitmap.dirty()]
    return found


def _listeners(options: argparse.Namespace, stack: ExitStack) -> list[socket.socket]:
    """Where clients connect."""
    passed = passed_sockets()
    if (options.socket is not None) + (options.port is not None) + bool(passed) > 1:
        raise ValueError("one of --socket, --port and passed sockets is needed")
    if passed:
        for listener in passed:
            stack.enter_context(listener)
        return passed
    if options.socket is not None:
        owned = UnixListener(options.socket, _BACKLOG)
        stack.callback(owned.close)
        return [owned.socket]
    port = DEFAULT_PORT if options.port is None else options.port
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is no number of a port")
    try:
        found = socket.getaddrinfo(options.bind, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        message = f"cannot listen at {options.bind} port {port}: {message_of(error)}"
        raise OSError(error.errno, message) from error
    return [stack.enter_context(listener)]


def _tls(options: argparse.Namespace) -> ssl.SSLContext | None:
    """What is demanded of clients."""
    if options.tls_certs is None and options.tls_psk is None:
        if options.tls_verify_peer:
            raise ValueError("--tls-verify-peer wants --tls-certs")
        return None
    if options.tls_certs is not None and options.tls_psk is not None:
        raise ValueError("--tls-certs and --tls-psk exclude each other")
    from ...backend.tls import TlsCredentials

    return TlsCredentials(
        options.tls_certs if options.tls_psk is None else options.tls_psk,
        server=True,
        verify_peer=options.tls_verify_peer,
        shared_key=options.tls_psk is not None,
    ).context()


def make_parser(program: str) -> argparse.ArgumentParser:
    """The options there are."""
    parser = argparse.ArgumentParser(
        program, description="Serve images over NBD.", allow_abbrev=False
    )
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="any format that pyvirtio knows")
    add("--export-name", default="", metavar="NAME", help="of IMAGE (default: the empty name)")
    add(
        "--export",
        action="append",
        default=[],
        metavar="NAME=IMAGE",
        help="one more; may be repeated",
    )
    add("--socket", metavar="PATH", help="listen at this UNIX socket")
    add("--port", type=int, metavar="N", help=f"listen at this TCP port (default: {DEFAULT_PORT})")
    add("--bind", default="127.0.0.1", metavar="ADDRESS", help="of the TCP port (default: local)")
    add("--format", metavar="FORMAT", help="of the images; their first bytes tell if not given")
    add("--read-only", action="store_true", help="nothing is written")
    add("--description", default="", metavar="TEXT", help="what clients are told of the exports")
    add(
        "--bitmap",
        action="append",
        default=[],
        metavar="NAME",
        help="show this dirty bitmap as qemu:dirty-bitmap:NAME; may be repeated",
    )
    add(
        "--tls-certs",
        metavar="FOLDER",
        help="require TLS, with server-cert.pem, server-key.pem and ca-cert.pem there",
    )
    add(
        "--tls-verify-peer",
        action="store_true",
        help="require certificates of clients that ca-cert.pem stands for",
    )
    add(
        "--tls-psk",
        metavar="FOLDER",
        help="require TLS, with the shared keys in keys.psk there (from Python 3.13 on)",
    )
    add(
        "--max-connections",
        type=int,
        default=MAX_CONNECTIONS,
        metavar="N",
        help=f"at the same time; others wait (default: {MAX_CONNECTIONS})",
    )
    add("--stats", action="store_true", help="tell at the end what was asked for")
    return parser
