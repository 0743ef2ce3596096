"""A recorded board for gdb: its remote serial protocol, backwards as well as forwards.

``target remote`` connects; then stepping, breakpoints and watchpoints work in both directions
(``reverse-stepi``, ``reverse-continue``). Packets: ``g G m M c s bs bc Z z ? H T D k qSupported
qXfer:features vCont``. Addresses are virtual, as the hart would translate them at this moment; a
watchpoint stays with the physical bytes that it was set on.
"""

from __future__ import annotations

import select
import socket

from .layout import RAM_BASE
from .mmu import translate
from .recording import RecordedBoard
from .travel import Points, Traveller

__all__ = ["GdbServer"]

_NAMES = (
    *("zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "fp", "s1"),
    *(f"a{number}" for number in range(8)),
    *(f"s{number}" for number in range(2, 12)),
    *("t3", "t4", "t5", "t6"),
)
_PC = 32
_MOST = 4096
"""Bytes of a packet, and of memory in one."""
_INTERRUPT = b"\x03"
_STOPPED = "S05"
_BEGINNING = "T05replaylog:begin;"


class GdbServer:
    """Serves one gdb at a time on a socket of this machine; ``port`` 0 chooses one."""

    def __init__(self, board: RecordedBoard, port: int = 0) -> None:
        self._board = board
        self._traveller = Traveller(board)
        self._visits: list[int] = []
        self._watches: list[tuple[int, range]] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self._client: socket.socket | None = None
        self._received = bytearray()

    def serve(self) -> None:
        """Wait for a gdb and do what it wants until it leaves."""
        self._client, _ = self._listener.accept()
        try:
            while (packet := self._read_packet()) is not None:
                answer = self._answer(packet)
                if answer is None:
                    return
                self._send(answer)
        except ConnectionError:
            return
        finally:
            self._client.close()
            self._received.clear()

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()

    # -- packets -------------------------------------------------------------------------------

    def _more(self) -> bool:
        assert self._client is not None
        data = self._client.recv(_MOST)
        self._received += data
        return bool(data)

    def _read_packet(self) -> str | None:
        """The next packet, acknowledged; None once the connection is closed."""
        assert self._client is not None
        while True:
            start = self._received.find(b"$")
            end = self._received.find(b"#", start + 1)
            if start >= 0 and end >= 0 and len(self._received) >= end + 3:
                body = bytes(self._received[start + 1 : end])
                checksum = bytes(self._received[end + 1 : end + 3])
                del self._received[: end + 3]
                good = checksum == b"%02x" % (sum(body) & 0xFF)
                self._client.sendall(b"+" if good else b"-")
                if good:
                    return body.decode("latin-1")
            elif len(self._received) > 4 * _MOST or not self._more():
                return None

    def _send(self, text: str) -> None:
        assert self._client is not None
        body = text.encode("latin-1")
        self._client.sendall(b"$" + body + b"#%02x" % (sum(body) & 0xFF))

    def _patient(self) -> bool:
        """False once gdb wants the guest to stop."""
        assert self._client is not None
        if select.select([self._client], [], [], 0)[0] and not self._more():
            return False
        if _INTERRUPT in self._received:
            self._received.clear()
            return False
        return True

    # -- what they mean ------------------------------------------------------------------------

    def _answer(self, packet: str) -> str | None:
        """The answer to a packet, empty for one that is not known; None to end."""
        kind, rest = packet[:1], packet[1:]
        try:
            if kind in "cs":
                return self._go(kind)
            if packet in ("bc", "bs"):
                return self._go_back(kind + rest)
            if kind in "gGmM":
                return self._memory(kind, rest)
            if kind in "zZ":
                return self._point(kind == "Z", rest)
            if kind in "qv":
                return self._query(packet)
        except (ValueError, IndexError):
            return "E01"
        if kind == "D":
            self._send("OK")
            return None
        if kind == "k":
            return None
        return {"?": _STOPPED, "H": "OK", "T": "OK"}.get(kind, "")

    def _query(self, packet: str) -> str:
        if packet.startswith("qSupported"):
            return (
                f"PacketSize={_MOST:x};qXfer:features:read+;ReverseStep+;ReverseContinue+;"
                "vContSupported+;hwbreak+"
            )
        if packet.startswith("qXfer:features:read:target.xml:"):
            offset, length = (int(part, 16) for part in packet.rpartition(":")[2].split(","))
            part = _description()[offset : offset + length]
            return ("m" if offset + length < len(_description()) else "l") + part
        if packet == "vCont?":
            return "vCont;c;C;s;S"
        if packet.startswith("vCont;"):
            return self._go(packet[6:7].lower())
        fixed = {"qAttached": "1", "qC": "QC1", "qfThreadInfo": "m1", "qsThreadInfo": "l"}
        return fixed.get(packet, "")

    def _points(self) -> Points:
        return Points(list(self._visits), [where for _, where in self._watches])

    def _go(self, kind: str) -> str:
        if kind == "s":
            self._traveller.step()
            return _STOPPED
        if not self._traveller.forward_to(self._points(), self._patient):
            return "W00" if self._board.power is not None else "S02"
        if self._at_breakpoint():
            return _STOPPED
        after = self._seen()
        assert self._traveller.eve is not None
        self._board.goto(self._traveller.eve)
        return self._watch_reason(after)

    def _go_back(self, packet: str) -> str:
        if packet == "bs":
            return _STOPPED if self._traveller.step_back() else _BEGINNING
        if not self._traveller.back_to(self._points()):
            return _BEGINNING
        if self._at_breakpoint():
            return _STOPPED
        before = self._seen()
        self._traveller.step()
        return self._watch_reason(before)

    def _at_breakpoint(self) -> bool:
        self._board.cpu.state.load()
        return self._board.cpu.state.pc in self._visits

    def _seen(self) -> list[bytes]:
        return [self._bytes(where) for _, where in self._watches]

    def _watch_reason(self, other: list[bytes]) -> str:
        """Which watchpoint it was: one that is different on the ``other`` side of the write.

        On RISC-V gdb takes it that a watchpoint stops the hart on this side of the write, and makes
        the step over it, in its own direction, by itself.
        """
        changed = [
            address
            for (address, _), old, new in zip(self._watches, other, self._seen(), strict=True)
            if old != new
        ]
        return f"T05watch:{(changed or [self._watches[0][0]])[0]:x};"

    def _point(self, wanted: bool, rest: str) -> str:
        kind, address, length = (int(part, 16) for part in rest.split(";")[0].split(","))
        if kind in (0, 1):
            if wanted and address not in self._visits:
                self._visits.append(address)
            elif not wanted and address in self._visits:
                self._visits.remove(address)
            return "OK"
        if kind != 2:
            return ""
        kept = [watch for watch in self._watches if watch[0] != address]
        if wanted:
            where = self._physical(address)
            if where is None or not 0 < length <= 4096:
                return "E01"
            kept.append((address, range(where, where + length)))
        self._watches = kept
        return "OK"

    # -- registers and memory ------------------------------------------------------------------

    def _memory(self, kind: str, rest: str) -> str:
        state = self._board.cpu.state
        state.load()
        if kind == "g":
            words = [*state.words[:32], state.pc]
            return b"".join(word.to_bytes(8, "little") for word in words).hex()
        if kind == "G":
            self._board.set_registers(bytes.fromhex(rest))
            return "OK"
        place, _, content = rest.partition(":")
        address, length = (int(part, 16) for part in place.split(","))
        if not 0 < length <= _MOST // 2:
            return "E01"
        wheres = [self._physical(address + index) for index in range(length)]
        if any(where is None for where in wheres):
            return "E01"
        offsets = [where - RAM_BASE for where in wheres if where is not None]
        if kind == "m":
            return bytes(self._board.ram[offset] for offset in offsets).hex()
        data = bytes.fromhex(content)
        if len(data) != length:
            raise ValueError("another length than it says")
        if offsets == list(range(offsets[0], offsets[0] + length)):
            self._board.poke(offsets[0], data)
        else:
            for offset, byte in zip(offsets, data, strict=True):
                self._board.poke(offset, bytes((byte,)))
        return "OK"

    def _physical(self, address: int) -> int | None:
        """Where in memory a virtual address is at the moment."""
        self._board.cpu.state.load()
        with memoryview(self._board.ram) as ram:
            where = translate(self._board.cpu.state, ram, RAM_BASE, address)
        if where is None or not 0 <= where - RAM_BASE < len(self._board.ram):
            return None
        return where

    def _bytes(self, where: range) -> bytes:
        return self._board.ram[where.start - RAM_BASE : where.stop - RAM_BASE]


def _description() -> str:
    """target.xml: the registers, in the order of the packet ``g``."""
    registers = "".join(
        f'<reg name="{name}" bitsize="64" type="int" regnum="{number}"/>'
        for number, name in enumerate(_NAMES)
    )
    return (
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">'
        '<architecture>riscv:rv64</architecture><feature name="org.gnu.gdb.riscv.cpu">'
        f'{registers}<reg name="pc" bitsize="64" type="code_ptr" regnum="{_PC}"/>'
        "</feature></target>"
    )
