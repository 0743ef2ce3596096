"""The qcow2 driver: an image in a file as a Disk."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..backend.disk import Disk, DiskInfo, Extent, Limits, Run
from ..backend.references import FileReference
from ..errors import BackendError, UnsupportedError
from . import header_update, info, layout, opening, zeroing
from .bitmaps import Bitmaps
from .cleaner import CacheCleaner
from .compressed_writing import CompressedWriter
from .corruption import REPORTING, CorruptionError, CorruptionListener
from .data_file import data_file_info, open_data_file, resize_data_file
from .header import Header, read_header
from .layout import Autoclear, CryptMethod, Incompatible
from .metadata import Metadata
from .options import RuntimeOptions
from .reading import Reader
from .reload import reload
from .runs import runs
from .snapshots import Snapshots
from .state import is_dirty
from .status import block_status
from .vmstate import VmState
from .writing import Writer

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath, WriteableBuffer

    from ..backend.luks1 import Passphrase
    from .check import Fix
    from .encryption import Encryption
    from .result import CheckResult

__all__ = ["Qcow2Disk"]


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
                request_alignment=max(
                    metadata.data.limits.request_alignment,
                    layout.SECTOR if metadata.encryption else 1,
                ),
                write_zeroes_alignment=metadata.geometry.subcluster_size,
                discard_alignment=cluster_size,
                optimal_io_size=cluster_size,
            ),
        )
        self._file = file
        self._header = header
        self._metadata = metadata
        self.repairs: tuple[str, ...] = ()
        """What was found when the image, left dirty, was repaired as it was opened."""
        self._options = options
        self._closing, self._resizing = Lock(), Lock()
        metadata.repair_only = for_check
        self._cleaner = CacheCleaner(metadata, options.cache_clean_interval)
        missing = header.backing_file if backing is None else None
        self.reader = Reader(metadata, backing, missing)
        """For an image that has this one as its backing file."""
        self._writer = Writer(metadata, self.reader)
        self._compressed_writer = CompressedWriter(metadata, self._writer)
        self.bitmaps = Bitmaps(metadata)
        """The persistent dirty bitmaps."""
        self.snapshots = Snapshots(
            metadata, self._set_size, self._make_reader, self.bitmaps.__len__
        )
        """The internal snapshots."""
        self.vmstate = VmState(metadata, self.reader, self._writer)
        """The VM state past the disk's end, until a snapshot takes it."""
        if not for_check:
            self.snapshots.load()

    @classmethod
    def open(
        cls,
        file: Disk,
        *,
        read_only: bool = False,
        policy: Callable[[FileReference], Disk | None] | None = None,
        data_file: Disk | StrPath | None = None,
        passphrase: Passphrase | None = None,
        encrypt_format: str | None = None,
        no_io: bool = False,
        for_check: bool = False,
        **options: Any,
    ) -> Qcow2Disk:
        """Open the image in ``file``. ``policy`` opens the backing file and the data file, or
        declines; ``data_file`` is used instead of the data file that the image names.

        An encrypted image needs its ``passphrase`` (or what asks for it), unless with ``no_io`` no
        encrypted data is read or written: for info and check. With ``encrypt_format`` (``aes``,
        ``luks``) it must be encrypted like that. ``for_check`` opens an image, be it corrupt, dirty
        or without a refcount table, for nothing but :meth:`check` (and reading). ``options`` are
        those of RuntimeOptions.

        Raises ImageError naming the field that is wrong, UnsupportedError naming the feature that
        is missing, PassphraseError if the passphrase is missing or wrong, or ValueError for an
        option.
        """
        file.bounded = not file.growable
        header = read_header(file, for_check=for_check)
        runtime = opening.runtime_options(file, header, options)
        if not read_only and not for_check:
            opening.refuse_corrupt(header)
        encryption = opening.encryption_of(
            file, header, passphrase, encrypt_format, no_io or for_check
        )
        data = open_data_file(header, policy, data_file, read_only)
        metadata = backing = None
        try:
            metadata = opening.load_metadata(file, header, runtime, read_only, data)
            if encryption is not None:
                metadata.encryption = encryption
                encryption.before_changes(metadata.check_writable)
            if header.backing_file is not None and policy is not None:
                reference = FileReference(header.backing_file, header.backing_format, "backing")
                backing = policy(reference)
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
            if metadata is not None:
                metadata.close()
            if data is not None and data is not data_file:
                data.close()
            if backing is not None:
                backing.close()
            raise

    def _clear_unknown_autoclear(self) -> None:
        """Autoclear bits say that something follows every write; what we do not know does not."""
        known = self._header.autoclear_features & Autoclear.RAW_DATA
        if self._header.bitmaps is not None:
            known |= Autoclear.BITMAPS
        if self._header.stale_bitmaps:
            header_update.update_header(
                self._metadata, stale_bitmaps=False, autoclear_features=known
            )
        elif known != self._header.autoclear_features:
            self._file.write(layout.AUTOCLEAR_FEATURES_OFFSET, layout.U64.pack(known))
            self._file.flush()
            self._header.autoclear_features = known

    def _make_reader(self, metadata: Metadata) -> Reader:
        """A reader of other tables of this image: a snapshot's."""
        backing = self.reader.backing
        known = backing is not None or self.reader.backing_known
        return Reader(metadata, backing, None if known else self._header.backing_file)

    def _repair_if_dirty(self) -> None:
        """Refcounts of a dirty image may be wrong: they are put right before anything is
        written."""
        if not is_dirty(self._header):
            return
        result = self.check(fix="all")
        self.repairs = tuple(result.messages)
        if result.check_errors or result.failure:
            raise BackendError(
                result.failure or errno.EIO,
                f"Could not repair dirty image: {'; '.join(result.messages[-3:])}",
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
            error.report()
            raise

    def writev(self, offset: int, buffers: Iterable[ReadableBuffer], *, fua: bool = False) -> None:
        """See :meth:`Disk.writev`."""
        try:
            if type(buffers) is list and len(buffers) == 1 and type(buffers[0]) is memoryview:
                length = buffers[0].nbytes
                bitmaps = self.bitmaps
                if (
                    0 <= offset <= self.size - length
                    and not (fua or self.read_only or self.closed or bitmaps.tracking)
                    and self.detect_zeroes == "off"
                    and self._writer.write_in_place(offset, buffers, length)
                ):
                    if bitmaps.tracking:  # since a moment ago
                        bitmaps.record(offset, length)
                    return
            super().writev(offset, buffers, fua=fua)
        except CorruptionError as error:
            error.report()
            raise

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.reader.read(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        with self.bitmaps.recording(offset, length):
            self._writer.write(offset, views, length)

    def _write_compressed(self, offset: int, views: list[memoryview], length: int) -> None:
        with self.bitmaps.recording(offset, length):
            self._compressed_writer.write(offset, views, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        with REPORTING:
            self._write_zero_clusters(offset, length, unmap)

    def _write_zero_clusters(self, offset: int, length: int, unmap: bool) -> None:
        # With subclusters the first and the last cluster may be there in part only.
        backed = self._header.backing_file is not None
        size, end = self._metadata.cluster_size, offset + length
        while offset < end:
            stop = end if end == self.size else max(end // size * size, offset)
            if offset % size or stop == offset:
                stop = min(end, (offset // size + 1) * size)
            try:
                with self.bitmaps.recording(offset, stop - offset):
                    zeroing.write_zeroes(
                        self._metadata, offset, stop - offset, unmap=unmap, backed=backed
                    )
            except UnsupportedError:
                if self._header.version < 3:
                    raise
                self._write_zero_bytes(offset, stop - offset)
            offset = stop

    def _write_zeroes_in_part(self, offset: int, length: int, unmap: bool) -> None:
        backed = self._header.backing_file is not None
        with REPORTING, self.bitmaps.recording(offset, length):
            if zeroing.write_zeroes_in_part(
                self.reader, offset, length, unmap=unmap, backed=backed
            ):
                return
        self._write_zero_bytes(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        backed = self._header.backing_file is not None
        keep = self._options.discard_no_unref
        with REPORTING, self.bitmaps.recording(offset, length):
            zeroing.discard(self._metadata, offset, length, backed=backed, keep=keep)

    def _flush(self) -> None:
        with REPORTING:
            self._metadata.flush()

    def _block_status(self, offset: int, length: int) -> Extent:
        with REPORTING:
            return block_status(self.reader, offset, length)

    def _runs(self, offset: int, end: int) -> Iterator[Run]:
        metadata = self._metadata
        plain = metadata.data_file is None and metadata.encryption is None
        if metadata.geometry.extended_l2 or not plain or offset >= end:
            return super()._runs(offset, end)
        return runs(self.reader, offset, end - offset)

    # -- the image -----------------------------------------------------------------------------

    @property
    def has_zero_init(self) -> bool:
        l1 = self._metadata.tables.l1
        if not l1 or not l1[0]:
            return True
        # Preallocated, it may be: then the file's zeroes show, which are not those of a cipher.
        return self._metadata.encryption is None and self._metadata.data.has_zero_init

    @property
    def volatile(self) -> bool:
        """See :class:`Disk`: metadata is kept back until a flush."""
        return self._metadata.dirty or super().volatile

    @property
    def children(self) -> Mapping[str, Disk]:
        children = {"file": self._file}
        if self.reader.backing is not None:
            children["backing"] = self.reader.backing
        if self._metadata.data_file is not None:
            children["data-file"] = self._metadata.data_file
        return children

    @property
    def backing_file(self) -> str | None:
        """The backing file's name as it stands in the image."""
        return self._header.backing_file

    def change_backing_file(self, name: str | None, format: str | None = None) -> None:
        """Have the image name another backing file (None: none), as ``qemu-img rebase -u`` does.

        Only what is written in the image changes: the backing file that is open stays in use
        until :meth:`replace_backing`, and nobody compares the two.
        """
        with self._metadata.exclusive():
            header_update.change_backing_file(self._metadata, name, format)

    def replace_backing(self, backing: Disk | None) -> Disk | None:
        """Read from another backing file, which the image then owns, from now on.

        Returns the former one, which is the caller's then. What is written in the image does not
        change.
        """
        with self._metadata.gate.exclusive():
            return self.reader.replace_backing(backing, self._header.backing_file)

    def ignore_backing(self) -> None:
        """Read zeroes where the backing file's data would show, though the image names one."""
        with self._metadata.gate.exclusive():
            self.reader.replace_backing(None, None)

    def make_empty(self) -> None:
        """Forget all data of this layer, so that the backing file's show (``qemu-img commit``)."""
        from . import emptying

        with self.bitmaps.recording(0, self.size), self._metadata.exclusive():
            emptying.make_empty(self._metadata, alone=not self.snapshots.drafting)

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self._metadata.cluster_size

    @property
    def encryption(self) -> Encryption | None:
        """How the image is encrypted, and the passphrases that open it; None if it is not."""
        return self._metadata.encryption

    def info(self) -> DiskInfo:
        header = self._header
        return DiskInfo(
            format=self.format_name,
            virtual_size=self.size,
            actual_size=self._file.info().actual_size,
            filename=None if self.strong_options else self.filename,
            cluster_size=self._metadata.cluster_size,
            specific={
                **info.specific_facts(header),
                **data_file_info(header),
                **({"bitmaps": self.bitmaps.info()} if len(self.bitmaps) else {}),
                **({"encrypt": self.encryption.info()} if self.encryption is not None else {}),
            },
            dirty=bool(header.incompatible_features & Incompatible.DIRTY),
            encrypted=header.crypt_method is not CryptMethod.NONE,
            backing_filename=header.backing_file,
            backing_format=header.backing_format,
            vm_state_offset=self.vmstate.offset,
            snapshots=info.snapshot_facts(self.snapshots),
        )

    def amend(
        self,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        force: bool = False,
        **options: Any,
    ) -> None:
        """Change options of the image, as ``qemu-img amend`` does; they are AmendOptions'.

        ``progress(done, total)`` is called for each long step. ``force`` allows to change the
        encryption so that nothing can be read any more.
        """
        from . import amend

        amend.amend(
            self._metadata,
            self.snapshots,
            amend.AmendOptions.of(**options),
            resize=lambda size: self.truncate(size, shrink=True),
            progress=progress,
            force=force,
        )

    def check(self, fix: Fix | None = None) -> CheckResult:
        """Compare every refcount and flag with what refers to it, as ``qemu-img check`` does.

        ``fix`` says what is repaired: ``"leaks"``, refcounts that are too high, which is always
        safe; ``"all"``, corruptions, too. Without it nothing is changed.
        """
        from .check import check

        metadata = self._metadata
        if fix not in (None, "leaks", "all"):
            raise ValueError("what is fixed is 'leaks' or 'all'")
        if fix is not None:
            metadata.check_writable(repair=True)
            self._clear_unknown_autoclear()
        with metadata.gate.exclusive():
            if not self.read_only:
                metadata.settle()
                metadata.make_accurate()
            return check(metadata, fix, self.snapshots.rewrite)

    def on_corruption(self, listener: CorruptionListener) -> None:
        """Have ``listener(event)`` called when the image turns out to be corrupt while in use.

        It is called once, in the thread of the request that found it, outside every lock. An image
        that may be written is marked corrupt then, and refuses everything.
        """
        self._metadata.corruption.add_listener(listener)

    # -- life ----------------------------------------------------------------------------------

    def _truncate(self, size: int, preallocation: str) -> None:
        with self._resizing:
            self._resize(size, preallocation)
        self._set_size(self._header.size // layout.SECTOR * layout.SECTOR)

    def _resize(self, size: int, preallocation: str) -> None:
        from . import resize

        backing = self.reader.backing
        metadata, old_size = self._metadata, self._header.size
        self.bitmaps.begin_resize(size)
        reserve = preallocation if preallocation in ("falloc", "full") else "off"
        if size > old_size:
            resize_data_file(metadata, old_size, size, reserve)
        resize.truncate(
            metadata,
            size,
            preallocation,
            backing_size=0 if backing is None else backing.size,
            hide=self._zero_past_end,
            hide_stored=self._zero_stored_past_end,
        )
        if size < old_size:
            resize_data_file(metadata, old_size, size, "off")
        with metadata.exclusive():
            self.bitmaps.end_resize()

    def _zero_past_end(self, offset: int, length: int) -> None:
        """Make a part of the disk's L1 coverage past its end read as zeroes."""
        unit = self._metadata.geometry.subcluster_size
        aligned = -(-offset // unit) * unit
        end = offset + length
        if self._header.version >= 3 and aligned < end:
            self._write_zero_clusters(aligned, end - aligned, unmap=False)
            end = aligned
        self._write_zero_bytes(offset, end - offset)

    def _zero_stored_past_end(self, offset: int, length: int) -> None:
        data = bytearray(length)
        self._readv(offset, [memoryview(data)], length)
        if any(data):
            self._zero_past_end(offset, length)

    def reopen(self, *, read_only: bool) -> None:
        """Change between read-only and read-write, the file below and the data file included.

        What was written is brought to the file before; on the way to read-write the image is read
        anew, so that one which refused to write can be used again. If it fails, the disk is what
        it was.
        """
        if self.closed:
            self._refuse(0, 0)
        if read_only == self.read_only:
            return
        metadata = self._metadata
        with metadata.gate.exclusive():
            if not self.read_only and metadata.health.reason is None:
                metadata.settle()
                self.bitmaps.store()
                metadata.make_accurate()
            with ExitStack() as undo:
                for file in filter(None, (self._file, metadata.data_file)):
                    file.reopen(read_only=read_only)
                    undo.callback(file.reopen, read_only=self.read_only)
                if not read_only:
                    reload(metadata, self.snapshots, opening.refuse_corrupt)
                undo.pop_all()
            self.read_only = metadata.read_only = read_only
            if not read_only:
                self._clear_unknown_autoclear()
            self.bitmaps.reload()
        if not read_only:
            self._repair_if_dirty()
            metadata.lazy = self._options.lazy_refcounts and self._header.version >= 3
        self._set_size(self._header.size // layout.SECTOR * layout.SECTOR)

    def invalidate(self) -> None:
        """Forget everything cached, written or not, and read the header and the tables again.

        A backing file that is named otherwise now is not opened. Raises where the image cannot be
        used any more; the disk then is what it was.
        """
        if self.closed:
            self._refuse(0, 0)
        accept = opening.accept_all if self.read_only else opening.refuse_corrupt
        with self._metadata.gate.exclusive():
            self._file.invalidate()
            reload(self._metadata, self.snapshots, accept)
            self.bitmaps.reload()
        self._set_size(self._header.size // layout.SECTOR * layout.SECTOR)

    def flush_to_os(self) -> None:
        """Bring what is cached to the file, where other programs see it; what is not cached is
        there already.

        The order in which metadata may reach the disk is made by syncs, so this costs them if
        metadata has changed, and nothing if only data was written.
        """
        if self.closed:
            self._refuse(0, 0)
        for _ in range(2):  # the first lowers refcounts of references that were dropped
            if self._metadata.dirty:
                self._metadata.flush()

    @property
    def unflushed(self) -> tuple[str, ...]:
        """The caches of metadata, as QEMU names them, that it could not bring to stable storage:
        those that have changed, and both if the file has something to flush, as far as it knows."""
        metadata = self._metadata
        flushes = getattr(self._file, "flush_due", False)
        if flushes or metadata.tables.cache.dirty or metadata.tables.dirty_l1:
            return "L2 table", "refcount block"
        return ("refcount block",) if metadata.dirty else ()

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
        with self._closing, ExitStack() as stack:
            if self.closed:
                return
            stack.callback(self._file.close)
            if self._metadata.data_file is not None:
                stack.callback(self._metadata.data_file.close)
            stack.callback(self._metadata.close)
            stack.callback(self.snapshots.close_views)
            stack.callback(self._metadata.gate.end)
            self._cleaner.stop()
            try:
                if not self.read_only and self._metadata.health.reason is None:
                    with self._metadata.gate.exclusive():
                        self.snapshots.give_up_drafts()
                        self._metadata.settle()
                        self.bitmaps.store()
                        self._metadata.settle()
                        self._metadata.make_accurate()
                        self._metadata.gate.end()  # before a late request finds a way in
            finally:
                self.closed = True
