"""Opening and creating disks by name: protocols, probing, and what an image may name itself."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import (
    BackendError,
    ImageError,
    InUseError,
    PassphraseError,
    PyvirtioError,
    UnsupportedError,
)
from .disk import Disk
from .file import CacheMode, DiscardMode, FileDisk, file_identity
from .registry import CERTAIN, PROBE_SIZE, Format, find_format, formats

if TYPE_CHECKING:
    from _typeshed import StrPath

__all__ = ["MAX_CHAIN", "FileReference", "Policy", "as_qemu", "create_disk", "open_disk"]

MAX_CHAIN = 200
"""Files in one backing chain. QEMU has no such limit, and runs out of stack; Python's recursion
limit may be met before."""

_PROTOCOL = re.compile(r"([^/:]*):")

_WARNING = """\
Image format was not specified for '{name}' and probing guessed raw.
Automatically detecting the format is dangerous for raw images, write operations on block 0 will \
be restricted.
Specify the 'raw' format explicitly to remove the restrictions."""


@dataclass(frozen=True, slots=True)
class FileReference:
    """A file that an image names inside itself.

    A format driver fills in the first three; who named it is added on the way to the policy.
    """

    name: str
    """As it stands in the image."""
    format: str | None = None
    """The format the image says it has, if it says."""
    role: str = "backing"
    """``backing`` or ``data-file``."""
    parent: str | None = None
    """File name of the image that names it."""
    depth: int = 0
    """How deep in the chain: 1 for what the image opened by the caller names, and so on."""


Policy = Callable[[FileReference], "Disk | StrPath | None"]
"""Decides about a file that an image names: a Disk to use (the image then owns it), a path to open
instead (taken as it is, with the format named in the image, or probed), or None not to open it."""


# -- opening ---------------------------------------------------------------------------------------


def open_disk(
    source: StrPath | Disk,
    *,
    format: str | None = None,
    read_only: bool = False,
    backing: Policy | None = None,
    cache: CacheMode = "writeback",
    locking: bool = True,
    discard: DiscardMode = "unmap",
    **options: Any,
) -> Disk:
    """Open a disk image.

    ``source`` is a path (as a string also with QEMU's ``file:`` prefix) or a Disk that holds the
    image, which the result then owns. Without ``format`` the image's first bytes decide. Files that
    the image names are opened read-only as QEMU does, unless the policy ``backing`` decides
    otherwise. ``cache``, ``locking`` and ``discard`` are FileDisk's, ``options`` the format's.

    Raises BackendError, InUseError, ImageError or UnsupportedError, with QEMU's messages.
    """
    opener = _Opener(backing or as_qemu, cache, locking, discard, read_only)
    if isinstance(source, Disk):
        return opener.open_image(source, format, options)
    return opener.open_path(_path_of(source), format, options)


@dataclass(frozen=True, slots=True)
class _Opener:
    """How files are opened for one image, and which files lead to it."""

    policy: Policy
    cache: CacheMode
    locking: bool
    discard: DiscardMode
    read_only: bool
    parent: str | None = None
    chain: tuple[tuple[int, int], ...] = ()
    """The identities of the files from the first image down to the one that names the next."""
    depth: int = 0

    def open_path(self, path: str, format: str | None, options: dict[str, Any]) -> Disk:
        """Open the image at ``path``."""
        file = self.open_file(path)
        try:
            return self.open_image(file, format, options)
        except BaseException:
            file.close()
            raise

    def open_file(self, path: str) -> FileDisk:
        """Open the file at ``path``; it must not be one of those that lead here."""
        # Looked at before it is opened: our own lock would refuse it with the wrong reason.
        if self.chain:
            try:
                identity = file_identity(os.stat(path))
            except (OSError, ValueError):
                pass  # opening it says what is wrong
            else:
                self._check_loop(path, identity)
        file = FileDisk(
            path,
            read_only=self.read_only,
            cache=self.cache,
            locking=self.locking,
            discard=self.discard,
            growable=True,
        )
        try:
            self._check_loop(path, file.identity)
        except BaseException:
            file.close()
            raise
        return file

    def open_image(self, file: Disk, format: str | None, options: dict[str, Any]) -> Disk:
        """Open the image in ``file``."""
        probed = format is None
        kind = probe(file) if format is None else find_format(format)
        read_only = self.read_only or file.read_only
        if probed and kind.name == "raw":
            options = {**options, "probed": True}
            if not read_only:
                warnings.warn(_WARNING.format(name=file.filename), UserWarning, stacklevel=4)
        identity = (file.identity,) if isinstance(file, FileDisk) else ((-2, id(file)),)
        below = replace(
            self,
            parent=file.filename,
            chain=self.chain + identity,
            depth=self.depth + 1,
            read_only=read_only,
        )
        return kind.open(file, read_only=read_only, policy=below.resolve, **options)

    def resolve(self, reference: FileReference) -> Disk | None:
        """Open what the image names, if the policy wants it; None if it does not."""
        reference = replace(reference, parent=self.parent, depth=self.depth)
        if len(self.chain) >= MAX_CHAIN:
            raise ImageError(
                f"The backing chain is longer than {MAX_CHAIN} files",
                field="backing file",
                value=reference.name,
                limit=MAX_CHAIN,
            )
        try:
            decision = self.policy(reference)
            if decision is None or isinstance(decision, Disk):
                return decision
            path = os.fsdecode(decision)
            if reference.role == "data-file":  # QEMU opens this as a bare file, too
                return self.open_file(path)
            if reference.format is not None:
                try:
                    find_format(reference.format)
                except ValueError as error:
                    raise UnsupportedError(str(error), feature=reference.format) from None
            return replace(self, read_only=True).open_path(path, reference.format, {})
        except RecursionError:
            if self.depth > 1:
                raise  # told where the stack is short again
            raise ImageError(
                "The backing chain is too long for Python's recursion limit",
                field="backing file",
                value=reference.name,
                limit=sys.getrecursionlimit(),
            ) from None
        except PyvirtioError as error:
            role = "backing file" if reference.role == "backing" else reference.role
            _raise_prefixed(f"Could not open {role}: ", error)

    def _check_loop(self, path: str, identity: tuple[int, int]) -> None:
        if identity in self.chain:
            raise ImageError(
                f"'{path}' is already part of this backing chain: it is a loop",
                field="backing file",
                value=path,
            )


def probe(file: Disk) -> Format:
    """The format of the image in ``file``: the one that is surest of its first bytes."""
    start = file.read(0, min(PROBE_SIZE, file.size))
    best, sure = None, -1
    for kind in formats():
        certainty = kind.probe(start)
        if certainty > sure:
            best, sure = kind, certainty
        if sure >= CERTAIN:
            break  # others are not even looked for
    if best is None:
        raise UnsupportedError("No image format is registered")
    return best


def _raise_prefixed(prefix: str, error: PyvirtioError) -> NoReturn:
    """Raise the same error with words before its message."""
    if isinstance(error, InUseError):
        raise InUseError(prefix + str(error.strerror), error.filename) from error
    if isinstance(error, OSError):
        number = error.errno or errno.EIO
        raise BackendError(number, prefix + str(error.strerror), error.filename) from error
    if isinstance(error, ImageError):
        raise ImageError(
            prefix + str(error), field=error.field, value=error.value, limit=error.limit
        ) from error
    if isinstance(error, UnsupportedError):
        raise UnsupportedError(prefix + str(error), feature=error.feature) from error
    if isinstance(error, PassphraseError):
        raise PassphraseError(prefix + str(error)) from error
    raise error


# -- names -----------------------------------------------------------------------------------------


def as_qemu(reference: FileReference) -> str:
    """The default policy: what QEMU would open."""
    name = reference.name
    if not name or "\0" in name:
        raise ImageError(
            f"Invalid {reference.role} file name", field=f"{reference.role} file", value=name
        )
    if _PROTOCOL.match(name) or reference.role == "data-file":
        return _strip_protocol(name)  # not relative to the image, in QEMU
    if os.path.isabs(name):
        return name
    if reference.parent is None:
        raise ImageError(
            f"Cannot resolve the relative file name '{name}': the image has no file name itself",
            field=f"{reference.role} file",
            value=name,
        )
    return os.path.join(os.path.dirname(reference.parent), name)


def _path_of(source: StrPath) -> str:
    """The path that a caller means: strings are QEMU's file names, path objects are paths."""
    return _strip_protocol(source) if isinstance(source, str) else os.fsdecode(source)


def _strip_protocol(name: str) -> str:
    match = _PROTOCOL.match(name)
    if match is None:
        return name
    if match[1] != "file":
        raise UnsupportedError(f"Unknown protocol '{match[1]}'", feature=match[1])
    return name[len("file:") :]


# -- creating --------------------------------------------------------------------------------------


def create_disk(
    target: StrPath | Disk,
    size: int,
    *,
    format: str = "qcow2",
    backing: Policy | None = None,
    cache: CacheMode = "writeback",
    locking: bool = True,
    discard: DiscardMode = "unmap",
    **options: Any,
) -> Disk:
    """Create an empty image of ``size`` bytes and open it.

    ``target`` is a path, or a growable Disk, which the result then owns. ``options`` are the
    format's for creating. An image that is there already is replaced, if nobody uses it, once the
    new one is complete: if it fails the old one is still there, and nothing half-made.
    """
    if size < 0:
        raise ValueError(f"a disk cannot have {size} bytes")
    kind = find_format(format)
    if kind.create is None:
        raise UnsupportedError(f"Format driver '{format}' does not support image creation")
    opener = _Opener(backing or as_qemu, cache, locking, discard, read_only=False)
    shared = {name: options[name] for name in kind.shared_options if name in options}
    if isinstance(target, Disk):
        kind.create(target, size, **options)
        return opener.open_image(target, format, shared)
    path = _path_of(target)

    def make(name: str) -> FileDisk:
        return FileDisk.create(name, cache=cache, locking=locking, discard=discard, growable=True)

    with ExitStack() as cleanup:
        old = _replaceable(path, locking)
        if old is not None:
            cleanup.callback(old.close)
            new_name = _name_beside(path)
            cleanup.callback(_unlink, new_name)
            file = make(new_name)
        else:
            is_new = not os.path.exists(path)
            file = make(path)
            if is_new:
                cleanup.callback(_unlink, path)
        cleanup.callback(file.close)
        file.filename = path  # what it names itself is relative to this
        kind.create(file, size, **options)
        disk = opener.open_image(file, format, shared)
        if old is not None:
            cleanup.callback(disk.close)
            disk.flush()
            _move(new_name, os.path.realpath(path))
            old.close()
        cleanup.pop_all()
        return disk


def _replaceable(path: str, locking: bool) -> FileDisk | None:
    """The file that a new one shall replace, locked against everybody.

    None if nothing is there, or nothing worth saving, or if it can only be overwritten: another
    name (a hard link) leads to it, or its folder takes no new file.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    folder = os.path.dirname(os.path.realpath(path))
    if (
        not stat.S_ISREG(status.st_mode)
        or not status.st_size
        or status.st_nlink > 1
        or not os.access(folder, os.W_OK | os.X_OK)
    ):
        return None
    return FileDisk(path, locking=locking)


def _name_beside(path: str) -> str:
    """A new empty file in the folder of the old one, with its mode and owner."""
    path = os.path.realpath(path)
    name = f"{path}.{os.urandom(8).hex()}"
    try:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BackendError.wrap(error, f"Could not create '{path}'", path) from error
    try:
        status = os.stat(path)
        with suppress(PermissionError):
            os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
    finally:
        os.close(fd)
    return name


def _move(source: str, target: str) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        raise BackendError.wrap(error, f"Could not replace '{target}'", target) from error


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
