"""What the board tells its guests about itself: the device tree's contents."""

from __future__ import annotations

import hashlib

from . import layout as at
from .clock import TICKS_PER_SECOND
from .fdt import LEVEL_HIGH, Node, wide
from .imsic import IDENTITIES
from .pcie import PcieHost

__all__ = ["describe"]

_CPU_INTC, _PLIC, _TEST, _IMSIC = 1, 2, 3, 4
"""Phandles: the numbers by which nodes refer to each other."""
_M_SOFT, _S_TIMER, _M_TIMER, _S_EXT, _M_EXT = 3, 5, 7, 9, 11


def describe(
    ram: int,
    arguments: str,
    initrd: range | None = None,
    pcie: PcieHost | None = None,
    *,
    aia: bool = False,
) -> Node:
    """The tree for a board with ``ram`` bytes; ``arguments`` is the kernel's command line.

    ``initrd``: the addresses where a first file system lies in memory. ``pcie``: the PCIe host
    bridge, if there is one. ``aia``: the interrupt controllers are those of the AIA.
    """
    root = Node(compatible="riscv-virtio", model="riscv-virtio,qemu")
    root["#address-cells"], root["#size-cells"] = 2, 2
    chosen = root.add("chosen", bootargs=arguments, stdout_path=f"/soc/serial@{at.UART_BASE:x}")
    # Not a secret: a board must come up the same every time.
    chosen["rng-seed"] = hashlib.sha256(b"pyvirtio example board").digest()
    if initrd is not None:
        chosen["linux,initrd-start"] = wide(initrd.start)
        chosen["linux,initrd-end"] = wide(initrd.stop)
    memory = root.add(f"memory@{at.RAM_BASE:x}")
    memory["device_type"] = "memory"
    memory["reg"] = wide(at.RAM_BASE, ram)
    _cpus(root, "_ssaia" if aia else "")
    soc = root.add("soc", compatible="simple-bus", ranges=True)
    soc["#address-cells"], soc["#size-cells"] = 2, 2
    _clint(soc)
    (_aia if aia else _plic)(soc)
    _devices(soc, [LEVEL_HIGH] if aia else [])
    if pcie is not None:
        pcie.describe(soc, _PLIC, _IMSIC if aia else None)
    _switches(root)
    return root


def _cpus(root: Node, extension: str) -> None:
    cpus = root.add("cpus", timebase_frequency=TICKS_PER_SECOND)
    cpus["#address-cells"], cpus["#size-cells"] = 1, 0
    cpu = cpus.add("cpu@0", reg=0, status="okay", compatible="riscv")
    cpu["device_type"] = "cpu"
    cpu["riscv,isa"] = f"rv64imafdc_zicsr_zifencei_sstc{extension}"
    cpu["mmu-type"] = "riscv,sv57"
    controller = cpu.add("interrupt-controller", interrupt_controller=True, phandle=_CPU_INTC)
    controller["#interrupt-cells"] = 1
    controller["compatible"] = "riscv,cpu-intc"


def _clint(soc: Node) -> None:
    clint = soc.add(f"clint@{at.CLINT_BASE:x}", compatible=["sifive,clint0", "riscv,clint0"])
    clint["reg"] = wide(at.CLINT_BASE, at.CLINT_SIZE)
    clint["interrupts-extended"] = [_CPU_INTC, _M_SOFT, _CPU_INTC, _M_TIMER]


def _plic(soc: Node) -> None:
    plic = soc.add(f"plic@{at.PLIC_BASE:x}", compatible=["sifive,plic-1.0.0", "riscv,plic0"])
    plic["reg"] = wide(at.PLIC_BASE, at.PLIC_SIZE)
    plic["interrupts-extended"] = [_CPU_INTC, _M_EXT, _CPU_INTC, _S_EXT]
    plic["interrupt-controller"] = True
    plic["#interrupt-cells"], plic["#address-cells"] = 1, 0
    plic["riscv,ndev"] = at.PLIC_SOURCES
    plic["phandle"] = _PLIC


def _aia(soc: Node) -> None:
    """An IMSIC, and an APLIC that sends it the wires. Nothing is told of the machine level: the
    board's own firmware needs no interrupts there but the CLINT's."""
    imsic = soc.add(f"interrupt-controller@{at.IMSIC_BASE:x}")
    imsic["compatible"] = ["qemu,imsics", "riscv,imsics"]
    imsic["reg"] = wide(at.IMSIC_BASE, at.IMSIC_SIZE)
    imsic["interrupts-extended"] = [_CPU_INTC, _S_EXT]
    imsic["interrupt-controller"] = imsic["msi-controller"] = True
    imsic["#interrupt-cells"], imsic["#msi-cells"] = 0, 0
    imsic["riscv,num-ids"] = IDENTITIES
    imsic["phandle"] = _IMSIC
    aplic = soc.add(f"interrupt-controller@{at.APLIC_BASE:x}")
    aplic["compatible"] = ["qemu,aplic", "riscv,aplic"]
    aplic["reg"] = wide(at.APLIC_BASE, at.APLIC_SIZE)
    aplic["interrupt-controller"] = True
    aplic["#interrupt-cells"], aplic["#address-cells"] = 2, 0
    aplic["riscv,num-sources"] = at.PLIC_SOURCES
    aplic["msi-parent"] = _IMSIC
    aplic["phandle"] = _PLIC


def _devices(soc: Node, how: list[int]) -> None:
    """``how`` follows an interrupt's number."""
    serial = soc.add(f"serial@{at.UART_BASE:x}", compatible="ns16550a", clock_frequency=3686400)
    serial["reg"] = wide(at.UART_BASE, 0x100)
    serial["interrupts"], serial["interrupt-parent"] = [at.UART_IRQ, *how], _PLIC
    for index in range(at.VIRTIO_SLOTS):
        base = at.VIRTIO_BASE + index * at.VIRTIO_SIZE
        slot = soc.add(f"virtio_mmio@{base:x}", compatible="virtio,mmio")
        slot["reg"] = wide(base, at.VIRTIO_SIZE)
        slot["interrupts"] = [at.VIRTIO_FIRST_IRQ + index, *how]
        slot["interrupt-parent"] = _PLIC
    test = soc.add(
        f"test@{at.FINISHER_BASE:x}", compatible=["sifive,test1", "sifive,test0", "syscon"]
    )
    test["reg"] = wide(at.FINISHER_BASE, at.FINISHER_SIZE)
    test["phandle"] = _TEST


def _switches(root: Node) -> None:
    for name, value in (("poweroff", 0x5555), ("reboot", 0x7777)):
        root.add(name, compatible=f"syscon-{name}", regmap=_TEST, offset=0, value=value)
