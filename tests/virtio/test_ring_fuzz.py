"""Bytes as a hostile driver: what ``make fuzz-rings`` goes on with for ten minutes."""

from __future__ import annotations

import random

import pytest

from support import ring_fuzz
from support.ring_fuzz import Board, Bytes, attack, endure


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


@pytest.mark.parametrize("transport", [0, 1, 2])
@pytest.mark.parametrize("options", [0, 3, 8])
def test_a_device_does_not_grow(transport: int, options: int) -> None:
    for seed in range(3):
        chance = random.Random(seed)
        endure(bytes([transport, options]) + chance.randbytes(400))


def test_growth_and_unbounded_work_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else these would be survived by anything."""
    kept: list[object] = []
    original = Board.step

    def step(board: Board, source: Bytes) -> None:
        kept.append([object() for _ in range(50)])
        original(board, source)

    data = bytes([0, 0]) + random.Random(1).randbytes(400)
    monkeypatch.setattr(Board, "step", step)
    with pytest.raises(RuntimeError, match="blocks of memory more"):
        endure(data)
    monkeypatch.setattr(Board, "step", lambda board, source: board.disk.readv(0, [bytearray(512)]))
    monkeypatch.setattr(ring_fuzz, "_MOST_REQUESTS", 0)
    with pytest.raises(RuntimeError, match="1 requests at one step"):
        attack(data)
