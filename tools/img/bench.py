"""``bench``: how fast is an image?"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from threading import Lock, Thread
from time import perf_counter
from typing import TYPE_CHECKING

from ...errors import PyvirtioError
from ..getopt import Option
from ..messages import Failure, errno_text
from ..objects import Objects
from ..sizes import INT_MAX, cvtnum, parse_number
from .opening import CacheChoice, Source, cache_mode, open_image
from .shared import FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, QUIET, one_operand

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["OPTIONS", "run"]

OPTIONS = (
    HELP,
    IMAGE_OPTS,
    FORCE_SHARE,
    Option(("--flush-interval",), "flush_interval", "Flush after so many writes."),
    Option(("--pattern",), "pattern", "The byte that is written."),
    Option(("--no-drain",), None, "Flush without waiting for the requests under way."),
    Option(("-c",), "count", "So many requests (75000)."),
    Option(("-d",), "depth", "So many at a time (64)."),
    Option(("-f",), "fmt", FORMAT.help),
    Option(("-n",), None, "The same as -i native."),
    Option(("-i",), "aio", "How requests are made: threads, native or io_uring."),
    Option(("-o",), "offset", "Begin at this byte."),
    QUIET,
    Option(("-s",), "buffer_size", "Bytes in a request (4096)."),
    Option(("-S",), "step_size", "Bytes from one request to the next."),
    Option(("-t",), "cache", "The cache mode."),
    Option(("-w",), None, "Write; else read."),
)

_MAX_THREADS = 64


def run(found: list[tuple[str, str]], operands: list[str]) -> int:
    """Run the subcommand."""
    count, depth, pattern, interval = 75000, 64, 0, 0
    offset, size, step = 0, 4096, 0
    cache: CacheChoice | None = CacheChoice("writeback", False)
    for option, value in found:
        if option == "-c":
            count = _number(value, "request count")
        elif option == "-d":
            depth = _number(value, "queue depth")
        elif option == "--pattern":
            pattern = _number(value, "pattern byte", 0xFF)
        elif option == "--flush-interval":
            interval = _number(value, "flush interval")
        elif option == "-o":
            offset = cvtnum("offset", value)
        elif option == "-s":
            size = cvtnum("buffer size", value, 0, INT_MAX)
        elif option == "-S":
            step = cvtnum("step_size", value, 0, INT_MAX)
        elif option == "-t":
            cache = cache_mode(value)
            if cache is None:
                raise Failure("Invalid cache mode")
        elif option == "-i" and value not in ("threads", "native", "io_uring"):
            raise Failure(f"Invalid aio option: {value}")
    given = dict(found)
    name = one_operand(operands)
    writing = "-w" in given
    if interval and not writing:
        raise Failure("--flush-interval is only available in write tests")
    if interval and interval < depth:
        raise Failure("Flush interval can't be smaller than depth")
    source = Source(name, given.get("-f"), "--image-opts" in given, "-U" in given)
    with open_image(source, Objects(), writable=writing, cache=cache) as disk:
        kind = "write" if writing else "read"
        print(
            f"Sending {count} {kind} requests, {size} bytes each, {depth} in parallel "
            f"(starting at offset {offset}, step size {step or size})"
        )
        if interval:
            print(f"Sending flush every {interval} requests")
        bench = _Bench(disk, bytes([pattern]) * size if writing else None, size, interval)
        if count and not disk.size:
            raise Failure("Failed request: Input/output error")
        offsets = _offsets(offset, step or size, disk.size, count)
        started = perf_counter()
        bench.run(offsets, min(depth, _MAX_THREADS, count))
        print(f"Run completed in {perf_counter() - started:3.3f} seconds.")
    return 0


def _number(text: str, what: str, high: int = INT_MAX) -> int:
    number = parse_number(text, 0, high)
    if number is None:
        raise Failure(f"Invalid {what} specified")
    return number


def _offsets(offset: int, step: int, size: int, count: int) -> Iterator[int]:
    for _ in range(count):
        yield offset
        offset = (offset + step) % size


class _Bench:
    """Requests from several threads."""

    def __init__(self, disk: Disk, data: bytes | None, size: int, interval: int) -> None:
        self._disk = disk
        self._data = data
        self._size = size
        self._interval = interval
        self._lock = Lock()
        self._done = 0
        self._error: Exception | None = None

    def run(self, offsets: Iterator[int], workers: int) -> None:
        """Make the requests at all offsets. Raises Failure if one fails."""
        threads = [Thread(target=self._work, args=(offsets,), daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise Failure(f"Failed request: {errno_text(self._error)}") from self._error

    def _work(self, offsets: Iterator[int]) -> None:
        buffer = bytearray(self._size)
        while self._error is None:
            with self._lock:
                offset = next(offsets, None)
            if offset is None:
                return
            try:
                self._request(offset, buffer)
            except (PyvirtioError, OSError) as error:
                self._error = error
            except ValueError:  # past the end of the disk
                self._error = OSError(errno.EIO, os.strerror(errno.EIO))

    def _request(self, offset: int, buffer: bytearray) -> None:
        if self._data is None:
            self._disk.readv(offset, [memoryview(buffer)])
            return
        self._disk.write(offset, self._data)
        with self._lock:
            self._done += 1
            flush = self._interval and self._done % self._interval == 0
        if flush:
            self._disk.flush()
