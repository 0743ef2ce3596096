"""The filter ``throttle``: no more requests or bytes a second than its group allows."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from .disk import Disk
from .filter import FilterDisk
from .node import Node, Role
from .registry import Driver

__all__ = ["DRIVER", "ThrottleDisk", "ThrottleGroup", "ThrottleLimits"]

_BURST = 0.1
"""Seconds' worth that may be done at once after a rest (QEMU's leaky bucket holds as much)."""


@dataclass(frozen=True, slots=True)
class ThrottleLimits:
    """Requests and bytes a second; 0 is no limit."""

    iops_total: int = 0
    iops_read: int = 0
    iops_write: int = 0
    bps_total: int = 0
    bps_read: int = 0
    bps_write: int = 0

    @classmethod
    def of(cls, options: Mapping[str, str]) -> ThrottleLimits:
        """From the properties of QEMU's object (``limits.bps-total`` or ``x-bps-total``).

        Raises ValueError for what is no number, or contradicts itself.
        """
        values = {}
        for name, text in options.items():
            key = name.removeprefix("limits.").removeprefix("x-").replace("-", "_")
            if key in cls.__dataclass_fields__:
                try:
                    values[key] = int(text, 0)
                except ValueError:
                    raise ValueError(f"Parameter '{name}' expects an integer") from None
        limits = cls(**values)
        for kind in ("bps", "iops"):
            parts = getattr(limits, f"{kind}_read") or getattr(limits, f"{kind}_write")
            if getattr(limits, f"{kind}_total") and parts:
                raise ValueError(
                    "bps/iops/max total values and read/write values cannot be used at the same "
                    "time"
                )
        return limits


class ThrottleGroup:
    """What several disks may do together."""

    def __init__(self, limits: ThrottleLimits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._free_at: dict[str, float] = {}

    def wait(self, kind: str, length: int) -> None:
        """Wait until a request (``read`` or ``write``) may go."""
        now = time.monotonic()
        until = now
        with self._lock:
            for name, amount in (("iops", 1), ("bps", length)):
                for scope in ("total", kind):
                    rate = getattr(self.limits, f"{name}_{scope}")
                    if rate:
                        key = f"{name}_{scope}"
                        free = max(self._free_at.get(key, 0.0), now - _BURST)
                        until = max(until, free)
                        self._free_at[key] = free + amount / rate
        if until > now:
            time.sleep(until - now)


class ThrottleDisk(FilterDisk):
    """Holds requests up until their group lets them go."""

    format_name = "throttle"

    def __init__(self, below: Disk, group: ThrottleGroup) -> None:
        super().__init__(below)
        self.group = group

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.group.wait("read", length)
        super()._readv(offset, views, length)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self.group.wait("write", length)
        super()._writev(offset, views, length)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.group.wait("write", length)
        super()._write_zeroes(offset, length, unmap)

    def _write_compressed(self, offset: int, views: list[memoryview], length: int) -> None:
        self.group.wait("write", length)
        super()._write_compressed(offset, views, length)

    def _discard(self, offset: int, length: int) -> None:
        self.group.wait("write", length)
        super()._discard(offset, length)


def _open(node: Node) -> Disk:
    name = node.options.text("throttle-group")
    below = node.required("file", Role.FILTERED, filename=node.filename)
    if name is None:
        raise ValueError("Please specify a throttle group")
    group = node.context.graph.objects.get(name)
    if not isinstance(group, ThrottleGroup):
        raise ValueError(f"Throttle group '{name}' does not exist")
    return ThrottleDisk(below, group)


DRIVER = Driver("throttle", _open, filtering=True)
