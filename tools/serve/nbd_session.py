"""One NBD client: negotiation, then requests, one after the other (NBD specification)."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from struct import Struct

from ...backend import nbd_protocol as nbd
from ...backend.disk import Disk
from ...errors import BackendError, PyvirtioError, UnsupportedError

__all__ = ["Export", "Session", "Statistics"]

_U32 = Struct(">I")
_PAIR = Struct(">II")
_BASE = "base:allocation"
_DIRTY = "qemu:dirty-bitmap:"
_MAX_EXTENTS = 4096
"""Runs told in one answer about block status."""
_HOLE, _ZERO = 1, 2


@dataclass(slots=True)
class Statistics:
    """What all clients have asked for."""

    connections: int = 0
    requests: int = 0
    read: int = 0
    written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, command: int, length: int) -> None:
        """Note a request."""
        with self.lock:
            self.requests += 1
            if command == nbd.Command.READ:
                self.read += length
            elif command == nbd.Command.WRITE:
                self.written += length

    def __str__(self) -> str:
        return (
            f"{self.connections} connections, {self.requests} requests, "
            f"{self.read} bytes read, {self.written} bytes written"
        )


@dataclass(slots=True)
class Export:
    """A disk under a name."""

    name: str
    disk: Disk
    read_only: bool
    description: str = ""
    bitmaps: Mapping[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Dirty runs (offset, end) by the bitmap's name, in order."""

    @property
    def flags(self) -> int:
        """What a client may do."""
        flags = nbd.Transmission.HAS_FLAGS | nbd.Transmission.SEND_DF
        flags |= nbd.Transmission.SEND_CACHE | nbd.Transmission.CAN_MULTI_CONN
        flags |= nbd.Transmission.SEND_FLUSH | nbd.Transmission.SEND_FUA
        if self.read_only:
            return flags | nbd.Transmission.READ_ONLY
        flags |= nbd.Transmission.SEND_TRIM | nbd.Transmission.SEND_WRITE_ZEROES
        return flags | nbd.Transmission.SEND_FAST_ZERO

    @property
    def contexts(self) -> list[str]:
        """The metadata contexts it has; their places in the list are their numbers."""
        return [_BASE, *(_DIRTY + name for name in self.bitmaps)]


