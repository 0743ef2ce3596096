"""Vectored reads and writes of any length and any number of buffers on a file descriptor.

EINTR needs no care here: Python's os module retries (PEP 475).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from .buffers import split

__all__ = ["read_some", "write_all"]

_IOV_MAX = os.sysconf("SC_IOV_MAX") if "SC_IOV_MAX" in os.sysconf_names else 1024
if _IOV_MAX <= 0:  # "no limit"
    _IOV_MAX = 1024


def read_some(fd: int, offset: int, views: Sequence[memoryview], length: int) -> int:
    """Fill ``views`` (``length`` bytes together) up to the end of the file; bytes read."""
    if len(views) > _IOV_MAX:
        views = [view for view in views if len(view)]  # else a batch of empty ones looks like EOF
    done = os.preadv(fd, views[:_IOV_MAX], offset)
    while 0 < done < length:
        got = os.preadv(fd, split(views, done, length - done)[:_IOV_MAX], offset + done)
        if not got:
            break
        done += got
    return done


def write_all(fd: int, offset: int, views: Sequence[memoryview], length: int) -> None:
    """Write all of ``views`` (``length`` bytes together)."""
    if len(views) > _IOV_MAX:
        views = [view for view in views if len(view)]
    done = os.pwritev(fd, views[:_IOV_MAX], offset)
    while done < length:
        put = os.pwritev(fd, split(views, done, length - done)[:_IOV_MAX], offset + done)
        if not put:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += put
