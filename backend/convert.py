"""Copying one disk onto another, of any format, with holes kept and made (``qemu-img convert``)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import BackendError, PyvirtioError, UnsupportedError, message_of
from .disk import Disk, Extent
from .pace import Pace
from .progress import Progress, silent
from .pump import pump
from .sparse import SECTOR, sparse_runs
from .zeroes import first_nonzero

__all__ = ["CopyError", "convert"]

_CHUNK = 2 << 20
"""Bytes read and written at a time (QEMU's IO_BUF_SIZE)."""
_MAX_CHUNK = 16 << 20
"""More is not read at once, whatever the target likes best (QEMU's MAX_BUF_SECTORS)."""


class CopyError(BackendError):
    """The source could not be read or the target could not be written at some byte."""

    brief = ""
    """In QEMU's words, which say of the reason only what the error's number means."""

    @classmethod
    def at(cls, doing: str, offset: int, error: Exception) -> CopyError:
        """The error for ``error``, met while ``doing`` something at byte ``offset``."""
        number = (error.errno if isinstance(error, OSError) else None) or errno.EIO
        failure = cls(number, f"error while {doing} {offset}: {message_of(error)}")
        failure.brief = f"error while {doing} {offset}: {os.strerror(number)}"
        return failure


@dataclass(frozen=True, slots=True)
class _Piece:
    offset: int
    length: int
    zero: bool
    """Known to be zeroes."""


def convert(
    source: Disk,
    target: Disk,
    *,
    target_is_new: bool = False,
    target_is_zero: bool = False,
    overlay: bool | None = None,
    compressed: bool = False,
    sparse_size: int = 4096,
    parallel: int = 4,
    out_of_order: bool = False,
    salvage: Callable[[str], None] | None = None,
    rate_limit: int = 0,
    progress: Progress = silent,
) -> None:
    """Make ``target``, which is at least as large, hold what ``source`` does; ends with a flush.

    ``target_is_new`` says that the target was just created: if it reads as zeroes then, none are
    written. ``target_is_zero`` says that it does. ``sparse_size`` is the length in bytes of zeroes
    that become a hole; with 0 everything is written as data. ``compressed`` writes compressed
    clusters.

    A target with a backing file is taken for an overlay over the same data as the source, unless
    ``overlay`` is false: what the source does not hold in its own layer is left to it.

    ``parallel`` threads read; with ``out_of_order`` they write (and compress) in parallel, too,
    and where clusters come to lie is up to chance. With ``salvage``, what cannot be read counts as
    zeroes, and ``salvage(message)`` is told. ``rate_limit`` is in bytes written per second.

    Raises CopyError where a disk fails. An exception leaves a valid image, half full.
    """
    if target.size < source.size:
        raise ValueError("The target is smaller than the source")
    if sparse_size < 0 or sparse_size % SECTOR:
        raise ValueError("The sparse size must be a multiple of 512 bytes")
    job = _Conversion(source, target, compressed=compressed, sparse_size=sparse_size)
    job.overlay = target.backing is not None if overlay is None else overlay
    if job.overlay and target_is_new and target.backing is not None:
        job.backing_size = target.backing.size
    job.is_zero = target_is_zero or (
        target_is_new and job.sparse and target.has_zero_init and not job.overlay
    )
    job.salvage = salvage
    pace = Pace(rate_limit)
    total = finished = 0
    if progress is not silent:
        total = sum(piece.length for piece in job.pieces() if not piece.zero)

    def write(piece: _Piece, data: bytes) -> None:
        pace.wait(0 if piece.zero else piece.length)
        try:
            job.write(piece, data)
        except (PyvirtioError, OSError) as error:
            raise CopyError.at("writing at byte", piece.offset, error) from error

    def done(piece: _Piece) -> None:
        nonlocal finished
        if not piece.zero:
            finished += piece.length
            progress(min(finished, total), total)

    progress(0, total)
    pump(job.pieces(), job.read, write, done, workers=parallel, in_order=not out_of_order)
    target.flush()
    progress(total, total)


class _Conversion:
    def __init__(self, source: Disk, target: Disk, *, compressed: bool, sparse_size: int) -> None:
        self.source = source
        self.target = target
        self.overlay = False
        """The target has a backing file that shows where the source holds nothing itself."""
        self.backing_size: int | None = None
        """How far that shows anything but zeroes, if known."""
        self.compressed = compressed
        self.sparse = sparse_size > 0
        self.is_zero = False
        """The target reads as zeroes where nothing is written."""
        self.salvage: Callable[[str], None] | None = None
        self._sparse_size = sparse_size
        self._chunk = min(
            _MAX_CHUNK,
            max(_CHUNK, target.limits.optimal_io_size, target.limits.discard_alignment),
        )
        self._cluster = 1
        if compressed:
            cluster_size = target.info().cluster_size
            if cluster_size is None:
                raise UnsupportedError(
                    "Compression not supported for this file format", feature="compression"
                )
            self._cluster = self._chunk = cluster_size
        # Changes between data and zeroes are moved to multiples of this.
        power = 1 << max(0, sparse_size.bit_length() - 1)
        self._alignment = max(power, SECTOR, target.limits.request_alignment)

    # -- what there is to do -----------------------------------------------------------------------

    def pieces(self) -> Iterator[_Piece]:
        """Everything to be written, in order, in pieces of a chunk if it is data."""
        for offset, length, zero in self._runs():
            if zero and self.sparse:
                yield _Piece(offset, length, True)
                continue
            for at in range(offset, offset + length, self._chunk):
                yield _Piece(at, min(self._chunk, offset + length - at), False)

    def _runs(self) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, zero) of what is to be written. For a compressed target data come in
        whole clusters, zeroes and what is left out only in whole clusters."""
        cluster, size = self._cluster, self.source.size
        offset = 0
        while offset < size:
            length = size - offset
            if self.backing_size is not None and offset < self.backing_size:
                length = min(length, self.backing_size - offset)
            extent = self._status(offset, length)
            kind, length = self._kind(extent, offset), extent.length
            if cluster > 1 and offset + length < size:
                length = length // cluster * cluster
                if not length:
                    length, kind = min(cluster, size - offset), "data"
            if kind != "skip":
                yield offset, length, kind == "zero"
            offset += length

    def _status(self, offset: int, length: int) -> Extent:
        while True:
            try:
                return self.source.block_status(offset, length)
            except (PyvirtioError, OSError) as error:
                failure = CopyError.at("reading block status at offset", offset, error)
                if self.salvage is None:
                    raise failure from error
                if length <= SECTOR:
                    self.salvage(failure.brief)
                    return Extent(length, data=True, zero=False, allocated=True)
            length = max(SECTOR, -(-length // (4 * SECTOR)) * SECTOR)

    def _kind(self, extent: Extent, offset: int) -> str:
        if not self.overlay:
            return "zero" if extent.zero else "data"
        if extent.depth:
            return "skip"
        if extent.zero:
            hidden = self.backing_size is not None and offset >= self.backing_size
            return "skip" if hidden else "zero"
        return "data" if extent.data or extent.allocated else "skip"

    # -- doing it ----------------------------------------------------------------------------------

    def read(self, piece: _Piece) -> bytes:
        """The contents of a piece of data."""
        if piece.zero:
            return b""
        try:
            return self.source.read(piece.offset, piece.length)
        except (PyvirtioError, OSError) as error:
            if self.salvage is not None:
                return self._read_what_can_be(piece)
            raise CopyError.at("reading at byte", piece.offset, error) from error

    def _read_what_can_be(self, piece: _Piece) -> bytes:
        """Sector by sector; zeroes for those that cannot be read."""
        data = bytearray()
        for offset in range(piece.offset, piece.offset + piece.length, SECTOR):
            length = min(SECTOR, piece.offset + piece.length - offset)
            try:
                data += self.source.read(offset, length)
            except (PyvirtioError, OSError) as error:
                if self.salvage is not None:
                    failure = CopyError.at("reading offset", offset, error)
                    self.salvage(failure.brief)
                data += bytes(length)
        return bytes(data)

    def write(self, piece: _Piece, data: bytes) -> None:
        """Write a piece, without its zeroes where they need not be written."""
        if piece.zero:
            self._write_zeroes(piece.offset, piece.length)
        elif self.compressed:
            self._write_compressed(piece.offset, data)
        elif not self.sparse:
            self.target.write(piece.offset, data)
        else:
            view = memoryview(data)
            for start, end, zero in sparse_runs(
                data, piece.offset, smallest=self._sparse_size, alignment=self._alignment
            ):
                if zero:
                    self._write_zeroes(piece.offset + start, min(end, len(data)) - start)
                else:
                    self.target.write(piece.offset + start, view[start:end])

    def _write_zeroes(self, offset: int, length: int) -> None:
        if not self.is_zero:
            self.target.write_zeroes(offset, length, unmap=True)

    def _write_compressed(self, offset: int, data: bytes) -> None:
        size = self._cluster
        if len(data) % size and offset + len(data) < self.target.size:
            data = data.ljust(-(-len(data) // size) * size, b"\0")[: self.target.size - offset]
        for start in range(0, len(data), size):
            cluster = data[start : start + size]
            if self.sparse and first_nonzero(cluster) < 0:
                self._write_zeroes(offset + start, len(cluster))
            else:
                self.target.write_compressed(offset + start, [cluster])
