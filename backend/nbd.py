"""The driver ``nbd``: a disk that another program serves."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable
from struct import Struct
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from ..errors import BackendError, UnsupportedError
from . import nbd_protocol as nbd
from .buffers import clear, gather, split
from .disk import Disk, Extent, Limits
from .node import Graph, Node
from .registry import Driver
from .tls import TlsCredentials

__all__ = ["DRIVER", "NbdDisk"]

_U32 = Struct(">I")
_STATUS = Struct(">II")
_CONTEXT = b"base:allocation"
_T = TypeVar("_T")


class NbdDisk(Disk):
    """An export of an NBD server at ``address``: a path of a UNIX socket, or (host, port).

    One request is under way at a time. For ``reconnect_delay`` seconds after a connection is lost
    requests wait for a new one and are sent again; after that they fail with EIO.
    """

    format_name = "nbd"

    def __init__(
        self,
        address: str | tuple[str, int],
        export: str = "",
        *,
        read_only: bool = False,
        reconnect_delay: float = 0,
        tls: ssl.SSLContext | None = None,
        tls_hostname: str | None = None,
    ) -> None:
        self._address = address
        self._export = export
        self._delay = reconnect_delay
        self._tls = tls
        self._tls_hostname = tls_hostname
        self._lock = threading.Lock()
        self._cookie = 0
        self._structured = self._status = False
        self._socket: socket.socket | None = None
        self._largest = nbd.MAX_REQUEST
        size, flags, smallest = self._connect()
        server_read_only = bool(flags & nbd.Transmission.READ_ONLY)
        if server_read_only and not read_only:
            self._disconnect()
            raise BackendError(
                errno.EACCES, "Could not open image: Permission denied", self.filename
            )
        self._flags = nbd.Transmission(flags)
        super().__init__(
            size, read_only=read_only, limits=Limits(request_alignment=max(1, smallest))
        )

    @property
    def filename(self) -> str:
        """A URL of the export."""
        name = f"/{self._export}" if self._export else ""
        if isinstance(self._address, str):
            return f"nbd+unix://{name}?socket={self._address}"
        return f"nbd://{self._address[0]}:{self._address[1]}{name}"

    # -- connecting ------------------------------------------------------------------------------

    def _connect(self) -> tuple[int, int, int]:
        """Connect; size, flags and smallest request of the export."""
        where = (
            self._address
            if isinstance(self._address, str)
            else f"{self._address[0]}:{self._address[1]}"
        )
        try:
            if isinstance(self._address, str):
                connection = socket.socket(socket.AF_UNIX)
                connection.connect(self._address)
            else:
                connection = socket.create_connection(self._address)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise BackendError.wrap(error, f"Failed to connect to '{where}'") from error
        self._socket = connection
        try:
            return self._handshake()
        except BaseException:
            self._disconnect()
            raise

    def _handshake(self) -> tuple[int, int, int]:
        connection = self._peer
        magic, style = nbd.INIT.unpack(nbd.receive(connection, nbd.INIT.size))
        if magic != nbd.INIT_MAGIC or style not in (nbd.OPTION_MAGIC, nbd.OLD_STYLE_MAGIC):
            raise BackendError(errno.EINVAL, "Bad initial magic received")
        self._structured = self._status = False
        if style == nbd.OLD_STYLE_MAGIC:
            return self._old_style()
        flags = int.from_bytes(nbd.receive(connection, 2), "big")
        if not flags & nbd.FIXED_NEWSTYLE:
            raise BackendError(errno.EINVAL, "Server does not support fixed newstyle")
        connection.sendall(_U32.pack(flags & (nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)))
        if self._tls is not None:
            self._simple_option(nbd.Option.STARTTLS, required=True)
            self._start_tls(connection, self._tls)
        self._structured = self._simple_option(nbd.Option.STRUCTURED_REPLY)
        name = self._export.encode()
        if self._structured:
            query = _U32.pack(len(name)) + name + _U32.pack(1) + _U32.pack(len(_CONTEXT)) + _CONTEXT
            for reply, data in self._option(nbd.Option.SET_META_CONTEXT, query):
                self._status |= reply == nbd.Reply.META_CONTEXT and data[4:] == _CONTEXT
        wanted = Struct(">HH").pack(1, nbd.Info.BLOCK_SIZE)
        facts: tuple[int, int] | None = None
        smallest = 1
        for reply, data in self._option(nbd.Option.GO, _U32.pack(len(name)) + name + wanted):
            if reply >= nbd.Reply.UNSUPPORTED:
                text = data.decode(errors="replace")
                raise BackendError(
                    errno.EINVAL, f"Requested export not available\nserver reported: {text}"
                )
            kind = int.from_bytes(data[:2], "big")
            if kind == nbd.Info.EXPORT and len(data) == nbd.EXPORT_INFO.size:
                _, *numbers = nbd.EXPORT_INFO.unpack(data)
                facts = numbers[0], numbers[1]
            elif kind == nbd.Info.BLOCK_SIZE and len(data) == nbd.BLOCK_SIZE_INFO.size:
                _, smallest, _, largest = nbd.BLOCK_SIZE_INFO.unpack(data)
                self._largest = max(smallest, min(largest, nbd.MAX_REQUEST))
        if facts is None:
            raise BackendError(errno.EINVAL, "broken server omitted NBD_INFO_EXPORT")
        size, flags = facts
        if size >= 1 << 63 or smallest & (smallest - 1) or smallest > 1 << 16:
            raise BackendError(errno.EINVAL, "server sent invalid export information")
        return size, flags, smallest

    def _start_tls(self, connection: socket.socket, tls: ssl.SSLContext) -> None:
        try:
            self._socket = tls.wrap_socket(connection, server_hostname=self._tls_hostname)
        except ssl.SSLCertVerificationError as error:
            message = f"The server's certificate is no good: {error.verify_message}"
            raise BackendError(errno.EACCES, message) from error
        except ssl.SSLError as error:
            reason = error.reason or str(error)
            raise BackendError(errno.EIO, f"TLS with the server failed: {reason}") from error
        except ValueError as error:  # a name is wanted
            raise BackendError(errno.EINVAL, str(error)) from error

    def _old_style(self) -> tuple[int, int, int]:
        """A server that offers its one export without a question."""
        if self._tls is not None:
            raise BackendError(errno.EINVAL, "Server does not support STARTTLS")
        if self._export:
            raise BackendError(errno.EINVAL, "Server does not support non-empty export names")
        size, flags = nbd.OLD_STYLE.unpack(nbd.receive(self._peer, nbd.OLD_STYLE.size))
        if size >= 1 << 63:
            raise BackendError(errno.EINVAL, "server sent invalid export information")
        return size, flags & 0xFFFF, 1

    @property
    def _peer(self) -> socket.socket:
        if self._socket is None:
            raise BackendError(errno.ENOTCONN, "The NBD connection is lost")
        return self._socket

    def _option(self, option: nbd.Option, data: bytes) -> list[tuple[int, bytes]]:
        """Send an option; all replies to it but the acknowledgement."""
        self._peer.sendall(nbd.OPTION.pack(nbd.OPTION_MAGIC, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            head = nbd.receive(self._peer, nbd.OPTION_REPLY.size)
            magic, answered, reply, length = nbd.OPTION_REPLY.unpack(head)
            if magic != nbd.REPLY_MAGIC or answered != option or length > nbd.MAX_OPTION:
                raise BackendError(errno.EINVAL, "Unexpected option reply from the server")
            contents = nbd.receive(self._peer, length)
            if reply == nbd.Reply.ACK:
                return replies
            replies.append((reply, contents))
            if reply >= nbd.Reply.UNSUPPORTED:
                return replies
            if len(replies) > 1000:
                raise BackendError(errno.EINVAL, "Too many option replies from the server")

    def _simple_option(self, option: nbd.Option, *, required: bool = False) -> bool:
        replies = self._option(option, b"")
        if replies and required:
            raise BackendError(errno.EINVAL, f"Server refused option {option.name.lower()}")
        return not replies

    def _disconnect(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    # -- requests --------------------------------------------------------------------------------

    def _do(self, work: Callable[[], _T]) -> _T:
        """Do a request, again on a new connection if the connection was lost."""
        deadline: float | None = None
        with self._lock:
            while True:
                try:
                    if self._socket is None:
                        size, flags, _ = self._connect()
                        if size != self.size or flags != self._flags:
                            raise BackendError(errno.EIO, "The NBD export has changed")
                    return work()
                except (ConnectionError, BackendError, ssl.SSLError) as error:
                    if self._socket is not None and not _is_lost(error):
                        raise
                    self._disconnect()
                    now = time.monotonic()
                    deadline = now + self._delay if deadline is None else deadline
                    if now >= deadline:
                        raise BackendError(errno.EIO, "The NBD connection is lost") from error
                    time.sleep(min(0.1, deadline - now))

    def _send(
        self, command: nbd.Command, flags: int, offset: int, length: int, data: bytes = b""
    ) -> int:
        self._cookie = (self._cookie + 1) & 0xFFFFFFFFFFFFFFFF
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, self._cookie, offset, length)
        self._peer.sendall(head + data)
        return self._cookie

    def _request(
        self,
        command: nbd.Command,
        flags: int,
        offset: int,
        length: int,
        *,
        data: bytes = b"",
        views: list[memoryview] | None = None,
    ) -> list[bytes]:
        """One request and its whole reply; the contents of block status chunks."""
        cookie = self._send(command, flags, offset, length, data)
        failure = 0
        found: list[bytes] = []
        while True:
            (magic,) = _U32.unpack(nbd.receive(self._peer, 4))
            if magic == nbd.SIMPLE_MAGIC and not (self._structured and views):
                failure, answered = Struct(">IQ").unpack(nbd.receive(self._peer, 12))
                self._check_cookie(answered, cookie)
                if not failure and views:
                    self._fill(split(views, 0, length))
                break
            if magic != nbd.CHUNK_MAGIC or not self._structured:
                self._lose("Unexpected reply magic from the server")
            last, kind, answered, size = Struct(">HHQI").unpack(nbd.receive(self._peer, 16))
            self._check_cookie(answered, cookie)
            failure = self._chunk(kind, size, offset, length, views, found) or failure
            if last & nbd.DONE:
                break
        if failure:
            number = nbd.number_of(failure)
            raise BackendError(number, "The NBD server refused a request")
        return found

    def _chunk(
        self,
        kind: int,
        size: int,
        offset: int,
        length: int,
        views: list[memoryview] | None,
        found: list[bytes],
    ) -> int:
        """Take one chunk of a reply; the error in it, or 0."""
        if kind == nbd.Type.OFFSET_DATA and views and 8 < size <= length + 8:
            at = int.from_bytes(nbd.receive(self._peer, 8), "big") - offset
            if not 0 <= at <= length - (size - 8):
                self._lose("The server sent data that was not asked for")
            self._fill(split(views, at, size - 8))
            return 0
        if size > nbd.MAX_OPTION:
            self._lose("The server sent too long a chunk")
        data = nbd.receive(self._peer, size)
        if kind == nbd.Type.OFFSET_HOLE and views and size == 12:
            at, run = Struct(">QI").unpack(data)
            if not 0 <= at - offset <= length - run:
                self._lose("The server sent a hole that was not asked for")
            clear(split(views, at - offset, run))
        elif kind == nbd.Type.BLOCK_STATUS:
            found.append(data)
        elif kind & 0x8000:
            return int.from_bytes(data[:4], "big") or errno.EIO
        elif kind != nbd.Type.NONE or size:
            self._lose("Unexpected chunk from the server")
        return 0

    def _fill(self, views: list[memoryview]) -> None:
        for view in views:
            nbd.receive_into(self._peer, view)

    def _check_cookie(self, answered: int, cookie: int) -> None:
        if answered != cookie:
            self._lose("The server answered a request that was not made")

    def _lose(self, message: str) -> None:
        """The server does not keep to the protocol: nothing it says from now on counts."""
        self._disconnect()
        raise BackendError(errno.EINVAL, message)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        for done in range(0, length, self._largest):
            part = min(self._largest, length - done)
            place, pieces = offset + done, split(views, done, part)
            self._do(
                lambda place=place, part=part, pieces=pieces: self._request(  # type: ignore[misc]
                    nbd.Command.READ, 0, place, part, views=pieces
                )
            )

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        for done in range(0, length, self._largest):
            data = gather(split(views, done, min(self._largest, length - done)))
            self._do(
                lambda place=offset + done, data=data: self._request(  # type: ignore[misc]
                    nbd.Command.WRITE, 0, place, len(data), data=data
                )
            )

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if not self._flags & nbd.Transmission.SEND_WRITE_ZEROES:
            raise UnsupportedError("the NBD server writes no zeroes", feature="zeroes")
        flags = 0 if unmap else nbd.Flag.NO_HOLE
        self._in_parts(nbd.Command.WRITE_ZEROES, flags, offset, length)

    def _discard(self, offset: int, length: int) -> None:
        if self._flags & nbd.Transmission.SEND_TRIM:
            self._in_parts(nbd.Command.TRIM, 0, offset, length)

    def _in_parts(self, command: nbd.Command, flags: int, offset: int, length: int) -> None:
        step = 1 << 30
        for done in range(0, length, step):
            part = min(step, length - done)
            self._do(
                lambda place=offset + done, part=part: self._request(  # type: ignore[misc]
                    command, flags, place, part
                )
            )

    def _flush(self) -> None:
        if self._flags & nbd.Transmission.SEND_FLUSH:
            self._do(lambda: self._request(nbd.Command.FLUSH, 0, 0, 0))

    def _block_status(self, offset: int, length: int) -> Extent:
        length = min(length, 1 << 30)
        if not self._status:
            return Extent(
                length, data=True, zero=False, allocated=True, host_offset=offset, file=self
            )
        chunks = self._do(
            lambda: self._request(nbd.Command.BLOCK_STATUS, nbd.Flag.REQ_ONE, offset, length)
        )
        if not chunks or len(chunks[0]) < 12:
            raise BackendError(errno.EIO, "The NBD server told no block status")
        run, flags = _STATUS.unpack_from(chunks[0], 4)
        if not run:
            raise BackendError(errno.EIO, "The NBD server told an empty block status")
        return Extent(
            min(run, length),
            data=not flags & 1,
            zero=bool(flags & 2),
            allocated=True,
            host_offset=offset,
            file=self,
        )

    def _close(self) -> None:
        try:
            if self._socket is not None:
                self._send(nbd.Command.DISC, 0, 0, 0)
        except OSError:
            pass  # it is gone already
        finally:
            self._disconnect()


def _is_lost(error: Exception) -> bool:
    lost = (errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)
    return not isinstance(error, BackendError) or error.errno in lost


# -- opening ---------------------------------------------------------------------------------------


def _parse_filename(name: str, options: dict[str, Any]) -> None:
    if "://" in name:
        _parse_url(name, options)
        return
    rest, found, export = name.removeprefix("nbd:").partition(":exportname=")
    if found:
        options["export"] = export
    if rest.startswith("unix:"):
        options |= {"server.type": "unix", "server.path": rest[len("unix:") :]}
        return
    host, colon, port = rest.rpartition(":")
    if not colon:
        raise ValueError(f"error parsing address '{rest}'")
    options |= {"server.type": "inet", "server.host": host.strip("[]"), "server.port": port}


def _parse_url(name: str, options: dict[str, Any]) -> None:
    url = urlsplit(name)
    query = parse_qs(url.query)
    export = unquote(url.path).lstrip("/")
    if export:
        options["export"] = export
    if url.scheme == "nbd+unix":
        if url.netloc or list(query) != ["socket"]:
            raise ValueError("No valid URL specified")
        options |= {"server.type": "unix", "server.path": query["socket"][0]}
        return
    if url.scheme not in ("nbd", "nbd+tcp") or not url.hostname or query:
        raise ValueError("No valid URL specified")
    port = str(url.port or nbd.DEFAULT_PORT)
    options |= {"server.type": "inet", "server.host": url.hostname, "server.port": port}


def _open(node: Node) -> Disk:
    options = node.options
    path, host, port = options.text("path"), options.text("host"), options.text("port")
    kind = options.text("server.type") or ("unix" if path else "inet" if host else None)
    address: str | tuple[str, int]
    if kind is None:
        raise ValueError("NBD server address missing")
    if kind == "unix":
        address = options.text("server.path") or path or ""
    elif kind == "inet":
        host = options.text("server.host") or host or "localhost"
        port = options.text("server.port") or port or str(nbd.DEFAULT_PORT)
        if not port.isdigit() or int(port) > 65535:
            raise ValueError(f"Invalid port '{port}'")
        address = (host, int(port))
    else:
        raise ValueError(f"Invalid parameter '{kind}'")
    options.number("open-timeout")
    tls = _credentials(node.context.graph, options.text("tls-creds"))
    hostname = options.text("tls-hostname") or (address[0] if isinstance(address, tuple) else None)
    return NbdDisk(
        address,
        options.text("export") or "",
        read_only=node.context.read_only,
        reconnect_delay=options.number("reconnect-delay"),
        tls=tls,
        tls_hostname=hostname,
    )


def _credentials(graph: Graph, name: str | None) -> ssl.SSLContext | None:
    """What the object ``name`` says of TLS."""
    if name is None:
        return None
    found = graph.objects.get(name)
    if found is None and name not in graph.secrets:
        raise ValueError(f"No TLS credentials with id '{name}'")
    if not isinstance(found, TlsCredentials):
        raise ValueError(f"Object with id '{name}' is not TLS credentials")
    if found.server:
        raise ValueError("Expected TLS credentials for a client endpoint")
    return found.context()


DRIVER = Driver("nbd", _open, protocol=True, parse_filename=_parse_filename)
