"""The board: one RISC-V hart, memory, and the devices of QEMU's ``virt`` machine, in its places.

==========  ===========================================================
address     what
==========  ===========================================================
0x00100000  test finisher: power off and reset
0x02000000  CLINT: timer and software interrupt
0x03000000  PCIe, if wanted: I/O space; interrupts 32 to 35
0x0c000000  PLIC: interrupts of the devices
0x0d000000  APLIC, in place of the PLIC, if wanted
0x10000000  serial port (16550A), interrupt 10
0x10001000  eight virtio-mmio slots, 4 KiB apart, interrupts 1 to 8
0x28000000  IMSIC, with the APLIC: messages
0x30000000  PCIe: configuration space
0x40000000  PCIe: memory space
0x80000000  memory
==========  ===========================================================
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyvirtio
from pyvirtio.backend.state import StateReader, StateWriter

from . import layout as at
from .aplic import Aplic
from .clint import NEVER, Clint
from .clock import Clock, InstructionClock
from .cpu import Cpu, Interrupt, Stop, no_firmware
from .csr import ExtraCsrs
from .fdt import flatten
from .image import load_program
from .imsic import Imsic
from .kernel import load_linux
from .pcie import PcieHost
from .plic import Plic
from .sbi import Sbi
from .slots import EmptySlot, Slot, VirtioSlot
from .state import SUPERVISOR
from .syscon import Power, TestFinisher
from .tree import describe
from .uart import Uart

__all__ = ["Board"]

_SLICE = 200_000
"""Instructions between two looks at the devices, at most."""
_CUT_SLICE = 5_000
"""Instructions that a slice counts for if it ends early, by wfi or for a device."""
_DELEGATED_EXCEPTIONS = 0xB1FF
"""All that the engine knows but calls of firmware, and calls of hypervisors."""
_DELEGATED_INTERRUPTS = 0x222
_ALL_COUNTERS = 7
_TREE_ROOM = 0x20_0000
"""The device tree lies this far below the end of memory."""


class Board:
    """A whole machine. ``send(byte)`` takes what the guest writes to its serial port.

    ``ram`` is in bytes. Disks go into the slots in their order; a device that was made for one
    (which may have another block size, say) goes there as it is. Devices live on the caller's
    thread: everything happens inside :meth:`step`, in slices of ``slice_length`` instructions.

    ``pci`` gives the board a PCIe host bridge, and the disks go there; ``legacy_virtio`` makes them
    virtio-mmio devices of version 1, or transitional ones on PCI. ``aia``: an IMSIC and an APLIC
    are there in place of the PLIC, and functions on PCI have MSI-X.
    """

    def __init__(
        self,
        send: Callable[[int], None],
        *,
        ram: int = 128 << 20,
        disks: Sequence[pyvirtio.Disk | pyvirtio.VirtioBlk] = (),
        clock: Clock | None = None,
        legacy_virtio: bool = False,
        pci: bool = False,
        aia: bool = False,
        slice_length: int = _SLICE,
    ) -> None:
        if ram % 4096 or ram < 2 * _TREE_ROOM:
            raise ValueError(f"{ram} bytes of memory: must be whole pages, and 4 MiB at least")
        if len(disks) > at.VIRTIO_SLOTS and not pci:
            raise ValueError(f"{len(disks)} disks do not go into {at.VIRTIO_SLOTS} slots")
        self.clock = clock if clock is not None else InstructionClock()
        self._slice_length = slice_length
        self.ram = mmap.mmap(-1, ram)
        self.cpu = cpu = Cpu(self.ram, at.RAM_BASE)
        self.clint = Clint(
            self.clock,
            timer=partial(cpu.set_line, Interrupt.MACHINE_TIMER),
            software=partial(cpu.set_line, Interrupt.MACHINE_SOFTWARE),
        )
        external = partial(cpu.set_line, Interrupt.SUPERVISOR_EXTERNAL)
        self.imsic = Imsic(external) if aia else None
        self.csrs = ExtraCsrs(
            self.clint,
            self.clock,
            partial(cpu.set_line, Interrupt.SUPERVISOR_TIMER),
            self.imsic,
        )
        cpu.illegal = self.csrs.execute
        cpu.touched = self._on_access
        self._alarm = NEVER
        self.plic: Plic | Aplic
        """Where the devices' wires end."""
        if self.imsic is not None:
            self.plic = Aplic(self.imsic.deliver, at.PLIC_SOURCES)
            cpu.map(at.APLIC_BASE, at.APLIC_SIZE, self.plic)
            cpu.map(at.IMSIC_BASE, at.IMSIC_SIZE, self.imsic)
        else:
            machine = partial(cpu.set_line, Interrupt.MACHINE_EXTERNAL)
            self.plic = Plic((machine, external), at.PLIC_SOURCES)
            cpu.map(at.PLIC_BASE, at.PLIC_SIZE, self.plic)
        self.uart = Uart(
            send, partial(self.plic.set, at.UART_IRQ), partial(self.plic.pulse, at.UART_IRQ)
        )
        self.finisher = TestFinisher()
        cpu.map(at.FINISHER_BASE, at.FINISHER_SIZE, self.finisher)
        cpu.map(at.CLINT_BASE, at.CLINT_SIZE, self.clint)
        cpu.map(at.UART_BASE, at.UART_SIZE, self.uart)
        self._written: list[tuple[int, int]] = []
        self.slots: list[Slot] = []
        self._blocks: list[pyvirtio.VirtioBlk] = []
        self._pcie: PcieHost | None = None
        self._plug_in(disks, legacy_virtio, pci)
        self.sbi = Sbi(
            cpu, self.csrs, self.ram, at.RAM_BASE, uart=self.uart, send=send, finisher=self.finisher
        )

    def _plug_in(
        self, disks: Sequence[pyvirtio.Disk | pyvirtio.VirtioBlk], legacy: bool, pci: bool
    ) -> None:
        memory = pyvirtio.GuestMemory.from_buffer(
            self.ram, at.RAM_BASE, on_write=lambda pa, length: self._written.append((pa, length))
        )
        for index in range(at.VIRTIO_SLOTS):
            base = at.VIRTIO_BASE + index * at.VIRTIO_SIZE
            if pci or index >= len(disks):
                self.cpu.map(base, at.VIRTIO_SIZE, EmptySlot())
                continue
            interrupt = partial(self.plic.set, at.VIRTIO_FIRST_IRQ + index)
            mmio = pyvirtio.VirtioMmio(
                self._block(disks[index]), memory, interrupt, legacy=legacy, notify="deferred"
            )
            slot = VirtioSlot(mmio, self.cpu.end_slice)
            self.slots.append(slot)
            self.cpu.map(base, at.VIRTIO_SIZE, slot)
        if pci:
            msi = None if self.imsic is None else self._message
            self._pcie = PcieHost(memory, self.plic.set, self.cpu.end_slice, msi)
            for window in self._pcie.windows():
                self.cpu.map(*window)
            for disk in disks:
                self.plug_into_pci(disk, transitional=legacy)

    def _message(self, address: int, data: int) -> None:
        """A device on PCI writes to memory to interrupt. Elsewhere than here it has no effect."""
        if self.imsic is not None and 0 <= address - at.IMSIC_BASE < at.IMSIC_SIZE:
            self.imsic.write(address - at.IMSIC_BASE, 4, data)

    def _block(self, disk: pyvirtio.Disk | pyvirtio.VirtioBlk) -> pyvirtio.VirtioBlk:
        """The device for a disk."""
        if not isinstance(disk, pyvirtio.VirtioBlk):
            disk = pyvirtio.VirtioBlk(disk, serial=f"pyvirtio{len(self._blocks)}")
        self._blocks.append(disk)
        return disk

    def plug_into_pci(
        self, disk: pyvirtio.Disk | pyvirtio.VirtioBlk, *, transitional: bool = False
    ) -> None:
        """One more disk on PCI, before the guest is started; ValueError without ``pci``."""
        if self._pcie is None:
            raise ValueError("the board has no PCI")
        self.slots.append(self._pcie.plug(self._block(disk), transitional=transitional))

    # -- starting ----------------------------------------------------------------------------

    def load(self, path: Path, address: int = at.RAM_BASE) -> int:
        """Put a program into memory; the address it starts at. See :func:`.image.load_program`."""
        with memoryview(self.ram) as ram:
            return load_program(path, ram, at.RAM_BASE, address)

    def load_linux(self, path: Path) -> int:
        """Put a Linux kernel into memory; the address it starts at. See :mod:`.kernel`."""
        with memoryview(self.ram) as ram:
            return load_linux(path, ram, at.RAM_BASE)

    def start(self, entry: int, arguments: str = "", initrd: bytes = b"") -> None:
        """Start the hart at ``entry``, as QEMU's reset code does: in machine mode, its number in
        a0, the address of the device tree (which hands over ``arguments``) in a1.

        ``initrd`` goes to the end of memory, just below the tree, which tells where it is.
        """
        where = len(self.ram) - _TREE_ROOM
        place = None
        if initrd:
            below = (where - len(initrd)) & ~0xFFF
            if below < 0:
                raise ValueError(f"{len(initrd)} bytes of initrd do not fit into the memory")
            self.ram[below : below + len(initrd)] = initrd
            place = range(at.RAM_BASE + below, at.RAM_BASE + below + len(initrd))
        aia = self.imsic is not None
        tree = flatten(describe(len(self.ram), arguments, place, self._pcie, aia=aia))
        self.ram[where : where + len(tree)] = tree
        state = self.cpu.state
        state.load()
        state.pc = entry
        state.words[10], state.words[11] = 0, at.RAM_BASE + where
        state.store()

    def start_supervisor(self, entry: int, arguments: str = "", initrd: bytes = b"") -> None:
        """Start the hart at ``entry`` as firmware would hand it to a kernel: in supervisor mode,
        with :class:`.sbi.Sbi` below. The rest is as in :meth:`start`.
        """
        self.start(entry, arguments, initrd)
        self.csrs.delegate_timer()
        self.cpu.firmware = self.sbi.handle
        state = self.cpu.state
        state.load()
        state.priv, state.mstatus, state.satp = SUPERVISOR, 0, 0
        state.medeleg, state.mideleg = _DELEGATED_EXCEPTIONS, _DELEGATED_INTERRUPTS
        state.mcounteren = state.scounteren = _ALL_COUNTERS
        state.store()

    # -- running -----------------------------------------------------------------------------

    @property
    def power(self) -> Power | None:
        """Why the board has stopped; None while it runs."""
        return self.finisher.power

    def step(self) -> bool:
        """Run a slice and look after the devices. True if the guest has nothing to do now."""
        count = self._begin_slice()
        return self._end_slice(count, self.cpu.run(count))

    def _begin_slice(self) -> int:
        """How many instructions the slice is to have."""
        self._update_timers()
        self._alarm = self.next_event()
        return self.clock.budget(self._alarm, self._slice_length)

    def _end_slice(self, count: int, stop: Stop) -> bool:
        # How much of a slice was run that ended early, the engine does not tell.
        self.clock.ran(count if stop is Stop.COUNT else min(count, _CUT_SLICE))
        for slot in self.slots:
            slot.poll()
        self._forget_overwritten_code()
        self._update_timers()
        return stop is Stop.WAIT and self.power is None and not self.cpu.wakes

    def receive(self, data: bytes) -> None:
        """Bytes arrive at the serial port. To be called between two slices."""
        self.uart.receive(data)

    def _on_access(self) -> None:
        """Accesses to devices take time, in which a timer may go off."""
        self.clock.touched()
        if self.clock.now() >= self._alarm:
            self._alarm = NEVER
            self._update_timers()

    def _update_timers(self) -> None:
        self.clint.update()
        self.csrs.update()

    def next_event(self) -> int:
        """The tick at which a timer goes off; :data:`.clint.NEVER` if none is yet to go off."""
        now = self.clock.now()
        timers = (self.clint.deadline(), self.csrs.deadline())
        return min((tick for tick in timers if tick > now), default=NEVER)

    def sleep(self, until: int | None = None) -> None:
        """Let the time pass up to the next timer, or up to tick ``until`` if that is sooner."""
        tick = self.next_event()
        self._update_timers()
        if self.cpu.wakes:
            return  # a timer has gone off since the guest went to sleep
        if until is not None:
            tick = min(tick, until)
        if tick == NEVER:
            self.finisher.power = Power.ASLEEP
        else:
            self.clock.sleep_until(tick)

    def _forget_overwritten_code(self) -> None:
        """What a device wrote may have been code; pages are done once each, neighbours together."""
        if not self._written:
            return
        pages = sorted(
            {
                page
                for address, length in self._written
                for page in range(address >> 12, ((address + length - 1) >> 12) + 1)
            }
        )
        self._written.clear()
        start = previous = pages[0]
        for page in pages[1:]:
            if page != previous + 1:
                self.cpu.forget_code(start << 12, (previous + 1 - start) << 12)
                start = page
            previous = page
        self.cpu.forget_code(start << 12, (previous + 1 - start) << 12)

    # -- snapshots -----------------------------------------------------------------------------

    state_version = 1

    def save_state(self, stream: StateWriter) -> None:
        """Write how the guest was started; between two slices there is nothing else."""
        stream.flag(self.cpu.firmware is not no_firmware)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read it; returns how to put it in force."""
        supervised = stream.flag()

        def adopt() -> None:
            self.cpu.firmware = self.sbi.handle if supervised else no_firmware
            self._written.clear()

        return adopt

    def close(self) -> None:
        """Unplug the disks, which stay open."""
        for block in self._blocks:
            block.detach()
        self._blocks.clear()
