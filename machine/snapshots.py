"""Snapshots of a whole machine: savevm, loadvm, delvm, listvm.

As in QEMU, the machine's state is kept as the VM state of one of its disks, inside a snapshot of
that disk; a snapshot of the same name on each other disk belongs to it. The order:

savevm  stream into the VM state | snapshots of the other disks | the snapshot that takes the state
loadvm  stream checked whole | all disks go back | RAM, components
delvm   the snapshot with the state | those of the other disks

So a machine snapshot that is listed is whole, and a cut leaves disk snapshots without one at worst;
:meth:`MachineSnapshots.delvm` removes those, too.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ..errors import BackendError, UnsupportedError
from ..qcow2.driver import Qcow2Disk
from ..qcow2.snapshots import Snapshot
from .state import Machine

__all__ = ["MachineSnapshots"]

_WAY_BACK = "pyvirtio: before loadvm"
"""Name of the disk snapshots that exist while several disks go back."""


class MachineSnapshots:
    """The snapshots of ``machine`` with its ``disks``: all that the guest can write, in any order
    that stays. The state goes on the first one, or on ``state_disk``.

    The machine must stand still in all that follows, with no request to a disk under way.
    """

    def __init__(
        self, machine: Machine, disks: Sequence[Qcow2Disk], *, state_disk: Qcow2Disk | None = None
    ) -> None:
        for disk in disks:
            if not isinstance(disk, Qcow2Disk):
                raise UnsupportedError(
                    f"A {disk.format_name} disk does not support snapshots", feature="snapshots"
                )
        if not disks or len({id(disk) for disk in disks}) < len(disks):
            raise ValueError("a machine has disks, and each of them once")
        self._machine = machine
        self._state_disk = disks[0] if state_disk is None else state_disk
        self._others = [disk for disk in disks if disk is not self._state_disk]
        if len(self._others) == len(disks):
            raise ValueError("the state goes on one of the disks")

    # -- looking -------------------------------------------------------------------------------

    def listvm(self) -> list[Snapshot]:
        """The snapshots that can be loaded, as the disk with the state has them."""
        return [
            snapshot
            for snapshot in self._state_disk.snapshots
            if snapshot.vm_state_size
            and all(_find(disk, snapshot.name) is not None for disk in self._others)
        ]

    # -- doing ---------------------------------------------------------------------------------

    def savevm(
        self,
        name: str,
        *,
        vm_clock: int = 0,
        icount: int | None = None,
        date: float | None = None,
    ) -> Snapshot:
        """Keep the machine and its disks as they are now under ``name``.

        ``vm_clock`` is the guest's run time in nanoseconds, ``icount`` its instruction count, if
        that is counted, ``date`` seconds since the epoch (now, if None). If a disk fails, none has
        the snapshot. Raises ValueError where one has a snapshot of that name.
        """
        self._check_writable()
        for disk in self._disks():
            if _find(disk, name) is not None:
                raise ValueError(f"Snapshot '{name}' already exists in one or more devices")
        if date is None:
            date = time.time()
        state = self._state_disk.vmstate
        try:
            state.discard()  # what a program that died may have left
            size = self._machine.save(state)
            for disk in self._others:
                disk.snapshots.create(name, vm_clock=vm_clock, icount=icount, date=date)
            return self._state_disk.snapshots.create(
                name, vm_clock=vm_clock, icount=icount, date=date, vm_state_size=size
            )
        except BaseException as error:
            for disk in self._disks():
                with _undoing(error):
                    _delete(disk, name)
            with _undoing(error):
                state.discard()
            raise

    def loadvm(self, name_or_id: str) -> Snapshot:
        """Make the machine and its disks what they were; the id is the state disk's.

        The whole stream is read, checked, and taken by the components before anything changes;
        if a disk fails then, the others are what they were. Only if RAM cannot be read a second
        time, the machine is left in pieces (its disks are those of the snapshot then).
        Raises KeyError where a disk has no such snapshot, UnsupportedError for one without a state,
        and the errors of :meth:`Machine.prepare`.
        """
        self._check_writable()
        snapshot = self._state_disk.snapshots.find(name_or_id)
        if not snapshot.vm_state_size:
            raise UnsupportedError(
                f"Snapshot '{snapshot.name}' is a disk-only snapshot", feature="disk-only snapshot"
            )
        targets = [(disk, disk.snapshots.find_by(name=snapshot.name)) for disk in self._others]
        with self._state_disk.snapshots.open(snapshot) as view:
            load = self._machine.prepare(view.vmstate)
            _apply_all([*targets, (self._state_disk, snapshot)])
            # Only the snapshot is to hold RAM; if it stays here too, as in QEMU, it does no harm.
            with suppress(BackendError):
                self._state_disk.vmstate.discard()
            load()
        return snapshot

    def delvm(self, name_or_id: str) -> None:
        """Delete a snapshot from all disks that have it; the id is the state disk's.

        Raises KeyError if none has it. If a disk fails, the snapshot is deleted from the others
        still, and the first error is raised.
        """
        self._check_writable()
        name, found = name_or_id, []
        with suppress(KeyError):
            snapshot = self._state_disk.snapshots.find(name_or_id)
            name = snapshot.name
            found.append((self._state_disk, snapshot))
        for disk in self._others:
            other = _find(disk, name)
            if other is not None:
                found.append((disk, other))
        if not found:
            raise KeyError(f"snapshot {name_or_id!r} does not exist")
        failure: Exception | None = None
        for disk, snapshot in found:
            try:
                disk.snapshots.delete(snapshot)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    # -- parts ---------------------------------------------------------------------------------

    def _disks(self) -> Iterator[Qcow2Disk]:
        yield self._state_disk
        yield from self._others

    def _check_writable(self) -> None:
        for disk in self._disks():
            if disk.read_only:
                raise BackendError(errno.EPERM, "a disk of the machine is read-only")


def _find(disk: Qcow2Disk, name: str) -> Snapshot | None:
    return next((snapshot for snapshot in disk.snapshots if snapshot.name == name), None)


def _delete(disk: Qcow2Disk, name: str) -> None:
    snapshot = _find(disk, name)
    if snapshot is not None:
        disk.snapshots.delete(snapshot)


def _apply_all(targets: list[tuple[Qcow2Disk, Snapshot]]) -> None:
    """Apply a snapshot to each disk; if one fails, the others are what they were before."""
    *first, (last_disk, last_snapshot) = targets
    applied = []
    try:
        for disk, snapshot in first:
            _delete(disk, _WAY_BACK)  # left by a cut
            way_back = disk.snapshots.create(_WAY_BACK)
            applied.append((disk, way_back))
            disk.snapshots.apply(snapshot)
        last_disk.snapshots.apply(last_snapshot)
    except BaseException as error:
        for disk, way_back in applied:
            with _undoing(error):
                disk.snapshots.apply(way_back)
        for disk, _ in first:
            with _undoing(error):
                _delete(disk, _WAY_BACK)
        raise
    for disk, way_back in applied:
        # Too late to fail; the next loadvm deletes what stays.
        with suppress(BackendError):
            disk.snapshots.delete(way_back)


@contextmanager
def _undoing(cause: BaseException) -> Iterator[None]:
    """What fails while the work of ``cause`` is undone is told with it, and the rest goes on."""
    try:
        yield
    except Exception as error:
        cause.add_note(f"and what was done before could not be undone: {error}")
