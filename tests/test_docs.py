"""docs/qcow2.md and docs/virtio.md name files, tests and faults that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("qcow2", "virtio")
"""Each has a page of its own, which names files and tests without the folder."""


def named(pattern: str) -> list[tuple[str, str]]:
    """What the pages name so, each with its page's folder."""
    return sorted(
        (folder, name)
        for folder in FOLDERS
        for name in set(re.findall(pattern, (ROOT / "docs" / f"{folder}.md").read_text()))
    )


@pytest.mark.parametrize(("folder", "name"), named(r"`([\w/]+\.py::\w+)`"))
def test_a_test_that_is_named_is_there(folder: str, name: str) -> None:
    file, _, test = name.partition("::")
    path = ROOT / "tests" / (file if "/" in file else f"{folder}/{file}")
    assert re.search(rf"^\s*def {test}\(", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("folder", "name"), named(r"`((?:(?:\.\./)?backend/)?\w+\.py)`"))
def test_a_file_that_is_named_is_there(folder: str, name: str) -> None:
    places = (ROOT / folder / name, ROOT / name, ROOT / "tests" / folder / name)
    assert any(place.resolve().is_file() for place in places)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_faults_that_are_named_are_in_the_list(folder: str) -> None:
    lists = "".join(path.read_text() for path in (ROOT / "tests" / "mutants").glob("*.py"))
    text = (ROOT / "docs" / f"{folder}.md").read_text()
    faults = re.findall(r'\| "([^"]+)" \|$', text, re.MULTILINE)
    assert len(faults) > 30
    assert [fault for fault in faults if f'"{fault}"' not in lists] == []
