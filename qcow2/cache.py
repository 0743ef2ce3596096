"""The metadata cache: slices of L2 tables, or of refcount blocks, in one slab that never moves.

A slice is a fixed, naturally aligned part of a table (QEMU's ``l2-cache-entry-size``). It lives in
a slot of one anonymous mmap, exactly as it is in the file: big-endian. There is no Python object
for an entry. A slot with a pin keeps its slice until it is unpinned; each time a slot takes
another slice its generation changes. The caller holds the image's metadata lock throughout.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap

from ..backend.disk import Disk

__all__ = ["CacheFull", "TableCache"]


class CacheFull(Exception):
    """Every slot is pinned, or dirty and not to be written now: flush, then try again."""


class TableCache:
    """Slices of metadata tables by host offset.

    ``slot_size`` is the length of a slice in bytes, a power of two. With ``write_back`` a dirty
    slot may be written whenever its place is needed; without, only by :meth:`take_dirty`, and
    a cache full of dirty slots raises CacheFull.
    """

    def __init__(self, file: Disk, slot_size: int, slots: int, *, write_back: bool) -> None:
        self.slot_size = slot_size
        self.slot_bits = slot_size.bit_length() - 1
        self.slots = slots
        # Loads of refcount blocks are announced where one is to be changed, as in QEMU.
        self.load_event = None if write_back else "l2_load"
        self.update_event = "refblock_update_part" if write_back else "l2_update"
        self._file = file
        self._write_back = write_back
        self._slab = mmap(-1, slot_size * slots, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self.view = memoryview(self._slab)
        """The slab: slot n at byte n * slot_size."""
        self.index = SlotIndex()
        """Host offset of a slice -> slot. Always this one dict: others hold on to it."""
        self._offsets = array("Q", bytes(8 * slots))
        self.generations = array("Q", bytes(8 * slots))
        self._pins = array("L", bytes(array("L").itemsize * slots))
        self.referenced = bytearray(slots)
        """1 for a slot used since the clock hand last passed it."""
        self._dirty: set[int] = set()
        self._orphans: set[int] = set()
        """Pinned slots whose slice was forgotten."""
        self.guard: Callable[[int, int], None] | None = None
        """Called with the host offset and length before a slice is written; may refuse."""
        self._unused = slots
        """Slots below this one have never been filled (taken from the top down)."""
        self._free: list[int] = []
        self._hand = 0

    def close(self) -> None:
        """Give the slab back; nothing is written."""
        self.index.clear()
        self._dirty.clear()
        with suppress(BufferError):
            # A view in the traceback of an exception somebody keeps: the slab goes with it.
            self.view.release()
            self._slab.close()

    # -- slots ---------------------------------------------------------------------------------

    def get(self, offset: int) -> int:
        """The slot of the slice at host byte ``offset``, read from the file if it must be.

        Raises CacheFull, or BackendError where the file cannot be read.
        """
        slot = self.index.get(offset)
        if slot is not None:
            self.referenced[slot] = 1
            return slot
        slot = self._vacate()
        start = slot << self.slot_bits
        try:
            if self.load_event is not None:
                self._file.debug_event(self.load_event)
            self._file.readv(offset, [self.view[start : start + self.slot_size]])
        except BaseException:
            self._free.append(slot)
            raise
        self._settle(slot, offset)
        return slot

    def put(self, offset: int, contents: bytes) -> None:
        """Have a slice that stands in the file with these contents, and is in no slot yet.

        Raises CacheFull.
        """
        slot = self._vacate()
        start = slot << self.slot_bits
        self.view[start : start + self.slot_size] = contents
        self._settle(slot, offset)

    def _settle(self, slot: int, offset: int) -> None:
        """The slot has the slice at ``offset`` now."""
        self._offsets[slot] = offset
        self.generations[slot] += 1
        self.referenced[slot] = 1
        self.index[offset] = slot

    def _vacate(self) -> int:
        """A slot that holds nothing."""
        if self._free:
            return self._free.pop()
        if self._unused:
            self._unused -= 1
            return self._unused
        dirty = None
        for _ in range(2 * self.slots):
            slot = self._hand
            self._hand = (slot + 1) % self.slots
            if self.referenced[slot]:
                self.referenced[slot] = 0
            elif self._pins[slot]:
                continue
            elif slot not in self._dirty:
                del self.index[self._offsets[slot]]
                return slot
            elif dirty is None:
                dirty = slot
        if dirty is None or not self._write_back:
            raise CacheFull
        self._write(dirty)
        del self.index[self._offsets[dirty]]
        return dirty

    def slice(self, slot: int) -> memoryview:
        """The contents of a slot, in place."""
        start = slot << self.slot_bits
        return self.view[start : start + self.slot_size]

    def pin(self, slot: int) -> None:
        """Keep the slice in its slot until :meth:`unpin`."""
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        """Take back one :meth:`pin`."""
        self._pins[slot] -= 1
        if not self._pins[slot] and slot in self._orphans:
            self._orphans.discard(slot)
            self._free.append(slot)

    def forget(self, offset: int, length: int) -> None:
        """Drop, unwritten, every slice inside these bytes of the file: no longer a table's."""
        places: Sequence[int] = range(offset, offset + length, self.slot_size)
        if len(places) > len(self.index):
            places = [place for place in self.index if offset <= place < offset + length]
        for place in places:
            slot = self.index.pop(place, None)
            if slot is not None:
                self._dirty.discard(slot)
                if self._pins[slot]:
                    self._orphans.add(slot)
                else:
                    self._free.append(slot)

    def clear(self) -> None:
        """Drop everything; what is dirty is lost. No slot may be pinned."""
        self.index.clear()
        self._dirty.clear()
        self._free.clear()
        self._unused = self.slots

    def drop_unused(self) -> int:
        """Drop what was not used since the last call, and give its memory back to the host.

        Returns how many slices that were. What is dirty or pinned stays.
        """
        dropped = []
        for offset, slot in list(self.index.items()):
            if self.referenced[slot]:
                self.referenced[slot] = 0
            elif not self._pins[slot] and slot not in self._dirty:
                del self.index[offset]
                dropped.append(slot)
        self._free += dropped
        if dropped:
            self._give_back(set(self._free))
        return len(dropped)

    def _give_back(self, free: set[int]) -> None:
        """Tell the host that free slots need no memory, where they fill whole pages."""
        per_page = max(1, PAGESIZE >> self.slot_bits)
        for slot in free:
            if slot % per_page:
                continue
            if per_page == 1 or free.issuperset(range(slot, min(slot + per_page, self.slots))):
                start = slot << self.slot_bits
                length = min(per_page << self.slot_bits, len(self._slab) - start)
                self._slab.madvise(MADV_DONTNEED, start, length)

    # -- dirty slots -----------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """True if a slot differs from the file."""
        return bool(self._dirty)

    def mark_dirty(self, slot: int) -> None:
        """Note that the slot is about to differ from the file."""
        self._dirty.add(slot)

    def write_dirty(self) -> None:
        """Write every dirty slot to the file, in the order of the file."""
        for slot in sorted(self._dirty, key=self._offsets.__getitem__):
            self._write(slot)

    def _write(self, slot: int) -> None:
        if self.guard is not None:
            self.guard(self._offsets[slot], self.slot_size)
        self._file.debug_event(self.update_event)
        self._file.writev(self._offsets[slot], [self.slice(slot)])
        self._dirty.discard(slot)

    def take_dirty(self) -> StagedSlices:
        """A copy of every dirty slot, to be written later; they count as clean from now on.

        They stay pinned until the copy is written (or given up) by :meth:`StagedSlices.done`.
        """
        staged = []
        for slot in sorted(self._dirty, key=self._offsets.__getitem__):
            self._pins[slot] += 1
            staged.append((slot, self._offsets[slot], bytes(self.slice(slot))))
        self._dirty.clear()
        return StagedSlices(staged, self._release, self.guard, self.update_event)

    def _release(self, slots: list[int], written: bool) -> None:
        for slot in slots:
            if not written and slot not in self._orphans:
                self._dirty.add(slot)
            self.unpin(slot)