class _Refused(Exception):
    """An option is answered with an error."""

    def __init__(self, reply: nbd.Reply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class _Over(Exception):
    """The client is gone, or asked to go."""


class Session:
    """Serves one client until it goes or :meth:`stop` is called."""

    def __init__(
        self,
        connection: socket.socket,
        exports: Mapping[str, Export],
        *,
        tls: ssl.SSLContext | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        self._socket = connection
        self._exports = exports
        self._tls = tls
        self._encrypted = False
        self._statistics = statistics or Statistics()
        self._structured = False
        self._contexts: tuple[str, list[int]] = ("", [])
        """Export and numbers of the metadata contexts that were negotiated."""

    def stop(self) -> None:
        """Finish the request that is under way, and no other."""
        with suppress(OSError):  # it is over already
            self._socket.shutdown(socket.SHUT_RD)

    def serve(self) -> None:
        """Talk to the client until it goes."""
        with self._statistics.lock:
            self._statistics.connections += 1
        try:
            export = self._negotiate()
            while True:
                self._serve_request(export)
        except (_Over, OSError):
            pass  # BackendError too: the stream ended, or cannot be understood
        finally:
            self._socket.close()

    # -- negotiation -----------------------------------------------------------------------------

    def _negotiate(self) -> Export:
        flags = nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES
        greeting = nbd.INIT.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC) + flags.to_bytes(2, "big")
        self._socket.sendall(greeting)
        (answer,) = _U32.unpack(nbd.receive(self._socket, 4))
        if answer & ~flags or not answer & nbd.FIXED_NEWSTYLE:
            raise _Over
        no_zeroes = bool(answer & nbd.NO_ZEROES)
        while True:
            head = nbd.receive(self._socket, nbd.OPTION.size)
            magic, option, length = nbd.OPTION.unpack(head)
            if magic != nbd.OPTION_MAGIC or length > nbd.MAX_OPTION:
                raise _Over
            data = nbd.receive(self._socket, length)
            if option == nbd.Option.EXPORT_NAME:
                return self._old_style(data, no_zeroes)
            try:
                export = self._option(option, data)
            except _Refused as error:
                self._reply(option, error.reply, str(error).encode())
                continue
            if export is not None:
                return export

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        head = nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, option, reply, len(data))
        self._socket.sendall(head + data)

    def _old_style(self, data: bytes, no_zeroes: bool) -> Export:
        """``EXPORT_NAME``: there is no way to refuse but to hang up."""
        export = self._exports.get(data.decode(errors="replace"))
        if export is None or (self._tls is not None and not self._encrypted):
            raise _Over
        answer = Struct(">QH").pack(export.disk.size, export.flags)
        self._socket.sendall(answer + (b"" if no_zeroes else bytes(124)))
        return export

    def _option(self, option: int, data: bytes) -> Export | None:
        """Answer one option; the export if requests begin."""
        if option == nbd.Option.ABORT:
            self._reply(option, nbd.Reply.ACK)
            raise _Over
        if option == nbd.Option.STARTTLS:
            self._start_tls(option, data)
            return None
        if self._tls is not None and not self._encrypted:
            raise _Refused(nbd.Reply.TLS_REQUIRED, "TLS is required")
        if option in (nbd.Option.INFO, nbd.Option.GO):
            export = self._describe(option, data)
            return export if option == nbd.Option.GO else None
        if option == nbd.Option.LIST:
            self._list(option, data)
        elif option == nbd.Option.STRUCTURED_REPLY:
            if data:
                raise _Refused(nbd.Reply.INVALID, "no data are expected")
            self._structured = True
            self._reply(option, nbd.Reply.ACK)
        elif option in (nbd.Option.LIST_META_CONTEXT, nbd.Option.SET_META_CONTEXT):
            self._meta_contexts(option, data)
        else:
            raise _Refused(nbd.Reply.UNSUPPORTED, "unknown option")
        return None

    def _start_tls(self, option: int, data: bytes) -> None:
        if self._tls is None:
            raise _Refused(nbd.Reply.POLICY, "TLS is not configured")
        if data or self._encrypted:
            raise _Refused(nbd.Reply.INVALID, "TLS cannot be started now")
        self._reply(option, nbd.Reply.ACK)
        self._socket = self._tls.wrap_socket(self._socket, server_side=True)
        self._encrypted = True
        self._structured = False
        self._contexts = ("", [])

    def _list(self, option: int, data: bytes) -> None:
        if data:
            raise _Refused(nbd.Reply.INVALID, "no data are expected")
        for export in self._exports.values():
            name = export.name.encode()
            text = export.description.encode()
            self._reply(option, nbd.Reply.SERVER, _U32.pack(len(name)) + name + text)
        self._reply(option, nbd.Reply.ACK)

    def _named(self, data: bytes) -> tuple[Export, bytes]:
        """The export whose name an option's data begin with, and the rest of them."""
        length = int.from_bytes(data[:4], "big")
        if len(data) < 4 + length:
            raise _Refused(nbd.Reply.INVALID, "the export's name is cut off")
        name = data[4 : 4 + length].decode(errors="replace")
        if name not in self._exports:
            raise _Refused(nbd.Reply.UNKNOWN, f"export '{name}' not present")
        return self._exports[name], data[4 + length :]

    def _describe(self, option: int, data: bytes) -> Export:
        """``INFO`` and ``GO``."""
        export, rest = self._named(data)
        count = int.from_bytes(rest[:2], "big")
        if len(rest) != 2 + 2 * count:
            raise _Refused(nbd.Reply.INVALID, "the list of information is cut off")
        wanted = {int.from_bytes(rest[at : at + 2], "big") for at in range(2, len(rest), 2)}
        kind = Struct(">H")
        if nbd.Info.NAME in wanted:
            name = export.name.encode()
            self._reply(option, nbd.Reply.INFO, kind.pack(nbd.Info.NAME) + name)
        if nbd.Info.DESCRIPTION in wanted and export.description:
            text = export.description.encode()
            self._reply(option, nbd.Reply.INFO, kind.pack(nbd.Info.DESCRIPTION) + text)
        sizes = nbd.BLOCK_SIZE_INFO.pack(nbd.Info.BLOCK_SIZE, 1, 4096, nbd.MAX_REQUEST)
        self._reply(option, nbd.Reply.INFO, sizes)
        facts = nbd.EXPORT_INFO.pack(nbd.Info.EXPORT, export.disk.size, export.flags)
        self._reply(option, nbd.Reply.INFO, facts)
        self._reply(option, nbd.Reply.ACK)
        return export

    def _meta_contexts(self, option: int, data: bytes) -> None:
        if not self._structured:
            raise _Refused(nbd.Reply.INVALID, "structured replies come first")
        export, rest = self._named(data)
        count, at = int.from_bytes(rest[:4], "big"), 4
        queries = []
        for _ in range(count):
            length = int.from_bytes(rest[at : at + 4], "big")
            if at + 4 + length > len(rest):
                raise _Refused(nbd.Reply.INVALID, "a query is cut off")
            queries.append(rest[at + 4 : at + 4 + length].decode(errors="replace"))
            at += 4 + length
        listing = option == nbd.Option.LIST_META_CONTEXT
        chosen = [
            number
            for number, name in enumerate(export.contexts)
            if (listing and not queries) or any(_matches(name, query, listing) for query in queries)
        ]
        for number in chosen:
            name = export.contexts[number].encode()
            self._reply(option, nbd.Reply.META_CONTEXT, _U32.pack(number) + name)
        if not listing:
            self._contexts = (export.name, chosen)
        self._reply(option, nbd.Reply.ACK)

    # -- requests --------------------------------------------------------------------------------

    def _serve_request(self, export: Export) -> None:
        head = nbd.receive(self._socket, nbd.REQUEST.size)
        magic, flags, command, cookie, offset, length = nbd.REQUEST.unpack(head)
        if magic != nbd.REQUEST_MAGIC or command == nbd.Command.DISC:
            raise _Over
        data = b""
        if command == nbd.Command.WRITE:
            if length > nbd.MAX_REQUEST:
                raise _Over  # what follows could be anything
            data = nbd.receive(self._socket, length)
        self._statistics.count(command, length)
        try:
            answer = self._do(export, command, flags, offset, length, data)
        except (PyvirtioError, ValueError, MemoryError) as error:
            self._fail(cookie, _code(error), str(error))
            return
        if answer is None:
            self._succeed(cookie)
        else:
            answer(cookie)

    def _do(
        self, export: Export, command: int, flags: int, offset: int, length: int, data: bytes
    ) -> Callable[[int], None] | None:
        """Do a request; what sends the answer, if there is more to say than that it is done."""
        disk = export.disk
        writing = command in (nbd.Command.WRITE, nbd.Command.TRIM, nbd.Command.WRITE_ZEROES)
        if writing and export.read_only:
            raise BackendError(errno.EPERM, "the export is read-only")
        if command != nbd.Command.FLUSH and offset + length > disk.size:
            number = errno.ENOSPC if command == nbd.Command.WRITE else errno.EINVAL
            raise BackendError(number, "the request passes the end of the export")
        if command == nbd.Command.READ:
            if length > nbd.MAX_REQUEST:
                raise BackendError(errno.EOVERFLOW, "the request is too long")
            return self._read(disk, offset, length, bool(flags & nbd.Flag.DF))
        if command == nbd.Command.BLOCK_STATUS:
            return self._block_status(export, offset, length, bool(flags & nbd.Flag.REQ_ONE))
        fua = bool(flags & nbd.Flag.FUA)
        if command == nbd.Command.WRITE:
            disk.write(offset, data, fua=fua)
            return None
        if command == nbd.Command.TRIM:
            disk.discard(offset, length)
        elif command == nbd.Command.WRITE_ZEROES:
            fast = bool(flags & nbd.Flag.FAST_ZERO)
            unmap = not flags & nbd.Flag.NO_HOLE
            disk.write_zeroes(offset, length, unmap=unmap, fallback=not fast)
        elif command not in (nbd.Command.FLUSH, nbd.Command.CACHE):
            raise BackendError(errno.EINVAL, "unknown request")
        if command == nbd.Command.FLUSH or fua:
            disk.flush()
        return None

    def _succeed(self, cookie: int) -> None:
        if self._structured:
            self._chunk(cookie, nbd.Type.NONE, b"", last=True)
        else:
            self._socket.sendall(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_MAGIC, 0, cookie))

    def _fail(self, cookie: int, number: int, message: str) -> None:
        if not self._structured:
            self._socket.sendall(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_MAGIC, number, cookie))
            return
        text = message.encode()[:4096]
        self._chunk(cookie, nbd.Type.ERROR, Struct(">IH").pack(number, len(text)) + text, last=True)

    def _chunk(self, cookie: int, kind: int, data: bytes, *, last: bool) -> None:
        flags = nbd.DONE if last else 0
        self._socket.sendall(nbd.CHUNK.pack(nbd.CHUNK_MAGIC, flags, kind, cookie, len(data)) + data)

    def _read(self, disk: Disk, offset: int, length: int, whole: bool) -> Callable[[int], None]:
        place = Struct(">Q")
        if not self._structured:
            data = disk.read(offset, length)
            head = nbd.SIMPLE_REPLY
            return lambda cookie: self._socket.sendall(
                head.pack(nbd.SIMPLE_MAGIC, 0, cookie) + data
            )
        chunks: list[tuple[int, bytes]] = []
        if whole or not length:
            chunks.append((nbd.Type.OFFSET_DATA, place.pack(offset) + disk.read(offset, length)))
        else:
            for at, end, zero in _zero_runs(disk, offset, length):
                if zero:
                    chunks.append((nbd.Type.OFFSET_HOLE, place.pack(at) + _U32.pack(end - at)))
                else:
                    data = disk.read(at, end - at)
                    chunks.append((nbd.Type.OFFSET_DATA, place.pack(at) + data))

        def answer(cookie: int) -> None:
            for number, (kind, data) in enumerate(chunks, 1):
                self._chunk(cookie, kind, data, last=number == len(chunks))

        return answer

    def _block_status(
        self, export: Export, offset: int, length: int, one: bool
    ) -> Callable[[int], None]:
        name, chosen = self._contexts
        if name != export.name or not chosen or not length:
            raise BackendError(errno.EINVAL, "no metadata context was negotiated")
        limit = 1 if one else _MAX_EXTENTS
        contents = []
        for number in chosen:
            if number == 0:
                runs = _allocation(export.disk, offset, length)
            else:
                dirty = export.bitmaps[export.contexts[number].removeprefix(_DIRTY)]
                runs = _dirtiness(dirty, offset, length)
            packed = [_PAIR.pack(run, flags) for run, flags in _merged(runs, limit)]
            contents.append(_U32.pack(number) + b"".join(packed))

        def answer(cookie: int) -> None:
            for index, data in enumerate(contents, 1):
                last = index == len(contents)
                self._chunk(cookie, nbd.Type.BLOCK_STATUS, data, last=last)

        return answer


