"""A board that remembers: what came in from outside, and what it was like now and then.

Between two slices the board is a function of what it was at the start and of what has come in
since: bytes typed, how long it slept, what the disks answered and, with a clock that is not made of
instructions, the time. All that goes into one log. Every so many slices the board keeps a snapshot
of itself in memory, of which only pages that have changed take room. To go to a position, it takes
on the nearest snapshot before, and runs again from the log; no disk is touched, nothing is sent.

Changed pages are found by comparing with a copy. Having the engine report stores would cost far
more, all the time, and not every host's kernel keeps track of dirty pages for a process.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import pyvirtio
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.machine.log import Cursor, EventLog

from .board import Board
from .clint import NEVER
from .clock import Clock, InstructionClock
from .cpu import Stop
from .saving import components_of

__all__ = ["Kind", "Position", "RecordedBoard"]

_PAGE = 4096
_BLOCK = 1 << 20
_WHOLE = 1 << 62
"""An offset behind all instructions of a slice."""


class Kind(IntEnum):
    """What an event of the log is."""

    TYPED = 1
    SLEPT = 2
    DISK = 3
    TIME = 4


class Position(NamedTuple):
    """A moment: so many slices are over, and so many instructions of the next one."""

    slice: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    """A snapshot: the components' states, and how many events came before it."""

    slice: int
    events: int
    states: dict[str, bytes]


class _Journal:
    """The log of a board, and whether it is written or read at the moment."""

    def __init__(self) -> None:
        self.log = EventLog()
        self.slice = 0
        self.cursor: Cursor | None = None
        """Where the log is read; None while it is written."""

        self.asked_by_board = False
        """Whether it is the board that is running, and not somebody who looks at its clock."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """The board does something that will be done again."""
        before, self.asked_by_board = self.asked_by_board, True
        try:
            yield
        finally:
            self.asked_by_board = before

    def note(self, kind: Kind, data: bytes) -> None:
        self.log.append(self.slice, kind, data)

    def again(self, kind: Kind) -> bytes:
        assert self.cursor is not None
        return self.cursor.take(self.slice, kind)


class _RecordedDisk(pyvirtio.Disk):
    """Notes what the disk below answers; when the log is read, answers the same without it."""

    format_name = "recorded"

    def __init__(self, below: pyvirtio.Disk, journal: _Journal) -> None:
        super().__init__(below.size, read_only=below.read_only, limits=below.limits)
        self._below = below
        self._journal = journal

    def _outcome(self, action: Callable[[], bytes]) -> bytes:
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
        return outcome[2:]

    def _done(self, action: Callable[[], None]) -> None:
        def act() -> bytes:
            action()
            return b""

        self._outcome(act)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        data = self._outcome(lambda: self._below.read(offset, length))
        at = 0
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._done(lambda: self._below.writev(offset, views))

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._done(lambda: self._below.write_zeroes(offset, length, unmap=unmap))

    def _discard(self, offset: int, length: int) -> None:
        self._done(lambda: self._below.discard(offset, length))

    def _flush(self) -> None:
        self._done(self._below.flush)


class _RecordedClock:
    """Notes what a clock says that is not made of instructions."""

    def __init__(self, below: Clock, journal: _Journal) -> None:
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

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Nothing: what the time was, is in the log."""

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        return lambda: None