class SlotIndex(dict[int, int]):
    """Host offsets of slices -> slots."""

    def __init__(self) -> None:
        self.when_removed: Callable[[], object] = _nothing
        """Called when a slice is about to leave its slot: for who remembers where they were.

        What is still remembered need not be marked as referenced when it is used: the clock hand
        moves to remove a slice, and all is forgotten then.
        """

    def __delitem__(self, offset: int) -> None:
        self.when_removed()
        super().__delitem__(offset)

    def pop(self, offset: int, default: int | None = None) -> int | None:  # type: ignore[override]
        """The slot, which the slice has left; ``default`` if it is in none."""
        slot = self.get(offset, default)
        if slot is not None:
            del self[offset]
        return slot

    def clear(self) -> None:
        """All slices have left their slots."""
        self.when_removed()
        super().clear()


def _nothing() -> None:
    pass


class StagedSlices:
    """Copies of slices as they were at one moment, on their way to the file."""

    def __init__(
        self,
        staged: list[tuple[int, int, bytes]],
        release: Callable[[list[int], bool], None],
        guard: Callable[[int, int], None] | None,
        event: str,
    ) -> None:
        self._guard = guard
        self._event = event
        self._staged = staged
        self._release = release

    def __bool__(self) -> bool:
        return bool(self._staged)

    def write(self, file: Disk) -> None:
        """Write the copies. Needs no lock."""
        for _, offset, data in self._staged:
            if self._guard is not None:
                self._guard(offset, len(data))
            file.debug_event(self._event)
            file.writev(offset, [data])

    def done(self, *, written: bool) -> None:
        """Unpin the slots; what was not ``written`` is dirty again. Needs the lock."""
        self._release([slot for slot, _, _ in self._staged], written)
        self._staged = []
