"""A board that remembers: what came in from outside, and what it was like now and then.

Between two slices the board is a function of what it was at the start and of what has come in
since: bytes typed, how long it slept, what the disks answered, how large they became, what a
debugger changed and, with a clock that is not made of instructions, the time. All that goes into
one log (:mod:`.journal`). Every so many slices the board keeps a machine snapshot of itself, in an
image in memory: of which only pages that have changed take room. To go to a position, it takes on
the nearest snapshot before, and runs again from the log; no disk is touched, nothing is sent.

Changed pages are found by comparing with a copy. Having the engine report stores would cost far
more, all the time, and not every host's kernel keeps track of dirty pages for a process.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyvirtio
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.machine.increment import SaveFigures
from pyvirtio.machine.log import Cursor, EventLog
from pyvirtio.qcow2.driver import Qcow2Disk
from pyvirtio.qcow2.snapshots import Snapshot

from .board import Board
from .clint import NEVER
from .clock import Clock, InstructionClock
from .cpu import Stop
from .journal import Journal, Kind, Moment, RecordedClock, RecordedDisk
from .saving import machine_of

__all__ = ["Position", "RecordedBoard"]

_PAGE = 4096
_WHOLE = 1 << 62
"""An offset behind all instructions of a slice."""


class Position(NamedTuple):
    """A moment: so many slices are over, and so many instructions of the next one."""

    slice: int
    offset: int = 0


def _image_in_memory() -> Qcow2Disk:
    """An image for snapshots and nothing else."""
    memory = pyvirtio.MemoryDisk(0, growable=True)
    disk = pyvirtio.create_disk(memory, 512, cluster_size=_PAGE)
    assert isinstance(disk, Qcow2Disk)
    return disk


class RecordedBoard(Board):
    """A board that keeps a snapshot of itself before every ``every``-th slice: in memory, or in
    ``keep``, an image for nothing else (best with clusters of 4 KiB). The rest is as for
    :class:`.board.Board`; time that is not made of instructions is noted.

    In the past (after :meth:`goto`), :meth:`step` runs on as it was, up to the present. Nothing may
    be typed, and no machine snapshot be taken, for the disks are in the present;
    :class:`.branching.Branches` takes another way from there. A machine snapshot that is loaded
    starts a new run: its past is not known.
    """

    def __init__(
        self,
        send: Callable[[int], None],
        *,
        every: int = 100,
        keep: Qcow2Disk | None = None,
        ram: int = 128 << 20,
        disks: Sequence[pyvirtio.Disk] = (),
        clock: Clock | None = None,
        legacy_virtio: bool = False,
        pci: bool = False,
        aia: bool = False,
        slice_length: int = 200_000,
    ) -> None:
        self._journal = Journal()
        self._every = every
        self._kept: list[tuple[Moment, Snapshot]] = []
        self._present = 0
        self._offset = 0
        self.disk_wrote: Callable[[int, int], object] = lambda address, length: None
        """Called when a disk has written to memory, at the end of a slice."""
        self._recorded = [
            RecordedDisk(disk, self._journal, number) for number, disk in enumerate(disks)
        ]
        if clock is not None and not isinstance(clock, InstructionClock):
            clock = RecordedClock(clock, self._journal)

        def say(byte: int) -> None:
            if self._journal.cursor is None:
                send(byte)

        super().__init__(
            say,
            ram=ram,
            disks=self._recorded,
            clock=clock,
            legacy_virtio=legacy_virtio,
            pci=pci,
            aia=aia,
            slice_length=slice_length,
        )
        self._machine = machine_of(self)
        self._snapshots = pyvirtio.MachineSnapshots(self._machine, [keep or _image_in_memory()])

    @property
    def disks(self) -> list[pyvirtio.Disk]:
        """The disks as they were given."""
        return [disk.below for disk in self._recorded]

    def _block(self, disk: pyvirtio.Disk | pyvirtio.VirtioBlk) -> pyvirtio.VirtioBlk:
        if not isinstance(disk, RecordedDisk):
            raise TypeError("a recorded board gets all its disks when it is made")
        return super()._block(disk)

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
        return max((kept.slice for kept, _ in self._kept if kept.slice < slice_), default=0)

    @property
    def last_save(self) -> SaveFigures | None:
        """What keeping the last snapshot took."""
        return self._snapshots.last_save

    @property
    def moment(self) -> Moment:
        """Where the board is, for a snapshot taken there. ValueError in the past."""
        self._live()
        sizes = tuple(disk.size for disk in self._recorded)
        return Moment(self.log, self._journal.slice, len(self.log), sizes)

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

    def poke(self, offset: int, data: bytes) -> None:
        """Put ``data`` at an offset of the memory, as a debugger does. ValueError in the past."""
        self._live()
        event = offset.to_bytes(8, "little") + data
        self._journal.note(Kind.POKED, event)
        self._poke(event)

    def _poke(self, event: bytes) -> None:
        offset = int.from_bytes(event[:8], "little")
        self.ram[offset : offset + len(event) - 8] = event[8:]
        self.cpu.forget_everything()

    def set_registers(self, values: bytes) -> None:
        """Set x0, x1, … and then pc, each 8 bytes (little-endian). ValueError in the past."""
        self._live()
        self._journal.note(Kind.SET, values)
        self._set(values)

    def _set(self, values: bytes) -> None:
        state = self.cpu.state
        state.load()
        for index in range(min(len(values) // 8, 33)):
            value = int.from_bytes(values[8 * index : 8 * index + 8], "little")
            if index == 32:
                state.pc = value
            elif index:
                state.words[index] = value
        state.store()

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
            self.keep()
        elif any(kept.slice == self._journal.slice for kept, _ in self._kept):
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
        between = (Kind.TYPED, Kind.SLEPT, Kind.RESIZED, Kind.POKED, Kind.SET)
        while journal.cursor is not None and (event := journal.cursor.peek()) is not None:
            if event.position != journal.slice or event.kind not in between:
                break
            journal.cursor.index += 1
            if event.kind == Kind.TYPED:
                super().receive(event.data)
            elif event.kind == Kind.RESIZED:
                self._recorded[event.data[0]].become(int.from_bytes(event.data[1:], "little"))
            elif event.kind == Kind.POKED:
                self._poke(event.data)
            elif event.kind == Kind.SET:
                self._set(event.data)
            else:
                tick = int.from_bytes(event.data, "little")
                with journal.running():
                    super().sleep(None if tick == NEVER else tick)
        if journal.slice == self._present:
            self._be_present()

    def _be_present(self) -> None:
        self._journal.cursor = None
        for disk in self._recorded:
            disk.follow()

    def _live(self) -> None:
        if self.in_past or self._offset:
            raise ValueError("the past cannot be changed: go to the present first, or branch")

    def close(self) -> None:
        """As in Board."""
        super().close()
        for disk in self._recorded:
            disk.leave()

    def _forget_overwritten_code(self) -> None:
        for address, length in self._written:
            self.disk_wrote(address, length)
        super()._forget_overwritten_code()

    # -- snapshots -----------------------------------------------------------------------------

    def keep(self) -> None:
        """Keep a snapshot of the board here, unless there is one. ValueError in the past."""
        moment = self.moment
        if not self._kept or self._kept[-1][0].slice < moment.slice:
            self._drop_others()
            snapshot = self._snapshots.savevm(
                str(moment.slice), vm_clock=100 * self.clock.now(), date=0
            )
            self._kept.append((moment, snapshot))
            # A later run from here starts with none cached: that nothing may depend on it.
            self.cpu.forget_translations()

    def _drop_others(self) -> None:
        """Delete the snapshots of a past that is none any more."""
        wanted = {snapshot.id for _, snapshot in self._kept}
        for snapshot in self._snapshots.listvm():
            if snapshot.id not in wanted:
                self._snapshots.delvm(snapshot.id)

    def save_state(self, stream: StateWriter) -> None:
        """As in Board; ValueError in the past."""
        self._live()
        super().save_state(stream)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """As in Board; a new run starts."""
        adopt_board = super().load_state(stream)

        def adopt() -> None:
            adopt_board()
            coming = self._journal.coming
            if coming is None:
                self._begin()
            else:
                for disk, size in zip(self._recorded, coming.sizes, strict=True):
                    disk.become(size)

        return adopt

    def _begin(self) -> None:
        """A new run starts here."""
        self._journal.log = EventLog()
        self._journal.slice = self._present = self._offset = 0
        self._kept.clear()
        self._be_present()

    def _take_on(self, moment: Moment, load: Callable[[], object]) -> None:
        """Become what a snapshot was, which ``load`` loads; and stand in the log where it was."""
        journal = self._journal
        with journal.taking_on(moment):
            load()
        self._offset = 0
        journal.slice = moment.slice
        journal.cursor = Cursor(journal.log, moment.events)
        self._arrive()

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
        number = max(0, bisect_right(self._kept, target, key=lambda kept: kept[0].slice) - 1)
        here = self._journal.slice
        moment, snapshot = self._kept[number]
        if self._offset or not moment.slice <= here <= target:
            self._take_on(moment, lambda: self._snapshots.loadvm(snapshot.id))

    def relive(self, moment: Moment, load: Callable[[], object]) -> None:
        """Make where the board is in its past the present; what came after it never was.

        ``load`` makes the board and its disks what they were at ``moment``, which is before. What
        happened from there to here happens again, to the disks, too. Raises ValueError inside a
        slice and for a moment that is none; what ``load`` raises; BackendError if a disk does not
        do again what it has done: the board is still in the past then, and its disks are not.
        """
        target, journal = self.position, self._journal
        if target.offset:
            raise ValueError("another way can be taken between two slices only")
        if moment.log is not self.log or moment.slice > target.slice:
            raise ValueError(f"slice {moment.slice} is not in the past of {target}")
        if not self.in_past:
            return
        self._take_on(moment, load)
        with journal.carrying_out():
            while journal.slice < target.slice:
                self.step()
        assert journal.cursor is not None
        self.log.truncate(journal.cursor.index)
        self._kept = [kept for kept in self._kept if kept[0].slice <= target.slice]
        self._present = target.slice
        self._be_present()

    def replay_slice(self) -> Stop:
        """Run the CPU's part of a slice of the past, and leave it at its end."""
        if not self.in_past or self._offset:
            raise ValueError("only a whole slice of the past can be run again")
        with self._journal.running():
            stop = self.cpu.run(self._begin_slice())
        self._offset = _WHOLE
        return stop
