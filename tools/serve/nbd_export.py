"""What an NBD client may ask about a disk: the export, its flags, the state of its blocks."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ...backend import nbd_protocol as nbd
from ...backend.disk import Disk

__all__ = ["Export", "Statistics", "merged", "zero_runs"]

_BASE = "base:allocation"
_DIRTY = "qemu:dirty-bitmap:"
_HOLE, _ZERO = 1, 2


@dataclass(slots=True)
class Statistics:
    """What all clients have asked for."""

    connections: int = 0
    requests: int = 0
    read: int = 0
    """Bytes."""
    written: int = 0
    """Bytes, without zeroes and discards."""
    at_once: int = 0
    """Requests under way at the same time, at most."""
    under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Note a request."""
        with self.lock:
            self.requests += 1
            self.under_way += 1
            self.at_once = max(self.at_once, self.under_way)

    def succeed(self, command: int, length: int) -> None:
        """Note that a request did what it was to do."""
        with self.lock:
            if command == nbd.Command.READ:
                self.read += length
            elif command == nbd.Command.WRITE:
                self.written += length

    def end(self) -> None:
        """Note that a request is over."""
        with self.lock:
            self.under_way -= 1

    def __str__(self) -> str:
        return (
            f"{self.connections} connections, {self.requests} requests "
            f"(up to {self.at_once} at once), {self.read} bytes read, {self.written} bytes written"
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
        """What a client may do. Several connections see one disk: a flush is for all of them."""
        flags = nbd.Transmission.HAS_FLAGS | nbd.Transmission.SEND_CACHE
        flags |= nbd.Transmission.CAN_MULTI_CONN
        flags |= nbd.Transmission.SEND_FLUSH | nbd.Transmission.SEND_FUA
        if self.read_only:
            return flags | nbd.Transmission.READ_ONLY
        flags |= nbd.Transmission.SEND_TRIM | nbd.Transmission.SEND_WRITE_ZEROES
        return flags | nbd.Transmission.SEND_FAST_ZERO

    @property
    def contexts(self) -> list[str]:
        """The metadata contexts it has; their places in the list are their numbers."""
        return [_BASE, *(_DIRTY + name for name in self.bitmaps)]

    def states(self, context: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Runs (length, flags) of a range, as the metadata context of that number has them."""
        if not context:
            return _allocation(self.disk, offset, length)
        name = self.contexts[context].removeprefix(_DIRTY)
        return _dirtiness(self.bitmaps[name], offset, length)


def zero_runs(disk: Disk, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """A range as runs (start, end, zeroes?)."""
    start = at = offset
    zero: bool | None = None
    for run, _, is_zero, *_ in disk.runs(offset, length):
        if zero is not None and is_zero is not zero:
            yield start, at, zero
            start = at
        zero = is_zero
        at += run
    yield start, at, bool(zero)


def _allocation(disk: Disk, offset: int, length: int) -> Iterator[tuple[int, int]]:
    for run, data, zero, *_ in disk.runs(offset, length):
        yield run, (0 if data else _HOLE) | (_ZERO if zero else 0)


def _dirtiness(dirty: list[tuple[int, int]], offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Runs of a range: dirty (1) or not (0)."""
    end = offset + length
    at = offset
    for index in range(max(0, bisect_right(dirty, (offset, 1 << 64)) - 1), len(dirty)):
        start, stop = dirty[index]
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


def merged(runs: Iterator[tuple[int, int]], limit: int) -> Iterator[tuple[int, int]]:
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
