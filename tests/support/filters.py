"""Disks that stand below a driver under test: they record, fail, or hold requests up."""

from __future__ import annotations

import errno
import random
import threading
from dataclasses import dataclass, field

from pyvirtio import BackendError, Disk
from pyvirtio.backend.filter import FilterDisk as Filter


class CappedDisk(Filter):
    """A host with little room: what would end beyond ``cap`` bytes is refused with EFBIG."""

    def __init__(self, below: Disk, cap: int) -> None:
        super().__init__(below)
        self.cap = cap

    def _check(self, end: int) -> None:
        if end > self.cap:
            raise BackendError(errno.EFBIG, "the test's disk is full")

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._check(offset + length)
        super()._writev(offset, views, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._check(offset + length)
        super()._write_zeroes(offset, length, unmap)

    def _truncate(self, size: int, preallocation: str) -> None:
        self._check(size)
        super()._truncate(size, preallocation)


@dataclass(frozen=True)
class Event:
    """Something that reached the disk below the driver, or a mark of the test's own."""

    kind: str
    """``write``, ``zero``, ``discard``, ``truncate``, ``flush`` or ``mark``."""
    offset: int = 0
    data: bytes = b""
    length: int = 0
    mark: object = None


class RecordingDisk(Filter):
    """Keeps a log of everything that changes the disk below, and of every flush."""

    def __init__(self, below: Disk) -> None:
        super().__init__(below)
        self.log: list[Event] = []
        self._lock = threading.Lock()

    def mark(self, thing: object) -> None:
        """Note something of the test's own between the events."""
        self.log.append(Event("mark", mark=thing))

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        with self._lock:
            data = b"".join(views)
            self.log.append(Event("write", offset, data, length))
            super()._writev(offset, [memoryview(data)], length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        with self._lock:
            self.log.append(Event("zero", offset, length=length))
            super()._write_zeroes(offset, length, unmap)

    def _discard(self, offset: int, length: int) -> None:
        with self._lock:
            self.log.append(Event("discard", offset, length=length))
            super()._discard(offset, length)

    def _truncate(self, size: int, preallocation: str) -> None:
        with self._lock:
            self.log.append(Event("truncate", length=size))
            super()._truncate(size, preallocation)

    def _flush(self) -> None:
        with self._lock:
            self.log.append(Event("flush"))
            super()._flush()


class FaultyDisk(Filter):
    """Lets the ``fail_at``-th operation (from 0) of the given kinds fail, once or from then on.

    A write that fails may have been done in part: its first half (in whole sectors) is written.
    """

    KINDS = frozenset({"read", "write", "flush", "truncate", "discard"})

    def __init__(
        self,
        below: Disk,
        *,
        kinds: frozenset[str] = KINDS,
        number: int = errno.EIO,
        torn: bool = False,
        interrupt: type[BaseException] | None = None,
    ) -> None:
        super().__init__(below)
        self.interrupt = interrupt
        """Raised instead of the host's error: what Python may throw anywhere."""
        self.kinds = kinds
        self.number = number
        self.torn = torn
        self.fail_at: int | None = None
        self.persistent = False
        self.count = 0
        self.failed = 0

    def _now(self, kind: str) -> bool:
        """Whether this operation is to fail."""
        if kind not in self.kinds or self.fail_at is None:
            self.count += kind in self.kinds
            return False
        at = self.count
        self.count += 1
        failing = at >= self.fail_at if self.persistent else at == self.fail_at
        self.failed += failing
        return failing

    def _fault(self, kind: str) -> None:
        if self._now(kind):
            raise self._error(kind)

    def _error(self, kind: str) -> BaseException:
        if self.interrupt is not None:
            return self.interrupt(f"injected into a {kind}")
        return BackendError(self.number, f"injected into a {kind}")

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self._fault("read")
        super()._readv(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        if self._now("write"):
            half = length // 2 // 512 * 512
            if self.torn and half:
                super()._writev(offset, [memoryview(b"".join(views))[:half]], half)
            raise self._error("write")
        super()._writev(offset, views, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._fault("write")
        super()._write_zeroes(offset, length, unmap)

    def _discard(self, offset: int, length: int) -> None:
        self._fault("discard")
        super()._discard(offset, length)

    def _truncate(self, size: int, preallocation: str) -> None:
        self._fault("truncate")
        super()._truncate(size, preallocation)

    def _flush(self) -> None:
        self._fault("flush")
        super()._flush()


class BadSectorsDisk(Filter):
    """Reads and writes that touch one of the ``bad`` bytes fail with EIO."""

    def __init__(self, below: Disk, bad: range = range(0)) -> None:
        super().__init__(below)
        self.bad = bad
        self.number = errno.EIO
        self.failed = 0

    def _meet(self, offset: int, length: int) -> None:
        if offset < self.bad.stop and self.bad.start < offset + length:
            self.failed += 1
            raise BackendError(self.number, "a bad sector")

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self._meet(offset, length)
        super()._readv(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._meet(offset, length)
        super()._writev(offset, views, length)


class JitteryDisk(Filter):
    """Gives other threads a turn at random before and after each request."""

    def __init__(self, below: Disk, *, seed: int) -> None:
        super().__init__(below)
        self._chance = random.Random(seed)
        self._pause = threading.Event()  # never set: waiting on it is a sleep

    def _jitter(self) -> None:
        if self._chance.random() < 0.4:
            self._pause.wait(self._chance.random() * 0.0005)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self._jitter()
        super()._readv(offset, views, length)
        self._jitter()

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._jitter()
        super()._writev(offset, views, length)
        self._jitter()

    def _flush(self) -> None:
        self._jitter()
        super()._flush()


@dataclass
class Gate:
    """Requests meeting a condition wait here until ``wanted`` of them are under way at once."""

    wanted: int
    timeout: float = 30.0
    most: int = 0
    _here: int = 0
    _condition: threading.Condition = field(default_factory=threading.Condition)

    def pass_through(self) -> None:
        """Wait for the others; gives up silently after the timeout (``most`` tells)."""
        with self._condition:
            self._here += 1
            self.most = max(self.most, self._here)
            self._condition.notify_all()
            self._condition.wait_for(lambda: self.most >= self.wanted, self.timeout)
            self._here -= 1


class GatedDisk(Filter):
    """Holds up reads and writes of at least ``smallest`` bytes (guest data) at a gate."""

    def __init__(self, below: Disk, *, smallest: int) -> None:
        super().__init__(below)
        self.smallest = smallest
        self.read_gate: Gate | None = None
        self.write_gate: Gate | None = None

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        if self.read_gate is not None and length >= self.smallest:
            self.read_gate.pass_through()
        super()._readv(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        if self.write_gate is not None and length >= self.smallest:
            self.write_gate.pass_through()
        super()._writev(offset, views, length)


class HoldingDisk(Filter):
    """Holds the next request of one kind (``read``, ``write``) of at least ``smallest`` bytes."""

    def __init__(self, below: Disk, *, smallest: int) -> None:
        super().__init__(below)
        self.smallest = smallest
        self.hold: str | None = None
        self.arrived = threading.Event()
        self.go = threading.Event()

    def _meet(self, kind: str, length: int) -> None:
        if self.hold == kind and length >= self.smallest:
            self.hold = None
            self.arrived.set()
            self.go.wait(60)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self._meet("read", length)
        super()._readv(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._meet("write", length)
        super()._writev(offset, views, length)
