"""One PCI function as a bus sees it: configuration space, BARs, capabilities. Nothing of virtio.

Configuration space is 256 bytes and a mask that says which bits of them a guest may write. That
alone makes BARs size themselves: all ones written come back as the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..backend.state import StateReader, StateWriter
from . import pci_layout as at

__all__ = ["Bar", "ConfigSpace"]

_COMMAND_WRITABLE = (
    at.PCI_COMMAND_IO
    | at.PCI_COMMAND_MEMORY
    | at.PCI_COMMAND_MASTER
    | at.PCI_COMMAND_PARITY
    | at.PCI_COMMAND_SERR
    | at.PCI_COMMAND_INTX_DISABLE
)


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: a window that the guest puts somewhere into an address space."""

    index: int
    size: int
    """Bytes, a power of two."""
    io: bool = False
    """In I/O space instead of memory."""
    wide: bool = False
    """64 bits: it takes the next register, too."""
    prefetchable: bool = False

    @property
    def flags(self) -> int:
        """The low bits of the register."""
        if self.io:
            return at.PCI_BAR_IO
        return (at.PCI_BAR_64BIT if self.wide else 0) | (
            at.PCI_BAR_PREFETCH if self.prefetchable else 0
        )


class ConfigSpace:
    """The configuration space of a function with header type 0."""

    def __init__(
        self,
        *,
        vendor_id: int,
        device_id: int,
        revision: int,
        class_code: int,
        subsystem_vendor_id: int,
        subsystem_id: int,
        bars: tuple[Bar, ...],
    ) -> None:
        """``class_code``: base class, subclass and interface, 24 bits."""
        self.bars = bars
        self._reset_value = bytearray(at.CONFIG_SIZE)
        self._mask = bytearray(at.CONFIG_SIZE)
        self.data = self._reset_value
        for offset, size, value, mask in (
            (at.PCI_VENDOR_ID, 2, vendor_id, 0),
            (at.PCI_DEVICE_ID, 2, device_id, 0),
            (at.PCI_COMMAND, 2, 0, _COMMAND_WRITABLE),
            (at.PCI_STATUS, 2, at.PCI_STATUS_CAP_LIST, 0),
            (at.PCI_REVISION_ID, 1, revision, 0),
            (at.PCI_CLASS_PROG, 3, class_code, 0),
            (at.PCI_CACHE_LINE_SIZE, 1, 0, 0xFF),
            (at.PCI_LATENCY_TIMER, 1, 0, 0xFF),
            (at.PCI_SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor_id, 0),
            (at.PCI_SUBSYSTEM_ID, 2, subsystem_id, 0),
            (at.PCI_INTERRUPT_LINE, 1, 0, 0xFF),
            (at.PCI_INTERRUPT_PIN, 1, 1, 0),
        ):
            self.declare(offset, size, value, mask)
        for bar in bars:
            width = 8 if bar.wide else 4
            writable = -bar.size & (1 << 8 * width) - 1
            self.declare(at.PCI_BAR_0 + 4 * bar.index, width, bar.flags, writable)
        self._next_capability = at.PCI_FIRST_CAPABILITY
        self._link = at.PCI_CAPABILITY_LIST
        self.reset()

    def declare(self, offset: int, size: int, value: int, mask: int = 0) -> None:
        """A field has this value after a reset, and the guest may write the bits in ``mask``."""
        self._reset_value[offset : offset + size] = value.to_bytes(size, "little")
        self._mask[offset : offset + size] = mask.to_bytes(size, "little")

    def add_capability(self, body: bytes, mask: bytes = b"") -> int:
        """Add a capability (its first byte the id, the second a place for the link); its offset."""
        offset = self._next_capability
        self._next_capability += -(-len(body) // 4) * 4
        if self._next_capability > at.CONFIG_SIZE:
            raise ValueError("no room for a capability in the configuration space")
        self._reset_value[offset : offset + len(body)] = body
        self._mask[offset : offset + len(mask)] = mask
        self._reset_value[offset + 1] = 0
        self._reset_value[self._link] = offset
        self._link = offset + 1
        self.reset()
        return offset

    def reset(self) -> None:
        """As after power-on: BARs and command register are 0."""
        self.data = bytearray(self._reset_value)

    def load(self, offset: int, size: int) -> int:
        """A field."""
        return int.from_bytes(self.data[offset : offset + size], "little")

    def store(self, offset: int, size: int, value: int) -> None:
        """Set a field, whatever the guest may do to it."""
        self.data[offset : offset + size] = value.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        """The guest reads; outside of the 256 bytes there are only ones."""
        data = bytes(self.data[offset : offset + size]) if offset >= 0 else b""
        return int.from_bytes(data.ljust(size, b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes what it may."""
        new = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        for position, byte in enumerate(new, offset):
            if 0 <= position < at.CONFIG_SIZE:
                mask = self._mask[position]
                self.data[position] = self.data[position] & ~mask | byte & mask

    @property
    def command(self) -> int:
        """The command register."""
        return self.load(at.PCI_COMMAND, 2)

    def enabled(self, bar: Bar) -> bool:
        """The space that a BAR lies in is enabled."""
        return bool(self.command & (at.PCI_COMMAND_IO if bar.io else at.PCI_COMMAND_MEMORY))

    def address_of(self, bar: Bar) -> int | None:
        """Where the guest has put a BAR; None where it is not enabled, or is being sized."""
        width = 8 if bar.wide else 4
        address = self.load(at.PCI_BAR_0 + 4 * bar.index, width) & -bar.size
        nowhere = address in (0, -bar.size & (1 << 8 * width) - 1)
        return None if nowhere or not self.enabled(bar) else address

    def save(self, stream: StateWriter) -> None:
        """Write what the guest may have changed, and the rest to compare it by."""
        stream.data(self.data)

    def load_saved(self, stream: StateReader) -> bytearray:
        """Read it again; ImageError if it is the space of another function."""
        saved = bytearray(stream.data())
        if len(saved) != at.CONFIG_SIZE or any(
            (new ^ old) & ~mask
            for new, old, mask in zip(saved, self._reset_value, self._mask, strict=True)
        ):
            raise stream.malformed("is of another PCI function")
        return saved
