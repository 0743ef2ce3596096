"""Bytes as a hostile driver: what ``make fuzz-rings`` goes on with for ten minutes."""

from __future__ import annotations

import random

import pytest

from support.ring_fuzz import Board, Bytes, attack


@pytest.mark.parametrize("transport", [0, 1, 2])
@pytest.mark.parametrize("options", [0, 1, 2, 6, 8])
def test_any_bytes_are_survived(transport: int, options: int) -> None:
    for seed in range(40):
        chance = random.Random(seed)
        attack(bytes([transport, options]) + chance.randbytes(chance.randrange(2, 800)))


@pytest.mark.parametrize("transport", [0, 1, 2])
@pytest.mark.parametrize("options", [0, 1, 2, 6])
def test_a_request_that_is_right_is_done(transport: int, options: int) -> None:
    """Else the bytes would be survived by a device that does nothing."""
    board = Board(Bytes(bytes([transport, options])))
    board.step(Bytes(bytes([3, 0, 8, 0, 1, 0x10, 0, 0x80, 0])))
    assert board.disk.requests == 1
