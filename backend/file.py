"""A file or device of the host as a Disk (QEMU's ``file`` and ``host_device``)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
import threading
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self

from ..errors import BackendError, InUseError, UnsupportedError
from .buffers import clear, split
from .direct import DirectTransfer
from .disk import Disk, DiskInfo, Extent, Limits
from .locks import FileLocks, permissions_for
from .space import Space, device_sector_size
from .transfer import read_some, write_all

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath, WriteableBuffer

__all__ = ["CacheMode", "DiscardMode", "FileDisk"]

CacheMode = Literal["writeback", "none", "unsafe"]
"""``none`` bypasses the host's page cache; ``unsafe`` ignores flushes."""

DiscardMode = Literal["unmap", "ignore"]
"""What becomes of discards: space is given back to the host, or nothing happens."""

_BASE_FLAGS = os.O_CLOEXEC | os.O_NOCTTY
_NO_STRAIGHT = -1
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000

_FIRST_BLOCK = 4096


class FileDisk(Disk):
    """A regular file, a block device or, as QEMU has it, a character device.

    ``size`` is the exact length in bytes. ``growable`` is for a file below a format, see
    :attr:`Disk.growable`; a device never grows. ``locking`` takes the locks that QEMU takes
    for such a use of an image: writing excludes everybody else, reading excludes writers, unless
    with ``force_share``, which bears everything.

    Raises BackendError with QEMU's message if the file cannot be opened, InUseError if it is
    locked.
    """

    format_name = "file"

    def __init__(
        self,
        path: StrPath,
        *,
        read_only: bool = False,
        cache: CacheMode = "writeback",
        locking: bool = True,
        discard: DiscardMode = "unmap",
        growable: bool = False,
        force_share: bool = False,
    ) -> None:
        _check_modes(cache, discard)
        self._path = os.fsdecode(path)
        self._direct: DirectTransfer | None = None
        self._straight_read_end = self._straight_write_end = _NO_STRAIGHT
        self._fd = fd = _open(self._path, read_only, cache)
        try:
            self._setup(fd, read_only, cache, locking, discard, growable, force_share)
        except BaseException:
            self._fd = -1
            os.close(fd)
            raise

    def _setup(
        self,
        fd: int,
        read_only: bool,
        cache: CacheMode,
        locking: bool,
        discard: DiscardMode,
        growable: bool,
        force_share: bool,
    ) -> None:
        self._is_device = _kind_checked(os.fstat(fd), self._path)
        self._cache: CacheMode = cache
        self._locking = locking
        self.discard_mode: DiscardMode = discard
        """Whether the host hears of discards."""
        self.growable = growable and not self._is_device
        self._grow_lock = threading.Lock()
        self._cache_lost: BackendError | None = None
        self._flushing = threading.Lock()
        self._unflushed = True
        """Something may not be on stable storage: at first, what others have written before. Set
        once a write is done, for then a flush that has begun before need not have met it."""
        self._locks = FileLocks(fd, self._path)
        self._force_share = force_share
        if locking:
            try:
                self._locks.acquire(*permissions_for(read_only, force_share))
            except InUseError:
                raise
            except OSError as error:
                raise BackendError.wrap(error, f"Could not lock '{self._path}'") from error
        self._space = Space(fd, block_device=self._is_device)
        sector = device_sector_size(fd) if self._is_device else None
        if cache == "none":
            self._direct = DirectTransfer(fd, sector_size=sector)
        alignment = self._direct.alignment if self._direct else 1
        limits = Limits(
            request_alignment=alignment,
            write_zeroes_alignment=sector or alignment,
            discard_alignment=sector or alignment,
        )
        if self._is_device:
            self.format_name = "host_device"
        super().__init__(os.lseek(fd, 0, os.SEEK_END), read_only=read_only, limits=limits)
        self._aim()

    @classmethod
    def create(
        cls,
        path: StrPath,
        size: int = 0,
        *,
        preallocation: str = "off",
        mode: int = 0o644,
        exclusive: bool = False,
        **options: Any,
    ) -> Self:
        """Make a file of ``size`` zero bytes (or empty the one that is there) and open it.

        An existing file is emptied only once it is locked; with ``exclusive`` there must be none.
        If it fails, a file that was not there before is not there after. ``options`` are the
        constructor's.
        """
        name = os.fsdecode(path)
        _check_preallocation(preallocation)
        flags = os.O_RDWR | os.O_CREAT | _BASE_FLAGS
        try:
            os.close(os.open(name, flags | os.O_EXCL, mode))
            made = True
        except FileExistsError as error:
            if exclusive:
                raise BackendError.wrap(error, f"Could not create '{name}'", name) from error
            made = False
        except OSError as error:
            raise BackendError.wrap(error, f"Could not create '{name}'", name) from error
        if os.path.isdir(name):
            reason = IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
            raise BackendError.wrap(reason, f"Could not create '{name}'", name)
        if not made and not os.path.exists(name):  # a symbolic link to what is not there yet
            try:
                os.close(os.open(name, flags, mode))
            except OSError as error:
                raise BackendError.wrap(error, f"Could not create '{name}'", name) from error
        try:
            disk = cls(name, **options)
            try:
                if not disk._is_device:
                    disk.truncate(0, shrink=True)
                    disk.truncate(size, preallocation=preallocation)
                elif disk.size < size:
                    raise BackendError(errno.EINVAL, "Cannot grow device files", name)
            except BaseException:
                disk.close()
                raise
        except BaseException:
            if made:
                with suppress(FileNotFoundError):
                    os.unlink(name)
            raise
        return disk

    # -- reading and writing -------------------------------------------------------------------
    # The two public methods are overridden for speed alone: memoryviews inside the file, as nearly
    # every request of a guest, go to the system call with one comparison.

    def readv(self, offset: int, buffers: Iterable[WriteableBuffer]) -> None:
        """See :meth:`Disk.readv`."""
        views: list[Any] = buffers if type(buffers) is list else list(buffers)
        try:
            length = views[0].nbytes if len(views) == 1 else sum([view.nbytes for view in views])
            if (
                offset + length <= self._straight_read_end
                and offset >= 0
                and os.preadv(self._fd, views, offset) == length
            ):
                return
        except (AttributeError, BufferError, OSError):
            pass  # the long way takes any buffers, and finds out again what to say of an error
        super().readv(offset, views)

    def writev(self, offset: int, buffers: Iterable[ReadableBuffer], *, fua: bool = False) -> None:
        """See :meth:`Disk.writev`."""
        views: list[Any] = buffers if type(buffers) is list else list(buffers)
        try:
            length = views[0].nbytes if len(views) == 1 else sum([view.nbytes for view in views])
            if (
                offset + length <= self._straight_write_end
                and offset >= 0
                and not fua
                and self.detect_zeroes == "off"
                and os.pwritev(self._fd, views, offset) == length
            ):
                self._unflushed = True
                return
        except (AttributeError, BufferError, OSError):
            pass
        super().writev(offset, views, fua=fua)

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        try:
            if self._direct is not None:
                self._direct.readv(offset, views, length)
                return
            done = read_some(self._fd, offset, views, length)
        except OSError as error:
            raise self._failed(error, f"Could not read {length} bytes at {offset}") from error
        except BufferError as error:
            raise TypeError("the buffers of a read must be writable") from error
        if done < length:  # the file is shorter than it was: QEMU reads zeroes there, too
            clear(split(views, done, length - done))

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        try:
            if self._direct is not None:
                self._direct.writev(offset, views, length)
            else:
                write_all(self._fd, offset, views, length)
        except OSError as error:
            raise self._failed(error, f"Could not write {length} bytes at {offset}") from error
        finally:
            self._unflushed = True
        self._reached(offset + length)

    # -- space ---------------------------------------------------------------------------------

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        unmap = unmap and self.discard_mode == "unmap"
        # Past the end of the file only space that is to be given back is left a hole.
        zeroed = max(0, min(length, self.size - offset)) if unmap else length
        try:
            if zeroed:
                if self._direct is not None:
                    with self._direct.lock.shared():
                        self._space.zero(offset, zeroed, unmap=unmap)
                else:
                    self._space.zero(offset, zeroed, unmap=unmap)
        except OSError as error:
            raise self._failed(error, f"Could not zero {length} bytes at {offset}") from error
        finally:
            self._unflushed = True
        if zeroed < length:
            # Past the end there is nothing yet; one byte makes the file reach so far, and unlike
            # ftruncate it can never cut off what another thread is appending.
            self._writev(offset + length - 1, [memoryview(b"\0")], 1)
        else:
            self._reached(offset + length)

    def _discard(self, offset: int, length: int) -> None:
        if self.discard_mode == "ignore":
            return
        try:
            if self._direct is not None:
                with self._direct.lock.shared():
                    self._space.discard(offset, length)
            else:
                self._space.discard(offset, length)
        except OSError as error:
            raise self._failed(error, f"Could not discard {length} bytes at {offset}") from error
        finally:
            self._unflushed = True

    def _block_status(self, offset: int, length: int) -> Extent:
        if self._is_device:
            run_end, data = offset + length, True
        else:
            data, run_end = self._space.run_at(offset, self.size)
        return Extent(
            max(1, min(length, run_end - offset)),
            data=data,
            zero=not data,
            allocated=True,
            host_offset=offset,
            file=self,
        )

    @property
    def has_zero_init(self) -> bool:
        """True for a file; a new device may hold anything."""
        return not self._is_device

    @property
    def filename(self) -> str:
        """The path as it was given; to be set if the file has been moved."""
        return self._path

    @filename.setter
    def filename(self, path: str) -> None:
        self._path = self._locks.filename = path

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode (for a block device: its number), the same for every name of it."""
        return file_identity(os.fstat(self._fd))

    def info(self) -> DiskInfo:
        """Facts about the file, with the space it really takes."""
        if self.closed:
            self._refuse(0, 0)
        blocks = os.fstat(self._fd).st_blocks
        return DiskInfo(
            format=self.format_name,
            virtual_size=self.size,
            actual_size=blocks * 512,
            filename=self._path,
        )

    def set_nocow(self) -> None:
        """Ask the file system to write this empty file in place (btrfs's ``chattr +C``).

        One that cannot is left as it is, as QEMU does.
        """
        with suppress(OSError):
            flags = bytearray(8)
            fcntl.ioctl(self._fd, _FS_IOC_GETFLAGS, flags)
            value = int.from_bytes(flags[:4], sys.byteorder) | _FS_NOCOW_FL
            fcntl.ioctl(self._fd, _FS_IOC_SETFLAGS, value.to_bytes(8, sys.byteorder))

    # -- life ----------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._cache != "unsafe":
            with self._flushing:  # who finds nothing to flush has waited for the one who is at it
                self._sync()

    def _sync(self) -> None:
        """Have on stable storage what was written, if anything was since the last time (with
        ``_flushing`` held)."""
        if self._cache_lost is not None:
            lost = self._cache_lost
            raise BackendError(lost.errno, lost.strerror, self._path) from lost
        if not self._unflushed:
            return
        self._unflushed = done = False
        try:
            os.fdatasync(self._fd)
            done = True
        except OSError as error:
            failure = self._failed(error, "Could not flush")
            if self._direct is None:
                # The kernel has marked the pages clean: a second fdatasync would claim success
                # for data that is lost. So nothing is stable any more until the file is reopened.
                self._cache_lost = failure
            raise failure from error
        finally:
            if not done:
                self._unflushed = True

    def _truncate(self, size: int, preallocation: str) -> None:
        _check_preallocation(preallocation)
        if self._is_device:
            self._truncate_device(size, preallocation)
            return
        old = self.size
        if preallocation != "off" and size < old:
            raise UnsupportedError(
                "Cannot use preallocation for shrinking files", feature="preallocation"
            )
        try:
            if self._direct is not None:
                with self._direct.lock.alone():
                    self._resize(old, size, preallocation)
            else:
                self._resize(old, size, preallocation)
        except OSError as error:
            raise self._failed(error, f"Could not resize file to {size} bytes") from error
        finally:
            self._unflushed = True
        self._set_size(size)

    def _resize(self, old: int, size: int, preallocation: str) -> None:
        if preallocation == "off" or size == old:
            os.ftruncate(self._fd, size)
            if size and not old and self._direct is None:
                # As QEMU does: who probes for the alignment that direct access needs finds a block
                # that is there (some file systems let anything pass in a hole).
                self._space.fill(0, min(size, _FIRST_BLOCK))
            return
        try:
            if preallocation == "falloc":
                self._space.reserve(old, size - old)
            elif self._direct is not None:
                # This descriptor takes only aligned writes; the file system can do it itself.
                self._space.reserve(old, size - old)
                self._space.zero(old, size - old, unmap=False)
            else:
                os.ftruncate(self._fd, size)
                self._space.fill(old, size - old)
                self._unflushed = True
                with self._flushing:
                    self._sync()
        except (OSError, UnsupportedError):
            os.ftruncate(self._fd, old)
            raise

    def _truncate_device(self, size: int, preallocation: str) -> None:
        if preallocation != "off":
            raise UnsupportedError(
                f"Preallocation mode '{preallocation}' unsupported for this non-regular file",
                feature="preallocation",
            )
        if size > self.size:
            raise BackendError(errno.EINVAL, "Cannot grow device files", self._path)
        # A device stays as long as it is; that is what QEMU does.

    def reopen(self, *, read_only: bool) -> None:
        """Change between read-only and read-write, and with it the locks.

        A flush that failed before is forgotten: the caller takes what the file now holds.
        Raises BackendError or InUseError, and then nothing has changed.
        """
        if self.closed:
            self._refuse(0, 0)
        if not self.read_only and self._cache_lost is None:
            self._flush()
        try:
            fd = _reopen(self._fd, self._path, read_only, self._cache)
        except OSError as error:
            raise self._failed(error, f"Could not reopen '{self._path}'") from error
        try:
            if self._locking:
                self._locks.acquire(*permissions_for(read_only, self._force_share))
                self._locks.copy_to(fd)
            # The number of the descriptor stays and the change is atomic: requests under way go
            # on with the file as it was open before.
            os.dup2(fd, self._fd, inheritable=False)
        except OSError as error:
            if self._locking:
                self._locks.acquire(*permissions_for(self.read_only, self._force_share))
            if isinstance(error, InUseError):
                raise
            raise self._failed(error, f"Could not reopen '{self._path}'") from error
        finally:
            os.close(fd)
        self.read_only = read_only
        self._cache_lost = None
        self._unflushed = True
        self._aim()

    def invalidate(self) -> None:
        """Take note of a size that somebody else has changed."""
        if self.closed:
            self._refuse(0, 0)
        self._set_size(os.lseek(self._fd, 0, os.SEEK_END))

    def _close(self) -> None:
        self._straight_read_end = self._straight_write_end = _NO_STRAIGHT
        fd, self._fd = self._fd, -1
        os.close(fd)

    def __del__(self) -> None:
        # A disk that was forgotten must not keep its image locked.
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            self._fd = -1
            os.close(fd)
            message = f"unclosed disk {self._path!r}"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def _set_size(self, size: int) -> None:
        super()._set_size(size)
        self._aim()

    # -- help for the above --------------------------------------------------------------------

    def _aim(self) -> None:
        """Note up to where a request may go straight to the system call."""
        straight = self._direct is None and not self.closed
        self._straight_read_end = self.size if straight else _NO_STRAIGHT
        self._straight_write_end = self.size if straight and not self.read_only else _NO_STRAIGHT

    def _reached(self, end: int) -> None:
        """A write has reached ``end``; the file is at least so long."""
        if end > self.size:
            with self._grow_lock:
                if end > self.size:
                    self._set_size(end)

    def _failed(self, error: OSError, doing: str) -> BackendError:
        return BackendError.wrap(error, doing, self._path)


def file_identity(status: os.stat_result) -> tuple[int, int]:
    """What tells whether two names mean one file."""
    if stat.S_ISBLK(status.st_mode):
        return (-1, status.st_rdev)
    return (status.st_dev, status.st_ino)


def is_device(mode: int) -> bool:
    """True for a device that a disk can be in: for QEMU that is a character device, too."""
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)


def _check_modes(cache: str, discard: str) -> None:
    if cache not in ("writeback", "none", "unsafe"):
        raise ValueError(f"Invalid cache option: {cache}")
    if discard not in ("unmap", "ignore"):
        raise ValueError(f"Invalid discard option: {discard}")


def _check_preallocation(mode: str) -> None:
    if mode not in ("off", "metadata", "falloc", "full"):
        raise ValueError(f"invalid parameter value: {mode}")
    if mode == "metadata":
        raise UnsupportedError(f"Unsupported preallocation mode: {mode}", feature="preallocation")


def _kind_checked(status: os.stat_result, path: str) -> bool:
    """True for a device, False for a regular file; anything else raises BackendError."""
    if stat.S_ISREG(status.st_mode):
        return False
    if is_device(status.st_mode):
        return True
    number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
    raise BackendError(number, f"'file' driver requires '{path}' to be a regular file", path)


def _flags(read_only: bool, cache: str) -> int:
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | _BASE_FLAGS
    return flags | os.O_DIRECT if cache == "none" else flags


def _open(path: str, read_only: bool, cache: str) -> int:
    try:
        # Asked before opening, since opening alone has effects on some devices. What passes and
        # then turns out to be a pipe is not waited for.
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode) and not read_only:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        blocking = _kind_checked(status, path) and stat.S_ISBLK(status.st_mode)
        return os.open(path, _flags(read_only, cache) | (0 if blocking else os.O_NONBLOCK))
    except BackendError:
        raise
    except OSError as error:
        if cache == "none" and error.errno == errno.EINVAL:
            raise BackendError(
                errno.EINVAL,
                f"Could not open '{path}': filesystem does not support O_DIRECT",
                path,
            ) from error
        raise BackendError.wrap(error, f"Could not open '{path}'", path) from error
    except ValueError as error:  # a NUL in the name
        raise BackendError(errno.EINVAL, f"Could not open {path!r}: {error}", path) from error


def _reopen(fd: int, path: str, read_only: bool, cache: str) -> int:
    """Another open file on the file that ``fd`` is open on, whatever its name is now."""
    flags = _flags(read_only, cache) | os.O_NONBLOCK
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    except FileNotFoundError:  # no /proc here: by name, if that is still the same file
        other = os.open(path, flags)
    if file_identity(os.fstat(other)) != file_identity(os.fstat(fd)):
        os.close(other)
        raise FileNotFoundError(errno.ENOENT, "another file has that name now", path)
    return other
