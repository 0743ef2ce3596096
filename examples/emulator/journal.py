"""What comes into a recorded board from outside, noted and given again: its log, disks and clock.

The log is written while the board lives, and read while it does again what it has done. A disk then
answers from the log and is left alone; only where a run takes another way from its past
(:mod:`.branching`) are writes carried out a second time, on disks that have gone back, too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import pyvirtio
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.machine.log import Cursor, EventLog

from .clock import Clock

__all__ = ["Journal", "Kind", "Moment", "RecordedClock", "RecordedDisk"]


class Kind(IntEnum):
    """What an event of the log is."""

    TYPED = 1
    SLEPT = 2
    DISK = 3
    TIME = 4
    RESIZED = 5
    """The number of a disk (1 byte), and how many bytes it has now (8)."""
    POKED = 6
    """An offset in memory (8 bytes), and what was put there from outside."""
    SET = 7
    """What x0, x1, … and then pc were set to from outside, 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in a run a snapshot was taken: between two slices."""

    log: EventLog
    slice: int
    events: int
    """How many came before."""
    sizes: tuple[int, ...]
    """Bytes of each disk."""


class Journal:
    """The log of a board, and whether it is written or read at the moment."""

    def __init__(self) -> None:
        self.log = EventLog()
        self.slice = 0
        self.cursor: Cursor | None = None
        """Where the log is read; None while it is written."""

        self.asked_by_board = False
        """Whether it is the board that is running, and not somebody who looks at its clock."""

        self.coming: Moment | None = None
        """Where in this run a snapshot was taken that is being loaded; None for any other."""
        self.carries_out = False
        """Whether what is read from the log happens to the disks, too."""
        self.failure: pyvirtio.BackendError | None = None
        """The first error of a disk to which it was to happen."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """The board does something that will be done again."""
        before, self.asked_by_board = self.asked_by_board, True
        try:
            yield
        finally:
            self.asked_by_board = before

    @contextmanager
    def taking_on(self, moment: Moment) -> Iterator[None]:
        """A snapshot of this run is loaded."""
        self.coming = moment
        try:
            yield
        finally:
            self.coming = None

    @contextmanager
    def carrying_out(self) -> Iterator[None]:
        """Requests happen to the disks again. Raises BackendError at the end if one has failed."""
        self.carries_out, self.failure = True, None
        try:
            yield
        finally:
            self.carries_out = False
        if self.failure is not None:
            raise self.failure

    def note(self, kind: Kind, data: bytes) -> None:
        """Write an event."""
        self.log.append(self.slice, kind, data)

    def again(self, kind: Kind) -> bytes:
        """Read the next event. Raises ReplayError for one of another kind."""
        assert self.cursor is not None
        return self.cursor.take(self.slice, kind)


class RecordedDisk(pyvirtio.Disk):
    """Notes what the disk ``below`` answers; when the log is read, answers the same without it.

    A change of its size is noted as well; to be made between two slices. One that is made while
    the board is in the past is seen by the guest in the present. ``number`` is the disk's.
    """

    format_name = "recorded"

    def __init__(self, below: pyvirtio.Disk, journal: Journal, number: int) -> None:
        super().__init__(below.size, read_only=below.read_only, limits=below.limits)
        self.below = below
        self._journal = journal
        self._number = number
        self._unfollow = below.on_resize(lambda _: self.follow())

    # -- sizes ---------------------------------------------------------------------------------

    def follow(self) -> None:
        """Be as long as the disk below, unless the log is being read."""
        if self._journal.cursor is None and self.size != self.below.size:
            size = self.below.size
            self._journal.note(Kind.RESIZED, bytes((self._number,)) + size.to_bytes(8, "little"))
            self._set_size(size)

    def become(self, size: int) -> None:
        """Be as long as the log says, or a snapshot."""
        if self._journal.carries_out:
            self._carry_out(lambda: self.below.truncate(size, shrink=True))
        self._set_size(size)

    # -- requests ------------------------------------------------------------------------------

    def _outcome(self, action: Callable[[], bytes], *, changes: bool = False) -> bytes:
        """The data of a request; raises BackendError as the disk below has done."""
        journal = self._journal
        if journal.cursor is None:
            try:
                outcome = bytes(2) + action()
            except OSError as error:
                outcome = (error.errno or errno.EIO).to_bytes(2, "little")
            journal.note(Kind.DISK, outcome)
        else:
            outcome = journal.again(Kind.DISK)
        number = int.from_bytes(outcome[:2], "little")
        if number:
            raise pyvirtio.BackendError(number, "the disk below has failed")
        if changes and journal.carries_out:
            self._carry_out(action)
        return outcome[2:]

    def _carry_out(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if self._journal.failure is None:
                self._journal.failure = pyvirtio.BackendError(
                    error.errno or errno.EIO, f"a disk does not do again what it has done: {error}"
                )

    def _done(self, action: Callable[[], None]) -> None:
        def act() -> bytes:
            action()
            return b""

        self._outcome(act, changes=True)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        data = self._outcome(lambda: self.below.read(offset, length))
        at = 0
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._done(lambda: self.below.writev(offset, views))

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._done(lambda: self.below.write_zeroes(offset, length, unmap=unmap))

    def _discard(self, offset: int, length: int) -> None:
        self._done(lambda: self.below.discard(offset, length))

    def _flush(self) -> None:
        self._done(self.below.flush)

    def leave(self) -> None:
        """The board is no more: let go of the disk below."""
        self._unfollow()


class RecordedClock:
    """Notes what a clock says that is not made of instructions."""

    def __init__(self, below: Clock, journal: Journal) -> None:
        self._below = below
        self._journal = journal
        self.ran, self.touched, self.budget = below.ran, below.touched, below.budget
        self._last = 0

    def _said(self, ask: Callable[[], int]) -> int:
        journal = self._journal
        if not journal.asked_by_board:
            return ask() if journal.cursor is None else self._last
        if journal.cursor is None:
            self._last = ask()
            journal.note(Kind.TIME, self._last.to_bytes(8, "little"))
        else:
            self._last = int.from_bytes(journal.again(Kind.TIME), "little")
        return self._last

    def now(self) -> int:
        return self._said(self._below.now)

    def look(self) -> int:
        return self._said(self._below.look)

    def sleep_until(self, tick: int) -> None:
        if self._journal.cursor is None:
            self._below.sleep_until(tick)

    @property
    def state_version(self) -> int:
        return self._below.state_version

    def save_state(self, stream: StateWriter) -> None:
        self._below.save_state(stream)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        adopt = self._below.load_state(stream)
        # What the time was in the past, is in the log.
        return (lambda: None) if self._journal.coming is not None else adopt
