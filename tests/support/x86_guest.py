"""Debian's Linux for amd64 as a guest of QEMU: a kernel, a first file system, a disk with tools.

Everything is from Debian's packages; nothing is installed, and nobody has to be root. What is made
of them is kept in the checkout's ``.cache``.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from examples.emulator.cpio import Archive
from examples.emulator.firmware import CACHE
from examples.emulator.packages import PackageError, Packages
from examples.emulator.rootfs import find_tool

__all__ = ["TOOLS", "Guest", "find_guest", "fio"]

TOOLS = "/tools/bin"
"""Where the programs are in the guest."""

_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
)
"""In the order of loading."""
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_PROGRAMS = {
    "fio": "usr/bin/fio",
    "e2fsprogs": "sbin/mke2fs",
    "util-linux": "sbin/fstrim",
}
_ALSO = {"e2fsprogs": ("sbin/e2fsck",)}
_NOT_LIBRARIES = re.compile(r"lib(perl|python|.*-perl|pam|semanage|debian|newt|text|slang|sqlite)")
_INIT = b"""#!/bin/busybox sh
export PATH=/bin:/tools/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for name in $(cat /modules/order); do
    insmod /modules/$name
done
echo 0 > /proc/sys/kernel/printk
for disk in /sys/block/vd*; do
    name=${disk##*/}
    [ "$(cat $disk/serial)" = tools ] && mount -t ext4 -o ro,noload /dev/$name /tools
    [ "$(cat $disk/serial)" = disk ] && ln -s /dev/$name /disk
done
export LD_LIBRARY_PATH=/tools/lib
ln -s /tools/lib/ld-linux-x86-64.so.2 /lib64/
stty -echo -icrnl -onlcr
export PS1=
echo 'the guest is up'
exec sh 2>&1
"""


@dataclass(frozen=True)
class Guest:
    """What QEMU is started with."""

    kernel: Path
    initramfs: Path
    tools: Path
    """A raw disk image with fio, e2fsprogs and fstrim, to be told from others by serial "tools"."""


def fio(name: str, size: int, *, sync: str = "--end_fsync=1") -> str:
    """Shell: random writes to a new file, every block read again and compared by its checksum."""
    return (
        f"{TOOLS}/fio --name={name} --directory=/mnt --size={size} --bs=4k --rw=randwrite "
        f"--verify=crc32c --verify_fatal=1 --ioengine=libaio --iodepth=16 --direct=1 {sync} "
        "--output=/tmp/fio && ! grep -v 'err= 0' /tmp/fio | grep err="
    )


def find_guest() -> Guest:
    """The guest, put together if it is not here yet. Raises PackageError."""
    packages = Packages(CACHE)
    folder = _kernel_package(packages)
    kernels = list(folder.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise PackageError(f"{folder.name}: {len(kernels)} kernels in it")
    made = CACHE.with_name("linux-amd64")
    made.mkdir(parents=True, exist_ok=True)
    stamp = hashlib.sha256(Path(__file__).read_bytes() + folder.name.encode()).hexdigest()[:12]
    initramfs, tools = made / f"initramfs-{stamp}.cpio", made / f"tools-{stamp}.raw"
    if not initramfs.is_file():
        busybox = packages.get("busybox-static", ("bin/busybox", "usr/bin/busybox"))
        part = initramfs.with_suffix(f".{os.getpid()}")
        part.write_bytes(_initramfs(next(busybox.glob("**/busybox")), folder))
        part.replace(initramfs)
    if not tools.is_file():
        _make_tools(packages, tools)
    return Guest(kernels[0], initramfs, tools)


def _kernel_package(packages: Packages) -> Path:
    here = sorted(packages.folder.glob("linux-image-*-cloud-amd64"))
    if here:
        return here[-1]
    names = packages.depends("linux-image-cloud-amd64")
    names = [name for name in names if name.startswith("linux-image-")]
    if len(names) != 1:
        raise PackageError(f"linux-image-cloud-amd64: depends on {names}")
    return packages.get(names[0], ["boot/vmlinuz-*", *(f"*/{name}.ko*" for name in _MODULES)])


def _initramfs(busybox: Path, kernel: Path) -> bytes:
    archive = Archive()
    for folder in ("bin", "dev", "proc", "sys", "tmp", "mnt", "tools", "lib64", "modules"):
        archive.folder(folder)
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    archive.file("init", _INIT, 0o755)
    archive.file("modules/order", "\n".join(f"{name}.ko" for name in _MODULES).encode())
    for name in _MODULES:
        found = list(kernel.glob(f"**/{name}.ko*"))
        if len(found) != 1:
            raise PackageError(f"{kernel.name}: has no single module {name}")
        data = found[0].read_bytes()
        if found[0].suffix == ".xz":
            data = lzma.decompress(data)
        archive.file(f"modules/{name}.ko", data)
    return archive.finish()


def _make_tools(packages: Packages, image: Path) -> None:
    """Programs and the libraries that they need, and no more, on an ext4 file system."""
    names = set(_PROGRAMS)
    for program in _PROGRAMS:
        names.update(
            name
            for name in packages.closure(program)
            if name.startswith(("lib", "zlib")) and not _NOT_LIBRARIES.match(name)
        )
    names.add("libc6")
    parts = packages.get_all(dict.fromkeys(sorted(names), ()))
    with tempfile.TemporaryDirectory(dir=image.parent) as scratch:
        every, tree, part = Path(scratch, "every"), Path(scratch, "tree"), Path(scratch, "part")
        every.mkdir()
        for name in ("lib", "bin"):
            (tree / name).mkdir(parents=True)
        for folder in parts.values():
            for library in folder.glob("**/*.so*"):
                if not (every / library.name).exists() and not library.is_dir():
                    shutil.copy(library, every / library.name)
        programs = [parts[name] / path for name, path in _PROGRAMS.items()]
        programs += [parts[name] / path for name, paths in _ALSO.items() for path in paths]
        for program in programs:
            shutil.copy(program, tree / "bin" / program.name)
            for library in _needed(program, every):
                shutil.copy(library, tree / "lib" / library.name)
        shutil.copy(every / "ld-linux-x86-64.so.2", tree / "lib")
        with part.open("wb") as file:
            file.truncate(160 << 20)
        command = [find_tool("mke2fs"), "-q", "-F", "-t", "ext4", "-O", "^has_journal"]
        done = subprocess.run(
            [*command, "-d", str(tree), str(part)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise PackageError(f"mke2fs: {done.stderr}")
        part.replace(image)


def _needed(program: Path, libraries: Path) -> list[Path]:
    """The libraries that a program loads, in that folder."""
    done = subprocess.run(
        ["ldd", str(program)],
        env={"LD_LIBRARY_PATH": str(libraries), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"=> (\S+) \(", done.stdout)
    if done.returncode or "not found" in done.stdout or not found:
        raise PackageError(f"{program.name}: {done.stdout}{done.stderr}")
    return [libraries / Path(path).name for path in found]
