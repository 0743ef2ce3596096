"""Snapshots of a whole machine: savevm, loadvm, delvm, listvm, and the tree they form.

As in QEMU, the machine's state is kept as the VM state of one of its disks, inside a snapshot of
that disk; a snapshot of the same name on each other disk belongs to it. The order:

savevm  what changed goes aside | snapshots of the other disks | the snapshot that takes the state
loadvm  stream and pages checked whole | all disks go back | RAM, components
delvm   the snapshot with the state | those of the other disks

So a machine snapshot that is listed is whole, and a cut leaves disk snapshots without one at worst;
:meth:`MachineSnapshots.delvm` removes those, too. RAM never is in the tables of the running disk.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from ..errors import BackendError, ImageError, UnsupportedError
from ..qcow2.driver import Qcow2Disk
from ..qcow2.snapshot_view import SnapshotDisk
from ..qcow2.snapshots import Snapshot
from .dirty import ByComparison, ByHash, Tracker
from .fork import fork_disk
from .increment import Increments, Pending, SaveFigures
from .lineage import Lineage, read_lineage
from .state import Machine

if TYPE_CHECKING:
    from _typeshed import StrPath

__all__ = ["MachineSnapshots", "Node"]

_WAY_BACK = "pyvirtio: before loadvm"
"""Name of the disk snapshots that exist while several disks go back."""


class _Times(TypedDict):
    vm_clock: int
    icount: int | None
    date: float


@dataclass(frozen=True, slots=True)
class Node:
    """A snapshot in the tree."""

    snapshot: Snapshot
    parent: Snapshot | None
    """The one it came from; its nearest ancestor still there, where that was deleted."""


class MachineSnapshots:
    """The snapshots of ``machine`` with its ``disks``: all that the guest can write, in any order
    that stays. The state goes on the first one, or on ``state_disk``, which may be an image for
    nothing else (with clusters of 4 KiB, a page each, best).

    A snapshot shares with the last one that was saved or loaded what has not changed since. How
    that is known: for each RAM that ``dirty`` names, by its tracker (a :class:`DirtyPages` that the
    emulator keeps); for others by comparing with a copy, or (``find_dirty``) with hashes. Who
    changes RAM behind a tracker's back says so with :meth:`forget`. ``compress``: pages are
    compressed, by the state disk's method (create it with ``compression_type="zstd"``).

    The machine must stand still in all that follows, with no request to a disk under way.
    """

    def __init__(
        self,
        machine: Machine,
        disks: Sequence[Qcow2Disk],
        *,
        state_disk: Qcow2Disk | None = None,
        dirty: Mapping[str, Tracker] | None = None,
        find_dirty: Literal["compare", "hash"] = "compare",
        compress: bool = False,
    ) -> None:
        for disk in disks:
            if not isinstance(disk, Qcow2Disk):
                raise UnsupportedError(
                    f"A {disk.format_name} disk does not support snapshots", feature="snapshots"
                )
        if not disks or len({id(disk) for disk in disks}) < len(disks):
            raise ValueError("a machine has disks, and each of them once")
        self._machine = machine
        self.disks = list(disks)
        """In the order in which they were given."""
        self._state_disk = disks[0] if state_disk is None else state_disk
        self._others = [disk for disk in disks if disk is not self._state_disk]
        if len(self._others) == len(disks):
            raise ValueError("the state goes on one of the disks")
        trackers: dict[str, Tracker] = {
            name: ByHash() if find_dirty == "hash" else ByComparison()
            for name in machine.ram_views()
        }
        for ram, tracker in (dirty or {}).items():
            if f"ram/{ram}" not in trackers:
                raise ValueError(f"the machine has no RAM {ram!r}")
            trackers[f"ram/{ram}"] = tracker
        self._increments = Increments(machine, self._state_disk, trackers, compress)
        self._lineages: dict[tuple[str, int, int, int], Lineage | None] = {}
        self.last_save: SaveFigures | None = None
        """What the last :meth:`savevm` did."""

    # -- looking -------------------------------------------------------------------------------

    def listvm(self) -> list[Snapshot]:
        """The snapshots that can be loaded, as the disk with the state has them."""
        return [
            snapshot
            for snapshot in self._state_disk.snapshots
            if snapshot.vm_state_size
            and all(_find(disk, snapshot.name) is not None for disk in self._others)
        ]

    def tree(self) -> list[Node]:
        """Those of :meth:`listvm`, and which one each came from.

        One that was saved after the machine had been set up anew, or by another program, has none.
        """
        listed = self.listvm()
        lineages = {id(snapshot): self._lineage(snapshot) for snapshot in listed}
        by_uuid = {
            lineage.uuid: snapshot
            for snapshot in listed
            if (lineage := lineages[id(snapshot)]) is not None
        }
        nodes = []
        for snapshot in listed:
            lineage = lineages[id(snapshot)]
            ancestors = () if lineage is None else lineage.ancestors
            there = (by_uuid[uuid] for uuid in ancestors if uuid in by_uuid)
            nodes.append(Node(snapshot, next(there, None)))
        return nodes

    def _lineage(self, snapshot: Snapshot) -> Lineage | None:
        key = snapshot.id, snapshot.l1_table_offset, snapshot.date_sec, snapshot.date_nsec
        if key not in self._lineages:
            with self._state_disk.snapshots.open(snapshot) as view:
                try:
                    self._lineages[key] = read_lineage(view.vmstate)
                except ImageError:  # another program's
                    self._lineages[key] = None
        return self._lineages[key]

    def open(self, name_or_id: str) -> list[SnapshotDisk]:
        """The disks as a snapshot has them, read-only, beside those that go on running: in the
        order in which they were given. Close them when done: as long as they are open the snapshot
        cannot be deleted. Raises KeyError where a disk has no such snapshot.
        """
        name = self._state_disk.snapshots.find(name_or_id).name
        views: list[SnapshotDisk] = []
        with ExitStack() as stack:
            for disk in self.disks:
                views.append(disk.snapshots.open(disk.snapshots.find_by(name=name)))
                stack.callback(views[-1].close)
            stack.pop_all()
        return views

    def fork(self, name_or_id: str, machine: Machine, paths: Sequence[StrPath]) -> MachineSnapshots:
        """A clone of the machine as a snapshot has it, beside the one that goes on running.

        Its disks are new overlays at ``paths``, in the order in which the disks were given; they
        share everything with the snapshot. ``machine`` has the same parts as this one, of its own,
        and becomes what was saved. Returns the clone's snapshots, whose :attr:`disks` are open and
        the caller's to close. Raises what :meth:`open` and :meth:`Machine.prepare` raise.
        """
        found = self._state_disk.snapshots.find(name_or_id)
        if len(paths) != len(self.disks):
            raise ValueError(f"{len(self.disks)} disks, and {len(paths)} paths")
        disks: list[Qcow2Disk] = []
        with ExitStack() as stack:
            for disk, path in zip(self.disks, paths, strict=True):
                snapshot = found
                if disk is not self._state_disk:
                    snapshot = disk.snapshots.find_by(name=found.name)
                disks.append(fork_disk(disk, snapshot, path))
                stack.callback(disks[-1].close)
            with self._state_disk.snapshots.open(found) as view:
                machine.load(view.vmstate)
            state_disk = disks[[disk is self._state_disk for disk in self.disks].index(True)]
            clone = MachineSnapshots(machine, disks, state_disk=state_disk)
            stack.pop_all()
        return clone

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
            disk.drain()
            if _find(disk, name) is not None:
                raise ValueError(f"Snapshot '{name}' already exists in one or more devices")
        if date is None:
            date = time.time()
        times: _Times = {"vm_clock": vm_clock, "icount": icount, "date": date}
        pending = None
        try:
            pending = self._increments.write()
            for disk in self._others:
                disk.snapshots.create(name, **times)
            try:
                snapshot = self._keep(name, pending, times)
            except ImageError as error:
                if error.field != "refcount" or pending.figures.whole:
                    raise
                # Something cannot be shared once more.
                pending.draft.close()
                pending = self._increments.write(share=False)
                snapshot = self._keep(name, pending, times)
        except BaseException as error:
            if pending is not None:
                with _undoing(error):
                    pending.draft.close()
            for disk in self._disks():
                with _undoing(error):
                    _delete(disk, name)
            raise
        self._increments.adopt(snapshot, pending)
        self.last_save = pending.figures
        return snapshot

    def _keep(self, name: str, pending: Pending, times: _Times) -> Snapshot:
        return self._state_disk.snapshots.create(
            name, vm_state_size=pending.size, draft=pending.draft, **times
        )

    def forget(self) -> None:
        """RAM was changed in a way that its tracker does not know: save all of it next."""
        self._increments.forget()

    def loadvm(self, name_or_id: str) -> Snapshot:
        """Make the machine and its disks what they were; the id is the state disk's.

        The whole stream is read, checked, and taken by the components before anything changes;
        if a disk fails then, the others are what they were. Only an interrupt in the last step
        (KeyboardInterrupt), or RAM of more than 256 MiB that cannot be read a second time, leave
        the machine in pieces: its disks are those of the snapshot then, and it can be loaded again.
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
            self._increments.forget()
            load()
            self._increments.loaded(snapshot, view.vmstate)
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
    with suppress(KeyError):
        return disk.snapshots.find_by(name=name)
    return None


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
            disk.snapshots.apply(snapshot, vm_state=False)
        last_disk.snapshots.apply(last_snapshot, vm_state=False)
    except BaseException as error:
        for disk, way_back in applied:
            with _undoing(error):
                disk.snapshots.apply(way_back, vm_state=False)
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
