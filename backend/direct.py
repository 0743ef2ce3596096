"""Reading and writing past the host's page cache (``O_DIRECT``).

The host then wants file offsets, lengths and memory addresses aligned. What is aligned goes
straight; the rest goes through an aligned buffer, and a write that covers a block only in part
reads it first. Such a write runs alone, or it would put back old data next to its own.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .buffers import clear, copy_in, gather, split
from .libc import address_of
from .transfer import read_some, write_all

__all__ = ["DirectTransfer", "SharedLock"]

_SAFE_ALIGNMENT = 4096
_BOUNCE_SIZE = 1 << 20


class SharedLock:
    """Many may hold it shared, or one alone. A waiting loner is let in before new sharers.

    An interrupt (KeyboardInterrupt) between taking it and what it was taken for gives it back.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharers = 0
        self._loners_waiting = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it together with others."""
        held = False
        try:
            with self._changed:
                while self._alone or self._loners_waiting:
                    self._changed.wait()
                self._sharers += 1
                held = True
            yield
        finally:
            if held:
                with self._changed:
                    self._sharers -= 1
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it with nobody else."""
        held = False
        try:
            with self._changed:
                self._loners_waiting += 1
                try:
                    while self._alone or self._sharers:
                        self._changed.wait()
                    self._alone = held = True
                finally:
                    self._loners_waiting -= 1
                    self._changed.notify_all()
            yield
        finally:
            if held:
                with self._changed:
                    self._alone = False
                    self._changed.notify_all()


class DirectTransfer:
    """Requests of any alignment on a file opened with O_DIRECT."""

    def __init__(self, fd: int, *, sector_size: int | None = None) -> None:
        self._fd = fd
        self._is_device = sector_size is not None
        self.alignment = sector_size or _probe_offsets(fd)
        """What file offsets and lengths must be a multiple of, in bytes: a power of two."""
        self.memory_alignment = _probe_memory(fd, self.alignment)
        """What addresses must be a multiple of."""
        self.lock = SharedLock()
        """Held alone by read-modify-write; others that change the file hold it shared."""

    def readv(self, offset: int, views: list[memoryview], length: int) -> None:
        """Read; what lies past the end of the file reads as zeroes."""
        if self._straight(offset, views, length):
            done = read_some(self._fd, offset, views, length)
            clear(split(views, done, length - done))
            return
        done = 0
        bounce = self._bounce(offset, length)
        while done < length:
            start, end = self._span(offset + done, min(length - done, self._chunk(bounce)))
            got = read_some(self._fd, start, [bounce[: end - start]], end - start)
            bounce[got : end - start] = bytes(end - start - got)
            skip = offset + done - start
            part = min(length - done, end - start - skip)
            copy_in(split(views, done, part), bounce[skip : skip + part])
            done += part

    def writev(self, offset: int, views: list[memoryview], length: int) -> None:
        """Write; the file grows to exactly the end of the request if that lies past its end."""
        if (offset | length) % self.alignment == 0:
            with self.lock.shared():
                if self._straight(offset, views, length):
                    write_all(self._fd, offset, views, length)
                else:
                    self._write_bounced(offset, views, length)
            return
        with self.lock.alone():
            size = os.fstat(self._fd).st_size
            self._write_bounced(offset, views, length)
            wanted = max(size, offset + length)
            if not self._is_device and wanted < os.fstat(self._fd).st_size:
                os.ftruncate(self._fd, wanted)

    def _write_bounced(self, offset: int, views: Sequence[memoryview], length: int) -> None:
        done = 0
        bounce = self._bounce(offset, length)
        while done < length:
            start, end = self._span(offset + done, min(length - done, self._chunk(bounce)))
            skip = offset + done - start
            part = min(length - done, end - start - skip)
            if skip:
                self._load(start, bounce[: self.alignment])
            if skip + part < end - start and (not skip or end - start > self.alignment):
                self._load(end - self.alignment, bounce[end - start - self.alignment :])
            bounce[skip : skip + part] = gather(split(views, done, part))
            write_all(self._fd, start, [bounce[: end - start]], end - start)
            done += part

    def _load(self, offset: int, block: memoryview) -> None:
        """Read the block at ``offset``, zeroes past the end of the file."""
        block = block[: self.alignment]
        got = read_some(self._fd, offset, [block], self.alignment)
        block[got:] = bytes(self.alignment - got)

    def _straight(self, offset: int, views: Sequence[memoryview], length: int) -> bool:
        if (offset | length) % self.alignment:
            return False
        return all(
            len(view) % self.alignment == 0 and address_of(view) % self.memory_alignment == 0
            for view in views
        )

    def _span(self, offset: int, length: int) -> tuple[int, int]:
        """The aligned range around a range."""
        alignment = self.alignment
        return offset // alignment * alignment, -(-(offset + length) // alignment) * alignment

    def _chunk(self, bounce: memoryview) -> int:
        """How much fits into the buffer, however it lies in its blocks."""
        return max(1, len(bounce) - 2 * self.alignment)

    def _bounce(self, offset: int, length: int) -> memoryview:
        """An aligned buffer with room for the range, or for a good part of it."""
        start, end = self._span(offset, length)
        return memoryview(mmap.mmap(-1, min(end - start + 2 * self.alignment, _BOUNCE_SIZE)))


def _probe_offsets(fd: int) -> int:
    """The alignment of offsets and lengths: the smallest with which a read works.

    If even a read of one byte works, the file system does not say (or the file is empty), and
    the answer is a safe one. So does QEMU.
    """
    view = memoryview(mmap.mmap(-1, _SAFE_ALIGNMENT))
    if _read_works(fd, view[:1]):
        return _SAFE_ALIGNMENT
    for alignment in (512, 1024, 2048):
        if _read_works(fd, view[:alignment]):
            return alignment
    return _SAFE_ALIGNMENT


def _probe_memory(fd: int, alignment: int) -> int:
    """The alignment of addresses, found in the same way."""
    view = memoryview(mmap.mmap(-1, alignment + _SAFE_ALIGNMENT))
    if _read_works(fd, view[1 : 1 + alignment]):
        return _SAFE_ALIGNMENT
    for step in (512, 1024, 2048):
        if _read_works(fd, view[step : step + alignment]):
            return step
    return _SAFE_ALIGNMENT


def _read_works(fd: int, view: memoryview) -> bool:
    try:
        os.preadv(fd, [view], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True
