"""One NBD client: its requests, several at a time, answered as they are done.

Its threads take turns at receiving: one receives a request and then does it, while the next one
receives. Every thread is idle, receiving or doing a request, so their number bounds the requests
that are under way. Where requests are done faster than threads change, the turn is not passed on.
"""

from __future__ import annotations

import errno
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct

from ...backend import nbd_protocol as nbd
from ...backend.disk import Disk
from ...errors import BackendError, PyvirtioError, UnsupportedError, message_of
from .nbd_export import Export, Statistics, merged, zero_runs
from .nbd_handshake import Agreed, Over, negotiate
from .nbd_stream import Stream

__all__ = ["MAX_REQUESTS", "Session"]

MAX_REQUESTS = 16
"""Under way for one client at the same time."""
_MAX_BYTES = nbd.MAX_REQUEST
"""Of data, of all requests of a client that are under way."""
_MAX_EXTENTS = 4096
"""Runs told in one answer about block status."""
_CACHE_CHUNK = 1 << 20
_SMALL = 64 << 10
"""Bytes that a request may have to be quick."""
_QUICK = 0.0002
"""Seconds; a change of threads takes some 0.00004."""
_TRIED = 16
_U32 = Struct(">I")
_U64 = Struct(">Q")
_PAIR = Struct(">II")

_FLAGS = {
    nbd.Command.READ: nbd.Flag.FUA | nbd.Flag.DF,
    nbd.Command.WRITE: nbd.Flag.FUA,
    nbd.Command.FLUSH: nbd.Flag.FUA,
    nbd.Command.TRIM: nbd.Flag.FUA,
    nbd.Command.CACHE: nbd.Flag.FUA,
    nbd.Command.WRITE_ZEROES: nbd.Flag.FUA | nbd.Flag.NO_HOLE | nbd.Flag.FAST_ZERO,
    nbd.Command.BLOCK_STATUS: nbd.Flag.FUA | nbd.Flag.REQ_ONE,
}
"""What a request may say; FUA is allowed everywhere, and means nothing where nothing is written."""

_Parts = list[bytes | bytearray | memoryview]


