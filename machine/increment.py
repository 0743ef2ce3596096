"""A machine's state on its way into a snapshot of an image: the pages that changed, and the stream.

The stream goes to the start of the VM state, with room to grow; each RAM has its fixed place behind
it (:mod:`.placed`). Where the last snapshot that was saved or loaded is still there, and has the
same shape, only what changed since is written, and the rest shared with it; else everything is.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

from ..errors import ImageError, UnsupportedError
from ..qcow2.aside import Draft
from ..qcow2.driver import Qcow2Disk
from ..qcow2.snapshots import Snapshot
from .dirty import PAGE, Tracker, pages_of
from .lineage import LINEAGE, LINEAGE_VERSION, Lineage, parse_lineage, read_lineage
from .placed import PLACED_VERSION, Placed, payload_length, read_placed
from .state import Machine
from .stream import Source, StreamReader, StreamWriter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Increments", "Pending", "SaveFigures"]

_LEAST_RESERVE = 1 << 16
"""Bytes for the stream, at least."""
_ONES = b"\0" + b"\1" * 255


@dataclass(slots=True)
class SaveFigures:
    """What a save did. Seconds and bytes."""

    whole: bool
    """Nothing was shared with another snapshot."""
    pages: int = 0
    """Pages of RAM that changed."""
    finding: float = 0.0
    """Seconds to find them, and to compute their checksums."""
    writing: float = 0.0
    """Seconds to write them and the stream."""
    ram_bytes: int = 0
    """Written of RAM, in whole clusters."""
    stream_bytes: int = 0
    """Written of the stream, in whole clusters."""


@dataclass(slots=True)
class Kept:
    """A state that is in the image: that of a snapshot, or of one to be."""

    lineage: Lineage
    reserve: int
    """Bytes before the first RAM: what the stream may grow to."""
    stream_length: int
    placed: dict[str, Placed]
    snapshot: Snapshot | None = None


@dataclass(slots=True)
class Pending:
    """A state that has been written to a draft."""

    draft: Draft
    kept: Kept
    changed: dict[str, bytes]
    """Of each RAM the pages that are new in it."""
    size: int
    """Bytes of VM state."""
    figures: SaveFigures


class Increments:
    """Saves ``machine`` to ``disk``, again and again."""

    def __init__(
        self, machine: Machine, disk: Qcow2Disk, trackers: Mapping[str, Tracker], compress: bool
    ) -> None:
        self._machine = machine
        self._disk = disk
        self._trackers = trackers
        """By section."""
        self._compress = compress
        self._base: Kept | None = None
        """The state that was saved or loaded last."""
        self._trusted = False
        """The trackers know what is different from it."""

    # -- saving --------------------------------------------------------------------------------

    def write(self, *, share: bool = True) -> Pending:
        """Write what changed (or all, if nothing is to be shared) to a draft, the caller's then.

        Its machine must stand still until :meth:`adopt`.
        """
        base, draft = self._begin(share)
        try:
            pending = self._write(base, draft)
            if pending is None:  # the stream has no room any more
                draft.close()
                draft = self._disk.snapshots.draft()
                pending = self._write(None, draft)
            if pending is None:
                raise ValueError("the state of a component grows while it is saved")
        except BaseException:
            draft.close()
            raise
        return pending

    def adopt(self, snapshot: Snapshot, pending: Pending) -> None:
        """The draft became this snapshot: the next one is based on it."""
        self._trusted = False
        self._base = replace(pending.kept, snapshot=snapshot)
        for name, ram in self._machine.ram_views().items():
            self._trackers[name].settle(ram, pending.changed[name])
        self._trusted = True

    def _begin(self, share: bool) -> tuple[Kept | None, Draft]:
        """The state to share with, if there is one, and a draft that begins with it."""
        base, snapshots = self._base, self._disk.snapshots
        if base is not None and self._trusted and share:
            base.snapshot = self._find(base)
            sizes = {name: len(ram) for name, ram in self._machine.ram_views().items()}
            same = sizes == {name: placed.size for name, placed in base.placed.items()}
            if base.snapshot is not None and same:
                try:
                    return base, snapshots.draft(base.snapshot)
                except UnsupportedError:
                    pass  # the disk has another size now
        return None, snapshots.draft()

    def _find(self, base: Kept) -> Snapshot | None:
        """The snapshot of ``base``, if it is still there."""
        if base.snapshot is None:
            return None
        if base.snapshot in self._disk.snapshots:
            return base.snapshot
        # It may have another name, or the image may have been read anew: its UUID is the same.
        for other in self._disk.snapshots:
            if other.l1_table_offset == base.snapshot.l1_table_offset and other.vm_state_size:
                with suppress(ImageError), self._disk.snapshots.open(other) as view:
                    lineage = read_lineage(view.vmstate)
                    if lineage is not None and lineage.uuid == base.lineage.uuid:
                        return other
        return None

    def _write(self, base: Kept | None, draft: Draft) -> Pending | None:
        """None if the stream is longer than what is reserved for it."""
        views = self._machine.ram_views()
        start = perf_counter()
        changed: dict[str, bytes] = {}
        for name, ram in views.items():
            found = self._trackers[name].changed(ram)
            changed[name] = bytes(found).translate(_ONES)
            if base is None:
                changed[name] = b"\1" * len(found)
        kept = self._shape(base, views, draft.cluster_size)
        unit = max(PAGE, draft.cluster_size)
        plans = {
            name: _plan(ram, changed[name], kept.placed[name].checksums, unit)
            for name, ram in views.items()
        }
        stream = self._stream(kept)
        if len(stream) > kept.reserve:
            return None
        middle = perf_counter()
        figures = SaveFigures(base is None, sum(pages.count(1) for pages in changed.values()))
        for name, (data, zeroes) in plans.items():
            position = kept.placed[name].position
            pieces = ((position + at, views[name][at:end]) for at, end in data)
            if self._compress:
                draft.write_compressed(pieces)
            else:
                draft.write(pieces)
            draft.write_zeroes(_clusters(zeroes, position, draft.cluster_size))
        figures.ram_bytes = draft.data_written
        draft.write([(0, memoryview(stream))])
        end = -(-len(stream) // draft.cluster_size) * draft.cluster_size
        stop = kept.reserve if base is None else base.stream_length
        draft.write_zeroes(range(end, stop, draft.cluster_size))
        figures.stream_bytes = draft.data_written - figures.ram_bytes
        figures.finding, figures.writing = middle - start, perf_counter() - middle
        kept.stream_length = len(stream)
        size = max([p.position + p.size for p in kept.placed.values()], default=len(stream))
        return Pending(draft, kept, changed, size, figures)

    def _shape(self, base: Kept | None, views: Mapping[str, memoryview], cluster: int) -> Kept:
        """The new state as the base is, or laid out anew."""
        if base is not None:
            placed = {
                name: replace(old, checksums=old.checksums[:]) for name, old in base.placed.items()
            }
            return Kept(base.lineage.child(), base.reserve, 0, placed)
        lineage = Lineage.root() if self._base is None else self._base.lineage.child()
        length = len(self._stream(Kept(lineage, 0, 0, {})))
        length += sum(payload_length(len(ram)) + 300 for ram in views.values())
        reserve = -(-max(2 * length, _LEAST_RESERVE) // cluster) * cluster
        placed, position = {}, reserve
        for name, ram in views.items():
            placed[name] = Placed(len(ram), position, array("I", [0]) * pages_of(len(ram)))
            position += -(-len(ram) // cluster) * cluster
        return Kept(lineage, reserve, 0, placed)

    def _stream(self, kept: Kept) -> bytearray:
        target = _Memory()
        writer = StreamWriter(target)
        lineage = kept.lineage.pack()
        writer.section(LINEAGE, LINEAGE_VERSION, len(lineage), [lineage])
        self._machine.save_components(writer)
        for name, placed in kept.placed.items():
            payload = placed.pack()
            writer.section(name, PLACED_VERSION, len(payload), [payload])
        writer.finish()
        return target.data

    # -- loading -------------------------------------------------------------------------------

    def loaded(self, snapshot: Snapshot, source: Source) -> None:
        """The machine is what was saved in ``snapshot``: the next one is based on it."""
        self._base, self._trusted = None, False
        views = self._machine.ram_views()
        reader = StreamReader(source, self._machine.known_sections())
        if LINEAGE in reader.sections and all(
            reader.sections[name].version == PLACED_VERSION for name in views
        ):
            lineage = parse_lineage(reader.read(LINEAGE))
            placed = {name: read_placed(reader, name, len(ram)) for name, ram in views.items()}
            if _makes_sense(placed.values(), reader.length, self._disk.cluster_size):
                reserve = min((p.position for p in placed.values()), default=0)
                self._base = Kept(lineage, reserve, reader.length, placed, snapshot)
        for name, ram in views.items():
            self._trackers[name].settle(ram, None)
        self._trusted = True

    def forget(self) -> None:
        """RAM may be anything: the next save is a whole one."""
        self._trusted = False


class _Memory:
    """A stream's target."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writev(self, position: int, buffers: Iterable[ReadableBuffer]) -> None:
        for buffer in buffers:
            self.data += buffer


