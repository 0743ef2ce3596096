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
from .check import CheckResult, check
from .header import Header, read_header
from .layout import ClusterKind, Compatible, CryptMethod, Incompatible
from .metadata import CacheSizes, Metadata
from .reading import Reader
from .snapshots import Snapshots
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
    ) -> None:
        cluster_size = metadata.cluster_size
        super().__init__(
            header.size // layout.SECTOR * layout.SECTOR,
            read_only=read_only,
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
        missing = header.backing_file if backing is None else None
        self.reader = Reader(metadata, backing, missing)
        """For an image that has this one as its backing file."""
        self._writer = Writer(metadata, self.reader)
        self.snapshots = Snapshots(metadata, self._set_size)
        """The internal snapshots."""

    @classmethod
    def open(
        cls,
        file: Disk,
        *,
        read_only: bool = False,
        policy: Callable[[FileReference], Disk | None] | None = None,
        l2_cache_size: int = 32 << 20,
        refcount_cache_size: int = 4 << 20,
    ) -> Qcow2Disk:
        """Open the image in ``file``. ``policy`` opens the backing file, or declines.

        Cache sizes are in bytes. Raises ImageError naming the field that is wrong, or
        UnsupportedError naming the feature that is missing.
        """
        header = read_header(file)
        _refuse_what_is_missing(header)
        if header.incompatible_features & Incompatible.CORRUPT and not read_only:
            raise ImageError(
                "qcow2: Image is corrupt; cannot be opened read/write",
                field="incompatible_features",
                value=header.incompatible_features,
            )
        if header.incompatible_features & Incompatible.DIRTY and not read_only:
            raise UnsupportedError(
                "The image is dirty: its refcounts must be repaired before it can be written",
                feature="repair",
            )
        metadata = _load(file, header, CacheSizes(l2_cache_size, refcount_cache_size), read_only)
        backing = None
        try:
            if header.backing_file is not None and policy is not None:
                backing = policy(_backing_reference(header))
            disk = cls(file, header, metadata, backing, read_only=read_only)
            if not read_only:
                disk._clear_unknown_autoclear()
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

    # -- requests ------------------------------------------------------------------------------

    # The usual request, one buffer to or from stored data, takes the short way.

    def readv(self, offset: int, buffers: Iterable[WriteableBuffer]) -> None:
        """See :meth:`Disk.readv`."""
        if type(buffers) is list and len(buffers) == 1 and type(buffers[0]) is memoryview:
            length = buffers[0].nbytes
            if (
                0 <= offset <= self.size - length
                and not self.closed
                and self.reader.read_stored(offset, buffers, length)
            ):
                return
        super().readv(offset, buffers)

    def writev(self, offset: int, buffers: Iterable[ReadableBuffer], *, fua: bool = False) -> None:
        """See :meth:`Disk.writev`."""
        if type(buffers) is list and len(buffers) == 1 and type(buffers[0]) is memoryview:
            length = buffers[0].nbytes
            if (
                0 <= offset <= self.size - length
                and not (fua or self.read_only or self.closed)
                and self._writer.write_in_place(offset, buffers, length)
            ):
                return
        super().writev(offset, buffers, fua=fua)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.reader.read(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._writer.write(offset, views, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
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
        zeroing.discard(
            self._metadata, offset, length, backed=self._header.backing_file is not None
        )

    def _flush(self) -> None:
        self._metadata.flush()

    def _block_status(self, offset: int, length: int) -> Extent:
        reader, depth, kind, host, run = self.reader.map_chain(offset, length)
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

    def check(self) -> CheckResult:
        """Compare every refcount and flag with what refers to it, as ``qemu-img check`` does.

        Nothing is changed.
        """
        metadata = self._metadata
        with metadata.gate.exclusive():
            if not self.read_only:
                metadata.settle()
            with metadata.lock:
                return check(metadata, self.snapshots, self.snapshots.table_length)

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
            if disk is not None and not disk.closed:
                stack.callback(disk.close)

    def _close_alone(self) -> None:
        """Close the image and its file, but not its backing file."""
        with ExitStack() as stack:
            stack.callback(self._file.close)
            stack.callback(self._metadata.close)
            try:
                if not self.read_only and self._metadata.health.reason is None:
                    with self._metadata.gate.exclusive():
                        self._metadata.settle()
            finally:
                self.closed = True


def _refuse_what_is_missing(header: Header) -> None:
    missing = header.incompatible_features & ~_SUPPORTED
    if missing:
        names = ", ".join(name for bit, name in _LATER.items() if missing & bit)
        raise UnsupportedError(f"Unsupported qcow2 feature(s): {names}", feature=names)
    if header.crypt_method is not CryptMethod.NONE:
        raise UnsupportedError("Encrypted images are not supported yet", feature="encryption")


def _load(file: Disk, header: Header, sizes: CacheSizes, read_only: bool) -> Metadata:
    try:
        return Metadata(file, header, sizes, read_only=read_only)
    except BackendError as error:
        number = error.errno or errno.EIO
        raise BackendError(number, f"Could not read the tables: {error.strerror}") from error


def _backing_reference(header: Header) -> FileReference:
    return FileReference(header.backing_file or "", header.backing_format, "backing")
