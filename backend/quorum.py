"""The driver ``quorum``: several disks with the same contents, and a vote on what is read."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping, Sequence

from ..errors import BackendError, PyvirtioError
from .buffers import copy_in, gather
from .disk import Disk, Limits
from .node import Node, Role
from .registry import Driver

__all__ = ["DRIVER", "QuorumDisk"]


class QuorumDisk(Disk):
    """What ``threshold`` of the ``disks`` agree on.

    ``pattern`` ``fifo`` reads from the first that answers, without a vote. ``rewrite`` puts right
    what was outvoted. Raises BackendError (EIO) where no version has votes enough.
    """

    format_name = "quorum"

    def __init__(
        self,
        disks: Sequence[Disk],
        threshold: int,
        *,
        pattern: str = "quorum",
        rewrite: bool = False,
        must_agree: bool = False,
    ) -> None:
        sizes = {disk.size for disk in disks}
        if len(sizes) != 1:
            raise BackendError(
                errno.EIO, "Could not refresh total sector count: Input/output error"
            )
        super().__init__(
            disks[0].size,
            read_only=any(disk.read_only for disk in disks),
            limits=Limits(request_alignment=max(disk.limits.request_alignment for disk in disks)),
        )
        self.disks = list(disks)
        self.threshold = threshold
        self._fifo = pattern == "fifo"
        self._rewrite = rewrite
        self._must_agree = must_agree
        self._lock = threading.Lock()

    @property
    def children(self) -> Mapping[str, Disk]:
        """All disks."""
        return {f"children.{index}": disk for index, disk in enumerate(self.disks)}

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        if self._fifo:
            self._read_first(offset, views)
            return
        with self._lock:  # no write may pass between two of the reads
            versions = self._versions(offset, length)
            winner = max(versions, key=lambda data: len(versions[data]), default=b"")
            if self._must_agree and len(versions) > 1:
                raise BackendError(errno.EIO, "quorum: the two versions differ")
            if len(versions.get(winner, ())) < self.threshold:
                raise BackendError(errno.EIO, "quorum: no version has votes enough")
            if self._rewrite and not self.read_only:
                for data, losers in versions.items():
                    for disk in losers if data != winner else ():
                        disk.write(offset, winner)
        copy_in(views, winner)

    def _versions(self, offset: int, length: int) -> dict[bytes, list[Disk]]:
        """Which disks have what."""
        versions: dict[bytes, list[Disk]] = {}
        for disk in self.disks:
            try:
                data = disk.read(offset, length)
            except PyvirtioError:
                continue  # a disk that cannot be read has no vote
            versions.setdefault(data, []).append(disk)
        return versions

    def _read_first(self, offset: int, views: list[memoryview]) -> None:
        failure: PyvirtioError | None = None
        for disk in self.disks:
            try:
                disk.readv(offset, views)
                return
            except PyvirtioError as error:
                failure = error
        raise BackendError(errno.EIO, "quorum: no disk can be read") from failure

    def _on_all(self, work: Callable[[Disk], None]) -> None:
        """Do something to all; enough of them must succeed."""
        failures = []
        with self._lock:
            for disk in self.disks:
                try:
                    work(disk)
                except PyvirtioError as error:
                    failures.append(error)
        if len(self.disks) - len(failures) < self.threshold:
            raise failures[0]

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        data = gather(views)
        self._on_all(lambda disk: disk.write(offset, data))

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._on_all(lambda disk: disk.write_zeroes(offset, length, unmap=unmap))

    def _flush(self) -> None:
        self._on_all(lambda disk: disk.flush())

    def _close(self) -> None:
        failures = []
        for disk in self.disks:
            try:
                disk.close()
            except PyvirtioError as error:
                failures.append(error)
        if len(self.disks) - len(failures) < self.threshold:
            raise failures[0]


def _open(node: Node) -> Disk:
    options = node.options
    names = {name.split(".")[1] for name in options.left if name.startswith("children.")}
    count = len(names)
    if not count:
        raise ValueError("Number of provided children must be 1 or more")
    threshold = options.number("vote-threshold", 0)
    if threshold < 1:
        raise ValueError("Parameter 'vote-threshold' expects a value >= 1")
    if threshold > count:
        raise ValueError("threshold may not exceed children count")
    pattern = options.text("read-pattern") or "quorum"
    if pattern not in ("quorum", "fifo"):
        raise ValueError("Please set read-pattern as fifo or quorum")
    must_agree = rewrite = False
    if pattern == "quorum":
        must_agree = options.boolean("blkverify", False)
        if must_agree and (count != 2 or threshold != 2):
            raise ValueError(
                "blkverify=on can only be set if there are exactly two files and "
                "vote-threshold is 2"
            )
        rewrite = options.boolean("rewrite-corrupted", False)
        if rewrite and must_agree:
            raise ValueError("rewrite-corrupted=on cannot be used with blkverify=on")
    disks = [node.required(f"children.{index}", Role.DATA) for index in range(count)]
    return QuorumDisk(disks, threshold, pattern=pattern, rewrite=rewrite, must_agree=must_agree)


DRIVER = Driver("quorum", _open)