def _makes_sense(placed: Iterable[Placed], length: int, cluster: int) -> bool:
    """True if the places begin with clusters, and none lies in another or in the stream."""
    end = length
    for ram in sorted(placed, key=lambda ram: ram.position):
        if ram.position % cluster or ram.position < end:
            return False
        end = ram.position + ram.size
    return True


def _plan(
    ram: memoryview, changed: bytes, checksums: array[int], unit: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What is to be written: runs (start, end) with data, and runs of zeroes, in whole units.

    The checksums of the pages that changed are put right.
    """
    data: list[tuple[int, int]] = []
    zeroes: list[tuple[int, int]] = []
    nothing, crc32 = bytes(unit), zlib.crc32
    for number in _units(changed, unit // PAGE):
        start = number * unit
        contents = ram[start : start + unit].tobytes()
        end = start + len(contents)
        for at in range(0, len(contents), PAGE):
            checksums[(start + at) // PAGE] = crc32(contents[at : at + PAGE])
        runs = zeroes if nothing.startswith(contents) else data
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return data, zeroes


def _units(changed: bytes, pages: int) -> Iterator[int]:
    """Numbers of the units of so many pages in which one changed."""
    page = -1
    while (page := changed.find(1, page + 1)) >= 0:
        yield page // pages
        page = page // pages * pages + pages - 1


def _clusters(runs: Iterable[tuple[int, int]], position: int, size: int) -> Iterator[int]:
    for start, end in runs:
        yield from range(position + start, position + end, size)
