"""VM state: bytes kept past the end of the disk, until a snapshot takes them.

They lie at guest offsets from the first L1 entry that the disk does not use (spec, "Snapshots"),
and so never show as disk contents. The image does not store how long they are: a snapshot does, and
takes them out of the active tables; resizing the disk drops them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from threading import Lock
from typing import TYPE_CHECKING

from ..backend.buffers import as_views, clear, split
from . import layout, zeroing
from .layout import ClusterKind
from .metadata import Metadata
from .past_end import drop_tables
from .quarantine import DiscardKind
from .reading import Reader
from .resize import grow_l1
from .runs import own_runs
from .writing import Writer

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["VmState", "VmStateStream"]

_MAX_POSITION = layout.INT64_MAX
_ZERO_CHUNK = 1 << 21
_BRIDGED = 1 << 15
"""Bytes between two pieces of the file that are read, too, where that saves a system call."""
_MAX_ROW = 1000
"""Buffers that one read fills; systems take 1,024."""


class VmState:
    """Random access to the VM state of an image, or of a snapshot. Positions are bytes."""

    def __init__(self, metadata: Metadata, reader: Reader, writer: Writer | None) -> None:
        self._metadata = metadata
        self._reader = reader
        self._writer = writer
        self._writing = Lock()

    @property
    def offset(self) -> int:
        """Guest byte at which the VM state begins."""
        geometry = self._metadata.geometry
        return geometry.l1_entries(self._metadata.header.size) * geometry.l2_coverage

    @property
    def size(self) -> int:
        """Bytes: up to the last one written, or as the snapshot that was applied has it.

        Of an image just opened, up to the end of the last cluster that is there.
        """
        metadata = self._metadata
        if metadata.vm_state_end is None:
            metadata.vm_state_end = self._allocated_end()
        return metadata.vm_state_end

    def _allocated_end(self) -> int:
        metadata, start = self._metadata, self.offset
        first = start // metadata.geometry.l2_coverage
        l1 = metadata.tables.l1
        for index in range(len(l1) - 1, first - 1, -1):
            if l1[index]:
                break
        else:
            return 0
        position, end, last = 0, (index + 1 - first) * metadata.geometry.l2_coverage, 0
        while position < end:
            kind, _, run = self._reader.map_own_run(start + position, end - position)
            position += run
            if kind is not ClusterKind.UNALLOCATED:
                last = position
        return last

    # -- reading and writing -------------------------------------------------------------------

    def readv(self, position: int, buffers: Iterable[WriteableBuffer]) -> None:
        """Read from byte ``position`` on into ``buffers``; zeroes where nothing was written."""
        views, length = as_views(buffers)
        _check(position, length)
        self._metadata.file.debug_event("vmstate_load")
        offset = self.offset + position
        plain = self._reader.encryption is None and not self._metadata.geometry.extended_l2
        if self._writer is None and plain and length > self._metadata.cluster_size:
            self._read_in_order(offset, views, length)
            return
        while length:
            run = self._reader.read_own_run(offset, views, length)
            views = split(views, run, length - run)
            offset += run
            length -= run

    def _read_in_order(self, offset: int, views: list[memoryview], length: int) -> None:
        """Read in the order of the file. The clusters of a snapshot are where those were that it
        shares with, so hardly any follows the one before; but each of the others wrote a row, in
        which there are gaps where a later one has written something else.

        Of a snapshot's view: nothing that is mapped there moves.
        """
        stored: list[tuple[int, int, int]] = []
        for kind, host, start, size in own_runs(self._metadata, offset, offset + length):
            if kind is ClusterKind.NORMAL:
                stored.append((host, start - offset, size))
            elif kind is ClusterKind.COMPRESSED:
                self._reader.read_own_run(start, split(views, start - offset, size), size)
            else:
                clear(split(views, start - offset, size))
        stored.sort()
        row: list[memoryview] = []
        row_start = row_end = 0
        nobodys = memoryview(bytearray(_BRIDGED))
        whole = views[0] if len(views) == 1 else None
        for host, at, size in stored:
            gap = host - row_end
            if not 0 <= gap <= _BRIDGED or len(row) > _MAX_ROW:
                if row:
                    self._metadata.data.readv(row_start, row)
                row, row_start = [], host
            elif gap:
                row.append(nobodys[:gap])
            if whole is not None:
                row.append(whole[at : at + size])
            else:
                row += split(views, at, size)
            row_end = host + size
        if row:
            self._metadata.data.readv(row_start, row)

    def read(self, position: int, length: int) -> bytes:
        """``length`` bytes from byte ``position`` on."""
        _check(position, length)
        data = bytearray(length)
        self.readv(position, [data])
        return bytes(data)

    def writev(self, position: int, buffers: Iterable[ReadableBuffer]) -> None:
        """Write ``buffers`` to byte ``position`` on.

        Raises BackendError: EPERM if the image is read-only, EFBIG past what an L1 table can map.
        """
        views, length = as_views(buffers)
        _check(position, length)
        self._metadata.check_writable()
        if self._writer is None or not length:
            return
        self._metadata.file.debug_event("vmstate_save")
        with self._writing:
            known = self.size
            self._make_room(position + length)
            if position > known:
                self._close_gap(known, position)
            start, views, padded = self._padded(self.offset + position, views, length)
            self._writer.write(start, views, padded)
            self._metadata.vm_state_end = max(known, position + length)

    def write(self, position: int, data: ReadableBuffer) -> None:
        """Write one buffer; see :meth:`writev`."""
        self.writev(position, [data])

    def discard(self) -> None:
        """Forget the VM state."""
        metadata = self._metadata
        metadata.check_writable()
        with self._writing, metadata.exclusive():
            first = metadata.geometry.l1_entries(metadata.header.size)
            drop_tables(metadata, first, DiscardKind.OTHER)
            metadata.vm_state_end = 0

    def _make_room(self, end: int) -> None:
        """Have L1 entries for ``end`` bytes of VM state, and some more for what will follow."""
        metadata = self._metadata
        needed = metadata.geometry.l1_entries(self.offset + end)
        if needed > metadata.header.l1_size:
            most = layout.MAX_L1_SIZE // 8
            with metadata.exclusive():
                grow_l1(metadata, max(needed, min(metadata.header.l1_size * 3 // 2, most)))

    def _close_gap(self, start: int, end: int) -> None:
        """Zeroes where nothing is written: QEMU would read a backing file that is so long."""
        metadata, size = self._metadata, self._metadata.cluster_size
        first, last = -(-start // size) * size, end // size * size
        if not metadata.header.backing_file or first >= last:
            return
        if metadata.geometry.version >= 3:
            zeroing.write_zeroes(
                metadata, self.offset + first, last - first, unmap=False, backed=True
            )
            return
        while first < last and self._writer is not None:
            zeroes = memoryview(bytes(min(last - first, _ZERO_CHUNK)))
            self._writer.write(self.offset + first, [zeroes], len(zeroes))
            first += len(zeroes)

    def _padded(
        self, offset: int, views: list[memoryview], length: int
    ) -> tuple[int, list[memoryview], int]:
        """The request made longer, so that no cluster is taken in part: a copy of the rest would
        come from the backing file."""
        size = self._metadata.cluster_size
        end = offset + length
        head, tail = offset % size, -end % size
        if head and self._has_hole(offset - head):
            views = [memoryview(bytearray(head)), *views]
            self._fill(offset - head, views[0])
            offset -= head
        if tail and self._has_hole(end - size + tail):
            views = [*views, memoryview(bytearray(tail))]
            self._fill(end, views[-1])
            end += tail
        return offset, views, end - offset

    def _fill(self, offset: int, view: memoryview) -> None:
        self.readv(offset - self.offset, [view])

    def _has_hole(self, offset: int) -> bool:
        """True if a part of the cluster at ``offset`` is unallocated."""
        end = offset + self._metadata.cluster_size
        while offset < end:
            kind, _, run = self._reader.map_own_run(offset, end - offset)
            if kind is ClusterKind.UNALLOCATED:
                return True
            offset += run
        return False

    # -- streams -------------------------------------------------------------------------------

    def reader(self) -> VmStateStream:
        """A stream that reads from byte 0 to :attr:`size`."""
        return VmStateStream(self, writable=False)

    def writer(self) -> VmStateStream:
        """A stream that writes from byte 0 on."""
        return VmStateStream(self, writable=True)


class VmStateStream(io.RawIOBase):
    """The VM state as a file object. Wrap it in io.BufferedReader or BufferedWriter where many
    small pieces are read or written."""

    def __init__(self, state: VmState, *, writable: bool) -> None:
        self._state = state
        self._writable = writable
        self._position = 0

    def readable(self) -> bool:
        return not self._writable

    def writable(self) -> bool:
        return self._writable

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise ValueError(f"invalid whence ({whence})")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._state.size}
        _check(base[whence] + offset, 0)
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._writable:
            raise io.UnsupportedOperation("not readable")
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._state.size - self._position))
        self._state.readv(self._position, [view[:count]])
        self._position += count
        return count

    def write(self, data: ReadableBuffer) -> int:
        if not self._writable:
            raise io.UnsupportedOperation("not writable")
        view = memoryview(data).cast("B")
        self._state.writev(self._position, [view])
        self._position += len(view)
        return len(view)


def _check(position: int, length: int) -> None:
    if position < 0 or length < 0 or position + length > _MAX_POSITION:
        raise ValueError(f"{length} bytes at {position} are no part of a VM state")
