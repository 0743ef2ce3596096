"""The suite accuses no device that is odd, slow or small, and legal; and it can accuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.odd_devices import ODD, SHOULDS

PACKAGE = "pyvirtio.virtio.conformance"
TESTS = Path(__file__).parents[1]
CHOSEN = {
    "slow": "suspend or queue_reset or in_order or event_index or every_batch or used",
    "leisurely": "test_pci or reset",
    "always_read_only": "test_block or kicks or status_reads",
}
"""Of those that are waited for by the clock, the tests that are about it: all take minutes."""
ADMIN = """
from pyvirtio.virtio.conformance.ours import pci

FIRST, COUNT = {first}, {count}

def device():
    made = pci()
    registers, bus = made.registers, made.function.bus
    offered, read = registers.offered_features, bus.bar_read
    registers.offered_features = lambda: offered() | 1 << 41
    registers.accept_features = lambda features: type(registers).accept_features(
        registers, features & ~(1 << 41)
    )
    fields = {{60: FIRST, 62: COUNT}}
    bus.bar_read = lambda bar, offset, size: (
        fields[offset] if bar == 4 and offset in fields else read(bar, offset, size)
    )
    return made
"""


def run(device: str, folder: Path, *options: str, path: Path = TESTS) -> dict[str, Any]:
    """What the suite finds, by rule."""
    prefix = folder / "matrix"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", PACKAGE),
            *("--device", device, "--matrix", str(prefix), *options),
        ],
        cwd=folder,
        env={"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    rows = json.loads(Path(f"{prefix}.json").read_text())["requirements"]
    return {row["id"]: row for row in rows}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_device_is_not_accused(name: str, tmp_path: Path) -> None:
    options = ("-k", CHOSEN[name]) if name in CHOSEN else ()
    rows = run(f"support.odd_devices:{name}", tmp_path, *options)
    accused = {ident: row["reason"] for ident, row in rows.items() if row["result"] == "fail"}
    assert set(accused) == SHOULDS.get(name, set()), accused
    assert all(rows[ident]["level"].startswith("SHOULD") for ident in accused)
    assert sum(row["result"] == "pass" for row in rows.values()) > 10


@pytest.mark.parametrize(
    ("first", "count", "broken"),
    [(2, 4, set()), (1, 4, {"PCI-47"}), (2, 0xFFFF, {"PCI-48"})],
)
def test_admin_queues(first: int, count: int, broken: set[str], tmp_path: Path) -> None:
    """No device of ours has any: so another one."""
    (tmp_path / "admin.py").write_text(ADMIN.format(first=first, count=count))
    rules = ("PCI-47", "PCI-48")
    options = [word for rule in rules for word in ("--requirement", rule)]
    rows = run("admin:device", tmp_path, *options, path=tmp_path)
    assert {rule for rule in rules if rows[rule]["result"] == "fail"} == broken
    assert broken or all(rows[rule]["result"] == "pass" for rule in rules)