class RecordedBoard(Board):
    """A board that keeps a snapshot of itself before every ``every``-th slice. The rest is
    as for :class:`.board.Board`; time that is not made of instructions is noted.

    In the past (after :meth:`goto`), :meth:`step` runs on as it was, up to the present, and nothing
    may be typed. Disks must not change their size while they are recorded.
    """

    def __init__(
        self,
        send: Callable[[int], None],
        *,
        every: int = 100,
        ram: int = 128 << 20,
        disks: Sequence[pyvirtio.Disk] = (),
        clock: Clock | None = None,
        legacy_virtio: bool = False,
        pci: bool = False,
        slice_length: int = 200_000,
    ) -> None:
        self._journal = _Journal()
        self._every = every
        self._kept: list[_Kept] = []
        self._mirror = bytearray()
        self._versions: dict[int, list[tuple[int, bytes]]] = {}
        """By page: what was in it from a snapshot (its number) on; those of the last are in the
        mirror, too."""
        self._present = 0
        self._offset = 0
        if clock is not None and not isinstance(clock, InstructionClock):
            clock = _RecordedClock(clock, self._journal)

        def say(byte: int) -> None:
            if self._journal.cursor is None:
                send(byte)

        super().__init__(
            say,
            ram=ram,
            disks=disks,
            clock=clock,
            legacy_virtio=legacy_virtio,
            pci=pci,
            slice_length=slice_length,
        )

    def _block(self, disk: pyvirtio.Disk | pyvirtio.VirtioBlk) -> pyvirtio.VirtioBlk:
        if isinstance(disk, pyvirtio.VirtioBlk):
            raise TypeError("a board that is recorded makes the devices for its disks itself")
        return super()._block(_RecordedDisk(disk, self._journal))

    @property
    def log(self) -> EventLog:
        """All that has come in."""
        return self._journal.log

    @property
    def position(self) -> Position:
        """Where the board is."""
        return Position(self._journal.slice, self._offset)

    @property
    def present(self) -> int:
        """How many slices have been run at all."""
        return self._present

    def snapshot_before(self, slice_: int) -> int:
        """The slice of the last snapshot before ``slice_``; 0 for the first."""
        return max((kept.slice for kept in self._kept if kept.slice < slice_), default=0)

    @property
    def in_past(self) -> bool:
        """True while what happens is what has happened already."""
        return self._journal.cursor is not None

    # -- running -------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """As in Board; ValueError in the past, which cannot be changed."""
        self._live()
        self._journal.note(Kind.TYPED, data)
        super().receive(data)

    def sleep(self, until: int | None = None) -> None:
        """As in Board. In the past, sleep comes by itself."""
        if not self.in_past:
            tick = NEVER if until is None else until
            self._journal.note(Kind.SLEPT, tick.to_bytes(8, "little"))
            with self._journal.running():
                super().sleep(until)

    def step(self) -> bool:
        """As in Board: live, or (in the past) as it was."""
        if self._offset:
            self.goto(Position(self._journal.slice))
        if not self.in_past and self._journal.slice % self._every == 0:
            self._keep()
        elif any(kept.slice == self._journal.slice for kept in self._kept):
            self.cpu.forget_translations()
        with self._journal.running():
            idle = super().step()
        self._journal.slice += 1
        if self.in_past:
            self._arrive()
            return False
        self._present = self._journal.slice
        return idle

    def _arrive(self) -> None:
        """What came in between the slice before and this one, comes in again."""
        journal = self._journal
        cursor = journal.cursor
        while cursor is not None and (event := cursor.peek()) is not None:
            if event.position != journal.slice or event.kind not in (Kind.TYPED, Kind.SLEPT):
                break
            cursor.index += 1
            if event.kind == Kind.TYPED:
                super().receive(event.data)
            else:
                tick = int.from_bytes(event.data, "little")
                with journal.running():
                    super().sleep(None if tick == NEVER else tick)
        if journal.slice == self._present:
            journal.cursor = None

    def _live(self) -> None:
        if self.in_past or self._offset:
            raise ValueError("the past cannot be changed: go to the present first")

    # -- snapshots in memory -------------------------------------------------------------------

    def _keep(self) -> None:
        if self._kept and self._kept[-1].slice >= self._journal.slice:
            return
        number = len(self._kept)
        if not number:
            self._mirror = bytearray(self.ram)
        for page in list(self._changed_pages()):
            data = self.ram[page : page + _PAGE]
            versions = self._versions.setdefault(page, [])
            if not versions:
                versions.append((0, bytes(self._mirror[page : page + _PAGE])))
            versions.append((number, data))
            self._mirror[page : page + _PAGE] = data
        states = {}
        for name, component in components_of(self).items():
            stream = StateWriter()
            component.save_state(stream)
            states[name] = bytes(stream)
        self._kept.append(_Kept(self._journal.slice, len(self.log), states))
        # A later run from here starts with none cached: that nothing may depend on it.
        self.cpu.forget_translations()

    def _changed_pages(self) -> Iterator[int]:
        """Offsets of the pages that are not as in the last snapshot."""
        ram, mirror = self.ram, self._mirror
        for start in range(0, len(ram), _BLOCK):
            now, before = ram[start : start + _BLOCK], bytes(mirror[start : start + _BLOCK])
            if now != before:
                for at in range(0, len(now), _PAGE):
                    if now[at : at + _PAGE] != before[at : at + _PAGE]:
                        yield start + at

    def _take_on(self, number: int) -> None:
        """Become what snapshot ``number`` was."""
        for page in list(self._changed_pages()):
            self.ram[page : page + _PAGE] = self._mirror[page : page + _PAGE]
        for page, versions in self._versions.items():
            index = bisect_right(versions, number, key=lambda version: version[0]) - 1
            if index < len(versions) - 1:
                self.ram[page : page + _PAGE] = versions[index][1]
        kept = self._kept[number]
        adopt = [
            component.load_state(
                StateReader(kept.states[name], name=name, version=component.state_version)
            )
            for name, component in components_of(self).items()
        ]
        for function in adopt:
            function()
        self._offset = 0
        self._journal.slice = kept.slice
        self._journal.cursor = Cursor(self.log, kept.events)

    # -- going there ---------------------------------------------------------------------------

    def goto(self, position: Position) -> None:
        """Be what the board was at a position from 0 to the present.

        Raises ValueError for one that has not been yet.
        """
        is_ahead = position.slice >= self._present if position.offset else False
        if not 0 <= position.slice <= self._present or is_ahead or not self._kept:
            raise ValueError(f"{position} has not been yet")
        self._rewind(position.slice)
        while self._journal.slice < position.slice:
            self.step()
        if position.offset:
            with self._journal.running():
                self.cpu.run(min(self._begin_slice(), position.offset))
            self._offset = position.offset

    def _rewind(self, target: int) -> None:
        """Go to the last snapshot up to slice ``target``, if the way from here is not shorter."""
        number = max(0, bisect_right(self._kept, target, key=lambda kept: kept.slice) - 1)
        here = self._journal.slice
        if self._offset or not self._kept[number].slice <= here <= target:
            self._take_on(number)
            self._arrive()

    def replay_slice(self) -> Stop:
        """Run the CPU's part of a slice of the past, and leave it at its end."""
        if not self.in_past or self._offset:
            raise ValueError("only a whole slice of the past can be run again")
        with self._journal.running():
            stop = self.cpu.run(self._begin_slice())
        self._offset = _WHOLE
        return stop
