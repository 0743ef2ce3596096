"""What an NBD client and the server agree on before the first request (fixed newstyle)."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct

from ...backend import nbd_protocol as nbd
from .nbd_export import Export
from .nbd_stream import Stream

__all__ = ["Agreed", "Over", "negotiate"]

_U32 = Struct(">I")
_U16 = Struct(">H")


class Over(Exception):
    """The client is gone, asked to go, or cannot be understood any more."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """How requests are made and answered."""

    export: Export
    structured: bool
    contexts: tuple[int, ...]
    """Numbers of the export's metadata contexts that block status tells."""


def negotiate(
    stream: Stream, exports: Mapping[str, Export], tls: ssl.SSLContext | None = None
) -> Agreed:
    """Talk until the client has chosen an export; with ``tls`` not before it encrypts.

    Raises Over or OSError if it does not come to that.
    """
    return _Handshake(stream, exports, tls).run()


class _Refused(Exception):
    """An option is answered with an error."""

    def __init__(self, reply: nbd.Reply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class _Handshake:
    def __init__(
        self, stream: Stream, exports: Mapping[str, Export], tls: ssl.SSLContext | None
    ) -> None:
        self._stream = stream
        self._exports = exports
        self._tls = tls
        self._structured = False
        self._contexts: tuple[str, tuple[int, ...]] = ("", ())
        """Export and numbers of the metadata contexts that were chosen."""

    def run(self) -> Agreed:
        flags = nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES
        self._stream.send([nbd.INIT.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC), _U16.pack(flags)])
        (answer,) = _U32.unpack(self._stream.receive(4))
        if answer & ~flags or not answer & nbd.FIXED_NEWSTYLE:
            raise Over
        while True:
            head = self._stream.receive(nbd.OPTION.size)
            magic, option, length = nbd.OPTION.unpack(head)
            if magic != nbd.OPTION_MAGIC or length > nbd.MAX_OPTION:
                raise Over
            data = bytes(self._stream.receive(length))
            try:
                if option == nbd.Option.EXPORT_NAME:
                    export = self._old_style(data, bool(answer & nbd.NO_ZEROES))
                else:
                    chosen = self._option(option, data)
                    if chosen is None:
                        continue
                    export = chosen
            except _Refused as error:
                self._reply(option, error.reply, str(error).encode())
                continue
            name, contexts = self._contexts
            return Agreed(export, self._structured, contexts if name == export.name else ())

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        self._stream.send([nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, option, reply, len(data)), data])

    def _flags(self, export: Export) -> int:
        return export.flags | (nbd.Transmission.SEND_DF if self._structured else 0)

    def _old_style(self, data: bytes, no_zeroes: bool) -> Export:
        """``EXPORT_NAME``: there is no way to refuse but to hang up."""
        export = self._exports.get(data.decode(errors="replace"))
        if export is None or (self._tls is not None and not self._stream.encrypted):
            raise Over
        facts = Struct(">QH").pack(export.disk.size, self._flags(export))
        self._stream.send([facts, b"" if no_zeroes else bytes(124)])
        return export

    def _option(self, option: int, data: bytes) -> Export | None:
        """Answer one option; the export if requests begin."""
        if option == nbd.Option.ABORT:
            self._reply(option, nbd.Reply.ACK)
            raise Over
        if option == nbd.Option.STARTTLS:
            self._start_tls(option, data)
            return None
        if self._tls is not None and not self._stream.encrypted:
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
        if data or self._stream.encrypted:
            raise _Refused(nbd.Reply.INVALID, "TLS cannot be started now")
        self._reply(option, nbd.Reply.ACK)
        self._stream.start_tls(self._tls)
        # What was said in the clear may have been said by somebody else.
        self._structured = False
        self._contexts = ("", ())

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
            raise _Refused(nbd.Reply.UNKNOWN, f"export '{name}' not present"[:4096])
        return self._exports[name], data[4 + length :]

    def _describe(self, option: int, data: bytes) -> Export:
        """``INFO`` and ``GO``."""
        export, rest = self._named(data)
        count = int.from_bytes(rest[:2], "big")
        if len(rest) != 2 + 2 * count:
            raise _Refused(nbd.Reply.INVALID, "the list of information is cut off")
        wanted = {int.from_bytes(rest[at : at + 2], "big") for at in range(2, len(rest), 2)}
        if nbd.Info.NAME in wanted:
            name = export.name.encode()
            self._reply(option, nbd.Reply.INFO, _U16.pack(nbd.Info.NAME) + name)
        if nbd.Info.DESCRIPTION in wanted and export.description:
            text = export.description.encode()
            self._reply(option, nbd.Reply.INFO, _U16.pack(nbd.Info.DESCRIPTION) + text)
        sizes = nbd.BLOCK_SIZE_INFO.pack(nbd.Info.BLOCK_SIZE, 1, 4096, nbd.MAX_REQUEST)
        self._reply(option, nbd.Reply.INFO, sizes)
        facts = nbd.EXPORT_INFO.pack(nbd.Info.EXPORT, export.disk.size, self._flags(export))
        self._reply(option, nbd.Reply.INFO, facts)
        self._reply(option, nbd.Reply.ACK)
        return export

    def _meta_contexts(self, option: int, data: bytes) -> None:
        listing = option == nbd.Option.LIST_META_CONTEXT
        if not listing:
            self._contexts = ("", ())  # what fails leaves nothing chosen
        if not self._structured:
            raise _Refused(nbd.Reply.INVALID, "structured replies come first")
        export, rest = self._named(data)
        if len(rest) < 4:
            raise _Refused(nbd.Reply.INVALID, "the number of queries is cut off")
        count, at = int.from_bytes(rest[:4], "big"), 4
        queries = []
        for _ in range(count):
            length = int.from_bytes(rest[at : at + 4], "big")
            if at + 4 + length > len(rest):
                raise _Refused(nbd.Reply.INVALID, "a query is cut off")
            queries.append(rest[at + 4 : at + 4 + length].decode(errors="replace"))
            at += 4 + length
        if at != len(rest):
            raise _Refused(nbd.Reply.INVALID, "there is more than queries")
        chosen = tuple(
            number
            for number, name in enumerate(export.contexts)
            if (listing and not queries) or any(_matches(name, query, listing) for query in queries)
        )
        for number in chosen:
            name = export.contexts[number].encode()
            self._reply(option, nbd.Reply.META_CONTEXT, _U32.pack(number) + name)
        if not listing:
            self._contexts = (export.name, chosen)
        self._reply(option, nbd.Reply.ACK)


def _matches(name: str, query: str, listing: bool) -> bool:
    """A query names a context, or when listing, the namespace (or its part) it is in."""
    if query == name:
        return True
    return listing and query.endswith(":") and name.startswith(query)
