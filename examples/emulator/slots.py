"""The virtio-mmio slots: the board's side of plugging a pyvirtio device in.

The device does its work between two slices of the CPU (``notify="deferred"``), never inside a
memory hook: so data arrive while no guest code runs, and code they overwrite can be forgotten
before the guest gets to it. That the guest need not wait until the slice is used up, a notification
ends it. Unicorn then carries the store out a second time, which a virtio device must not mind.
"""

from __future__ import annotations

from collections.abc import Callable

import pyvirtio
from pyvirtio.backend.state import StateReader, StateWriter

__all__ = ["EmptySlot", "VirtioSlot"]

_QUEUE_NOTIFY = 0x50
_MAGIC, _VERSION = 0x74726976, 2


class EmptySlot:
    """A slot with nothing in it: device ID 0 (virtio 1.2, 4.2.2)."""

    def read(self, offset: int, size: int) -> int:
        return {0: _MAGIC, 4: _VERSION}.get(offset, 0) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing listens."""


class VirtioSlot:
    """A slot with a device. ``end_slice`` asks the CPU to stop soon."""

    def __init__(self, mmio: pyvirtio.VirtioMmio, end_slice: Callable[[], None]) -> None:
        self._mmio = mmio
        self._end_slice = end_slice
        self.read = mmio.read
        self._repeated = False

    def write(self, offset: int, size: int, value: int) -> None:
        self._mmio.write(offset, size, value)
        if offset == _QUEUE_NOTIFY:
            self._repeated = not self._repeated
            if self._repeated:
                self._end_slice()

    def poll(self) -> None:
        """Do the work that the guest asked for."""
        self._mmio.poll()

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write the device, and whether a notification is to be carried out once more."""
        stream.flag(self._repeated)
        self._mmio.save_state(stream)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read them; returns how to put them in force."""
        repeated = stream.flag()
        adopt_device = self._mmio.load_state(stream)

        def adopt() -> None:
            self._repeated = repeated
            adopt_device()

        return adopt
