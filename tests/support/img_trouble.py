"""pyvirtio-img in a process of its own that is killed, or has no space left, from some call on.

    python img_trouble.py FOLDER CALLS kill|full SUBCOMMAND OPERAND...

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


def _after(left: list[int], call: Callable[..., Any], kill: bool) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*arguments, **named)

    return counted


def trouble(calls: int, kill: bool, words: list[str]) -> int:
    """Run the program; its exit code, if it is not killed."""
    left = [calls]
    for name in ("pwrite", "pwritev", "posix_fallocate"):
        setattr(os, name, _after(left, getattr(os, name), kill))
    if kill:
        for name in ("ftruncate", "fsync", "fdatasync", "replace", "rename", "unlink"):
            setattr(os, name, _after(left, getattr(os, name), kill))
    space.fallocate = _after(left, libc.fallocate, kill)  # type: ignore[attr-defined]
    sys.argv = ["qemu-img", *words]
    return int(main() or 0)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    sys.exit(trouble(int(sys.argv[2]), sys.argv[3] == "kill", sys.argv[4:]))
