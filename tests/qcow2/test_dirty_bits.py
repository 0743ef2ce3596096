"""The bits of a bitmap in memory, against a Python integer as the model."""

import random
from itertools import pairwise

import pytest

from pyvirtio.qcow2.dirty_bits import DirtyBits

CHUNK_BITS = 8 * 4096


def as_int(bits):
    return sum((1 << first + count) - (1 << first) for first, count in bits.runs())


def check(bits, model):
    assert as_int(bits) == model
    assert bits.count() == model.bit_count()
    runs = list(bits.runs())
    assert all(b > a + n for (a, n), (b, _) in pairwise(runs))


@pytest.mark.parametrize("length", [1, 7, 8, 100, CHUNK_BITS, CHUNK_BITS + 1, 3 * CHUNK_BITS + 5])
def test_random_operations_match_an_integer(length):
    chance = random.Random(length)
    bits, model = DirtyBits(length), 0
    for _ in range(150):
        what = chance.random()
        if what < 0.75:
            first = chance.randrange(length)
            count = chance.choice([1, 3, 8, 64, 5000, length])
            bits.set(first, count)
            end = min(first + count, length)
            model |= (1 << end) - (1 << first)
        elif what < 0.8:
            bits.clear()
            model = 0
        elif what < 0.9:
            other = DirtyBits(bits.length)
            first = chance.randrange(length)
            other.set(first, chance.choice([1, 100, length]))
            bits.merge(other)
            model |= as_int(other)
        else:
            length = max(1, length + chance.choice([-1, 1, -9, 9, -CHUNK_BITS, CHUNK_BITS]))
            bits.resize(length)
            model &= (1 << length) - 1
        check(bits, model)


@pytest.mark.parametrize("size", [512, 4096, 65536, 2 << 20])
def test_pieces_loaded_again_give_the_same_bits(size):
    chance = random.Random(size)
    bits = DirtyBits(20 * CHUNK_BITS + 77)
    for _ in range(30):
        bits.set(chance.randrange(bits.length), chance.choice([1, 9, 3000]))
    bits.set(5 * CHUNK_BITS, 3 * CHUNK_BITS)
    again = DirtyBits(bits.length)
    for number, piece in bits.pieces(size):
        assert len(piece) == size
        assert any(piece)
        again.load(number * size, piece)
    assert list(again.runs()) == list(bits.runs())


def test_set_bits_past_the_end_of_what_is_loaded_are_dropped():
    bits = DirtyBits(10)
    bits.load(0, b"\xff" * 512)
    assert list(bits.runs()) == [(0, 10)]
    bits.resize(20)
    assert list(bits.runs()) == [(0, 10)]


def test_a_huge_bitmap_takes_memory_only_where_it_is_set():
    bits = DirtyBits(1 << 32)
    bits.set(1 << 31, 1)
    bits.set(5, 1)
    assert list(bits.runs()) == [(5, 1), (1 << 31, 1)]
    assert len(bits._chunks) == 2


def test_a_huge_range_is_set_without_an_object_per_byte():
    bits = DirtyBits(1 << 30)
    bits.set(0, 1 << 30)
    assert list(bits.runs()) == [(0, 1 << 30)]
    assert len({id(chunk) for chunk in bits._chunks.values()}) == 1


def test_a_copy_does_not_follow_the_original():
    bits, copy = DirtyBits(100), DirtyBits(100)
    bits.set(3, 4)
    copy.merge(bits)
    bits.set(50, 1)
    assert list(copy.runs()) == [(3, 4)]
