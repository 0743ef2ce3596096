"""A UNIX socket that listens at a path, which is left as it was found."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress

__all__ = ["UnixListener"]


class UnixListener:
    """Listens at ``path``; ``backlog`` may wait to be accepted.

    A socket that is left there by a server that has died is replaced; what is no socket, or has
    somebody listening, is not. Raises OSError.
    """

    def __init__(self, path: str, backlog: int = 1) -> None:
        if not path:  # the kernel would choose a name
            raise OSError(errno.ENOENT, "A socket needs a path", path)
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            try:
                self.socket.bind(path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not _is_left_over(path):
                    raise
                os.unlink(path)
                self.socket.bind(path)
            self._identity: tuple[int, int] | None = _identity(path)
            self.socket.listen(backlog)
        except OSError as error:
            self.socket.close()
            number, text = error.errno or errno.EINVAL, error.strerror or str(error)
            raise OSError(number, text, path) from error

    def close(self) -> None:
        """Listen no more; the socket is taken away, if it still is this one."""
        identity, self._identity = self._identity, None
        with suppress(OSError):
            if identity is not None and _identity(self.path) == identity:
                os.unlink(self.path)
        self.socket.close()


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_left_over(path: str) -> bool:
    """Whether there is a socket that nobody listens at."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
