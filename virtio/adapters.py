"""Plugs for other shapes of bus than VirtioMmio's own ``read`` and ``write``; a few lines each."""

from __future__ import annotations

from typing import Any

from .mmio import VirtioMmio

__all__ = ["BytesDevice", "WordDevice", "map_unicorn"]


def map_unicorn(uc: Any, mmio: VirtioMmio, address: int, size: int = 4096) -> None:
    """Map the slot into a Unicorn engine at ``address``; both in units of pages (4096 bytes)."""
    uc.mmio_map(
        address,
        size,
        lambda uc, offset, length, data: mmio.read(offset, length),
        None,
        lambda uc, offset, length, value, data: mmio.write(offset, length, value),
        None,
    )


class BytesDevice:
    """The slot for buses that move bytes: ``load(addr, n) -> bytes``, ``store(addr, data)``.

    ``base`` is what the bus adds to offsets: 0 if it gives offsets into the device.
    """

    def __init__(self, mmio: VirtioMmio, base: int = 0) -> None:
        self.mmio = mmio
        self.base = base

    def load(self, addr: int, n: int) -> bytes:
        """Read ``n`` bytes, little-endian as the registers are."""
        return self.mmio.read(addr - self.base, n).to_bytes(n, "little")

    def store(self, addr: int, data: bytes) -> None:
        """Write bytes."""
        self.mmio.write(addr - self.base, len(data), int.from_bytes(data, "little"))


class WordDevice:
    """The slot for buses with a method per width: ``read32(addr)``, ``write32(addr, value)``, …"""

    def __init__(self, mmio: VirtioMmio, base: int = 0) -> None:
        self.mmio = mmio
        self.base = base

    def read8(self, addr: int) -> int:
        """Read one byte."""
        return self.mmio.read(addr - self.base, 1)

    def read16(self, addr: int) -> int:
        """Read two bytes."""
        return self.mmio.read(addr - self.base, 2)

    def read32(self, addr: int) -> int:
        """Read four bytes."""
        return self.mmio.read(addr - self.base, 4)

    def write8(self, addr: int, value: int) -> None:
        """Write one byte."""
        self.mmio.write(addr - self.base, 1, value)

    def write16(self, addr: int, value: int) -> None:
        """Write two bytes."""
        self.mmio.write(addr - self.base, 2, value)

    def write32(self, addr: int, value: int) -> None:
        """Write four bytes."""
        self.mmio.write(addr - self.base, 4, value)
