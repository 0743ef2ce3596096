"""Record what a driver does to a device, and do it again to another one.

Recording stands between the emulator and the device: it hands on every access to registers, and
what the device reads of guest memory (rings, headers, data) is written down as it is met::

    recorder = Recorder("run.jsonl", memory)
    mmio = recorder.attach(VirtioMmio(blk, recorder.memory, …))

Replaying gives another device the same accesses and the same memory, and compares what comes back:
the registers' values and everything the device writes (used chains, statuses, data)::

    replayer = Replayer("run.jsonl")
    mmio = VirtioMmio(VirtioBlk(another_disk), replayer.memory)
    differences = replayer.run(mmio)

The file is JSON lines: a head, then one action per line, with the memory that the device read for
the first time (or that changed since) before it, and what was written during it: short pieces as
they are, long ones as a digest. The device has to work inside the accesses (no ``io_threads``), and
no driver may change its memory while it does.
"""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from ..errors import ImageError
from .memory import CallbackMemory, GuestMemory

__all__ = ["Difference", "Recorder", "Replayer"]

_PAGE: Final = 4096
_SHORT: Final = 64
"""Bytes of a write that are written down as they are."""
_ACTIONS: Final = ("read", "write", "poll")
"""What an emulator does to VirtioMmio."""
_HEAD: Final = {"format": "pyvirtio driver record", "version": 1}


class _Image:
    """Sparse memory: zero where nothing was stored."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def _parts(self, address: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Page number, offset in it, and length of each part."""
        while length:
            page, offset = divmod(address, _PAGE)
            size = min(length, _PAGE - offset)
            yield page, offset, size
            address += size
            length -= size

    def load(self, address: int, length: int) -> bytes:
        return b"".join(
            bytes(size) if page not in self._pages else self._pages[page][offset : offset + size]
            for page, offset, size in self._parts(address, length)
        )

    def store(self, address: int, data: bytes) -> None:
        done = 0
        for page, offset, size in self._parts(address, len(data)):
            target = self._pages.setdefault(page, bytearray(_PAGE))
            target[offset : offset + size] = data[done : done + size]
            done += size


class _Effects:
    """The bytes that a device wrote during an action: what they are in the end."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int]] = []

    def add(self, address: int, length: int) -> None:
        if length:
            self._pieces.append((address, address + length))

    def take(self, image: _Image) -> list[list[Any]]:
        """Each piece as address, length and contents (or their digest); neighbours are joined."""
        joined: list[list[int]] = []
        for start, end in sorted(self._pieces):
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        self._pieces.clear()
        return [
            [start, end - start, _digest(image.load(start, end - start))] for start, end in joined
        ]


def _digest(data: bytes) -> str:
    if len(data) <= _SHORT:
        return data.hex()
    return "blake2b:" + blake2b(data, digest_size=16).hexdigest()


class Recorder:
    """Writes a record to ``path``. ``memory`` is the guest's RAM.

    :attr:`memory` goes to the transport in its place, and what :meth:`attach` gives is used in
    place of the transport. :meth:`close` ends the file.
    """

    def __init__(self, path: str | os.PathLike[str], memory: GuestMemory) -> None:
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
        self._real = memory
        self._known = _Image()
        """What the replayed memory would hold."""
        self._reads: list[list[Any]] = []
        self._effects = _Effects()
        self.memory = CallbackMemory(self._read, self._write)
        self._line(_HEAD)

    def _line(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")

    def _read(self, address: int, length: int) -> bytes:
        data = self._real.read(address, length)
        if data != self._known.load(address, length):
            self._known.store(address, data)
            self._reads.append([address, b64encode(data).decode()])
        return data

    def _write(self, address: int, data: bytes) -> None:
        self._real.write(address, data)
        self._known.store(address, data)
        self._effects.add(address, len(data))

    def attach(self, transport: Any, actions: tuple[str, ...] = _ACTIONS) -> Any:
        """Something like ``transport`` whose methods ``actions`` are recorded.

        Their arguments and results have to be numbers (or None). Raises ValueError for a device
        with worker threads.
        """
        service = getattr(transport.device, "service", None)
        if service is not None and not service.inline:
            raise ValueError("a device with worker threads cannot be recorded")
        return _Recorded(transport, self, actions)

    def perform(self, name: str, action: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Do one action and write it down."""
        try:
            result = action(*arguments)
        finally:
            reads, self._reads = self._reads, []
            line = {"do": name, "with": list(arguments), "reads": reads}
            line["writes"] = self._effects.take(self._known)
        line["gives"] = result
        self._line({key: value for key, value in line.items() if value not in ([], None)})
        return result

    def close(self) -> None:
        """Nothing is recorded any more."""
        self._file.close()


class _Recorded:
    """A transport whose actions are written down."""

    def __init__(self, transport: Any, recorder: Recorder, actions: tuple[str, ...]) -> None:
        self._transport = transport
        self._recorder = recorder
        self._actions = actions

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._transport, name)
        if name not in self._actions:
            return value
        perform = self._recorder.perform
        return lambda *arguments: perform(name, value, arguments)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay went another way."""

    action: int
    """Number of the action, from 1 on: its line in the file is the next one."""
    what: str


class Replayer:
    """Reads the record at ``path``. :attr:`memory` goes to the device that is to be tried."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._image = _Image()
        self._effects = _Effects()
        self.memory = CallbackMemory(self._image.load, self._write)

    def _write(self, address: int, data: bytes) -> None:
        self._image.store(address, data)
        self._effects.add(address, len(data))

    def _lines(self, actions: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        with self._path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                try:
                    content = json.loads(line)
                    known = content == _HEAD if number == 0 else content["do"] in actions
                except (ValueError, TypeError, KeyError):
                    known = False
                if not known:
                    raise ImageError(f"Line {number + 1} is none of a driver record", field="line")
                if number:
                    yield content

    def run(self, transport: Any, actions: tuple[str, ...] = _ACTIONS) -> list[Difference]:
        """Do every action to ``transport``; what came out differently, about 100 at most.

        ``actions`` are the methods that a record may name, as in :meth:`Recorder.attach`.

        Raises ImageError for a file that is no record.
        """
        differences: list[Difference] = []
        self._effects.take(self._image)
        for number, line in enumerate(self._lines(actions), 1):
            for address, data in line.get("reads", []):
                self._image.store(address, b64decode(data))
            result = getattr(transport, line["do"])(*line.get("with", []))
            writes = self._effects.take(self._image)
            for what, was, now in (
                ("gives", line.get("gives"), result),
                ("writes", line.get("writes", []), writes),
            ):
                if was != now:
                    text = f"{line['do']}{tuple(line.get('with', []))} {what} {now}, not {was}"
                    differences.append(Difference(number, text))
            if len(differences) >= 100:
                break
        return differences
