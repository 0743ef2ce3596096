"""Locks on image files that QEMU understands and respects (its block/file-posix.c).

QEMU describes the use of an image by permissions, one bit each. For a permission it uses it holds
a *read* lock on byte 100 + bit of the file, for one it does not share with others a read lock on
byte 200 + bit. Read locks never conflict: a conflict is found by asking afterwards whether
somebody else holds a lock on the opposite byte. The locks are OFD locks: they belong to the open
file, so that two opens in one process see each other.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Iterator
from enum import IntFlag
from typing import NoReturn

from ..errors import InUseError

__all__ = ["FileLocks", "Permission", "permissions_for"]

_USED_BASE = 100
_UNSHARED_BASE = 200

_FLOCK = struct.Struct("@hhqqi4x")
"""struct flock: l_type, l_whence, l_start, l_len, l_pid. OFD locks want l_pid to be 0."""


class Permission(IntFlag):
    """QEMU's ``BLK_PERM_*``."""

    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8


_NAMES = {
    Permission.CONSISTENT_READ: "consistent read",
    Permission.WRITE: "write",
    Permission.WRITE_UNCHANGED: "write unchanged",
    Permission.RESIZE: "resize",
}


def permissions_for(read_only: bool, force_share: bool = False) -> tuple[Permission, Permission]:
    """What an image that is open needs, and what it cannot have others do meanwhile: nothing,
    with ``force_share``."""
    used = Permission.CONSISTENT_READ
    if not read_only:
        used |= Permission.WRITE | Permission.RESIZE
    return used, Permission(0) if force_share else Permission.WRITE | Permission.RESIZE


class FileLocks:
    """The locks held through one file descriptor."""

    def __init__(self, fd: int, filename: str) -> None:
        self._fd = fd
        self.filename = filename
        self._held: set[int] = set()

    def acquire(self, used: Permission, unshared: Permission) -> None:
        """Change to these permissions. Raises InUseError (and keeps the old ones) if refused.

        Where the host cannot lock files at all nothing is locked, as with QEMU's
        ``locking=auto``.
        """
        if not self._supported():
            return
        before = set(self._held)
        wanted = {_USED_BASE + bit for bit, _ in _bits(used)}
        wanted |= {_UNSHARED_BASE + bit for bit, _ in _bits(unshared)}
        try:
            self._hold(before | wanted)
            self._check(used, unshared)
        except OSError:
            self._hold(before)
            raise
        self._hold(wanted)

    def copy_to(self, fd: int) -> None:
        """Take the same locks through another open file on the same image, asking nobody.

        The two conflict with each other, not with anyone else: the first is about to be closed.
        """
        FileLocks(fd, self.filename)._hold(self._held)

    def _supported(self) -> bool:
        try:
            _is_locked(self._fd, 0, 0)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return False
            raise
        return True

    def _hold(self, wanted: set[int]) -> None:
        """Hold read locks on exactly these bytes."""
        for byte in sorted(wanted - self._held):
            try:
                _set(self._fd, byte, fcntl.F_RDLCK)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    self._refuse(f"Failed to lock byte {byte}")
                raise
            self._held.add(byte)
        for byte in sorted(self._held - wanted):
            _set(self._fd, byte, fcntl.F_UNLCK)
            self._held.discard(byte)

    def _check(self, used: Permission, unshared: Permission) -> None:
        for bit, permission in _bits(used):
            if _is_locked(self._fd, _UNSHARED_BASE + bit, 1):
                self._refuse(f'Failed to get "{_NAMES[permission]}" lock')
        for bit, permission in _bits(unshared):
            if _is_locked(self._fd, _USED_BASE + bit, 1):
                self._refuse(f'Failed to get shared "{_NAMES[permission]}" lock')

    def _refuse(self, message: str) -> NoReturn:
        hint = f"Is another process using the image [{self.filename}]?"
        raise InUseError(f"{message}\n{hint}", self.filename)


def _bits(permissions: Permission) -> Iterator[tuple[int, Permission]]:
    for bit, permission in enumerate(_NAMES):
        if permission & permissions:
            yield bit, permission


def _set(fd: int, start: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, start, 1, 0))


def _is_locked(fd: int, start: int, length: int) -> bool:
    """True if somebody else holds a lock there."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, 0, start, length, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
