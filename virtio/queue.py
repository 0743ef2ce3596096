"""A virtqueue as the device has it: its state, its ring while it is served, what is under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .ring import Chain, QueueState, Ring

__all__ = ["DeviceState", "Queue"]


@dataclass(slots=True)
class DeviceState:
    """Everything there is to know of a device outside guest memory and its configuration."""

    queues: list[QueueState]
    status: int = 0
    driver_features: int = 0
    config_generation: int = 0
    broken: bool = False
    """Stopped by an error until the driver resets it."""


@dataclass(slots=True)
class Queue:
    """A virtqueue: its state, and its ring while it may be served."""

    index: int
    state: QueueState
    ring: Ring | None = field(default=None, repr=False)
    express: Callable[[], None] | None = field(default=None, repr=False)
    """A short way to serve it, if there is one; see :meth:`.device.VirtioDevice.make_express`."""
    pending: bool = False
    """Kicked, and not served to the end yet."""
    serving: bool = False
    interrupt: bool = False
    """While serving: the driver wants to hear of what was published."""
    held: list[Chain] = field(default_factory=list)
    """Taken from the ring and to be done (again) before anything else is taken: what an error has
    stopped, or what was under way where the device comes from."""
    parked: Ring | None = field(default=None, repr=False)
    """While serving: the ring that was taken away by a pause. Its request is done to the end."""
    suppressed: bool = False
    """While there is no ring: the driver was asked not to kick."""
    under_way: int = 0
    """With worker threads: requests that are being done."""
    available: int = 0
    """With worker threads: chains that the ring was seen to have and that were not taken yet."""

    def park(self) -> None:
        """Take the ring away for a pause; state and guest memory have all that it knows."""
        ring = self.ring
        if ring is not None:
            self.suppressed = ring.suppressed
            self.ring = self.express = None
            self.available = 0
            self.pending = False
            if self.serving:
                self.parked = ring

    def drop(self) -> None:
        """Take the ring away for good: what is under way is not answered any more."""
        self.ring = self.express = self.parked = None
        self.pending = self.suppressed = False
        self.available = 0
        self.held.clear()
