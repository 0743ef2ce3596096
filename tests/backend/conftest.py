"""Fixtures of the backend's tests."""

import pytest

from pyvirtio.backend import registry
from pyvirtio.backend.disk import Disk
from pyvirtio.backend.open import FileReference
from pyvirtio.backend.registry import Format

MAGIC = b"TOY!"


class ToyDisk(Disk):
    """A toy format: a magic, then the backing file's name and format, NUL-terminated each.

    A name that begins with ``data=`` is a data file's.
    """

    format_name = "toy"

    def __init__(self, file, read_only, policy):
        self.file = file
        name, kind = file.read(4, 508).split(b"\0")[:2]
        self._backing = self._data = None
        if name.startswith(b"data="):
            self._data = policy(FileReference(name[5:].decode(), role="data-file"))
        elif name:
            self._backing = policy(FileReference(name.decode(), kind.decode() or None))
        super().__init__(4096, read_only=read_only)

    def _readv(self, offset, views, length):
        self.file.readv(512 + offset, views)

    def _writev(self, offset, views, length):
        self.file.writev(512 + offset, views)

    @property
    def children(self):
        below = {"file": self.file}
        if self._backing is not None:
            below["backing"] = self._backing
        if self._data is not None:
            below["data-file"] = self._data
        return below

    def _close(self):
        for child in self.children.values():
            child.close()


def _toy_create(file, size, *, backing_file="", backing_format="", fail=False):
    file.write(0, MAGIC + backing_file.encode() + b"\0" + backing_format.encode() + b"\0")
    if fail:
        raise ValueError("asked to fail")


TOY = Format(
    "toy",
    lambda start: 100 if start[:4] == MAGIC else 0,
    lambda file, *, read_only, policy: ToyDisk(file, read_only, policy),
    _toy_create,
)


@pytest.fixture
def toy(monkeypatch):
    """The formats are raw and a toy, whatever else is registered."""
    loaders = {"raw": registry._loaders["raw"], "toy": lambda: TOY}
    monkeypatch.setattr(registry, "_loaders", loaders)
    return TOY
