"""Compressed clusters: the two codecs, and what was decompressed last.

A compressed cluster is one raw deflate stream (RFC 1951, 4 KiB window) or zstd data that gives a
whole guest cluster. What is read comes from a file nobody vouches for: output is bounded by the
cluster's size, a zstd window by what RFC 8878 asks every decoder to support.
"""

from __future__ import annotations

import sys
import threading
import zlib
from collections import OrderedDict
from typing import Any

from ..errors import UnsupportedError
from .geometry import Geometry
from .layout import CompressionType

__all__ = ["CompressedDataError", "DecompressedClusters", "compress", "decompress"]

_DEFLATE_WINDOW = -12
"""4 KiB, no header: what QEMU writes."""

_DEFLATE_MEMORY = 9
"""The most zlib can use for its tables (memLevel): what QEMU takes, too."""

_ZSTD_WINDOW_LOG = 23
"""8 MiB (RFC 8878, 3.1.1.1.2); no cluster is larger than 2 MiB."""

_CACHED_BYTES = 4 << 20
_CACHED_CLUSTERS = 64


class CompressedDataError(Exception):
    """The data of a compressed cluster do not give a cluster."""


# -- codecs ----------------------------------------------------------------------------------------


def compress(kind: CompressionType, data: bytes) -> bytes | None:
    """A guest cluster compressed; None if it does not become smaller. Needs no lock."""
    if kind is CompressionType.ZSTD:
        packed = _zstd_compress(data)
    else:
        stream = zlib.compressobj(
            zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _DEFLATE_WINDOW, _DEFLATE_MEMORY
        )
        packed = stream.compress(data) + stream.flush()
    return packed if len(packed) < len(data) else None


def decompress(kind: CompressionType, data: bytes, size: int) -> bytes:
    """The guest cluster of ``size`` bytes at the start of what ``data`` decompresses to.

    Raises CompressedDataError. What follows in ``data`` is ignored: the length in an L2 entry
    is rounded up to sectors.
    """
    if kind is CompressionType.ZSTD:
        contents = _zstd_decompress(data, size)
    else:
        try:
            contents = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        except zlib.error as error:
            raise CompressedDataError(str(error)) from error
    if len(contents) != size:
        raise CompressedDataError(f"{len(contents)} bytes instead of {size}")
    return contents


if sys.version_info >= (3, 14):

    def _zstd() -> Any:
        from compression import zstd

        return zstd

    def _zstd_compress(data: bytes) -> bytes:
        packed: bytes = _zstd().compress(data)
        return packed

    def _zstd_decompress(data: bytes, size: int) -> bytes:
        zstd = _zstd()
        options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        contents = b""
        try:
            while data and len(contents) < size:
                frame = zstd.ZstdDecompressor(options=options)
                contents += frame.decompress(data, size - len(contents))
                if not frame.eof:
                    break
                data = frame.unused_data
        except zstd.ZstdError as error:
            raise CompressedDataError(str(error)) from error
        return contents

else:
    _codecs = threading.local()
    """Each thread's own zstd contexts: they are not to be shared, and costly to make."""

    def _zstd() -> Any:
        try:
            import zstandard
        except ImportError as error:
            raise UnsupportedError(
                "zstd compression needs the package 'zstandard'", feature="zstd"
            ) from error
        return zstandard

    def _zstd_compress(data: bytes) -> bytes:
        codec = getattr(_codecs, "compressor", None)
        if codec is None:
            codec = _codecs.compressor = _zstd().ZstdCompressor()
        packed: bytes = codec.compress(data)
        return packed

    def _zstd_decompress(data: bytes, size: int) -> bytes:
        zstandard = _zstd()
        codec = getattr(_codecs, "decompressor", None)
        if codec is None:
            codec = zstandard.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_LOG)
            _codecs.decompressor = codec
        pieces = []
        try:
            with codec.stream_reader(data, read_across_frames=True) as stream:
                while size > 0:
                    piece = stream.read(size)
                    if not piece:
                        break
                    pieces.append(piece)
                    size -= len(piece)
        except zstandard.ZstdError as error:
            raise CompressedDataError(str(error)) from error
        return b"".join(pieces)


# -- what was decompressed -------------------------------------------------------------------------


class DecompressedClusters:
    """The contents of the compressed clusters that were read last, by L2 entry.

    An entry says where the data lie, not what they are: before the host clusters are freed and
    others may get them, :meth:`forget` is called. All requests that had mapped the entry have
    finished by then (``quarantine.py``), so nothing old comes in afterwards.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._limit = max(1, min(_CACHED_CLUSTERS, _CACHED_BYTES >> geometry.cluster_bits))
        self._clusters: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, entry: int) -> bytes | None:
        """The guest cluster of a compressed L2 entry, if it is known."""
        with self._lock:
            contents = self._clusters.get(entry)
            if contents is not None:
                self._clusters.move_to_end(entry)
            return contents

    def put(self, entry: int, contents: bytes) -> None:
        """Remember a guest cluster; by a request that has mapped its entry and not left yet."""
        with self._lock:
            self._clusters[entry] = contents
            if len(self._clusters) > self._limit:
                self._clusters.popitem(last=False)

    def forget(self, first: int, count: int, times: int = 1) -> None:
        """These host clusters lose references, and may be free then."""
        if not self._clusters:
            return
        geometry = self._geometry
        start, end = first << geometry.cluster_bits, (first + count) << geometry.cluster_bits
        with self._lock:
            for entry in list(self._clusters):
                offset, length = geometry.compressed_extent(entry)
                if offset < end and start < offset + length:
                    del self._clusters[entry]

    def clear(self) -> None:
        """Forget everything: the file may have changed."""
        with self._lock:
            self._clusters.clear()
