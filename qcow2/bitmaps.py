"""Persistent dirty bitmaps: which parts of the disk were written since some moment.

A bitmap is kept in memory while the image is open for writing, and stored when it is closed. Before
the first change of a stored bitmap its ``in_use`` flag is set on stable storage, by one write into
its directory entry: what is stored is out of date from then on, and a crash leaves it so
("inconsistent": such a bitmap can only be removed). Storing goes beside what is there: data, table
and directory are stable before one header write switches to them, and the old ones are freed then.

The bits of a write are set when it begins and when it is done, before it is acknowledged, whether
it failed or not: one that is under way while a bitmap is cleared is not lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Lock
from types import TracebackType

from ..errors import BackendError, ImageError, UnsupportedError
from . import layout
from .bitmap_directory import (
    BitmapsExtension,
    DirectoryEntry,
    encode_name,
    pack_directory,
    read_directory,
    table_size,
)
from .bitmap_store import free_bitmap, store_bits, switch_directory
from .bitmap_table import check_tables, load_bits
from .dirty_bits import DirtyBits
from .layout import BitmapFlags
from .metadata import Metadata

__all__ = ["Bitmap", "Bitmaps"]

_DEFAULT_GRANULARITY = (4096, 65536)
"""Between these it is the cluster size (QEMU)."""

_MAX_LOADED = 1 << 21
"""Chunks of bits that are read from one file: those of a disk of a petabyte, all of it dirty. Tiny
images could name thousands of bitmaps without a clear bit."""


class Bitmap:
    """A dirty bitmap of a disk. Made by :meth:`Bitmaps.add`."""

    def __init__(self, owner: Bitmaps, name: str, granularity_bits: int, *, enabled: bool) -> None:
        self._owner = owner
        self.name = name
        self.granularity_bits = granularity_bits
        self.enabled = enabled
        """It records writes. Changed by :meth:`Bitmaps.enable` and ``disable``."""
        self.entry: DirectoryEntry | None = None
        """How it is in the directory of the file, if it is."""
        self.bits: DirtyBits | None = None
        """Its contents, once they were needed."""

    @property
    def granularity(self) -> int:
        """Bytes of the disk that one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        """What is stored of it is out of date."""
        return self.entry is not None and bool(self.entry.flags & BitmapFlags.IN_USE)

    @property
    def inconsistent(self) -> bool:
        """It was not stored after its last use, and can only be removed."""
        return self.in_use and self.bits is None

    @property
    def changed(self) -> bool:
        """It has to be stored when the image is closed."""
        return self.bits is not None and (self.entry is None or self.in_use)

    @property
    def disk_size(self) -> int:
        """Bytes of the disk that it is for."""
        return self._owner.disk_size

    @property
    def count(self) -> int:
        """Bytes that are dirty: set bits times the granularity, as QEMU counts them.

        Raises ImageError if it is inconsistent or cannot be read.
        """
        with self._owner.lock:
            return self._owner.contents(self).count() << self.granularity_bits

    def dirty(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of every dirty stretch of the disk, in order.

        As it is now: what is written meanwhile may or may not be there. Raises ImageError if it is
        inconsistent or cannot be read.
        """
        size = self.disk_size
        for first, count in self.snapshot().runs():
            start = first << self.granularity_bits
            yield start, min((first + count) << self.granularity_bits, size) - start

    def snapshot(self) -> DirtyBits:
        """A copy of its bits as they are now."""
        with self._owner.lock:
            bits = self._owner.contents(self)
            copy = DirtyBits(bits.length)
            copy.merge(bits)
        return copy

    def __repr__(self) -> str:
        state = " inconsistent" if self.inconsistent else "" if self.enabled else " disabled"
        return f"<Bitmap {self.name!r} granularity {self.granularity}{state}>"


class Bitmaps:
    """The dirty bitmaps of one image, in the order of its directory. Iterable, with a length."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self.lock = Lock()
        """Protects the bitmaps. Nobody who holds it waits for requests."""
        self._list: list[Bitmap] = []
        self._enabled: tuple[Bitmap, ...] = ()
        self._ready = False
        """The enabled ones are marked in use."""
        self.tracking = False
        """Writes have to be recorded."""
        self.reload()

    def reload(self) -> None:
        """Forget everything in memory and list what the header says (nobody may be at work).

        What is to be kept has to be stored (:meth:`store`) before.
        """
        header = self._metadata.header
        self._list = []
        self._loaded = 0
        """How large what was read from the file is, in chunks of DirtyBits."""
        if header.stale_bitmaps:
            warnings.warn(
                "a program lacking bitmap support modified this file, so all bitmaps are now "
                "considered inconsistent; some clusters may be leaked",
                UserWarning,
                stacklevel=3,
            )
        if header.bitmaps is not None:
            self._read(header.bitmaps)
        self._changed_list()

    @property
    def disk_size(self) -> int:
        """Bytes of the disk."""
        return self._metadata.header.size // layout.SECTOR * layout.SECTOR

    def _read(self, extension: BitmapsExtension) -> None:
        metadata = self._metadata
        entries = read_directory(metadata.file, extension, metadata.geometry, self.disk_size)
        check_tables(metadata, entries, self.disk_size)
        names = set()
        for entry in entries:
            if entry.name in names:
                raise ImageError(
                    f"Bitmap already exists: {entry.name}", field="bitmap name", value=entry.name
                )
            names.add(entry.name)
            enabled = bool(entry.flags & BitmapFlags.AUTO)
            bitmap = Bitmap(self, entry.name, entry.granularity_bits, enabled=enabled)
            bitmap.entry = entry
            self._list.append(bitmap)

    # -- asking ----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Bitmap]:
        return iter(list(self._list))

    def __len__(self) -> int:
        return len(self._list)

    def __contains__(self, name: str) -> bool:
        return any(bitmap.name == name for bitmap in self._list)

    def __getitem__(self, name: str) -> Bitmap:
        """The bitmap of that name. Raises KeyError, with QEMU's text, if there is none."""
        for bitmap in self._list:
            if bitmap.name == name:
                return bitmap
        raise KeyError(f"Dirty bitmap '{name}' not found")

    def info(self) -> list[dict[str, object]]:
        """The bitmaps as ``qemu-img info`` lists them."""
        listed: list[dict[str, object]] = []
        for bitmap in self._list:
            flags = ["in-use"] if bitmap.in_use else []
            if bitmap.enabled:
                flags.append("auto")
            listed.append({"flags": flags, "name": bitmap.name, "granularity": bitmap.granularity})
        return listed

    def contents(self, bitmap: Bitmap) -> DirtyBits:
        """The bits (lock held), read from the file the first time."""
        if bitmap.inconsistent:
            raise _inconsistent(bitmap)
        if bitmap.bits is None:
            length = -(-self.disk_size >> bitmap.granularity_bits)
            if bitmap.entry is None:
                bitmap.bits = DirtyBits(length)
            else:
                bits = load_bits(self._metadata, bitmap.entry, length)
                self._loaded += bits.chunks
                if self._loaded > _MAX_LOADED:
                    raise ImageError(
                        "The image's bitmaps have too much in them to be held",
                        field="bitmaps",
                        value=self._loaded,
                        limit=_MAX_LOADED,
                    )
                bitmap.bits = bits
        return bitmap.bits

    # -- changing --------------------------------------------------------------------------------

    def add(self, name: str, *, granularity: int | None = None, enabled: bool = True) -> Bitmap:
        """A new bitmap without a set bit; unless it is not ``enabled`` it records from now on.

        ``granularity`` is in bytes, a power of two from 512 to 2 GiB; None is the cluster size, at
        least 4 KiB and at most 64 KiB. It is stored when the image is closed. Raises ValueError,
        with QEMU's texts, where a limit stands against it.
        """
        metadata = self._metadata
        metadata.check_writable()
        if not name:
            raise ValueError("Bitmap name cannot be empty")
        if not isinstance(name, str):
            raise TypeError(f"a bitmap's name is a string, not {name!r}")
        if granularity is None:
            low, high = _DEFAULT_GRANULARITY
            granularity = min(max(metadata.cluster_size, low), high)
        if granularity < 512 or granularity & (granularity - 1) or granularity >= 1 << 32:
            raise ValueError("Granularity must be power of 2 and at least 512")
        with self.lock:
            if name in self:
                raise ValueError(f"Bitmap already exists: {name}")
            bitmap = Bitmap(self, name, granularity.bit_length() - 1, enabled=enabled)
            self._check_new(bitmap)
            self.contents(bitmap)
            self._list.append(bitmap)
            self._changed_list()
        return bitmap

    def _check_new(self, bitmap: Bitmap) -> None:
        prefix = f"Can't make bitmap '{bitmap.name}' persistent: "
        if self._metadata.geometry.version < 3:
            raise UnsupportedError(
                prefix + "Cannot store dirty bitmaps in qcow2 v2 files", feature="bitmaps"
            )
        self._check_size(bitmap.granularity_bits, self.disk_size, prefix)
        if len(encode_name(bitmap.name)) > layout.MAX_BITMAP_NAME:
            raise ValueError(
                f"{prefix}Name length exceeds maximum ({layout.MAX_BITMAP_NAME} characters)"
            )
        if "\0" in bitmap.name:
            raise ValueError(prefix + "A name cannot contain NUL")
        try:
            pack_directory([self._entry(b) for b in [*self._list, bitmap]])
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from None

    def _check_size(self, granularity_bits: int, disk_size: int, prefix: str) -> None:
        entries = table_size(self._metadata.geometry, disk_size, granularity_bits)
        if not entries:
            raise ValueError(prefix + "A disk of size 0 has no bitmaps")
        stored = -(-disk_size >> (granularity_bits + 3))
        if stored > layout.MAX_BITMAP_SIZE or entries > layout.MAX_BITMAP_TABLE_SIZE:
            raise ValueError(
                prefix + "Too much space will be occupied by the bitmap. Use larger granularity"
            )
        if entries << self._metadata.cluster_bits > layout.MAX_BITMAP_SIZE:
            raise ValueError(f"{prefix}The bitmap is too big")

    def _entry(self, bitmap: Bitmap) -> DirectoryEntry:
        """The directory's entry, as far as it is known."""
        return bitmap.entry or DirectoryEntry(
            bitmap.name, 0, 0, BitmapFlags(0), bitmap.granularity_bits
        )

    def enable(self, name: str) -> None:
        """Have a bitmap record writes. Raises KeyError, or ImageError if it is inconsistent."""
        self._set_enabled(name, True)

    def disable(self, name: str) -> None:
        """Have a bitmap no longer record writes."""
        self._set_enabled(name, False)

    def _set_enabled(self, name: str, enabled: bool) -> None:
        self._metadata.check_writable()
        with self.lock:
            bitmap = self[name]
            if bitmap.inconsistent:
                raise _inconsistent(bitmap)
            if bitmap.enabled != enabled:
                self._touch(bitmap)
                bitmap.enabled = enabled
                self._changed_list()

    def clear(self, name: str) -> None:
        """Have nothing count as dirty in a bitmap."""
        self._metadata.check_writable()
        with self.lock:
            bitmap = self[name]
            self._touch(bitmap).clear()

    def merge(self, target: str, sources: Iterable[str | Bitmap]) -> None:
        """Have all that is dirty in any of ``sources`` count as dirty in ``target``, too.

        A source is a name, or a Bitmap, which may be another disk's of the same size (ValueError
        if it is not). Nothing is changed if one of them cannot be read.
        """
        self._metadata.check_writable()
        bitmap = self[target]
        if bitmap.inconsistent:
            raise _inconsistent(bitmap)
        merged: list[tuple[Bitmap, DirtyBits]] = []
        for source in sources:
            other = self[source] if isinstance(source, str) else source
            if other.disk_size != self.disk_size:
                raise ValueError(
                    f"Bitmaps are of different sizes (destination size is {self.disk_size}, "
                    f"source size is {other.disk_size}) and can't be merged"
                )
            merged.append((other, other.snapshot()))
        with self.lock:
            bits = self._touch(self[target])
            for other, copy in merged:
                if other.granularity_bits == bitmap.granularity_bits:
                    bits.merge(copy)
                    continue
                for first, count in copy.runs():
                    start = first << other.granularity_bits >> bitmap.granularity_bits
                    end = (first + count) << other.granularity_bits
                    bits.set(start, -(-end >> bitmap.granularity_bits) - start)

    def remove(self, name: str) -> None:
        """Remove a bitmap, also an inconsistent one; on the disk at once."""
        metadata = self._metadata
        metadata.check_writable()
        with metadata.exclusive(), self.lock:
            bitmap = self[name]
            kept = [other for other in self._list if other is not bitmap]
            if bitmap.entry is not None:
                switch_directory(
                    metadata, [other.entry for other in kept if other.entry is not None]
                )
                free_bitmap(metadata, bitmap.entry)
                bitmap.entry = None
            self._list = kept
            self._changed_list()

    def _changed_list(self) -> None:
        self._enabled = tuple(b for b in self._list if b.enabled and not b.inconsistent)
        self._ready = all(b.bits is not None and b.changed for b in self._enabled)
        self.tracking = bool(self._enabled) and not self._metadata.read_only

    # -- recording -------------------------------------------------------------------------------

    def begin(self) -> None:
        """The disk's contents are about to change: mark in use what records it."""
        if self._ready:
            return
        with self.lock:
            self._touch_all(self._enabled)
            self._ready = True

    def record(self, offset: int, length: int) -> None:
        """The disk's contents have changed."""
        if offset >= self.disk_size:
            return  # what is hidden before the disk grows was none of its contents
        with self.lock:
            for bitmap in self._enabled:
                shift = bitmap.granularity_bits
                first = offset >> shift
                if bitmap.bits is not None:
                    bitmap.bits.set(first, ((offset + length - 1) >> shift) + 1 - first)

    def recording(self, offset: int, length: int) -> Recording:
        """To be ``with`` while the disk's contents change there."""
        return Recording(self, offset, length)

    def _touch(self, bitmap: Bitmap) -> DirtyBits:
        """A bitmap is about to change (lock held): have its contents, and mark it in use."""
        self._touch_all([bitmap])
        return self.contents(bitmap)

    def _touch_all(self, bitmaps: Sequence[Bitmap]) -> None:
        """:meth:`_touch` several, with one walk over the directory and one flush. The flags of
        each are one write inside a sector."""
        for bitmap in bitmaps:
            self.contents(bitmap)
        marked = {bitmap for bitmap in bitmaps if bitmap.entry is not None and not bitmap.in_use}
        extension, file = self._metadata.header.bitmaps, self._metadata.file
        if not marked or extension is None:
            return
        self._metadata.check_writable()
        entries: list[tuple[Bitmap, DirectoryEntry]] = []
        offset = extension.directory_offset
        for bitmap in self._list:
            if bitmap.entry is None:
                continue
            if bitmap in marked:
                entry = replace(bitmap.entry, flags=bitmap.entry.flags | BitmapFlags.IN_USE)
                file.write(offset + layout.BITMAP_FLAGS_OFFSET, layout.U32.pack(entry.flags))
                entries.append((bitmap, entry))
            offset += len(bitmap.entry.pack())
        file.flush()
        for bitmap, entry in entries:
            bitmap.entry = entry

    # -- the size of the disk --------------------------------------------------------------------

    def begin_resize(self, size: int) -> None:
        """The disk is about to have ``size`` bytes. Raises UnsupportedError if a bitmap stands
        against it (QEMU's rule: an inconsistent one)."""
        with self.lock:
            for bitmap in self._list:
                if bitmap.inconsistent:
                    raise UnsupportedError(str(_inconsistent(bitmap)), feature="resize")
                self._check_size(
                    bitmap.granularity_bits, size, f"Bitmap '{bitmap.name}' cannot be resized: "
                )
            self._touch_all(self._list)

    def end_resize(self) -> None:
        """The disk has the size that its header says: new bits are clear."""
        with self.lock:
            for bitmap in self._list:
                if bitmap.bits is not None:
                    bitmap.bits.resize(-(-self.disk_size >> bitmap.granularity_bits))

    # -- storing ---------------------------------------------------------------------------------

    def store(self) -> None:
        """Store what has changed (in an exclusive operation, metadata settled).

        If it fails, what is in the file stays: bitmaps in use, which are lost with this object.
        """
        with self.lock:
            if not any(bitmap.changed for bitmap in self._list):
                return
            # As QEMU: all of them, but those that nobody can tell the contents of.
            changed = [bitmap for bitmap in self._list if not bitmap.inconsistent]
            metadata = self._metadata
            old = [bitmap.entry for bitmap in changed if bitmap.entry is not None]
            new: dict[Bitmap, DirectoryEntry] = {}
            try:
                for bitmap in changed:
                    new[bitmap] = self._store(bitmap)
                entries = [(bitmap, new.get(bitmap) or bitmap.entry) for bitmap in self._list]
                switch_directory(metadata, [entry for _, entry in entries if entry is not None])
            except BaseException:
                with suppress(ImageError, BackendError):
                    for entry in new.values():
                        free_bitmap(metadata, entry)
                raise
            for bitmap, entry in new.items():
                bitmap.entry = entry
            for entry in old:
                free_bitmap(metadata, entry)
            self._changed_list()

    def _store(self, bitmap: Bitmap) -> DirectoryEntry:
        metadata = self._metadata
        entries = table_size(metadata.geometry, self.disk_size, bitmap.granularity_bits)
        offset = store_bits(metadata, self.contents(bitmap), entries)
        flags = BitmapFlags.AUTO if bitmap.enabled else BitmapFlags(0)
        return DirectoryEntry(bitmap.name, offset, entries, flags, bitmap.granularity_bits)


class Recording:
    """While the disk's contents change: see :meth:`Bitmaps.recording`."""

    __slots__ = ("_bitmaps", "_length", "_offset")

    def __init__(self, bitmaps: Bitmaps, offset: int, length: int) -> None:
        self._bitmaps = bitmaps
        self._offset = offset
        self._length = length

    def __enter__(self) -> None:
        if self._bitmaps.tracking:
            self._bitmaps.begin()
            # Should an interrupt keep us from the end, it is recorded all the same.
            self._bitmaps.record(self._offset, self._length)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Again: a bitmap may have been added or cleared meanwhile.
        if self._bitmaps.tracking:
            self._bitmaps.record(self._offset, self._length)


def _inconsistent(bitmap: Bitmap) -> ImageError:
    return ImageError(
        f"Bitmap '{bitmap.name}' is inconsistent and cannot be used",
        field="bitmap",
        value=bitmap.name,
    )
