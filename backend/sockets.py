"""Listening at UNIX sockets."""

from __future__ import annotations

import errno
import os
import socket
import stat

__all__ = ["listen_at"]


def listen_at(path: str, backlog: int = 1) -> socket.socket:
    """A socket that listens at ``path``, where one that a dead server has left is replaced.

    Raises OSError.
    """
    if not path:
        raise OSError(errno.ENOENT, "A socket needs a path", path)  # the kernel would choose a name
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_over(path):
                raise
            os.unlink(path)
            listener.bind(path)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise OSError(error.errno or errno.EINVAL, error.strerror or str(error), path) from error
    return listener


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
