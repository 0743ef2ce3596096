"""The qcow2 driver: an image in a file as a Disk."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Any

from ..backend.disk import Disk, DiskInfo, Extent, Limits
from ..backend.open import FileReference
from ..errors import BackendError, ImageError, UnsupportedError
from . import layout, resize, zeroing
from .cache import CacheFull
from .check import CheckResult, check
from .header import Header, read_header
from .layout import ClusterKind, Compatible, CryptMethod, Incompatible
from .metadata import CacheSizes, Metadata
from .reading import Reader
from .snapshots import Snapshots
from .writing import Writer

__all__ = ["Qcow2Disk"]

_SUPPORTED = Incompatible.DIRTY | Incompatible.CORRUPT
_LATER = {
    Incompatible.DATA_FILE: "external data file",
    Incompatible.COMPRESSION: "compression type",
    Incompatible.EXTENDED_L2: "extended L2 entries",
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
                write_zeroes_alignment=cluster_size,
                discard_alignment=cluster_size,
                optimal_io_size=cluster_size,
            ),
        )
        self._file = file
        self._header = header
        self._metadata = metadata
        missing = header.backing_file if backing is None else None
        self._reader = Reader(metadata, backing, missing)
        self._writer = Writer(metadata, self._reader)
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

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self._reader.read(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._writer.write(offset, views, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        zeroing.write_zeroes(self._metadata, offset, length, unmap=unmap)

    def _discard(self, offset: int, length: int) -> None:
        zeroing.discard(
            self._metadata, offset, length, backed=self._header.backing_file is not None
        )

    def _flush(self) -> None:
        self._metadata.flush()

    def _block_status(self, offset: int, length: int) -> Extent:
        metadata = self._metadata
        with metadata.lock:
            epoch = metadata.gate.enter()
        try:
            while True:
                try:
                    with metadata.lock:
                        kind, host, run = metadata.tables.map(offset, length)
                    break
                except CacheFull:
                    metadata.flush_inside()
            return self._extent(kind, host, offset, run)
        finally:
            with metadata.lock:
                metadata.gate.leave(epoch)

    def _extent(self, kind: ClusterKind, host: int, offset: int, run: int) -> Extent:
        file = self._file
        if kind is ClusterKind.NORMAL:
            return Extent(run, True, False, True, host_offset=host, file=file)
        if kind is ClusterKind.ZERO_ALLOCATED:
            return Extent(run, False, True, True, host_offset=host, file=file)
        if kind is ClusterKind.ZERO_PLAIN:
            return Extent(run, False, True, True)
        if kind is ClusterKind.COMPRESSED:
            return Extent(run, True, False, True, compressed=True)
        backing = self._reader.backing
        if backing is None or offset >= backing.size:
            zero = self._header.backing_file is None or backing is not None
            return Extent(run, False, zero, False)
        below = backing.block_status(offset, min(run, backing.size - offset))
        return Extent(
            below.length,
            below.data,
            below.zero,
            below.allocated,
            compressed=below.compressed,
            depth=below.depth + 1,
            host_offset=below.host_offset,
            file=below.file,
        )

    # -- the image -----------------------------------------------------------------------------

    @property
    def has_zero_init(self) -> bool:
        return True

    @property
    def children(self) -> Mapping[str, Disk]:
        children = {"file": self._file}
        if self._reader.backing is not None:
            children["backing"] = self._reader.backing
        return children

    @property
    def backing_file(self) -> str | None:
        """The backing file's name as it stands in the image."""
        return self._header.backing_file

    def info(self) -> DiskInfo:
        header = self._header
        specific: dict[str, Any] = {"compat": "0.10" if header.version == 2 else "1.1"}
        if header.version >= 3:
            specific |= {
                "compression-type": "zlib",
                "lazy-refcounts": bool(header.compatible_features & Compatible.LAZY_REFCOUNTS),
                "refcount-bits": 1 << header.refcount_order,
                "corrupt": bool(header.incompatible_features & Incompatible.CORRUPT),
                "extended-l2": False,
            }
        return DiskInfo(
            format=self.format_name,
            virtual_size=self.size,
            actual_size=self._file.info().actual_size,
            filename=self.filename,
            cluster_size=self._metadata.cluster_size,
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
        if size != self.size:
            with self._metadata.exclusive():
                resize.grow(self._metadata, size)
            self._set_size(size)

    def drain(self) -> None:
        with self._metadata.gate.exclusive():
            pass

    def close(self) -> None:
        """Flush, and close the image, its backing files and the file it is in.

        Where the flush fails, what was not written is lost (the error is raised), and the image
        is what the last flush left.
        """
        if self.closed:
            return
        try:
            if not self.read_only and self._metadata.health.reason is None:
                with self._metadata.gate.exclusive():
                    self._metadata.settle()
        finally:
            self.closed = True
            self._close()

    def _close(self) -> None:
        self._metadata.close()
        if self._reader.backing is not None:
            self._reader.backing.close()
        self._file.close()


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
