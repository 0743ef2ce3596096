"""pyvirtio-img in a process that is killed or interrupted (Ctrl-C), or out of space, from some call
on.

    python img_trouble.py FOLDER CALLS kill|interrupt|full SUBCOMMAND OPERAND...

``CALLS`` calls that change a file go through. Prints nothing itself.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from pyvirtio.backend import libc, space
from pyvirtio.tools.img import main


def _after(left: list[int], call: Callable[..., Any], how: str) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] == -1 and how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if left[0] < 0 and how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*arguments, **named)

    return counted


def trouble(calls: int, how: str, words: list[str]) -> int:
    """Run the program; its exit code, if it is not killed."""
    left = [calls]
    for name in ("pwrite", "pwritev", "posix_fallocate"):
        setattr(os, name, _after(left, getattr(os, name), how))
    if how != "full":
        for name in ("ftruncate", "fsync", "fdatasync", "replace", "rename", "unlink"):
            setattr(os, name, _after(left, getattr(os, name), how))
    space.fallocate = _after(left, libc.fallocate, how)  # type: ignore[attr-defined]
    sys.argv = ["qemu-img", *words]
    return int(main() or 0)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    sys.exit(trouble(int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
