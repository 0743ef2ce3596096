"""Virtio-mmio slots, and slots of a PCI bus: the board's side of plugging a pyvirtio device in.

The device does its work between two slices of the CPU (``notify="deferred"``), never inside a
memory hook: so data arrive while no guest code runs, and code they overwrite can be forgotten
before the guest gets to it. That the guest need not wait until the slice is used up, a notification
ends it. Unicorn then carries the store out a second time, which a virtio device must not mind.
"""

from __future__ import annotations

from collections.abc import Callable

import pyvirtio
from pyvirtio.backend.state import StateReader, StateWriter

__all__ = ["EmptySlot", "PciSlot", "Slot", "VirtioSlot"]

_QUEUE_NOTIFY = 0x50
_MAGIC, _VERSION = 0x74726976, 2


class EmptySlot:
    """A slot with nothing in it: device ID 0 (virtio 1.2, 4.2.2)."""

    def read(self, offset: int, size: int) -> int:
        return {0: _MAGIC, 4: _VERSION}.get(offset, 0) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing listens."""


class Slot:
    """A slot with a device behind ``transport``. ``end_slice`` asks the CPU to stop soon."""

    def __init__(
        self, transport: pyvirtio.VirtioMmio | pyvirtio.VirtioPci, end_slice: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._end_slice = end_slice
        self._repeated = False

    def notified(self) -> None:
        """The guest has notified the device, for the first or the second time."""
        self._repeated = not self._repeated
        if self._repeated:
            self._end_slice()

    def poll(self) -> None:
        """Do the work that the guest asked for."""
        self._transport.poll()

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write the device, and whether a notification is to be carried out once more."""
        stream.flag(self._repeated)
        self._transport.save_state(stream)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read them; returns how to put them in force."""
        repeated = stream.flag()
        adopt_device = self._transport.load_state(stream)

        def adopt() -> None:
            self._repeated = repeated
            adopt_device()

        return adopt


class VirtioSlot(Slot):
    """A virtio-mmio slot: registers at a fixed place."""

    def __init__(self, mmio: pyvirtio.VirtioMmio, end_slice: Callable[[], None]) -> None:
        super().__init__(mmio, end_slice)
        self._mmio = mmio
        self.read = mmio.read

    def write(self, offset: int, size: int, value: int) -> None:
        self._mmio.write(offset, size, value)
        if offset == _QUEUE_NOTIFY:
            self.notified()


class PciSlot(Slot):
    """A slot of a PCI bus, with a function in it."""

    def __init__(self, function: pyvirtio.VirtioPci, end_slice: Callable[[], None]) -> None:
        super().__init__(function, end_slice)
        self.function = function

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """The guest writes to a BAR."""
        self.function.bar_write(bar, offset, size, value)
        if self.function.notifies(bar, offset):
            self.notified()
