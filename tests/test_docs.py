"""docs/qcow2.md names files, tests and faults that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "qcow2.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+\.py::\w+)`", TEXT))))
def test_a_test_that_is_named_is_there(name: str) -> None:
    file, _, test = name.partition("::")
    path = ROOT / "tests" / (file if "/" in file else f"qcow2/{file}")
    assert re.search(rf"^\s*def {test}\(", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:\.\./backend/)?\w+\.py)`", TEXT))))
def test_a_file_that_is_named_is_there(name: str) -> None:
    tests = ROOT / "tests" / "qcow2" / name
    assert (ROOT / "qcow2" / name).resolve().is_file() or tests.is_file()


def test_the_faults_that_are_named_are_in_the_list() -> None:
    lists = "".join(path.read_text() for path in (ROOT / "tests" / "mutants").glob("*.py"))
    named = re.findall(r'\| "([^"]+)" \|$', TEXT, re.MULTILINE)
    assert len(named) > 50
    assert [fault for fault in named if f'"{fault}"' not in lists] == []
