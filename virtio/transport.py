"""What a transport and a device are to each other: two small protocols, and nothing else.

A transport (registers on MMIO, a PCI function, a vhost-user socket) translates its own language
into the calls of :class:`TransportDevice`, and hears of interrupts through those of
:class:`Transport`. Both sides are plain methods; which thread calls what is said at each.

A transport's life with a device::

    device.connect(memory, transport, features=…)    once; the device is reset then
    device.offered_features                          the driver reads features …
    device.set_driver_features(bits, mask)           … and accepts some
    device.set_status(value)                         what the driver writes; 0 resets
    state = device.queue_state(index)                plain data: size and addresses, to be set …
    device.enable_queue(index)                       … before this, which checks them
    device.kick(index)                               QueueNotify, an eventfd, …
    device.poll()                                    where kicks are only noted (``defer``)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..backend.state import StateReader, StateWriter
from ..errors import GuestError
from .layout import ByteOrder
from .memory import GuestMemory
from .ring import QueueState

__all__ = ["Transport", "TransportDevice"]


class Transport(Protocol):
    """What a device needs of the thing it is reached through.

    What the driver can see of an interrupt is noted at the moment that it is for, under the
    device's lock: so none appears in a device that was reset meanwhile (BF-28). The emulator hears
    of it after that, under no lock, and may call the device again. With worker threads
    (``io_threads``) these are called from those, at any time between two calls of the transport's
    own; without, only inside a call that the transport makes, or that changes the configuration.
    """

    def queue_interrupt(self, index: int) -> None:
        """Queue ``index`` has used buffers that the driver wants to hear of: :meth:`note_interrupt`
        and :meth:`deliver` in one, for a device without threads."""

    def note_interrupt(self, index: int | None) -> None:
        """There is something to be heard of: queue ``index``, or None: the configuration, or
        DEVICE_NEEDS_RESET. Nothing of the emulator's may be called here."""

    def deliver(self) -> None:
        """Tell the emulator what was noted, as far as it is not told and still holds."""


class TransportDevice(Protocol):
    """What a transport may use of a device; :class:`~.device.VirtioDevice` is one."""

    device_id: int
    legacy: bool
    """The interface before virtio 1.0 is in use."""

    # -- attaching ---------------------------------------------------------------------------

    def connect(
        self,
        memory: GuestMemory,
        transport: Transport,
        *,
        legacy: bool = False,
        transitional: bool = False,
        order: ByteOrder = "little",
        defer: bool = False,
        features: int = 0,
    ) -> None:
        """Attach the device to guest memory and to its transport, and reset it.

        ``features``: what the transport adds to those of the device (RING_RESET and so on).
        ``transitional``: the driver chooses, see :meth:`use_interface`.
        """

    def use_interface(self, *, legacy: bool) -> None:
        """A transitional device, just reset, is used through this interface from now on."""

    def set_memory(self, memory: GuestMemory) -> None:
        """Guest memory is another now; requests under way are done with the old one first."""

    # -- features, status, configuration -------------------------------------------------------

    @property
    def offered_features(self) -> int:
        """A bit mask of all 64 and more."""

    @property
    def driver_features(self) -> int:
        """What the driver has written as accepted, whether that was right or not."""

    def set_driver_features(self, features: int, mask: int = -1) -> None:
        """The driver accepts ``features`` among those in ``mask``; ignored after FEATURES_OK."""

    def accepted(self, feature: int) -> bool:
        """The driver has accepted feature (bit number) ``feature``."""

    @property
    def status(self) -> int:
        """The device status field."""

    def set_status(self, value: int) -> None:
        """The driver writes the status field; 0 resets, and that is complete on return."""

    @property
    def config_generation(self) -> int:
        """Another number after every change of the configuration that the driver did not make."""

    def read_config(self, offset: int, length: int) -> bytes:
        """``length`` bytes of device configuration; zeroes where there is none."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes device configuration; ignored where it may not."""

    def guest_error(self, error: GuestError) -> None:
        """The driver did in the transport what only a reset can mend: stop until then."""

    # -- queues ------------------------------------------------------------------------------

    @property
    def num_queues(self) -> int:
        """How many there are; indices start at 0."""

    def queue_state(self, index: int) -> QueueState | None:
        """Queue ``index`` as plain data, None if there is none.

        While it is not ``ready``, the transport sets ``size``, the three areas and (where its
        protocol has them) the ring indices. Ask again each time: a reset makes a new one.
        """

    def enable_queue(self, index: int) -> None:
        """Check the queue's state and use it. ``ready`` tells; one that cannot work breaks the
        device (NEEDS_RESET)."""

    def disable_queue(self, index: int) -> None:
        """Stop using the queue and rewind its indices (MMIO's QueueReady = 0)."""

    def stop_queue(self, index: int) -> None:
        """Stop using the queue when its requests under way are done; its indices stay, for
        :meth:`queue_state` to tell (vhost-user's GET_VRING_BASE)."""

    def reset_queue(self, index: int) -> None:
        """RING_RESET: everything of the queue is as after a reset of the device."""

    def resetting(self, index: int) -> bool:
        """A reset of queue ``index`` goes on still."""

    def kick(self, index: int) -> None:
        """The driver says that queue ``index`` has something available. Any index may come."""

    def poll(self) -> bool:
        """Serve what was kicked and is not done; True if there was something."""

    # -- saving ------------------------------------------------------------------------------

    state_version: int

    def save_state(self, stream: StateWriter) -> None:
        """Write all of the device but guest memory; see there."""

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read it again; returns how to put it in force."""