@dataclass(frozen=True, slots=True)
class _Request:
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytearray
    """What is to be written."""

    @property
    def weight(self) -> int:
        """Bytes of memory that it takes."""
        heavy = self.command in (nbd.Command.READ, nbd.Command.WRITE)
        return min(self.length, nbd.MAX_REQUEST) if heavy else 0


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
        self._stream = Stream(connection)
        self._exports = exports
        self._tls = tls
        self._statistics = statistics or Statistics()
        self._agreed: Agreed | None = None
        self._receiving = threading.Lock()
        """Of the thread whose turn it is."""
        self._change = threading.Condition()
        """Guards what follows."""
        self._threads: list[threading.Thread] = []
        self._waiting = 0
        """Threads that receive, or will when it is their turn."""
        self._bytes = 0
        self._over = False
        self._slow = 2
        """Small requests one after the other that took long; one may be by chance. Guarded by the
        turn, as is the next."""
        self._small = 0

    @property
    def negotiated(self) -> bool:
        """The client has chosen an export."""
        return self._agreed is not None

    def stop(self) -> None:
        """Finish the requests that are under way, and take no others."""
        self._over = True
        self._stream.stop_receiving()

    def cut(self) -> None:
        """The same, but what cannot be sent at once is not sent."""
        self._stream.cut()

    def serve(self) -> None:
        """Talk to the client until it goes."""
        with self._statistics.lock:
            self._statistics.connections += 1
        try:
            self._agreed = negotiate(self._stream, self._exports, self._tls)
            self._waiting = 1
            try:
                self._work(self._agreed)
            finally:
                for thread in self._threads:
                    thread.join()
        except (Over, OSError):
            pass  # BackendError too: the stream ended, or cannot be understood
        finally:
            self._stream.close()

    # -- the threads -----------------------------------------------------------------------------

    def _work(self, agreed: Agreed) -> None:
        """Receive a request when it is this thread's turn, do it, and so on until it is over."""
        while True:
            with self._receiving:
                request = self._next()
                while request is not None and self._is_quick(request):
                    begun = time.perf_counter()
                    self._serve(agreed, request)
                    self._slow = 0 if time.perf_counter() - begun < _QUICK else self._slow + 1
                    request = self._next()
            if request is None:
                return
            with self._change:
                self._waiting -= 1
                if not self._waiting and len(self._threads) < MAX_REQUESTS - 1:
                    self._add_thread(agreed)
            try:
                self._serve(agreed, request)
            finally:
                with self._change:
                    self._waiting += 1

    def _is_quick(self, request: _Request) -> bool:
        """Whether it is likely done before another thread could take its turn at receiving. One
        request in a while is tried, to see whether such requests are."""
        simple = request.command in (nbd.Command.READ, nbd.Command.WRITE) and not request.flags
        if not simple or request.length > _SMALL:
            return False
        self._small += 1
        return self._slow < 2 or self._small % _TRIED == 0

    def _serve(self, agreed: Agreed, request: _Request) -> None:
        """Do a request and answer it."""
        self._statistics.begin()
        try:
            self._stream.send(self._answer(agreed, request))
        except BaseException as error:
            self._over = True
            self.cut()
            if not isinstance(error, OSError):  # nobody hears it, that is all
                raise
        finally:
            self._statistics.end()
            if request.weight:
                with self._change:
                    self._bytes -= request.weight
                    self._change.notify()

    def _add_thread(self, agreed: Agreed) -> None:
        """One more, which receives next. Where there can be none, this one goes on alone."""
        thread = threading.Thread(target=self._work, args=(agreed,), daemon=True)
        with suppress(RuntimeError):
            thread.start()
            self._threads.append(thread)
            self._waiting += 1

    def _next(self) -> _Request | None:
        """The next request, for which there is room; None if there is no other."""
        try:
            if self._over:
                return None
            head = self._stream.receive(nbd.REQUEST.size)
            magic, flags, command, cookie, offset, length = nbd.REQUEST.unpack(head)
            if magic != nbd.REQUEST_MAGIC or command == nbd.Command.DISC:
                raise Over
            if command == nbd.Command.WRITE and length > nbd.MAX_REQUEST:
                raise Over  # what follows could be anything
            request = _Request(command, flags, cookie, offset, length, bytearray())
            if request.weight:
                with self._change:
                    self._change.wait_for(lambda: self._bytes + request.weight <= _MAX_BYTES)
                    self._bytes += request.weight
            if command == nbd.Command.WRITE:
                data = self._stream.receive(length)
                request = _Request(command, flags, cookie, offset, length, data)
            return request
        except (Over, OSError):
            self._over = True
            return None

    # -- requests --------------------------------------------------------------------------------

    def _answer(self, agreed: Agreed, request: _Request) -> _Parts:
        """Do a request; what to say to it."""
        structured, cookie = agreed.structured, request.cookie
        try:
            contents = self._do(agreed, request)
            self._statistics.succeed(request.command, request.length)
        except (PyvirtioError, OSError, ValueError, MemoryError) as error:
            number = _code(error)
            if not structured:
                return [nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_MAGIC, number, cookie)]
            text = message_of(error).encode(errors="replace")[:4096]
            contents = [(nbd.Type.ERROR, [Struct(">IH").pack(number, len(text)), text])]
        if not structured:
            data = [part for _, parts in contents for part in parts]
            return [nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_MAGIC, 0, cookie), *data]
        answer: _Parts = []
        for number, (kind, parts) in enumerate(contents or [(nbd.Type.NONE, [])], 1):
            flags = nbd.DONE if number >= len(contents) else 0
            length = sum(len(part) for part in parts)
            answer.append(nbd.CHUNK.pack(nbd.CHUNK_MAGIC, flags, kind, cookie, length))
            answer += parts
        return answer

    def _do(self, agreed: Agreed, request: _Request) -> list[tuple[nbd.Type, _Parts]]:
        """Do a request; the chunks of its reply, if there is more to say than that it is done."""
        command, flags, offset, length = (
            request.command,
            request.flags,
            request.offset,
            request.length,
        )
        export, disk = agreed.export, agreed.export.disk
        writing = command in (nbd.Command.WRITE, nbd.Command.TRIM, nbd.Command.WRITE_ZEROES)
        if writing and export.read_only:
            raise BackendError(errno.EPERM, "the export is read-only")
        if command not in _FLAGS:
            raise BackendError(errno.EINVAL, "unknown request")
        if flags & ~int(_FLAGS[nbd.Command(command)]):  # of an IntFlag only known flags are left
            raise BackendError(errno.EINVAL, "unknown flags of a request")
        if command != nbd.Command.FLUSH and offset + length > disk.size:
            number = errno.ENOSPC if writing else errno.EINVAL
            raise BackendError(number, "the request passes the end of the export")
        if command == nbd.Command.READ:
            return _read(agreed, offset, length, bool(flags & nbd.Flag.DF))
        if command == nbd.Command.BLOCK_STATUS:
            return _block_status(agreed, offset, length, bool(flags & nbd.Flag.REQ_ONE))
        fua = bool(flags & nbd.Flag.FUA) and writing
        if command == nbd.Command.WRITE:
            disk.writev(offset, (request.data,), fua=fua)
            return []
        if command == nbd.Command.TRIM:
            disk.discard(offset, length)
        elif command == nbd.Command.WRITE_ZEROES:
            fast = bool(flags & nbd.Flag.FAST_ZERO)
            unmap = not flags & nbd.Flag.NO_HOLE
            disk.write_zeroes(offset, length, unmap=unmap, fallback=not fast)
        elif command == nbd.Command.CACHE:
            _cache(disk, offset, length)
        if command == nbd.Command.FLUSH or fua:
            disk.flush()
        return []


