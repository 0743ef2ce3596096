"""The emulator of a hundred lines, and the page that adds snapshots to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from examples import toy
from support.peers import find_program
from support.qemu import qemu_check, qemu_img_json

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "vmstate.md").read_text()


def test_the_counter_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert toy.main() == 0
    assert capsys.readouterr().out.splitlines() == ["1024", "5125 instructions"]


def test_the_emulator_is_as_short_as_the_page_says() -> None:
    assert len(Path(toy.__file__).read_text().splitlines()) < 125


def test_the_code_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    assert len(blocks) > 5
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile("\n".join(blocks), "docs/vmstate.md", "exec"), names)
    if find_program("qemu-img"):
        for image in ("toy.qcow2", "toy-ram.qcow2"):
            qemu_check(tmp_path / image)
        listed = qemu_img_json("info", tmp_path / "toy-ram.qcow2")["snapshots"]
        assert [(one["name"], one.get("icount")) for one in listed] == [
            ("in the middle", 500),
            ("another way", None),
        ]
