"""The pytest plugin: options, collection, one result for each requirement, the matrix at the end.

It is an entry point of the package. Without ``--device`` it only adds its options.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

__all__ = ["Rules", "shows"]

FOLDER = Path(__file__).parent
PACKAGE = __package__
RULES = pytest.StashKey["Rules"]()


def shows(*idents: str) -> pytest.MarkDecorator:
    """Marks a test with the requirements that it shows."""
    return pytest.mark.shows(*idents)


class Rules:
    """What a running test has found out about the requirements that it shows."""

    def __init__(self) -> None:
        self.shown: set[str] = set()
        self.broken: set[str] = set()

    @contextmanager
    def __call__(self, *idents: str) -> Iterator[None]:
        """What fails inside breaks these requirements, and none of the others of the test."""
        try:
            yield
        except pytest.skip.Exception:
            raise
        except BaseException:
            self.broken.update(idents)
            raise
        self.shown.update(idents)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's options."""
    group = parser.getgroup("virtio", "virtio conformance (pyvirtio.virtio.conformance)")
    group.addoption(
        "--device", metavar="DEVICE", help="test this: vhost-user:SOCKET, or module:function"
    )
    group.addoption(
        "--matrix", metavar="PREFIX", help="write the matrix to PREFIX.txt, .json and .html"
    )
    group.addoption(
        "--requirement",
        metavar="ID",
        action="append",
        default=[],
        help="run only tests that show this requirement, BLK-66 for instance",
    )


def pytest_configure(config: pytest.Config) -> None:
    """With a device: fixtures and the recorder."""
    config.addinivalue_line("markers", "shows(*ids): the requirements of virtio that a test shows")
    spec = config.getoption("--device")
    if spec:
        from .report import Recorder

        config.pluginmanager.register(import_module(f"{PACKAGE}.fixtures"), "virtio-fixtures")
        config.pluginmanager.register(Recorder(spec, config), "virtio-recorder")


# -- collection: the suite's modules are imported under the name of the package they belong to ---


class _Module(pytest.Module):
    def _getobj(self) -> ModuleType:
        return import_module(f"{PACKAGE}.{self.path.stem}")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Any:
    """A module of the suite; any other is left to pytest."""
    if module_path.parent == FOLDER:
        return _Module.from_parent(parent, path=module_path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> Any:
    """The suite's folder, and those above it: packages that are not imported once more."""
    if FOLDER.is_relative_to(path) and (path / "__init__.py").exists():
        return pytest.Dir.from_parent(parent, path=path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a device there is nothing to be tested; with --requirement less is."""
    wanted = set(config.getoption("--requirement"))
    kept: list[pytest.Item] = []
    for item in items:
        if item.path.parent != FOLDER:
            kept.append(item)
            continue
        if not config.getoption("--device"):
            item.add_marker(pytest.mark.skip(reason="no --device"))
        marker = item.get_closest_marker("shows")
        if not wanted or (marker is not None and wanted.intersection(marker.args)):
            kept.append(item)
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
