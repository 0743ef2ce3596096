"""Backwards through a recorded run: to the last write to an address, or the last visit of one.

A processor cannot run backwards. But it can run from an earlier snapshot again, and watch: once
over whole slices, to find the last one in which something happened, and once over that slice,
counting instructions, to find the very one. What a disk writes to memory, it writes at the end of a
slice, after all of its instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import unicorn as u

from .cpu import Stop
from .recording import Position, RecordedBoard

__all__ = ["Points", "Traveller"]


@dataclass(frozen=True)
class Points:
    """What to look for: instructions by their (virtual) address, writes to physical ranges."""

    visits: Sequence[int] = ()
    writes: Sequence[range] = ()


@dataclass
class _Slice:
    """What happened in a slice: how many instructions began, and at which of them (from 1)."""

    length: int = 0
    visited: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    written_by_disk: bool = False
    """At its end."""
    stop: Stop = Stop.COUNT


class Traveller:
    """Goes through the past of ``board``."""

    def __init__(self, board: RecordedBoard) -> None:
        self.board = board
        self.eve: Position | None = None
        """Where what :meth:`forward_to` has found was about to happen."""

    # -- single steps --------------------------------------------------------------------------

    def step(self) -> None:
        """One instruction forward; at the end of a slice, into the next one."""
        slice_, offset = self.board.position
        if slice_ >= self.board.present:
            self._run_live()
            slice_ = self.board.present - 1
            offset = 0
        if offset + 1 < self._trace(slice_).length:
            self.board.goto(Position(slice_, offset + 1))
        else:
            self.board.goto(Position(slice_ + 1))

    def step_back(self) -> bool:
        """One instruction back; False at the beginning."""
        slice_, offset = self.board.position
        while not offset:
            if not slice_:
                return False
            slice_ -= 1
            # A store that ended its slice is carried out by the next one.
            found = self._trace(slice_)
            offset = found.length - (found.stop is Stop.DEVICE)
        self.board.goto(Position(slice_, offset - 1))
        return True

    # -- to something --------------------------------------------------------------------------

    def back_to(self, points: Points) -> bool:
        """Go to the last moment before this one at which one of ``points`` was about to happen:
        at which the hart or a disk was about to write, or an instruction to be run.

        False, and at the beginning, if there was none.
        """
        end = self.board.position
        limit = end.slice + (1 if end.offset else 0)
        while limit > 0:
            start = self.board.snapshot_before(limit)
            slices = self._eventful(start, limit, points)
            for slice_ in reversed(slices):
                moments = list(self._moments(slice_, points))
                before = [at for at in moments if slice_ < end.slice or at < end.offset]
                if before:
                    self.board.goto(Position(slice_, before[-1]))
                    return True
            limit = start
        self.board.goto(Position(0))
        return False

    def forward_to(self, points: Points, patience: Callable[[], bool]) -> bool:
        """Run on until one of ``points`` happens: before an instruction that is visited, after a
        write. False when ``patience()`` is, or the board has stopped; asked between slices.
        """
        board = self.board
        here = board.position
        if here.offset:
            ahead = self._ahead(here, points)
            if ahead is not None:
                board.goto(ahead)
                return True
            board.goto(Position(here.slice + 1))
        first = True
        while patience() and (board.in_past or board.power is None):
            slice_ = board.position.slice
            with self._watching(points) as happened:
                if board.step():
                    board.sleep()
            if happened():
                ahead = self._ahead(Position(slice_, 0 if first else -1), points)
                if ahead is not None:
                    board.goto(ahead)
                    return True
            first = False
        return False

    def _ahead(self, here: Position, points: Points) -> Position | None:
        """The first moment of a slice, after ``here``, at which to stop."""
        found = self._trace(here.slice, points)
        moments = sorted(
            [(at - 1, at - 1) for at in found.visited if at - 1 > here.offset]
            + [(at, at - 1) for at in found.written if at > here.offset]
        )
        if moments:
            at, eve = moments[0]
        elif found.written_by_disk:
            at = eve = found.length
        else:
            return None
        self.eve = Position(here.slice, eve)
        return Position(here.slice, at) if at < found.length else Position(here.slice + 1)

    # -- parts ---------------------------------------------------------------------------------

    def _run_live(self) -> None:
        if self.board.step():
            self.board.sleep()

    def _eventful(self, start: int, end: int, points: Points) -> list[int]:
        """The slices from ``start`` to before ``end`` in which something happened."""
        found = []
        self.board.goto(Position(start))
        with self._watching(points) as happened:
            for slice_ in range(start, end):
                self.board.step()
                if happened():
                    found.append(slice_)
        return found

    def _moments(self, slice_: int, points: Points) -> Iterator[int]:
        """Offsets in a slice at which one of ``points`` is about to happen, in their order."""
        found = self._trace(slice_, points)
        yield from sorted({at - 1 for at in (*found.visited, *found.written)})
        if found.written_by_disk:
            yield found.length

    def _trace(self, slice_: int, points: Points | None = None) -> _Slice:
        """Run a slice of the past again and count its instructions. Leaves the board in it."""
        board, found = self.board, _Slice()
        if points is not None:
            found.written_by_disk = self._disk_writes_in(slice_, points)
        board.goto(Position(slice_))

        def count(uc: u.Uc, address: int, size: int, _: object) -> None:
            found.length += 1

        def visit(uc: u.Uc, address: int, size: int, _: object) -> None:
            found.visited.append(found.length)

        def write(uc: u.Uc, kind: int, address: int, size: int, value: int, _: object) -> None:
            found.written.append(found.length)

        uc = board.cpu.uc
        hooks = [uc.hook_add(u.UC_HOOK_CODE, count)]
        try:
            if points is not None:
                hooks += _hooks(uc, points, visit, write)
            uc.ctl_flush_tb()
            found.stop = board.replay_slice()
        finally:
            for hook in hooks:
                uc.hook_del(hook)
            uc.ctl_flush_tb()
        return found

    def _disk_writes_in(self, slice_: int, points: Points) -> bool:
        """Run a slice of the past again: does a disk write where ``points`` says at its end?"""
        if not points.writes:
            return False
        self.board.goto(Position(slice_))
        happened = False

        def note() -> None:
            nonlocal happened
            happened = True

        with self._watching_disks(points, note):
            self.board.step()
        return happened

    @contextmanager
    def _watching_disks(self, points: Points, note: Callable[[], None]) -> Iterator[None]:
        def wrote(address: int, length: int) -> None:
            if any(address < where.stop and where.start < address + length for where in wheres):
                note()

        wheres, before = points.writes, self.board.disk_wrote
        self.board.disk_wrote = wrote
        try:
            yield
        finally:
            self.board.disk_wrote = before

    @contextmanager
    def _watching(self, points: Points) -> Iterator[Callable[[], bool]]:
        """Within, the function given tells whether something has happened since it was asked."""
        happened = False

        def note(*_: object) -> None:
            nonlocal happened
            happened = True

        def ask() -> bool:
            nonlocal happened
            answer, happened = happened, False
            return answer

        uc = self.board.cpu.uc
        hooks = _hooks(uc, points, note, note)
        uc.ctl_flush_tb()
        try:
            with self._watching_disks(points, note):
                yield ask
        finally:
            for hook in hooks:
                uc.hook_del(hook)
            uc.ctl_flush_tb()


def _hooks(
    uc: u.Uc, points: Points, visit: Callable[..., None], write: Callable[..., None]
) -> list[int]:
    hooks = [uc.hook_add(u.UC_HOOK_CODE, visit, begin=at, end=at) for at in points.visits]
    return hooks + [
        uc.hook_add(u.UC_HOOK_MEM_WRITE, write, begin=where.start, end=where.stop - 1)
        for where in points.writes
    ]