def _read(agreed: Agreed, offset: int, length: int, whole: bool) -> list[tuple[nbd.Type, _Parts]]:
    """The data, with holes where the client can understand them."""
    if length > nbd.MAX_REQUEST:
        raise BackendError(errno.EOVERFLOW if whole else errno.EINVAL, "the request is too long")
    disk = agreed.export.disk
    if not agreed.structured:
        data = bytearray(length)
        disk.readv(offset, (data,))
        return [(nbd.Type.OFFSET_DATA, [data])]
    if not length:
        return []
    chunks: list[tuple[nbd.Type, _Parts]] = []
    runs = [(offset, offset + length, False)] if whole else zero_runs(disk, offset, length)
    for start, end, zero in runs:
        if zero:
            chunks.append((nbd.Type.OFFSET_HOLE, [_U64.pack(start) + _U32.pack(end - start)]))
        else:
            data = bytearray(end - start)
            disk.readv(start, (data,))
            chunks.append((nbd.Type.OFFSET_DATA, [_U64.pack(start), data]))
    return chunks


def _cache(disk: Disk, offset: int, length: int) -> None:
    """Read what will be read soon."""
    if length > nbd.MAX_REQUEST:
        raise BackendError(errno.EINVAL, "the request is too long")
    buffer = memoryview(bytearray(min(length, _CACHE_CHUNK)))
    while length:
        part = min(length, len(buffer))
        disk.readv(offset, (buffer[:part],))
        offset, length = offset + part, length - part


def _block_status(
    agreed: Agreed, offset: int, length: int, one: bool
) -> list[tuple[nbd.Type, _Parts]]:
    if not agreed.contexts:
        raise BackendError(errno.EINVAL, "no metadata context was negotiated")
    if not length:
        raise BackendError(errno.EINVAL, "the status of no bytes was asked for")
    limit = 1 if one else _MAX_EXTENTS
    chunks: list[tuple[nbd.Type, _Parts]] = []
    for context in agreed.contexts:
        states = agreed.export.states(context, offset, length)
        runs = b"".join(_PAIR.pack(run, flags) for run, flags in merged(states, limit))
        chunks.append((nbd.Type.BLOCK_STATUS, [_U32.pack(context), runs]))
    return chunks


def _code(error: BaseException) -> int:
    """The protocol's number for an error."""
    if isinstance(error, OSError):
        return nbd.ERRORS.get(error.errno or errno.EIO, nbd.ERRORS[errno.EIO])
    if isinstance(error, UnsupportedError):
        return nbd.ERRORS[errno.EOPNOTSUPP]
    if isinstance(error, MemoryError):
        return nbd.ERRORS[errno.ENOMEM]
    return nbd.ERRORS[errno.EIO if isinstance(error, PyvirtioError) else errno.EINVAL]