def _matches(name: str, query: str, listing: bool) -> bool:
    """A query names a context, or when listing, the namespace (or its part) it is in."""
    if query == name:
        return True
    return listing and query.endswith(":") and name.startswith(query)


def _code(error: BaseException) -> int:
    """The protocol's number for an error."""
    if isinstance(error, OSError):
        return nbd.ERRORS.get(error.errno or errno.EIO, nbd.ERRORS[errno.EIO])
    if isinstance(error, UnsupportedError):
        return nbd.ERRORS[errno.EOPNOTSUPP]
    if isinstance(error, MemoryError):
        return nbd.ERRORS[errno.ENOMEM]
    return nbd.ERRORS[errno.EIO if isinstance(error, PyvirtioError) else errno.EINVAL]


def _zero_runs(disk: Disk, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """A range as runs (start, end, zeroes?)."""
    start = at = offset
    zero: bool | None = None
    for extent in disk.extents(offset, length):
        if zero is not None and extent.zero is not zero:
            yield start, at, zero
            start = at
        zero = extent.zero
        at += extent.length
    yield start, at, bool(zero)


def _allocation(disk: Disk, offset: int, length: int) -> Iterator[tuple[int, int]]:
    for extent in disk.extents(offset, length):
        hole = 0 if extent.data else _HOLE
        yield extent.length, hole | (_ZERO if extent.zero else 0)


def _dirtiness(dirty: list[tuple[int, int]], offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Runs of a range: dirty (1) or not (0)."""
    end = offset + length
    index = max(0, bisect_right(dirty, (offset, 1 << 64)) - 1)
    at = offset
    for start, stop in dirty[index:]:
        if start >= end:
            break
        if stop <= at:
            continue
        if start > at:
            yield start - at, 0
            at = start
        yield min(stop, end) - at, 1
        at = min(stop, end)
    if at < end:
        yield end - at, 0


def _merged(runs: Iterator[tuple[int, int]], limit: int) -> Iterator[tuple[int, int]]:
    """Neighbours of one state as one run, at most ``limit`` of them."""
    length = count = 0
    state: int | None = None
    for run, flags in runs:
        if flags != state and state is not None:
            yield length, state
            count += 1
            if count == limit:
                return
            length = 0
        state = flags
        length += run
    if state is not None:
        yield length, state
