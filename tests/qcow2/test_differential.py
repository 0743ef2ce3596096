"""Random operations on twin images, ours and QEMU's: the same contents, the same allocation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.features import WEIGHTS, Meetings
from support.peers import requires
from support.twins import run_sequence

pytestmark = requires("qemu-img", "qemu-io")

SEQUENCES, STEPS = 40, 260
"""10,400 operations."""
FIRST_SEED = int(os.environ.get("PYVIRTIO_FUZZ_SEED", "1"))

_meetings = Meetings()


@pytest.mark.parametrize("number", range(SEQUENCES))
def test_a_sequence_ends_as_with_qemu(tmp_path: Path, number: int) -> None:
    run_sequence(tmp_path, seed=FIRST_SEED + number, steps=STEPS, meetings=_meetings)


def test_features_met_in_pairs() -> None:
    """Every operation has been met by every feature of an image (prints the matrix)."""
    if _meetings.operations < SEQUENCES * (STEPS - 10):
        pytest.skip("needs all the sequences above")
    print(_meetings.table())
    values = ["v2", "v3", "subcl", "lazy", "b:none", "b:shorter", "b:longer", "b:chain"]
    met = {pair for pair in _meetings.pairs if _meetings.pairs[pair]}
    missing = [(v, kind) for v in values for kind in WEIGHTS if (v, kind) not in met]
    assert not missing
