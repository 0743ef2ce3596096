"""Debian's Linux for RISC-V as a guest: its kernel as it is, and a first file system with drivers.

Everything comes from Debian's packages for riscv64; nothing is installed, nothing is compiled, and
nobody has to be root. What is built from them is kept in the checkout's ``.cache``.
"""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cpio import Archive
from .firmware import CACHE
from .packages import PackageError, Packages
from .strip import strip

__all__ = ["COMMAND_LINE", "RAM", "SCRIPTS", "Linux", "find_linux", "guest_packages", "kept"]

RAM = 256 << 20
"""Bytes of memory that are plenty for this guest."""
_RELEASE = "trixie"
_MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "crc16",
    "crc32c_generic",
    "libcrc32c",
    "mbcache",
    "jbd2",
    "ext4",
)
"""In the order of loading: each needs only what is before it."""
_SLOW_AND_UNNEEDED = (
    "jent_mod_init",
    "load_system_certificate_list",
    "init_kprobe_trace",
    "bpf_tcp_ca_kfunc_init",
    "riscv_pmu_legacy_devinit",
)
"""Initialization of things that a small guest has no use for; together, most of booting."""
COMMAND_LINE = (
    "console=ttyS0 quiet no5lvl no4lvl cryptomgr.notests "
    f"initcall_blacklist={','.join(_SLOW_AND_UNNEEDED)}"
)
"""Three levels of page tables are quicker to walk than five."""
SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Linux:
    """A kernel, and the initramfs that belongs to it."""

    version: str
    kernel: Path
    initramfs: bytes


def guest_packages() -> Packages:
    """The packages of this checkout for the guest."""
    folder = CACHE.with_name("debian-riscv64")
    return Packages(folder, architecture="riscv64", release=_RELEASE)


def find_linux() -> Linux:
    """Debian's kernel, downloaded if it is not here yet. Raises PackageError."""
    packages = guest_packages()
    folder = _kernel_package(packages)
    kernels = list(folder.glob("boot/vmlinux-*"))
    if len(kernels) != 1:
        raise PackageError(f"{folder.name}: {len(kernels)} kernels in it")
    version = kernels[0].name.removeprefix("vmlinux-")
    busybox = packages.get("busybox-static", ("usr/bin/busybox",)) / "usr/bin/busybox"
    modules = [_find_module(folder, name) for name in _MODULES]
    sources = [busybox, *modules, SCRIPTS / "init"]
    path = kept("initramfs", ".cpio", sources)
    if not path.is_file():
        _replace(path, _initramfs(busybox, modules))
    return Linux(version, kernels[0], path.read_bytes())


def kept(name: str, suffix: str, sources: Sequence[Path]) -> Path:
    """Where something made from ``sources`` is kept; another place once one of them changes."""
    digest = hashlib.sha256()
    here = Path(__file__)
    makers = [here.with_name(f"{maker}.py") for maker in ("linux", "rootfs", "cpio", "strip")]
    for path in (*sources, *makers):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    folder = CACHE.with_name("linux")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{digest.hexdigest()[:12]}{suffix}"


def _kernel_package(packages: Packages) -> Path:
    wanted = ["boot/vmlinux-*", *(f"*/{name}.ko.xz" for name in _MODULES)]
    here = sorted(packages.folder.glob("linux-image-*-riscv64"))
    if here:
        return here[-1]
    names = [
        name for name in packages.depends("linux-image-riscv64") if name.startswith("linux-image-")
    ]
    if len(names) != 1:
        raise PackageError(f"linux-image-riscv64: depends on {names}")
    return packages.get(names[0], wanted)


def _find_module(folder: Path, name: str) -> Path:
    found = list(folder.glob(f"**/{name}.ko.xz"))
    if len(found) != 1:
        raise PackageError(f"{folder.name}: has no single module {name}")
    return found[0]


def _initramfs(busybox: Path, modules: Sequence[Path]) -> bytes:
    archive = Archive()
    for folder in ("bin", "dev", "proc", "root", "modules"):
        archive.folder(folder)
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    archive.file("init", (SCRIPTS / "init").read_bytes(), 0o755)
    names = [path.name.removesuffix(".xz") for path in modules]
    archive.file("modules/order", "\n".join(names).encode())
    for name, path in zip(names, modules, strict=True):
        archive.file(f"modules/{name}", strip(lzma.decompress(path.read_bytes())))
    return archive.finish()


def _replace(path: Path, data: bytes) -> None:
    scratch = path.with_suffix(f".{os.getpid()}.part")
    scratch.write_bytes(data)
    scratch.replace(path)
