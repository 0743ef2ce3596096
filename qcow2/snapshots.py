"""Internal snapshots: create, apply, delete, list.

Every change is made beside what is there and switched to by one write into the header's first
sector, so a cut leaves the state before or the state after, and leaks at worst. The order:

create  COPIED flags off and stable | refcounts up, L1 copy and table, stable | header
apply   COPIED flags of the snapshot off and stable | its refcounts up, its L1 copied, stable
        | header (size and L1) | refcounts of what was active down
delete  table without it stable | header | its refcounts down and stable | COPIED flags on
"""

from __future__ import annotations

import errno
import operator
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from weakref import WeakSet

from ..errors import BackendError, ImageError, UnsupportedError
from . import layout
from .aside import Base, Draft, locked
from .data_file import refuse_with_data_file
from .header import read_header
from .known_references import KnownReferences
from .metadata import Metadata
from .overlap import Section
from .past_end import drop_tables
from .quarantine import DiscardKind
from .reading import Reader
from .reference_vector import VectorTooLong
from .sharing import (
    lower_references,
    raise_references,
    strip_copied,
    strip_tables,
    update_copied,
)
from .snapshot_list import SnapshotList
from .snapshot_table import Snapshot, check_l1, read_snapshots
from .snapshot_view import SnapshotDisk
from .table_io import load_table, pack_table

__all__ = ["Snapshot", "Snapshots"]


