"""Lists of buffers, and the parts of a request that are done in different ways."""

from __future__ import annotations

import pytest

from pyvirtio import MemoryDisk
from pyvirtio.backend.buffers import as_views, clear, copy_in, gather, split
from pyvirtio.backend.disk import Disk, Limits


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in parts]


def test_a_part_of_several_buffers() -> None:
    parts = views(b"abc", b"", b"defg", b"hi")
    whole = b"abcdefghi"
    for start in range(10):
        for length in range(10 - start):
            assert gather(split(parts, start, length)) == whole[start : start + length]


def test_a_part_of_one_buffer() -> None:
    (view,) = views(b"abcdef")
    assert bytes(split([view], 0, 4)[0]) == b"abcd"
    assert split([view], 0, 6)[0] is view
    assert bytes(split([view], 2, 3)[0]) == b"cde"


def test_scattering() -> None:
    parts = views(b"...", b"", b"..")
    copy_in(parts, b"abcde")
    assert [bytes(part) for part in parts] == [b"abc", b"", b"de"]


@pytest.mark.parametrize("length", [0, 1, 65535, 65536, 65537, 200_001])
def test_clearing_buffers_of_any_length(length: int) -> None:
    parts = views(b"x" * length, b"y")
    clear(parts)
    assert gather(parts) == bytes(length + 1)


def test_a_buffer_with_holes_is_refused() -> None:
    with pytest.raises(TypeError, match="contiguous"):
        as_views([memoryview(b"abcdef")[::2]])


class Aligned(MemoryDisk):
    """Zeroes and discards of its own for whole units of 64 bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.limits = Limits(write_zeroes_alignment=64, discard_alignment=64)
        self.done: list[tuple[int, int]] = []
        self.write(0, b"x" * size)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.done.append((offset, length))
        self._writev(offset, [memoryview(bytes(length))], length)

    def _discard(self, offset: int, length: int) -> None:
        self.done.append((offset, length))


@pytest.mark.parametrize(
    ("offset", "length", "done"),
    [
        (64, 128, [(64, 128)]),
        (10, 300, [(64, 192)]),
        (70, 20, []),
        (60, 10, []),
        (128, 100, [(128, 64)]),
        (130, 62, []),
    ],
)
def test_zeroes_cover_exactly_what_was_asked(
    offset: int, length: int, done: list[tuple[int, int]]
) -> None:
    disk = Aligned(500)
    disk.write_zeroes(offset, length)
    assert disk.getvalue() == b"x" * offset + bytes(length) + b"x" * (500 - offset - length)
    assert disk.done == done


def test_a_discard_may_end_with_the_disk() -> None:
    disk = Aligned(500)
    disk.discard(440, 60)
    disk.discard(100, 100)
    disk.discard(65, 62)
    assert disk.done == [(448, 52), (128, 64)]


def test_past_the_end_of_a_growable_disk_buffers_are_cleared() -> None:
    disk: Disk = MemoryDisk(growable=True)
    disk.write(0, b"x" * 100)
    buffer = bytearray(b"?" * 200)
    disk.readv(0, [buffer])
    assert buffer == b"x" * 100 + bytes(100)
