"""The conformance suite, run on our own device as a user would, and what it says."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import pyvirtio.virtio.conformance
from pyvirtio.virtio.conformance.requirements import UNTESTABLE, load_requirements

PACKAGE = "pyvirtio.virtio.conformance"
FOLDER = Path(pyvirtio.virtio.conformance.__file__).parent
NEVER_REACHED = {"PCI-47", "PCI-48"}
"""Our device has no admin queues; see ``test_odd_devices.py``."""
FAULTS = Path(__file__).parents[1] / "mutants" / "device_faults.py"


def run(device: str, prefix: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the suite on a device, in a folder that is nobody's."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", PACKAGE),
            *("--device", device, "--matrix", str(prefix), *options),
        ],
        cwd=prefix.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def results(prefix: Path) -> dict[str, dict[str, Any]]:
    """What a run has found, by rule."""
    rows = json.loads(Path(f"{prefix}.json").read_text())["requirements"]
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Our device in three of its forms; in the third only what is about its registers."""
    folder = tmp_path_factory.mktemp("conformance")
    found = {}
    for maker, options in (
        ("pci_callbacks", ()),
        ("mmio_v1_big", ()),
        ("mmio", ("-k", "mmio")),
        ("pci_legacy", ("-k", "test_pci and (legacy or transitional)")),
        ("pci", ("-k", "notifications_of_16")),
    ):
        done = run(f"{PACKAGE}.ours:{maker}", folder / maker, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        found[maker] = results(folder / maker)
    return found


def test_our_device_breaks_no_rule(matrices: dict[str, dict[str, dict[str, Any]]]) -> None:
    broken = [
        (maker, row)
        for maker, rows in matrices.items()
        for row in rows.values()
        if row["result"] == "fail"
    ]
    assert not broken


def test_every_testable_must_is_shown(matrices: dict[str, dict[str, dict[str, Any]]]) -> None:
    missing = {
        ident
        for ident, rule in load_requirements().items()
        if rule.binding
        and ident not in UNTESTABLE
        and not any(rows[ident]["result"] == "pass" for rows in matrices.values())
    }
    assert missing == NEVER_REACHED


def test_every_rule_that_is_shown_has_a_fault_that_breaks_it() -> None:
    faults = {fault[0] for fault in runpy.run_path(str(FAULTS))["DEVICE"]}
    binding = {ident for ident, rule in load_requirements().items() if rule.binding}
    assert binding - set(UNTESTABLE) - NEVER_REACHED <= faults


def test_rules_that_tests_cite_are_in_the_table() -> None:
    text = "".join(path.read_text() for path in FOLDER.glob("test_*.py"))
    cited = set(re.findall(r'"((?:BF|VQ-S|PKD|MMIO|PCI|BLK)-\d+)"', text))
    rules = load_requirements()
    assert cited <= set(rules)
    assert not cited & set(UNTESTABLE)
    assert set(UNTESTABLE) <= set(rules)
    assert not set(rules) - cited - set(UNTESTABLE)


BROKEN = """
from pyvirtio.virtio.conformance.device import CannotMakeError
from pyvirtio.virtio.conformance.ours import mmio

def device():
    made = mmio()
    read = made.registers.read
    made.registers.read = lambda offset, size: read(offset, size) | (offset == 0x60) << 4
    return made

def nothing():
    raise CannotMakeError("it is not here")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "broken_device.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_broken_rule_is_named_and_no_other(folder: Path) -> None:
    options = ("--requirement", "MMIO-03", "--requirement", "MMIO-01")
    done = run("broken_device:device", folder / "m", *options)
    assert done.returncode == 1
    rows = results(folder / "m")
    assert {ident for ident, row in rows.items() if row["result"] == "fail"} == {"MMIO-04"}
    assert [rows[ident]["result"] for ident in ("MMIO-01", "MMIO-02", "MMIO-03")] == [
        "pass",
        "pass",
        "not reached",
    ]
    assert rows["PKD-02"]["result"] == "not testable"
    assert "MMIO-04   MUST        fail" in done.stdout


class Page(HTMLParser):
    """Counts rows and collects text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows = 0
        self.text = ""
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_device_that_cannot_be_had_reaches_nothing(folder: Path) -> None:
    done = run("broken_device:nothing", folder / "n", "--requirement", "MMIO-01")
    assert done.returncode == 0
    assert results(folder / "n")["MMIO-01"]["reason"] == "it is not here"
    page = Page((folder / "n.html").read_text())
    assert (page.rows, page.links) == (len(load_requirements()) + 1, [])
    assert "it is not here" in page.text
    assert "MMIO-01   MUST        not reached" in (folder / "n.txt").read_text()


def test_without_a_device_nothing_is_tested(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "--pyargs", PACKAGE, "-k", "identity"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "no --device" in done.stdout