class Snapshots:
    """The internal snapshots of one image, in the order of its table. Iterable, with a length."""

    def __init__(
        self,
        metadata: Metadata,
        resized: Callable[[int], None],
        make_reader: Callable[[Metadata], Reader],
        has_bitmaps: Callable[[], object] = lambda: False,
    ) -> None:
        self._metadata = metadata
        self._has_bitmaps = has_bitmaps
        """Whether there are dirty bitmaps, which would not know what applying changes."""
        self._resized = resized
        self._make_reader = make_reader
        self._views = WeakSet[SnapshotDisk]()
        """Those open. One that nobody has any more (an interrupt came before it could be closed) is
        in nobody's way."""
        self._list = SnapshotList()
        self._drafts: list[Draft] = []
        self._base: Base | None = None
        """The snapshot made last, if made of a draft: the next is likely based on it."""
        self._active = KnownReferences(metadata)
        metadata.overlap.snapshots = lambda: (self._list, self._list.length)

    def load(self) -> None:
        """Read the table that the header names."""
        self._list = SnapshotList(*read_snapshots(self._metadata.file, self._metadata.header))
        self._metadata.overlap.forget()

    def rewrite(self, snapshots: list[Snapshot], old_length: int) -> None:
        """Write a table with these snapshots in place of the one there, of ``old_length`` bytes (in
        an exclusive operation)."""
        self._list.length = old_length
        self._replace_list(SnapshotList(snapshots))
        self._metadata.settle()

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._list)

    def __len__(self) -> int:
        return len(self._list)

    def __contains__(self, snapshot: object) -> bool:
        """Whether it is one of them; what merely equals one is none."""
        return isinstance(snapshot, Snapshot) and snapshot in self._list

    def find(self, id_or_name: str) -> Snapshot:
        """The snapshot with that id, else the first with that name. Raises KeyError.

        So QEMU finds the one to apply; the one that ``qemu-img snapshot -d`` deletes it finds by
        name alone (:meth:`find_by`).
        """
        return self._list.with_id(id_or_name) or self.find_by(name=id_or_name)

    def find_by(self, *, id: str | None = None, name: str | None = None) -> Snapshot:
        """The first snapshot with that id, that name, or both. Raises KeyError."""
        if id is None:
            if name is None:
                raise ValueError("a snapshot is found by its id or its name")
            found = self._list.named(name)
        elif name is None:
            found = self._list.with_id(id)
        else:
            found = next((s for s in self._list if (s.id, s.name) == (id, name)), None)
        if found is not None:
            return found
        wanted = name if id is None else id if name is None else f"{id} ({name})"
        raise KeyError(f"snapshot {wanted!r} does not exist")

    def open(
        self, snapshot: str | Snapshot, *, closed: Callable[[], object] = lambda: None
    ) -> SnapshotDisk:
        """A read-only view of a snapshot, as a disk of its own beside this one.

        As long as it is open the snapshot cannot be deleted; closing the image closes it.
        ``closed()`` is called when it has been closed.
        """

        def release(view: SnapshotDisk) -> None:
            self._views.discard(view)
            closed()

        alone = nullcontext() if self._metadata.read_only else self._metadata.gate.exclusive()
        with alone:  # nobody may free the tables while they are looked at
            found = self._resolve(snapshot)
            view = SnapshotDisk(self._metadata, found, self._make_reader, release)
            self._views.add(view)
        return view

    def close_views(self) -> None:
        """Close every view that is open."""
        for view in list(self._views):
            view.close()

    @property
    def drafting(self) -> bool:
        """True if a draft is open, or VM state is kept to be based on."""
        return self._base is not None or any(not draft.closed for draft in self._drafts)

    def give_up_drafts(self) -> None:
        """Close every draft that became no snapshot."""
        for draft in self._drafts:
            draft.close()

    def refuse_views(self, snapshot: Snapshot | None = None) -> None:
        """Raise BackendError (EBUSY) if a view of this snapshot, or of any, is open.

        Drafts that are based on it are given up.
        """
        for view in list(self._views):
            if snapshot is None or _is_same(view.snapshot, snapshot):
                raise BackendError(
                    errno.EBUSY, f"a view of the snapshot {view.snapshot.name!r} is open"
                )
        for draft in self._drafts:
            base = draft.base
            if base is not None and (snapshot is None or _is_same(base, snapshot)):
                draft.close()

    def reload(self) -> Callable[[], None]:
        """Read the table again, as the header of the file names it; returns how to adopt it."""
        header = read_header(self._metadata.file)
        found = SnapshotList(*read_snapshots(self._metadata.file, header))

        def adopt() -> None:
            self._list = found

        return adopt

    def write_table(self) -> None:
        """Write the snapshot table anew, with all its extra data (in an exclusive operation)."""
        self._replace_list(SnapshotList(self._list))

    def rename(self, snapshot: str | Snapshot, name: str) -> None:
        """Give a snapshot another name.

        Raises BackendError (EBUSY) while a view of it is open; drafts based on it are given up.
        """
        self._check_writable(
            f"Could not rename snapshot '{snapshot}': -95 (Operation not supported)"
        )
        _check_name(name)
        with self._metadata.exclusive():
            found = self._resolve(snapshot)
            self.refuse_views(found)
            renamed = replace(found, name=name)
            changed = [renamed if other is found else other for other in self._list]
            self._replace_list(SnapshotList(changed))

    def _resolve(self, snapshot: str | Snapshot) -> Snapshot:
        if isinstance(snapshot, str):
            return self.find(snapshot)
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"a snapshot is named by a string, not {snapshot!r}")
        if snapshot in self._list:
            return snapshot
        raise KeyError(f"snapshot {snapshot.name!r} does not exist")

    def create(
        self,
        name: str,
        *,
        vm_clock: int = 0,
        vm_state_size: int = 0,
        icount: int | None = None,
        date: float | None = None,
        draft: Draft | None = None,
    ) -> Snapshot:
        """Keep the disk as it is now under ``name`` and a new id.

        ``vm_clock`` is the guest's run time in nanoseconds, ``date`` seconds since the epoch (now,
        if None). With ``vm_state_size`` (bytes) the snapshot takes the VM state that was written,
        and the image has none any more; with ``draft``, too, that is its VM state instead. Raises
        ImageError where a limit of the format is reached; nothing is lost then.
        """
        self._check_writable(f"Could not create snapshot '{name}': -95 (Operation not supported)")
        metadata = self._metadata
        nanoseconds = time.time_ns() if date is None else int(date * 1.0 * 1_000_000_000)
        _check_name(name)
        for what, number in (
            ("vm_clock", vm_clock),
            ("vm_state_size", vm_state_size),
            ("icount", icount or 0),
        ):
            if not 0 <= operator.index(number) < 1 << 64:
                raise ValueError(f"the {what} of a snapshot cannot be {number}")
        kept = None
        with metadata.exclusive(settled=False, told=True), ExitStack() as undo:
            snapshot = Snapshot(
                id=self._list.new_id(),
                name=name,
                l1_table_offset=0,
                l1_size=0,
                disk_size=metadata.header.size,
                vm_state_size=vm_state_size,
                date_sec=nanoseconds // 1_000_000_000 & 0xFFFF_FFFF,
                date_nsec=nanoseconds % 1_000_000_000,
                vm_clock_nsec=vm_clock,
                icount=icount,
            )
            self._list.added(snapshot).packed()
            used = metadata.geometry.l1_entries(metadata.header.size)
            with metadata.lock:
                stripped = strip_copied(metadata)
                metadata.write_l1_flags()
            if stripped:
                metadata.file.flush()
            undo.callback(self._restore_copied)
            with metadata.lock:
                l1 = metadata.tables.l1 if draft is None else metadata.tables.l1[:used]
                undo.callback(locked(metadata, self._raise(l1, self._active)))
                if draft is not None:
                    l1 = l1 + array("Q", bytes(8 * (used - len(l1)))) + draft.finish(undo)
                snapshot.l1_size = len(l1)
                snapshot.l1_table_offset = self._write_table(pack_table(l1), undo)
            self._replace_list(self._list.added(snapshot), undo)
            place = snapshot.l1_table_offset, 8 * snapshot.l1_size
            metadata.overlap.put(Section.INACTIVE_L1, *place)
            if draft is not None:
                kept = draft.kept(snapshot)
            if vm_state_size:
                # The snapshot has it now. As in QEMU, a failure leaves it here as well.
                with suppress(BackendError):
                    drop_tables(metadata, used, DiscardKind.NEVER)
                    metadata.vm_state_end = 0
            self._base = kept
        return snapshot

    def draft(self, base: Snapshot | None = None) -> Draft:
        """Begin VM state aside: what ``base`` has, or nothing. See :meth:`create`.

        Raises UnsupportedError if what ``base`` has cannot be shared: its disk had another size, or
        it is spread too far over the file.
        """
        self._check_writable("Could not begin a snapshot: -95 (Operation not supported)")
        metadata = self._metadata
        with metadata.gate.exclusive():  # nobody deletes the base before the draft is known
            known = None if base is None else self._known_base(base)
            draft = Draft(metadata, known)
            self._drafts = [other for other in self._drafts if not other.closed]
            self._drafts.append(draft)
        return draft

    def _known_base(self, base: Snapshot) -> Base:
        """What is known of a snapshot that VM state is to be shared with (exclusively)."""
        metadata, geometry = self._metadata, self._metadata.geometry
        self._resolve(base)
        if geometry.l1_entries(base.disk_size) != geometry.l1_entries(metadata.header.size):
            raise UnsupportedError(
                "The VM state of a disk of another size cannot be shared",
                feature="shared VM state",
            )
        known = self._base
        if (
            known is None
            or known.snapshot is not base
            or known.references.refcounts is not metadata.refcounts  # counted for another layout
        ):
            l1 = self.l1_table(base)
            with metadata.lock:
                known = Base.read(metadata, base, l1[geometry.l1_entries(base.disk_size) :])
        return known

    def apply(self, snapshot: str | Snapshot, *, vm_state: bool = True) -> None:
        """Make the disk what it was when the snapshot was taken, its size included.

        ``vm_state``: the VM state is that of the snapshot, as in QEMU; else there is none. What the
        disk and the snapshot share is not looked at.
        """
        self._check_writable(
            f"Could not apply snapshot '{snapshot}': -95 (Operation not supported)"
        )
        metadata = self._metadata
        if self._has_bitmaps():
            raise UnsupportedError("Device has active dirty bitmaps", feature="bitmaps")
        with metadata.exclusive(settled=False, told=True):
            snapshot = self._resolve(snapshot)
            target = self.l1_table(snapshot)
            needed = metadata.geometry.l1_entries(snapshot.disk_size)
            if 8 * needed > layout.MAX_L1_SIZE:
                raise ImageError(
                    "Snapshot's disk size is too big",
                    field="snapshot disk_size",
                    value=snapshot.disk_size,
                )
            if not vm_state:
                del target[needed:]
            target.frombytes(bytes(8 * max(0, needed - len(target))))
            self._switch_to(target, snapshot.disk_size)
            metadata.vm_state_end = snapshot.vm_state_size if vm_state else 0
        self._resized(snapshot.disk_size // layout.SECTOR * layout.SECTOR)

    def _switch_to(self, target: array[int], size: int) -> None:
        """Make ``target``, the L1 table of a snapshot, the active one (exclusively)."""
        metadata, header = self._metadata, self._metadata.header
        active, longest = metadata.tables.l1, max(len(target), len(metadata.tables.l1))
        coming, going = array("Q", bytes(8 * longest)), array("Q", bytes(8 * longest))
        coming[: len(target)], going[: len(active)] = target, active
        for index, (new, old) in enumerate(zip(target, active, strict=False)):
            if new == old & layout.OFFSET_MASK:
                coming[index] = going[index] = 0
        if size == header.size and not any(coming) and not any(going):
            return
        with ExitStack() as undo:
            with metadata.lock:
                # Set when the snapshot was alone with them; from now on it shares them.
                stripped = strip_tables(metadata, coming)
            if stripped:
                metadata.file.flush()
            with metadata.lock:
                undo.callback(locked(metadata, self._raise(coming, KnownReferences(metadata))))
                offset = self._write_table(pack_table(target), undo)
            metadata.flush_alone()
            undo.pop_all()
        previous = header.l1_table_offset, header.l1_size
        with metadata.lock, metadata.health.step("Applying a snapshot"):
            failed = metadata.switch_l1(target, offset, size)
            if failed is not None:
                raise failed
            self._lower(going, *previous)

    def delete(self, snapshot: str | Snapshot) -> None:
        """Remove a snapshot and free what only it used.

        Raises BackendError (EBUSY) while a view of it is open.
        """
        self._check_writable(
            f"Could not delete snapshot '{snapshot}': -95 (Operation not supported)"
        )
        metadata = self._metadata
        with metadata.exclusive(told=True):
            snapshot = self._resolve(snapshot)  # nobody else has deleted it, or opens it now
            self.refuse_views(snapshot)
            l1 = self.l1_table(snapshot)
            self._replace_list(self._list.removed(snapshot))
            place = snapshot.l1_table_offset, 8 * snapshot.l1_size
            metadata.overlap.drop(Section.INACTIVE_L1, *place)
            with metadata.lock, metadata.health.step("Deleting a snapshot"):
                self._lower(l1, snapshot.l1_table_offset, snapshot.l1_size)
            metadata.settle()
            with metadata.lock:
                update_copied(metadata)

    # -- parts -----------------------------------------------------------------------------------

    def _check_writable(self, refusal: str) -> None:
        self._metadata.check_writable()
        refuse_with_data_file(self._metadata, refusal)

    def l1_table(self, snapshot: Snapshot) -> array[int]:
        """The L1 table of a snapshot, without the COPIED flags, which mean nothing there."""
        metadata = self._metadata
        check_l1(metadata.header, snapshot)
        l1 = load_table(metadata.file, snapshot.l1_table_offset, snapshot.l1_size)
        return array("Q", [entry & ~layout.COPIED for entry in l1])

    def _raise(self, l1: array[int], known: KnownReferences) -> Callable[[], None]:
        """One reference more to all that an L1 table reaches, or an error and nothing (lock held).

        Returns how to take them back.
        """
        metadata = self._metadata
        try:
            return known.count(l1).raise_refcounts()
        except VectorTooLong:
            raise_references(metadata, l1)
            return lambda: lower_references(metadata, l1, DiscardKind.NEVER)

    def _restore_copied(self) -> None:
        """A snapshot came to nothing: flags that were taken off for it are set again."""
        metadata = self._metadata
        with suppress(BackendError):
            metadata.settle()
            with metadata.lock:
                update_copied(metadata)

    def _write_table(self, contents: bytes, undo: ExitStack) -> int:
        """Write a table into new clusters; its host offset, 0 for an empty one (lock held)."""
        metadata = self._metadata
        if not contents:
            return 0
        count = metadata.geometry.clusters(len(contents))
        first = metadata.refcounts.allocate_contiguous(count)
        undo.callback(locked(metadata, lambda: metadata.lower(first, count, DiscardKind.OTHER)))
        offset = first << metadata.cluster_bits
        metadata.overlap.check(offset, count << metadata.cluster_bits)
        metadata.file.write(offset, contents.ljust(count << metadata.cluster_bits, b"\0"))
        return offset

    def _lower(self, l1: array[int], offset: int, size: int) -> None:
        """Take back the references of an L1 table and the table itself (lock held)."""
        metadata = self._metadata
        lower_references(metadata, l1, DiscardKind.SNAPSHOT)
        clusters = metadata.geometry.clusters(8 * size)
        if clusters:
            metadata.lower(offset >> metadata.cluster_bits, clusters, DiscardKind.SNAPSHOT)

    def _replace_list(self, snapshots: SnapshotList, undo: ExitStack | None = None) -> None:
        """Write a new snapshot table, switch to it, free the old one.

        ``undo`` is for what came before, and done with when the switch begins.
        """
        metadata = self._metadata
        table = snapshots.packed()
        with undo if undo is not None else ExitStack() as undo:
            with metadata.lock:
                offset = self._write_table(table, undo)
            metadata.flush_alone()
            undo.pop_all()
        header = metadata.header
        old_offset, old_length = header.snapshots_offset, self._list.length
        with metadata.lock, metadata.health.step("Switching the snapshot table"):
            metadata.file.write(
                layout.NB_SNAPSHOTS_OFFSET, layout.SNAPSHOT_FIELDS.pack(len(snapshots), offset)
            )
            metadata.file.flush()
            header.nb_snapshots, header.snapshots_offset = len(snapshots), offset
            self._list, snapshots.length = snapshots, len(table)
            metadata.overlap.drop(Section.SNAPSHOT_TABLE, old_offset, old_length)
            metadata.overlap.put(Section.SNAPSHOT_TABLE, offset, len(table))
            if metadata.overlap.sections & Section.INACTIVE_L2:
                metadata.overlap.forget()  # tables are not a deleted snapshot's any more
            clusters = metadata.geometry.clusters(old_length)
            if clusters:
                metadata.lower(old_offset >> metadata.cluster_bits, clusters, DiscardKind.SNAPSHOT)


def _is_same(one: Snapshot, other: Snapshot) -> bool:
    """True for two objects that stand for one entry of the table, however often it was read."""
    return one is other or (one.id, one.l1_table_offset) == (other.id, other.l1_table_offset)


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a snapshot's name is a string, not {name!r}")
    if "\0" in name:
        raise ValueError("the name of a snapshot cannot contain NUL")
    if len(name.encode(errors="surrogateescape")) > 0xFFFF:
        raise ValueError("the name of a snapshot may be 65535 bytes long")
