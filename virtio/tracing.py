"""A trace of a device's requests: JSON lines, or what chrome://tracing and Perfetto show.

::

    trace = RequestTrace()
    stop = blk.observe(trace)
    …
    trace.save_chrome("run.json")
"""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

from .observe import RequestRecord

__all__ = ["RequestTrace"]


class RequestTrace:
    """An :class:`~.observe.Observer` that keeps the last ``limit`` requests."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.requests: deque[RequestRecord] = deque(maxlen=limit)

    def done(self, request: RequestRecord) -> None:
        """See :class:`~.observe.Observer`."""
        self.requests.append(request)

    def kicked(self, queue: int) -> None:
        """Kicks are not traced."""

    def interrupted(self, queue: int) -> None:
        """Nor are interrupts."""

    def suppressed(self, queue: int) -> None:
        """Nor those that were not sent."""

    def save_jsonl(self, path: str | os.PathLike[str]) -> None:
        """One JSON object per request and line, in the order of their answers.

        Times are in nanoseconds of the host's monotonic clock, sectors of 512 bytes.
        """
        with Path(path).open("w", encoding="utf-8") as file:
            for each in self.requests.copy():
                file.write(json.dumps({"type": each.name, **each._asdict()}) + "\n")

    def save_chrome(self, path: str | os.PathLike[str]) -> None:
        """The trace event format: a bar per request, a row per thread."""
        requests = self.requests.copy()
        origin = min((each.started for each in requests), default=0)
        threads = {thread: row for row, thread in enumerate({each.thread for each in requests}, 1)}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "virtio-blk"}}
        ]
        events += [
            {
                "ph": "X",
                "name": each.name,
                "cat": "request",
                "pid": 1,
                "tid": threads[each.thread],
                "ts": (each.started - origin) / 1000,
                "dur": (each.finished - each.started) / 1000,
                "args": {
                    "queue": each.queue,
                    "sector": each.sector,
                    "length": each.length,
                    "status": each.status,
                },
            }
            for each in requests
        ]
        Path(path).write_text(
            json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}), encoding="utf-8"
        )
