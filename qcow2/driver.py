"""The qcow2 driver: an image in a file as a Disk."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..backend.disk import Disk, DiskInfo, Extent, Limits
from ..backend.open import FileReference
from ..errors import BackendError, ImageError, UnsupportedError
from . import layout, resize, zeroing
from .check import CheckResult, Fix, check
from .cleaner import CacheCleaner
from .corruption import CorruptionError, CorruptionListener
from .header import Header, read_header
from .layout import ClusterKind, Compatible, CryptMethod, Incompatible
from .metadata import Metadata
from .options import RuntimeOptions
from .quarantine import DiscardKind
from .reading import Reader
from .snapshots import Snapshots
from .state import is_corrupt, is_dirty
from .writing import Writer

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["Qcow2Disk"]

_SUPPORTED = int(Incompatible.DIRTY | Incompatible.CORRUPT | Incompatible.EXTENDED_L2)
_LATER = {
    Incompatible.DATA_FILE: "external data file",
    Incompatible.COMPRESSION: "compression type",
}


class Qcow2Disk(Disk):
    """A qcow2 image of version 2 or 3, in the disk ``file``, which it owns."""

    format_name = "qcow2"

    def __init__(
        self,
        file: Disk,
        header: Header,
        metadata: Metadata,
        backing: Disk | None,
        *,
        read_only: bool,
        options: RuntimeOptions,
        for_check: bool = False,
    ) -> None:
        cluster_size = metadata.cluster_size
        super().__init__(
            header.size // layout.SECTOR * layout.SECTOR,
            read_only=read_only or for_check,
            limits=Limits(
                request_alignment=file.limits.request_alignment,
                write_zeroes_alignment=metadata.geometry.subcluster_size,
                discard_alignment=cluster_size,
                optimal_io_size=cluster_size,
            ),
        )
        self._file = file
        self._header = header
        self._metadata = metadata
        self._options = options
        metadata.repair_only = for_check
        self._cleaner = CacheCleaner(metadata, options.cache_clean_interval)
        missing = header.backing_file if backing is None else None
        self.reader = Reader(metadata, backing, missing)
        """For an image that has this one as its backing file."""
        self._writer = Writer(metadata, self.reader)
        self.snapshots = Snapshots(metadata, self._set_size)
        """The internal snapshots."""
        if not for_check:
            self.snapshots.load()

    @classmethod
    def open(
        cls,
        file: Disk,
        *,
        read_only: bool = False,
        policy: Callable[[FileReference], Disk | None] | None = None,
        for_check: bool = False,
        **options: Any,
    ) -> Qcow2Disk:
        """Open the image in ``file``. ``policy`` opens the backing file, or declines.

        ``for_check`` opens an image, be it corrupt, dirty or without a refcount table, for nothing
        but :meth:`check` (and reading); ``options`` are those of RuntimeOptions. Raises ImageError
        naming the field that is wrong, UnsupportedError naming the feature that is missing, or
        ValueError for an option.
        """
        header = read_header(file, for_check=for_check)
        _refuse_what_is_missing(header)
        runtime = RuntimeOptions.parse(
            options,
            header.geometry,
            size=header.size,
            lazy_refcounts=bool(header.compatible_features & Compatible.LAZY_REFCOUNTS),
            discards=getattr(file, "discard_mode", "unmap") == "unmap",
        )
        if is_corrupt(header) and not read_only and not for_check:
            raise ImageError(
                "qcow2: Image is corrupt; cannot be opened read/write",
                field="incompatible_features",
                value=header.incompatible_features,
            )
        metadata = _load(file, header, runtime, read_only)
        backing = None
        try:
            if header.backing_file is not None and policy is not None:
                backing = policy(_backing_reference(header))
            disk = cls(
                file,
                header,
                metadata,
                backing,
                read_only=read_only,
                options=runtime,
                for_check=for_check,
            )
            if not read_only and not for_check:
                disk._clear_unknown_autoclear()
                disk._repair_if_dirty()
                metadata.lazy = runtime.lazy_refcounts
            return disk
        except BaseException:
            metadata.close()
            if backing is not None:
                backing.close()
            raise

    def _clear_unknown_autoclear(self) -> None:
        """Autoclear bits say that something follows every write; nothing here does."""
        if self._header.autoclear_features:
            self._file.write(layout.AUTOCLEAR_FEATURES_OFFSET, layout.U64.pack(0))
            self._file.flush()
            self._header.autoclear_features = 0

    def _repair_if_dirty(self) -> None:
        """Refcounts of a dirty image may be wrong: they are put right before anything is
        written."""
        if not is_dirty(self._header):
            return
        result = self.check(fix="all")
        if result.check_errors:
            raise BackendError(
                errno.EIO, f"Could not repair dirty image: {'; '.join(result.messages[-3:])}"
            )

    # -- requests ------------------------------------------------------------------------------

    # The usual request, one buffer to or from stored data, takes the short way.

    def readv(self, offset: int, buffers: Iterable[WriteableBuffer]) -> None:
        """See :meth:`Disk.readv`."""
        try:
            if type(buffers) is list and len(buffers) == 1 and type(buffers[0]) is memoryview:
                length = buffers[0].nbytes
                if (
                    0 <= offset <= self.size - length
                    and not self.closed
                    and self.reader.read_stored(offset, buffers, length)
                ):
                    return
            super().readv(offset, buffers)
        except CorruptionError as error:
            _report(error)
            raise

    def writev(self, offset: int, buffers: Iterable[ReadableBuffer], *, fua: bool = False) -> None:
        """See :meth:`Disk.writev`."""
        try:
            if type(buffers) is list and len(buffers) == 1 and type(buffers[0]) is memoryview:
                length = buffers[0].nbytes
                if (
                    0 <= offset <= self.size - length
                    and not (fua or self.read_only or self.closed)
                    and self._writer.write_in_place(offset, buffers, length)
                ):
                    return
            super().writev(offset, buffers, fua=fua)
        except CorruptionError as error:
            _report(error)
            raise

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.reader.read(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._writer.write(offset, views, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        try:
            self._write_zero_clusters(offset, length, unmap)
        except CorruptionError as error:
            _report(error)
            raise

    def _write_zero_clusters(self, offset: int, length: int, unmap: bool) -> None:
        # With subclusters the first and the last cluster may be there in part only.
        size, end = self._metadata.cluster_size, offset + length
        while offset < end:
            stop = end if end == self.size else max(end // size * size, offset)
            if offset % size or stop == offset:
                stop = min(end, (offset // size + 1) * size)
            try:
                zeroing.write_zeroes(self._metadata, offset, stop - offset, unmap=unmap)
            except UnsupportedError:
                if self._header.version < 3:
                    raise
                self._write_zero_bytes(offset, stop - offset)
            offset = stop

    def _discard(self, offset: int, length: int) -> None:
        try:
            zeroing.discard(
                self._metadata,
                offset,
                length,
                backed=self._header.backing_file is not None,
                keep=self._options.discard_no_unref,
            )
        except CorruptionError as error:
            _report(error)
            raise

    def _flush(self) -> None:
        try:
            self._metadata.flush()
        except CorruptionError as error:
            _report(error)
            raise

    def _block_status(self, offset: int, length: int) -> Extent:
        try:
            reader, depth, kind, host, run = self.reader.map_chain(offset, length)
        except CorruptionError as error:
            _report(error)
            raise
        file = reader.file
        if kind is ClusterKind.NORMAL:
            return Extent(run, True, False, True, depth=depth, host_offset=host, file=file)
        if kind is ClusterKind.ZERO_ALLOCATED:
            return Extent(run, False, True, True, depth=depth, host_offset=host, file=file)
        if kind is ClusterKind.ZERO_PLAIN:
            return Extent(run, False, True, True, depth=depth)
        if kind is ClusterKind.COMPRESSED:
            return Extent(run, True, False, True, compressed=True, depth=depth)
        backing = reader.backing
        if backing is None or offset >= backing.size:
            return Extent(run, False, reader.backing_known, False, depth=depth)
        below = backing.block_status(offset, min(run, backing.size - offset))
        return replace(below, depth=depth + 1 + below.depth)

    # -- the image -----------------------------------------------------------------------------

    @property
    def has_zero_init(self) -> bool:
        return True

    @property
    def children(self) -> Mapping[str, Disk]:
        children = {"file": self._file}
        if self.reader.backing is not None:
            children["backing"] = self.reader.backing
        return children

    @property
    def backing_file(self) -> str | None:
        """The backing file's name as it stands in the image."""
        return self._header.backing_file

    def info(self) -> DiskInfo:
        header, metadata = self._header, self._metadata
        specific: dict[str, Any] = {"compat": "0.10" if header.version == 2 else "1.1"}
        if header.version >= 3:
            specific |= {
                "compression-type": "zlib",
                "lazy-refcounts": bool(header.compatible_features & Compatible.LAZY_REFCOUNTS),
                "refcount-bits": 1 << header.refcount_order,
                "corrupt": bool(header.incompatible_features & Incompatible.CORRUPT),
                "extended-l2": metadata.geometry.extended_l2,
            }
        return DiskInfo(
            format=self.format_name,
            virtual_size=self.size,
            actual_size=self._file.info().actual_size,
            filename=self.filename,
            cluster_size=metadata.cluster_size,
            specific=specific,
        )

    def check(self, fix: Fix | None = None) -> CheckResult:
        """Compare every refcount and flag with what refers to it, as ``qemu-img check`` does.

        ``fix`` says what is repaired: ``"leaks"``, refcounts that are too high, which is always
        safe; ``"all"``, corruptions, too. Without it nothing is changed.
        """
        metadata = self._metadata
        if fix not in (None, "leaks", "all"):
            raise ValueError("what is fixed is 'leaks' or 'all'")
        if fix is not None:
            metadata.check_writable(repair=True)
        with metadata.gate.exclusive():
            if not self.read_only:
                metadata.settle()
                metadata.make_accurate()
            result = check(metadata, fix, self.snapshots.rewrite)
            if fix is not None:
                self.reader.forget()
        return result

    def on_corruption(self, listener: CorruptionListener) -> None:
        """Have ``listener(event)`` called when the image turns out to be corrupt while in use.

        It is called once, in the thread of the request that found it, outside every lock. An image
        that may be written is marked corrupt then, and refuses everything.
        """
        self._metadata.corruption.add_listener(listener)

    # -- life ----------------------------------------------------------------------------------

    def _truncate(self, size: int, preallocation: str) -> None:
        if size < self.size:
            raise UnsupportedError("qcow2 images cannot be shrunk yet", feature="shrink")
        if preallocation != "off":
            raise UnsupportedError(
                f"Unsupported preallocation mode '{preallocation}'", feature="preallocation"
            )
        self._metadata.check_writable()
        metadata, old_size = self._metadata, self._header.size
        if size == old_size:
            return
        with metadata.exclusive():
            resize.make_room(metadata, size)
        backing = self.reader.backing
        if backing is not None and backing.size > old_size:
            # What the backing file has there must not show.
            hidden = min(size, backing.size) - old_size
            self._zero_past_end(old_size, hidden)
        with metadata.exclusive():
            resize.set_size(metadata, size)
        self._set_size(size)

    def _zero_past_end(self, offset: int, length: int) -> None:
        """Make a part of the disk's L1 coverage past its end read as zeroes."""
        aligned = -(-offset // self._metadata.cluster_size) * self._metadata.cluster_size
        end = offset + length
        if self._header.version >= 3 and aligned < end:
            zeroing.write_zeroes(self._metadata, aligned, end - aligned, unmap=False)
            end = aligned
        self._write_zero_bytes(offset, end - offset)

    def drain(self) -> None:
        with self._metadata.gate.exclusive():
            pass

    def close(self) -> None:
        """Flush, and close the image, its backing files and the file it is in.

        Where the flush fails, what was not written is lost (the error is raised), and the image
        is what the last flush left.
        """
        disk: Disk | None = self
        with ExitStack() as stack:
            while isinstance(disk, Qcow2Disk) and not disk.closed:
                stack.callback(disk._close_alone)
                disk = disk.reader.backing
            if disk is not None:
                stack.callback(disk.close)

    def _close_alone(self) -> None:
        """Close the image and its file, but not its backing file."""
        with ExitStack() as stack:
            stack.callback(self._file.close)
            stack.callback(self._metadata.close)
            self._cleaner.stop()
            try:
                if not self.read_only and self._metadata.health.reason is None:
                    with self._metadata.gate.exclusive():
                        self._metadata.settle()
                        self._metadata.make_accurate()
            finally:
                self.closed = True


def _refuse_what_is_missing(header: Header) -> None:
    missing = header.incompatible_features & ~_SUPPORTED
    if missing:
        names = ", ".join(name for bit, name in _LATER.items() if missing & bit)
        raise UnsupportedError(f"Unsupported qcow2 feature(s): {names}", feature=names)
    if header.crypt_method is not CryptMethod.NONE:
        raise UnsupportedError("Encrypted images are not supported yet", feature="encryption")


def _report(error: CorruptionError) -> None:
    """Tell whoever listens, now that no lock is held."""
    if error.source is not None:
        error.source.deliver()


def _load(file: Disk, header: Header, options: RuntimeOptions, read_only: bool) -> Metadata:
    try:
        metadata = Metadata(
            file,
            header,
            options.caches,
            read_only=read_only,
            overlap_check=options.overlap_check,
        )
    except BackendError as error:
        number = error.errno or errno.EIO
        raise BackendError(number, f"Could not read the tables: {error.strerror}") from error
    metadata.discards |= {
        DiscardKind.REQUEST: options.pass_discard_request,
        DiscardKind.SNAPSHOT: options.pass_discard_snapshot,
        DiscardKind.OTHER: options.pass_discard_other,
    }
    return metadata


def _backing_reference(header: Header) -> FileReference:
    return FileReference(header.backing_file or "", header.backing_format, "backing")
