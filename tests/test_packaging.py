"""What is installed is what is in the repository, and what the README says is so."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import pyvirtio

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = {"build", "tests", "examples", "benchmarks", "docs"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_the_library_is_installed(project: dict[str, Any]) -> None:
    found = {"pyvirtio"}
    for init in ROOT.glob("*/**/__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts[0] not in NOT_PACKAGED and not any(part.startswith(".") for part in parts):
            found.add(".".join(("pyvirtio", *parts)))
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_module_lies_in_a_package() -> None:
    for module in ROOT.glob("*/**/*.py"):
        parts = module.relative_to(ROOT).parts
        if parts[0] not in NOT_PACKAGED and not any(part.startswith(".") for part in parts):
            assert (module.parent / "__init__.py").exists(), module


def test_type_checkers_are_told_that_the_package_is_typed(project: dict[str, Any]) -> None:
    assert (ROOT / "py.typed").exists()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["pyvirtio"]


def test_the_installed_version_is_the_packages_own() -> None:
    assert version("pyvirtio") == pyvirtio.__version__


def test_every_public_name_can_be_imported() -> None:
    for name in pyvirtio.__all__:
        assert getattr(pyvirtio, name) is not None


def test_importing_the_package_loads_none_of_its_drivers() -> None:
    code = (
        "import sys, pyvirtio; "
        "print(*(m for m in sys.modules if m.startswith(('pyvirtio.qcow2', 'pyvirtio.virtio'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_module_of_the_package_is_loaded_under_two_names() -> None:
    names: dict[Path, str] = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or name == "__main__":
            continue
        path = Path(file).resolve()
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv"):
            other = names.setdefault(path, name)
            assert other == name or sys.modules[other] is module, f"{path}: {other} and {name}"


def test_the_code_of_the_readme_runs_when_pasted(tmp_path: Path) -> None:
    """All of its Python, one block after the other as a reader would, in an empty folder."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
