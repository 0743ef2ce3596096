"""A vhost-user server in a thread, and a driver connected to it."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any, Self

import pyvirtio
from pyvirtio.virtio.driver import BlockDriver, Link, SharedRam, VhostUserFrontEnd
from pyvirtio.virtio.vhost_user.layout import Request

__all__ = ["Rig", "open_descriptors", "settle"]


class Rig:
    """A server on ``disk`` at a socket in ``folder``; a context manager. It must end by itself."""

    def __init__(self, folder: Path, disk: Any = None, **device: Any) -> None:
        self.path = folder / "blk.sock"
        self.disk = pyvirtio.MemoryDisk(1 << 20) if disk is None else disk
        self.device = pyvirtio.VirtioBlk(self.disk, **device)
        self.server = pyvirtio.VhostUserServer(self.device, self.path)
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._fronts: list[VhostUserFrontEnd] = []
        self._rams: list[SharedRam] = []
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.server.serve()
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for front in self._fronts:
            front.close()
        self.server.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.server.close()
        if self.failure is not None:
            raise self.failure

    def ram(self, size: int = 1 << 20) -> SharedRam:
        """Guest memory."""
        self._rams.append(SharedRam(size))
        return self._rams[-1]

    def front(self, ram: SharedRam | None = None, **options: Any) -> VhostUserFrontEnd:
        """A front-end that is connected, and no more."""
        front = VhostUserFrontEnd.connect(self.path, ram or self.ram(), **options)
        self._fronts.append(front)
        return front

    def driver(self, front: VhostUserFrontEnd | None = None, **options: Any) -> BlockDriver:
        """A driver that is started."""
        front = front or self.front()
        options.setdefault("queue_size", 16)
        arena = front.ram.arena()
        driver = BlockDriver(front, front.ram.memory, arena, wait=front.wait, **options)
        driver.start()
        return driver

    def forget(self, front: VhostUserFrontEnd, ram: SharedRam) -> None:
        """These are not needed any more; the front-end has hung up."""
        self._fronts.remove(front)
        self._rams.remove(ram)
        ram.close()

    def link(self) -> Link:
        """A bare connection, with a short patience."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        return Link(connection, 10)


def settle(link: Link) -> None:
    """Have the server do what it was told before: kicks have their turn after 16 messages."""
    for _ in range(17):
        link.ask_u64(Request.GET_FEATURES)


def open_descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))
