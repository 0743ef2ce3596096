"""Where servers listen: sockets of their own, or some that a service manager has passed."""

from __future__ import annotations

import os
import socket
import stat

__all__ = ["passed_sockets"]

_FIRST_PASSED_FD = 3
"""Where the sockets begin that a service manager passes (sd_listen_fds)."""


def passed_sockets() -> list[socket.socket]:
    """The sockets that a service manager listens at for us; they go on listening after us.

    Raises ValueError if what was passed is something else.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    if not count.isdecimal():
        raise ValueError(f"LISTEN_FDS is no number: '{count}'")
    sockets = []
    for number in range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(count)):
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                raise ValueError(f"the file descriptor {number} is no socket")
        except OSError:
            raise ValueError(f"the file descriptor {number} was not passed") from None
        passed = socket.socket(fileno=number)
        if not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError(f"nobody listens at the socket {number}")
        sockets.append(passed)
    return sockets
