"""The guest's root file system: busybox, SQLite and e2fsprogs on ext4, in a qcow2 image.

mke2fs makes the file system from a folder, without being root; our own driver makes the image.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pyvirtio

from .linux import SCRIPTS, find_linux, guest_packages, kept
from .packages import PackageError

__all__ = ["ROOT_SIZE", "copy_disk", "find_root", "find_tool", "make_overlay"]

ROOT_SIZE = 256 << 20
_LIBRARY = "usr/lib/riscv64-linux-gnu"
_PACKAGES = {
    "busybox-static": ("usr/bin/busybox",),
    "libc6": tuple(f"{_LIBRARY}/{name}" for name in ("ld-linux-*", "libc.so.6", "libm.so.6")),
    "e2fsprogs": ("usr/sbin/mke2fs", "usr/sbin/mkfs.ext4", "usr/sbin/e2fsck", "etc/mke2fs.conf"),
    "libext2fs2t64": (f"{_LIBRARY}/lib*",),
    "libcom-err2": (f"{_LIBRARY}/lib*",),
    "libblkid1": (f"{_LIBRARY}/lib*",),
    "libuuid1": (f"{_LIBRARY}/lib*",),
    "util-linux": ("usr/sbin/blkdiscard",),
    "sqlite3": ("usr/bin/sqlite3",),
    "libsqlite3-0": (f"{_LIBRARY}/lib*",),
    "libreadline8t64": (f"{_LIBRARY}/libreadline*",),
    "libtinfo6": (f"{_LIBRARY}/libtinfo*",),
    "zlib1g": (f"{_LIBRARY}/lib*",),
}
"""Packages, and what of them the guest gets."""
_SCRIPTS = {
    "inittab": "etc/inittab",
    "profile": "etc/profile",
    "rc": "etc/rc",
    "workload": "usr/bin/workload",
    "verify": "usr/bin/verify",
}
_FOLDERS = ("dev", "etc", "mnt", "proc", "root", "sys", "tmp", "usr/bin", "usr/sbin", _LIBRARY)
_UUID = "5c0b8c1e-8d8e-4f5c-9f0a-0123456789ab"
"""The same in every image, so that the same image comes out."""


def find_root() -> Path:
    """The base image, built if it is not here yet. Raises PackageError."""
    scripts = [SCRIPTS / name for name in _SCRIPTS]
    linux = find_linux()
    parts = guest_packages().get_all(_PACKAGES)
    path = kept("root", ".qcow2", [parts["busybox-static"] / "usr/bin/busybox", *scripts])
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            tree, raw = Path(scratch, "tree"), Path(scratch, "root.raw")
            _fill(tree, parts)
            (tree / "etc/release").write_text(f"{linux.version}\n")
            _make_ext4(tree, raw)
            image = Path(scratch, "root.qcow2")
            with (
                pyvirtio.open_disk(raw, format="raw", read_only=True) as source,
                pyvirtio.create_disk(image, ROOT_SIZE, format="qcow2") as target,
            ):
                copy_disk(source, target)
            image.replace(path)
    return path


def make_overlay(path: Path) -> Path:
    """A fresh overlay on the base image."""
    base = os.path.relpath(find_root(), path.resolve().parent)
    pyvirtio.create_disk(
        path, ROOT_SIZE, format="qcow2", backing_file=base, backing_fmt="qcow2"
    ).close()
    return path


def copy_disk(source: pyvirtio.Disk, target: pyvirtio.Disk) -> int:
    """Copy what is not zeroes; how many bytes that is."""
    copied = offset = 0
    for extent in source.extents():
        if not extent.zero:
            target.write(offset, source.read(offset, extent.length))
            copied += extent.length
        offset += extent.length
    return copied


def find_tool(name: str) -> str:
    """A program of e2fsprogs on this machine. Raises PackageError."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise PackageError(f"{name} is missing: it comes with e2fsprogs")
    return found


def _fill(tree: Path, parts: dict[str, Path]) -> None:
    """Put the files together as they are to be in the guest."""
    for name in _FOLDERS:
        (tree / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib"):
        (tree / name).symlink_to(f"usr/{name}")
    for part in parts.values():
        shutil.copytree(part, tree, symlinks=True, dirs_exist_ok=True)
    # The loader is asked for by its path in /lib, which a package of another kind would provide.
    loader = next((tree / _LIBRARY).glob("ld-linux-*"))
    (tree / "usr/lib" / loader.name).symlink_to(loader.relative_to(tree / "usr/lib"))
    for name, place in _SCRIPTS.items():
        shutil.copyfile(SCRIPTS / name, tree / place)
        (tree / place).chmod(0o755)
    for name in _applets(tree / "usr/bin/busybox"):
        link = tree / "usr/bin" / name
        if not link.exists() and not (tree / "usr/sbin" / name).exists():
            link.symlink_to("busybox")
    (tree / "usr/sbin/init").symlink_to("../bin/busybox")


def _applets(busybox: Path) -> list[str]:
    """The names that busybox answers to: a table of strings inside it, which starts with "["."""
    data = busybox.read_bytes()
    start = data.find(b"[\0[[\0")
    end = data.find(b"\0\0", start)
    names = data[start:end].split(b"\0") if 0 < start < end else []
    if b"sh" not in names:
        raise PackageError(f"{busybox}: no table of applets found")
    return [name.decode() for name in names if b"/" not in name]


def _make_ext4(tree: Path, raw: Path) -> None:
    with raw.open("wb") as file:
        file.truncate(ROOT_SIZE)
    options = f"root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,hash_seed={_UUID}"
    command = [find_tool("mke2fs"), "-q", "-F", "-t", "ext4", "-U", _UUID, "-E", options]
    done = subprocess.run(
        [*command, "-d", str(tree), str(raw)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PackageError(f"mke2fs: {done.stderr}")
