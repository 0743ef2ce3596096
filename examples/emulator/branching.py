"""Other ways on from the past of a recorded board: with its disks.

Going into the past leaves the disks alone, so that looking costs nothing and changes nothing. To
run on from there, they have to be what they were, too. So a machine snapshot of board and disks is
gone back to, and what the guest wrote between that and the moment wanted is written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyvirtio
from pyvirtio.qcow2.driver import Qcow2Disk
from pyvirtio.qcow2.snapshots import Snapshot

from .journal import Moment
from .recording import RecordedBoard
from .saving import machine_of

__all__ = ["Branches"]


class Branches:
    """Machine snapshots of ``board`` and of ``disks``: all of its disks that can be written (or
    ValueError), and an image for the state, if wanted. ``options`` are those of MachineSnapshots.
    """

    def __init__(self, board: RecordedBoard, disks: Sequence[Qcow2Disk], **options: Any) -> None:
        if any(disk not in disks for disk in board.disks if not disk.read_only):
            raise ValueError("a disk of the board would not go back")
        self._board = board
        self._taken: list[tuple[Moment, Snapshot]] = []
        self.snapshots = pyvirtio.MachineSnapshots(machine_of(board), disks, **options)
        """For all else. Its ``loadvm`` starts a new run of the board."""

    def savevm(self, name: str) -> Snapshot:
        """Keep board and disks as they are now. ValueError in the past, or for a name in use."""
        self._board.keep()
        moment = self._board.moment
        snapshot = self.snapshots.savevm(name, vm_clock=100 * self._board.clock.now())
        self._taken.append((moment, snapshot))
        return snapshot

    def branch(self) -> None:
        """Make where the board is in its past (``board.goto(…)``) the present: it lives on from
        there, and its disks are what they were. What came after it never was; machine snapshots
        taken there stay, and loading one of them starts a new run.

        Raises ValueError inside a slice, and if there is no machine snapshot of this run between
        its beginning and here; otherwise as :meth:`.recording.RecordedBoard.relive`.
        """
        board, here = self._board, self._board.position
        there = {_identity(snapshot) for snapshot in self.snapshots.listvm()}
        self._taken = [
            taken
            for taken in self._taken
            if taken[0].log is board.log and _identity(taken[1]) in there
        ]
        before = [taken for taken in self._taken if taken[0].slice <= here.slice]
        if not before:
            raise ValueError(f"no machine snapshot of this run was taken up to {here}")
        moment, snapshot = before[-1]
        board.relive(moment, lambda: self.snapshots.loadvm(snapshot.id))
        self._taken = before


def _identity(snapshot: Snapshot) -> tuple[object, ...]:
    return snapshot.id, snapshot.name, snapshot.date_sec, snapshot.date_nsec
