"""Counters of a device: requests, bytes, errors and latencies by type; kicks and interrupts.

::

    counters = Counters()
    stop = blk.observe(counters)
    …
    print(counters)
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Final

from . import layout as at
from .observe import RequestRecord

__all__ = ["Counters", "TypeCounters"]

_BUCKETS: Final = 40


@dataclass(slots=True)
class TypeCounters:
    """Of one type of request."""

    requests: int = 0
    errors: int = 0
    """Answered with another status than OK."""
    bytes: int = 0
    """Of data."""
    nanoseconds: int = 0
    """All latencies together."""
    histogram: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    """Requests by latency: entry n has those of less than 2**n nanoseconds (and not less than half
    of that)."""

    def percentile(self, share: float) -> int:
        """Nanoseconds that this share (0 to 1) of requests took less than; a power of two."""
        wanted = share * self.requests
        seen = 0
        for exponent, count in enumerate(self.histogram):
            seen += count
            if count and seen >= wanted:
                return 1 << exponent
        return 0


class Counters:
    """An :class:`~.observe.Observer` that counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.types: dict[str, TypeCounters] = {}
        """By the type's name."""
        self.kicks = 0
        self.interrupts_sent = 0
        self.interrupts_suppressed = 0

    def kicked(self, queue: int) -> None:
        """See :class:`~.observe.Observer`."""
        with self._lock:
            self.kicks += 1

    def done(self, request: RequestRecord) -> None:
        """See :class:`~.observe.Observer`."""
        taken = max(request.finished - request.started, 0)
        with self._lock:
            counters = self.types.setdefault(request.name, TypeCounters())
            counters.requests += 1
            counters.errors += request.status != at.VIRTIO_BLK_S_OK
            counters.bytes += request.length
            counters.nanoseconds += taken
            counters.histogram[min(taken.bit_length(), _BUCKETS - 1)] += 1

    def interrupted(self, queue: int) -> None:
        """See :class:`~.observe.Observer`."""
        with self._lock:
            self.interrupts_sent += 1

    def suppressed(self, queue: int) -> None:
        """See :class:`~.observe.Observer`."""
        with self._lock:
            self.interrupts_suppressed += 1

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        with self._lock:
            return {
                "kicks": self.kicks,
                "interrupts_sent": self.interrupts_sent,
                "interrupts_suppressed": self.interrupts_suppressed,
                "types": {
                    name: {
                        "requests": each.requests,
                        "errors": each.errors,
                        "bytes": each.bytes,
                        "nanoseconds": each.nanoseconds,
                        "histogram": list(each.histogram),
                    }
                    for name, each in self.types.items()
                },
            }

    def __str__(self) -> str:
        with self._lock:
            lines = [
                f"kicks {self.kicks}, interrupts sent {self.interrupts_sent}, "
                f"suppressed {self.interrupts_suppressed}",
                f"{'':14}{'requests':>10}{'errors':>8}{'MiB':>10}{'mean us':>10}{'99 % us <':>11}",
            ]
            for name, each in sorted(self.types.items()):
                mean = each.nanoseconds / each.requests / 1000
                lines.append(
                    f"{name:14}{each.requests:10}{each.errors:8}{each.bytes / (1 << 20):10.1f}"
                    f"{mean:10.1f}{each.percentile(0.99) / 1000:11.1f}"
                )
        return "\n".join(lines)
