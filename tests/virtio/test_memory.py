"""Guest memory: regions, holes, wrap-around, views."""

from __future__ import annotations

import array
import ctypes
import mmap
from typing import Any

import pytest

from pyvirtio import GuestError, GuestMemory

TOP = (1 << 64) - 4096


def two_regions() -> tuple[Any, bytearray, bytearray]:
    low, high = bytearray(4096), bytearray(8192)
    return GuestMemory.from_regions([(0x10000, high), (0x1000, low)]), low, high


@pytest.mark.parametrize(
    ("pa", "length"),
    [
        (0, 1),
        (0xFFF, 2),
        (0x1FFF, 2),
        (0x2000, 1),
        (0xFFFF, 1),
        (0x12000, 1),
        (0x1000, 1 << 32),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        (1 << 64, 1),
        (0x1000, (1 << 64) - 1),
        ((1 << 64) - 0x100, 0x1200),
    ],
)
def test_what_is_not_ram_is_refused(pa: int, length: int) -> None:
    memory, _, _ = two_regions()
    with pytest.raises(GuestError):
        memory.map([(pa, length)], True)
    with pytest.raises(GuestError):
        memory.check([(pa, length)], False)
    with pytest.raises(GuestError):
        memory.read(pa, length)


def test_adjacent_regions_are_one_memory() -> None:
    low, high = bytearray(16), bytearray(16)
    memory = GuestMemory.from_regions([(0, low), (16, high)])
    memory.write(12, b"abcdefgh")
    assert (low[12:], high[:4]) == (b"abcd", b"efgh")
    assert memory.read(10, 12) == b"\0\0abcdefgh\0\0"
    views = memory.map([(12, 8)], True)
    assert [bytes(view) for view in views] == [b"abcd", b"efgh"]


def test_ram_at_the_top_of_the_address_space() -> None:
    memory = GuestMemory.from_buffer(bytearray(4096), TOP)
    memory.write(TOP + 4095, b"x")
    assert memory.read(TOP + 4095, 1) == b"x"
    with pytest.raises(GuestError):
        memory.write(TOP + 4095, b"xy")
    with pytest.raises(ValueError, match="address space"):
        GuestMemory.from_buffer(bytearray(4097), TOP)


def test_overlapping_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        GuestMemory.from_regions([(0, bytearray(16)), (15, bytearray(16))])


def test_rom_can_be_read_and_not_written() -> None:
    memory = GuestMemory.from_regions([(0, b"rom!"), (16, bytearray(16))])
    assert memory.read(0, 4) == b"rom!"
    for action in (
        lambda: memory.write(0, b"x"),
        lambda: memory.map([(0, 4)], True),
        lambda: memory.store_byte(0, 1),
    ):
        with pytest.raises(GuestError):
            action()


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(64),
        mmap.mmap(-1, 64),
        (ctypes.c_ubyte * 64)(),
        (ctypes.c_uint32 * 16)(),
        array.array("I", bytes(64)),
        memoryview(bytearray(64)),
        memoryview(bytearray(64)).cast("I"),
    ],
    ids=lambda buffer: type(buffer).__name__,
)
def test_any_writable_buffer_is_ram(buffer: Any) -> None:
    memory = GuestMemory.from_buffer(buffer, 0x100)
    memory.write(0x104, b"abc")
    memory.store_byte(0x107, 0x64)
    views = memory.map([(0x105, 3)], True)
    assert bytes(views[0]) == b"bcd"
    views[0][:] = b"xyz"
    memory.commit([(0x105, 3)], views)
    assert memory.read(0x100, 8) == b"\0\0\0\0axyz"
    open_words, first = memory.words(0x104, 4, "little")
    words = open_words()
    words[first + 1] = 0x4241
    words.release()
    assert memory.read(0x104, 4) == b"axAB"


def test_an_mmap_can_be_closed_after_use() -> None:
    ram = mmap.mmap(-1, 4096)
    memory = GuestMemory.from_buffer(ram)
    memory.map([(0, 16)], True)[0].release()
    open_words, _ = memory.words(0, 16, "little")
    open_words().release()
    memory.read(0, 4)
    ram.close()


def test_on_write_is_told_of_every_write() -> None:
    writes: list[tuple[int, int]] = []
    ram = bytearray(64)
    memory = GuestMemory.from_buffer(ram, 0x1000, on_write=lambda pa, n: writes.append((pa, n)))
    memory.write(0x1001, b"abc")
    memory.store_byte(0x1008, 1)
    memory.commit([(0x1010, 8)], memory.map([(0x1010, 8)], True))
    memory.map([(0x1010, 8)], False)
    open_words, first = memory.words(0x1020, 4, "little")
    open_words()[first] = 7
    assert writes == [(0x1001, 3), (0x1008, 1), (0x1010, 8), (0x1020, 2)]


def test_callbacks_that_raise_are_the_guests_error() -> None:
    def bad(*arguments: Any) -> bytes:
        raise RuntimeError("unmapped")

    memory = GuestMemory.from_callbacks(bad, bad)
    with pytest.raises(GuestError, match="unmapped"):
        memory.read(0, 1)
    with pytest.raises(GuestError, match="unmapped"):
        memory.write(0, b"x")


def test_a_callback_that_reads_short_is_the_guests_error() -> None:
    memory = GuestMemory.from_callbacks(lambda pa, n: b"", lambda pa, data: None)
    with pytest.raises(GuestError, match="not all RAM"):
        memory.read(0, 1)


def test_callbacks_are_not_asked_beyond_the_address_space() -> None:
    memory = GuestMemory.from_callbacks(lambda pa, n: bytes(n), lambda pa, data: None)
    with pytest.raises(GuestError, match="address space"):
        memory.map([((1 << 64) - 1, 2)], True)


def test_a_bounce_buffer_has_a_limit() -> None:
    memory = GuestMemory.from_callbacks(lambda pa, n: bytes(n), lambda pa, data: None)
    with pytest.raises(ValueError, match="one time"):
        memory.map([(0, 1 << 19)] * 3, True)


def test_a_failed_map_leaves_no_view_open() -> None:
    ram = bytearray(64)
    memory = GuestMemory.from_buffer(ram)
    with pytest.raises(GuestError):
        memory.map([(0, 8), (100, 8)], True)
    ram.extend(b"x")


def test_callbacks_are_not_asked_for_nothing() -> None:
    """As for RAM in buffers: an empty piece may lie anywhere."""

    def refuse(*_: Any) -> bytes:
        raise IndexError("no RAM there")

    memory = GuestMemory.from_callbacks(refuse, refuse)
    assert memory.read(1 << 40, 0) == b""
    memory.write(1 << 40, b"")
