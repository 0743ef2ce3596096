"""U-Boot, the board's firmware: Debian builds it for QEMU's virt machine, as this board is."""

from __future__ import annotations

from pathlib import Path

from .packages import Packages

__all__ = ["CACHE", "find_u_boot", "packages"]

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "debian"
"""Where downloaded packages are unpacked: inside the checkout, and ignored by git."""

_IN_PACKAGE = "usr/lib/u-boot/qemu-riscv64/u-boot.bin"


def packages() -> Packages:
    """The packages of this checkout."""
    return Packages(CACHE)


def find_u_boot() -> Path:
    """U-Boot for machine mode, from this machine or else downloaded. Raises PackageError."""
    installed = Path("/") / _IN_PACKAGE
    return installed if installed.is_file() else packages().get("u-boot-qemu") / _IN_PACKAGE
