"""The filter ``blkverify``: an image is compared with a raw copy, request by request."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from typing import Any

from ..errors import BackendError
from .buffers import gather
from .disk import Disk
from .filter import FilterDisk
from .node import Node, Role
from .registry import Driver

__all__ = ["DRIVER", "BlkverifyDisk"]


class BlkverifyDisk(FilterDisk):
    """Does everything to ``raw`` and to ``test``. Raises BackendError (EIO) where a read shows
    different data, or where only one of the two fails."""

    format_name = "blkverify"
    child_name = "raw"

    def __init__(self, raw: Disk, test: Disk, *, name: str | None = None) -> None:
        super().__init__(raw)
        self.test = test
        self.size = test.size
        self.growable = False
        self._name = name
        self._lock = threading.Lock()

    @property
    def children(self) -> Mapping[str, Disk]:
        """Both disks."""
        return {"raw": self.below, "test": self.test}

    @property
    def filename(self) -> str | None:
        """A file name that says the same, if there is one."""
        return self._name

    def _follow(self) -> None:
        """The size is the tested disk's."""

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        expected = bytearray(length)
        with self._lock:
            self._both(
                "read",
                offset,
                length,
                lambda: self.below.readv(offset, [expected]),
                lambda: self.test.readv(offset, views),
            )
        found = gather(views)
        if found != expected:
            at = next(i for i in range(length) if found[i] != expected[i])
            raise self._mismatch(
                "read", offset, length, f"contents mismatch at offset {offset + at}"
            )

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        data = [memoryview(gather(views))]  # both must get the same, whatever a guest does
        with self._lock:
            self._both(
                "write",
                offset,
                length,
                lambda: self.below.writev(offset, data),
                lambda: self.test.writev(offset, data),
            )

    def _both(self, kind: str, offset: int, length: int, first: Any, second: Any) -> None:
        """Do both; they must succeed both, or fail alike."""
        results: list[BackendError | None] = []
        for work in (first, second):
            try:
                work()
                results.append(None)
            except BackendError as error:
                results.append(error)
        numbers = [-(error.errno or errno.EIO) if error else 0 for error in results]
        if numbers[0] != numbers[1]:
            text = f"return value mismatch {numbers[0]} != {numbers[1]}"
            raise self._mismatch(kind, offset, length, text)
        if results[0] is not None:
            raise results[0]

    def _mismatch(self, kind: str, offset: int, length: int, text: str) -> BackendError:
        return BackendError(
            errno.EIO,
            f"blkverify: {kind} offset={offset} bytes={length} {text}",
            self._name,
        )

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._write_zero_bytes(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        """Ignored: what is read afterwards might differ."""

    def _flush(self) -> None:
        self.test.flush()  # the raw copy is there for comparing only

    def _close(self) -> None:
        try:
            super()._close()
        finally:
            self.test.close()


def _parse_filename(name: str, options: dict[str, Any]) -> None:
    rest = name.removeprefix("blkverify:")
    if rest == name:
        options["x-image"] = name
        return
    raw, colon, image = rest.partition(":")
    if not colon:
        raise ValueError("blkverify requires raw copy and original image path")
    options["x-raw"] = raw
    options["x-image"] = image


def _open(node: Node) -> Disk:
    options = node.options
    raw = node.required("raw", Role.FILTERED, filename=options.text("x-raw"))
    test = node.required("test", Role.DATA, filename=options.text("x-image"))
    name = None
    if raw.filename and test.filename:
        name = f"blkverify:{raw.filename}:{test.filename}"
    return BlkverifyDisk(raw, test, name=name)


DRIVER = Driver("blkverify", _open, protocol=True, parse_filename=_parse_filename)
