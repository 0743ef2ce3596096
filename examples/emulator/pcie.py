"""A PCIe host bridge, as QEMU's ``virt`` machine has it, with virtio functions plugged into it.

The generic kind (``pci-host-ecam-generic``): configuration space of bus 0 is a window of memory,
4 KiB for each function (ECAM); two more windows lead to where the guest has put the BARs, in memory
space and in I/O space. INTA# of device ``d`` is line ``d % 4`` to the PLIC, which several devices
may pull. On a board that can receive messages, functions have MSI-X. There is no bridge to further
buses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pyvirtio

from . import layout as at
from .cpu import Registers
from .fdt import LEVEL_HIGH, Node, wide
from .slots import PciSlot

__all__ = ["PcieHost"]

_DEVICES = 32
_FUNCTION_SHIFT, _DEVICE_SHIFT = 12, 15
"""Of an offset in the ECAM window: a function has 4 KiB, a device 8 functions."""
_LINES = 4
_IO, _MEMORY_32 = 0x0100_0000, 0x0200_0000
"""Spaces in the tree (PCI bus binding to Open Firmware, 2.2.1.1): I/O, and memory of 32 bits."""


class PcieHost:
    """Bus 0. ``set_irq(source, level)`` pulls a line of the PLIC; ``end_slice`` asks the CPU to
    stop soon; ``msi(address, data)`` takes messages, where there is somebody to take them.
    """

    def __init__(
        self,
        memory: pyvirtio.GuestMemory,
        set_irq: Callable[[int, bool], None],
        end_slice: Callable[[], None],
        msi: Callable[[int, int], None] | None = None,
    ) -> None:
        self._msi = msi
        self._memory = memory
        self._set_irq = set_irq
        self._end_slice = end_slice
        self._pulling: list[set[int]] = [set() for _ in range(_LINES)]
        """The devices that pull a line at the moment."""
        self.slots: list[PciSlot] = []
        """What is plugged in, by device number."""

    def plug(self, block: pyvirtio.VirtioBlk, *, transitional: bool = False) -> PciSlot:
        """Plug a device in, before the guest starts; ValueError if the bus is full."""
        device = len(self.slots)
        if device == _DEVICES:
            raise ValueError(f"no more than {_DEVICES} devices go on a bus")
        function = pyvirtio.VirtioPci(
            block,
            self._memory,
            partial(self._pull, device),
            self._msi,
            transitional=transitional,
            notify="deferred",
        )
        self.slots.append(PciSlot(function, self._end_slice))
        return self.slots[-1]

    def _pull(self, device: int, level: bool) -> None:
        line = device % _LINES
        pulling = self._pulling[line]
        if level:
            pulling.add(device)
        else:
            pulling.discard(device)
        self._set_irq(at.PCIE_FIRST_IRQ + line, bool(pulling))

    def windows(self) -> Iterator[tuple[int, int, Registers]]:
        """What is to be mapped: address, size, registers."""
        yield at.PCIE_ECAM_BASE, at.PCIE_ECAM_SIZE, _Ecam(self.slots)
        yield at.PCIE_IO_BASE, at.PCIE_IO_SIZE, _Window(self.slots, 0, io=True)
        yield (
            at.PCIE_MEMORY_BASE,
            at.PCIE_MEMORY_SIZE,
            _Window(self.slots, at.PCIE_MEMORY_BASE, io=False),
        )

    def describe(self, soc: Node, plic: int, imsic: int | None = None) -> None:
        """Add the node to the device tree; ``plic`` is the phandle of what has the lines: an APLIC
        where there is an ``imsic``, which has the messages."""
        high = () if imsic is None else (LEVEL_HIGH,)
        node = soc.add(f"pci@{at.PCIE_ECAM_BASE:x}", compatible="pci-host-ecam-generic")
        node["device_type"] = "pci"
        node["#address-cells"], node["#size-cells"], node["#interrupt-cells"] = 3, 2, 1
        node["reg"] = wide(at.PCIE_ECAM_BASE, at.PCIE_ECAM_SIZE)
        node["bus-range"] = [0, 0]
        node["linux,pci-domain"] = 0
        node["dma-coherent"] = True
        node["ranges"] = [
            *(_IO, *wide(0, at.PCIE_IO_BASE, at.PCIE_IO_SIZE)),
            *(_MEMORY_32, *wide(at.PCIE_MEMORY_BASE, at.PCIE_MEMORY_BASE, at.PCIE_MEMORY_SIZE)),
        ]
        # Of a function's address (bus, device, function, register) two bits of the device decide.
        node["interrupt-map-mask"] = [(_LINES - 1) << 11, 0, 0, 7]
        node["interrupt-map"] = [
            cell
            for device in range(_LINES)
            for pin in range(1, 5)
            for cell in (
                *(device << 11, 0, 0, pin),
                *(plic, at.PCIE_FIRST_IRQ + (device + pin - 1) % _LINES, *high),
            )
        ]
        if imsic is not None:
            node["msi-parent"] = imsic


class _Ecam:
    """Configuration space. Where no function is, all ones are read, which ends a guest's search."""

    def __init__(self, slots: list[PciSlot]) -> None:
        self._slots = slots

    def _find(self, offset: int) -> PciSlot | None:
        device, function = offset >> _DEVICE_SHIFT, offset >> _FUNCTION_SHIFT & 7
        return self._slots[device] if device < len(self._slots) and function == 0 else None

    def read(self, offset: int, size: int) -> int:
        slot = self._find(offset)
        if slot is None:
            return (1 << 8 * size) - 1
        return slot.function.config_read(offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        slot = self._find(offset)
        if slot is not None:
            slot.function.config_write(offset & 0xFFF, size, value)


class _Window:
    """Memory or I/O space of the bus from address ``start`` on."""

    def __init__(self, slots: list[PciSlot], start: int, *, io: bool) -> None:
        self._slots = slots
        self._start = start
        self._io = io

    def read(self, offset: int, size: int) -> int:
        for slot in self._slots:
            if (found := slot.function.find(self._start + offset, io=self._io)) is not None:
                return slot.function.bar_read(*found, size)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        for slot in self._slots:
            if (found := slot.function.find(self._start + offset, io=self._io)) is not None:
                slot.bar_write(*found, size, value)
                return
