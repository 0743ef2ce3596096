"""Importing: every file once, and nothing before it is needed."""

import subprocess
import sys

LOAD_EVERYTHING = """
import importlib, os, pkgutil, sys
import pyvirtio

def everything(package):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        top = module.name.split(".")[1]
        if module.name.endswith(".__main__"):
            continue
        if top in {"tests", "examples", "benchmarks", "build", "setup", "conftest", "demo"}:
            continue
        loaded = importlib.import_module(module.name)
        if module.ispkg:
            everything(loaded)

everything(pyvirtio)
names = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and name != "__main__":
        names.setdefault(os.path.realpath(file), set()).add(module.__name__)
root = os.path.dirname(os.path.realpath(pyvirtio.__file__)) + os.sep
for file, modules in names.items():
    if file.startswith(root) and ".venv" not in file:
        assert len(modules) == 1 and min(modules).startswith("pyvirtio"), (file, modules)
print(sum(file.startswith(root) for file in names))
"""

LOAD_ROOT = """
import sys
before = set(sys.modules)
import pyvirtio
new = set(sys.modules) - before
print(*sorted(new))
"""


def preloaded():
    """What an editable install's finder has imported before anybody asks for anything."""
    return set(run("import sys; print(*sys.modules)", None).split())


def run(code, folder):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_no_file_is_loaded_under_two_names(tmp_path):
    assert int(run(LOAD_EVERYTHING, tmp_path)) > 10


def test_importing_the_root_loads_little(tmp_path):
    loaded = run(LOAD_ROOT, tmp_path).split()
    ours = {name for name in loaded if name.startswith("pyvirtio")}
    assert ours == {"pyvirtio", "pyvirtio.backend", "pyvirtio.backend.names"}
    heavy = {"cffi", "_cffi_backend", "cryptography", "zstandard", "importlib.metadata"}
    heavy |= {"dataclasses", "inspect", "typing"} - preloaded()
    assert not heavy & set(loaded)


def test_public_names_are_all_there():
    import pyvirtio

    assert set(pyvirtio.__all__) <= set(dir(pyvirtio))
    for name in ("FileDisk", "MemoryDisk", "NullDisk", "RawDisk", "open_disk", "create_disk"):
        assert getattr(pyvirtio, name).__module__.startswith("pyvirtio.backend.")
