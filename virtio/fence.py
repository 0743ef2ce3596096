"""The one full memory fence of this package.

A driver that runs on another CPU (a hypervisor's guest, another process) and this device each
store one index and then look at the other's: without a full fence (store, then load) both may see
the old value, and an interrupt or a kick is lost (virtio 1.4 §2.7.13.4.1, §2.7.22.3).

CPython has no fence of its own, but its locks do: taking and giving back ``threading.Lock`` is an
atomic read-modify-write on memory (a POSIX semaphore up to Python 3.13, a PyMutex from 3.14). On
x86 one locked instruction is a full fence. On ARMv8, releasing is a store-release and taking a
load-acquire, and a load-acquire is never done before an earlier store-release: what is needed is
*release, then acquire*, so the lock is gone through twice.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from threading import Lock

__all__ = ["make_fence"]


def make_fence() -> Callable[[], None]:
    """A function that is a full memory fence. Each user has its own, so that none waits."""
    lock = Lock()
    acquire = lock.acquire
    release = lock.release

    def once() -> None:
        acquire()
        release()

    def twice() -> None:
        acquire()
        release()
        acquire()
        release()

    return once if platform.machine() in ("x86_64", "AMD64", "i386", "i686") else twice
