"""Copying one disk onto another, of any format, with holes kept and made (``qemu-img convert``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsupportedError
from .disk import Disk, Extent
from .progress import Progress, silent
from .pump import pump
from .zeroes import first_nonzero, zero_runs

__all__ = ["convert"]

_CHUNK = 2 << 20
"""Bytes read and written at a time (QEMU's IO_BUF_SIZE)."""


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
    compressed: bool = False,
    sparse_size: int = 4096,
    parallel: int = 4,
    out_of_order: bool = False,
    progress: Progress = silent,
) -> None:
    """Make ``target``, which is at least as large, hold what ``source`` does; ends with a flush.

    ``target_is_new`` says that the target was just created: if it reads as zeroes then, none are
    written. ``sparse_size`` is the length in bytes of aligned zeroes that become a hole; with 0
    everything is written as data. ``compressed`` writes compressed clusters.

    A target with a backing file is taken for an overlay over the same data as the source: what the
    source does not hold in its own layer is left to it.

    ``parallel`` threads read; with ``out_of_order`` they write (and compress) in parallel, too,
    and where clusters come to lie is up to chance. An exception leaves a valid image, half full.
    """
    if target.size < source.size:
        raise ValueError("The target is smaller than the source")
    if sparse_size < 0 or sparse_size % 512:
        raise ValueError("The sparse size must be a multiple of 512 bytes")
    job = _Conversion(source, target, target_is_new, compressed, sparse_size)
    finished = 0

    def done(piece: _Piece) -> None:
        nonlocal finished
        finished += piece.length
        progress(finished, source.size)

    progress(0, source.size)
    pump(job.pieces(), job.read, job.write, done, workers=parallel, in_order=not out_of_order)
    target.flush()
    progress(source.size, source.size)


class _Conversion:
    def __init__(
        self, source: Disk, target: Disk, is_new: bool, compressed: bool, sparse_size: int
    ) -> None:
        self.source = source
        self.target = target
        self.backing = target.backing
        self.compressed = compressed
        self.sparse = sparse_size > 0
        self.is_zero = is_new and target.has_zero_init and self.backing is None
        self.alignment = 1
        if compressed:
            cluster_size = target.info().cluster_size
            if cluster_size is None:
                raise UnsupportedError(
                    "Compression not supported for this file format", feature="compression"
                )
            self.alignment = cluster_size
        self.unit = max(sparse_size, 512)
        if not self.is_zero:
            # Shorter zeroes would be written out as data there.
            self.unit = max(self.unit, target.limits.write_zeroes_alignment)

    # -- what there is to do -----------------------------------------------------------------------

    def pieces(self) -> Iterator[_Piece]:
        """Everything to be written, in order, in pieces of a chunk if it is data."""
        chunk = max(_CHUNK, self.alignment)
        for offset, length, zero in self._runs():
            if zero and self.sparse:
                yield _Piece(offset, length, True)
                continue
            for at in range(offset, offset + length, chunk):
                yield _Piece(at, min(chunk, offset + length - at), False)

    def _runs(self) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, zero) of what is to be written. For a compressed target data come in
        whole clusters, zeroes and what is left out only in whole clusters."""
        alignment, size = self.alignment, self.source.size
        offset = 0
        while offset < size:
            extent = self.source.block_status(offset, size - offset)
            kind = self._kind(extent, offset)
            length = extent.length
            if self.backing is not None and offset < self.backing.size < offset + length:
                length = self.backing.size - offset
            if alignment > 1 and offset + length < size:
                length = length // alignment * alignment
                if not length:
                    length, kind = min(alignment, size - offset), "data"
            if kind != "skip":
                yield offset, length, kind == "zero"
            offset += length

    def _kind(self, extent: Extent, offset: int) -> str:
        backing = self.backing
        if backing is None:
            return "zero" if extent.zero else "data"
        if extent.depth:
            return "skip"
        if extent.zero:
            return "zero" if offset < backing.size else "skip"
        return "data" if extent.data or extent.allocated else "skip"

    # -- doing it ----------------------------------------------------------------------------------

    def read(self, piece: _Piece) -> bytes:
        """The contents of a piece of data."""
        return b"" if piece.zero else self.source.read(piece.offset, piece.length)

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
            for start, end, zero in zero_runs(data, piece.offset, self.unit):
                if zero:
                    self._write_zeroes(piece.offset + start, end - start)
                else:
                    self.target.write(piece.offset + start, view[start:end])

    def _write_zeroes(self, offset: int, length: int) -> None:
        if not self.is_zero:
            self.target.write_zeroes(offset, length, unmap=True)

    def _write_compressed(self, offset: int, data: bytes) -> None:
        size = self.alignment
        if len(data) % size and offset + len(data) < self.target.size:
            data = data.ljust(-(-len(data) // size) * size, b"\0")[: self.target.size - offset]
        for start in range(0, len(data), size):
            cluster = data[start : start + size]
            if self.sparse and first_nonzero(cluster) < 0:
                self._write_zeroes(offset + start, len(cluster))
            else:
                self.target.write_compressed(offset + start, [cluster])
