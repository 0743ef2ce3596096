"""The hart: Unicorn, and what has to be done around it to make it a whole RISC-V processor.

Unicorn 2.1.4 is QEMU's translator without QEMU's machine. What that means here:

* **Exceptions** end in a hook, with the program counter already moved on by 4; :mod:`.traps` enters
  them. ``ebreak`` ends in another hook, with the program counter where it was.
* **Interrupts** it enters by itself, at the right moment, once ``mip`` has the bit and the engine
  has been told to look. Writing the ``mip`` register through Unicorn does the telling, but can only
  set the supervisor's bits; the machine's are set in the saved state. Both are allowed inside a
  memory hook, so a device's line falls at the very access that clears it.
* **Time** does not exist, nor do CSRs newer than 2019: see :mod:`.csr`.
* **Accesses outside memory** stop the engine with an error instead of trapping.
* **Code** that a device overwrites stays as it was translated: see :meth:`Cpu.forget_code`.
* The engine cannot be stopped safely from outside. It runs in slices of a counted number of
  instructions, and devices are looked after in between. ``wfi`` ends a slice early.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from enum import Enum, IntFlag
from typing import Protocol

import unicorn as u
from unicorn import riscv_const as rv

from .decode import changes_memory, data_address
from .mmu import fetch_word, tables_are_missing
from .state import MACHINE, SUPERVISOR, HartState
from .traps import Cause, enter_exception

__all__ = ["Cpu", "Interrupt", "Registers", "Stop", "no_firmware"]

_WFI = 0x10500073
_ADDRESS_CAUSES = frozenset((0, 1, 4, 5, 6, 7, 12, 13, 15))
_LOAD_CAUSES = (Cause.LOAD_MISALIGNED, Cause.LOAD_ACCESS, Cause.LOAD_PAGE_FAULT)
_NO_ACCESS = {
    u.UC_ERR_FETCH_UNMAPPED: Cause.FETCH_ACCESS,
    u.UC_ERR_FETCH_PROT: Cause.FETCH_ACCESS,  # from a device
    u.UC_ERR_READ_UNMAPPED: Cause.LOAD_ACCESS,
    u.UC_ERR_WRITE_UNMAPPED: Cause.STORE_ACCESS,
}
_PAGE_TO_ACCESS = {
    Cause.FETCH_PAGE_FAULT: Cause.FETCH_ACCESS,
    Cause.LOAD_PAGE_FAULT: Cause.LOAD_ACCESS,
    Cause.STORE_PAGE_FAULT: Cause.STORE_ACCESS,
}


class Interrupt(IntFlag):
    """Bits of ``mip`` and ``mie``."""

    SUPERVISOR_SOFTWARE = 1 << 1
    MACHINE_SOFTWARE = 1 << 3
    SUPERVISOR_TIMER = 1 << 5
    MACHINE_TIMER = 1 << 7
    SUPERVISOR_EXTERNAL = 1 << 9
    MACHINE_EXTERNAL = 1 << 11


_MACHINE_LINES = 1 << 3 | 1 << 7 | 1 << 11
_SUPERVISOR_BITS = 1 << 1 | 1 << 5 | 1 << 9


class Stop(Enum):
    """Why a slice ended."""

    COUNT = "the instructions were used up, or the hart met an access outside memory"
    WAIT = "the guest waits for an interrupt (wfi)"
    DEVICE = "a device has asked for it"


class Registers(Protocol):
    """A device as the guest sees it: registers at offsets from its base."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


def no_firmware(state: HartState) -> bool:
    """Nobody below the guest answers its calls."""
    return False


class Cpu:
    """One hart with its memory ``ram`` at physical address ``base``, starting in machine mode."""

    def __init__(self, ram: mmap.mmap, base: int) -> None:
        self.uc = u.Uc(u.UC_ARCH_RISCV, u.UC_MODE_RISCV64)
        self.state = HartState(self.uc)
        self.illegal: Callable[[HartState, int], bool] = lambda state, instruction: False
        """Asked first about an illegal instruction: True if it carried it out (on the state)."""
        self.firmware: Callable[[HartState], bool] = no_firmware
        """Asked first about an ``ecall`` from supervisor mode: True if it answered it."""
        self.touched: Callable[[], None] = lambda: None
        """Called before every access to a device."""
        self._base = base
        self._ram = memoryview(ram)
        self._lines = 0
        self._stopped_by_device = False
        self._waiting = False
        self._mappings: list[object] = []
        address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        self.uc.mem_map_ptr(base, len(ram), u.UC_PROT_ALL, address)
        # No address ends the emulation: 0, the usual choice, is where some guests' programs start.
        self.uc.ctl_exits_enabled(True)
        self.uc.ctl_set_exits([])
        # Never called: nothing here is write-protected. But while a hook like this covers memory,
        # every store is checked for code that it overwrites; without one, Unicorn takes a page
        # off that list at the first store to it, whatever translated code is still there.
        self.uc.hook_add(
            u.UC_HOOK_MEM_WRITE_PROT, lambda *_: False, begin=base, end=base + len(ram) - 1
        )
        self.uc.hook_add(u.UC_HOOK_INTR, self._on_exception)
        self.uc.hook_add(u.UC_HOOK_INSN_INVALID, self._on_breakpoint)

    def map(self, address: int, size: int, device: Registers) -> None:
        """Put a device at ``address``; ``size`` is a multiple of 4096."""

        def read(uc: u.Uc, offset: int, width: int, _: object) -> int:
            self.touched()
            return device.read(offset, width)

        def write(uc: u.Uc, offset: int, width: int, value: int, _: object) -> None:
            self.touched()
            device.write(offset, width, value)

        self._mappings.append((read, write))
        self.uc.mmio_map(address, size, read, None, write, None)

    # -- interrupts --------------------------------------------------------------------------

    def set_line(self, interrupt: Interrupt, level: bool) -> None:
        """A wire into the hart changes. May be called at any time from the engine's own thread."""
        lines = self._lines | interrupt if level else self._lines & ~interrupt
        if lines != self._lines:
            fallen = self._lines & ~lines
            self._lines = lines
            self._show_lines(fallen)

    def _show_lines(self, fallen: int = 0) -> None:
        """Bring ``mip`` in line with the wires.

        The machine's bits are nothing but wires. The supervisor's can be set by software as well,
        so those follow a wire only when it is high or has just fallen.
        """
        self.state.load()
        self._set_pending(self.state.mip & ~(_MACHINE_LINES | fallen) | self._lines)

    def interrupt_software(self, pending: bool = True) -> None:
        """Set or clear the supervisor's software interrupt, as machine-mode firmware would."""
        self.state.load()
        bit = Interrupt.SUPERVISOR_SOFTWARE
        self._set_pending(self.state.mip | bit if pending else self.state.mip & ~bit)

    def _set_pending(self, wanted: int) -> None:
        state = self.state
        if wanted != state.mip:
            self.uc.reg_write(rv.UC_RISCV_REG_PRIV, MACHINE)
            self.uc.reg_write(rv.UC_RISCV_REG_MIP, _SUPERVISOR_BITS if wanted else 0)
            state.mip = wanted
            state.store()

    # -- running -----------------------------------------------------------------------------

    def run(self, count: int) -> Stop:
        """Run at most ``count`` instructions."""
        self._show_lines()
        self._stopped_by_device = self._waiting = False
        try:
            self.uc.emu_start(self.state.pc, 0, count=count)
        except u.UcError as error:
            # UC_ERR_EXCEPTION is the echo of an ebreak, which has been entered already.
            if error.errno != u.UC_ERR_EXCEPTION:
                self._access_fault(error)
                return Stop.COUNT
        if self._stopped_by_device:
            return Stop.DEVICE
        if self._waiting:
            return Stop.WAIT
        state = self.state
        state.load()
        waits = fetch_word(state, self._ram, self._base, state.pc - 4) == _WFI
        return Stop.WAIT if waits else Stop.COUNT

    def end_slice(self) -> None:
        """Have the slice end at the present memory access, which is carried out again afterwards.

        For use inside a device's ``write``, by devices that do not mind the repetition.
        """
        self._stopped_by_device = True
        self.uc.emu_stop()

    def wait_here(self) -> None:
        """Have the slice end after the present ``ecall``, as a ``wfi`` would end it."""
        self._waiting = True
        self.uc.emu_stop()

    @property
    def wakes(self) -> bool:
        """True if an interrupt is there that ends ``wfi`` (which looks at ``mie`` only)."""
        self.state.load()
        return bool(self.state.mip & self.state.mie)

    def forget_code(self, address: int, size: int) -> None:
        """Something other than the hart has written to this memory: translate it anew.

        Not to be called from within a hook.
        """
        page = address & ~0xFFF
        end = -(-(address + size) // 4096) * 4096
        self.state.load()
        # Only in machine mode does Unicorn take the range for physical addresses.
        self.uc.reg_write(rv.UC_RISCV_REG_PRIV, MACHINE)
        self.uc.ctl_remove_cache(page, end)
        self.state.store()

    @property
    def lines(self) -> int:
        """The wires into the hart that are high."""
        return self._lines

    def forget_everything(self) -> None:
        """Drop all that the engine has made of the guest's memory: code and translations.

        What the guest does afterwards does not depend on what was cached before.
        """
        self.uc.ctl_flush_tb()
        self.forget_translations()

    def resume(self, pending: int, lines: int) -> None:
        """The registers and the memory have become those of another moment: of one with these
        interrupts pending (``mip``) and these wires high."""
        self._lines = lines & sum(Interrupt)
        self.forget_everything()
        self.state.load()
        # Down and up again, so that the engine looks.
        self.state.mip = ~pending & 0xFFF
        self._set_pending(pending)

    def forget_translations(self) -> None:
        """The guest's page tables have changed: what SFENCE.VMA does."""
        self.uc.ctl(u.UC_CTL_TLB_FLUSH, u.UC_CTL_IO_WRITE)

    # -- exceptions --------------------------------------------------------------------------

    def _on_exception(self, uc: u.Uc, number: int, _: object) -> None:
        state = self.state
        state.load()
        pc = state.pc - 4
        value = 0
        if number == Cause.ILLEGAL_INSTRUCTION:
            value = fetch_word(state, self._ram, self._base, pc) or 0
            if self.illegal(state, value):
                state.store()
                return
        elif number == Cause.ECALL_FROM_USER:
            number += state.priv
            if state.priv == SUPERVISOR and self.firmware(state):
                state.store()
                return
        elif number in _ADDRESS_CAUSES:
            value = state.badaddr
        enter_exception(state, self._by_the_book(number, pc, value), value, pc)
        state.store()

    def _by_the_book(self, cause: int, pc: int, address: int) -> int:
        """The cause as the specification has it, where the engine sees it differently.

        An atomic instruction faults as a store; the engine does it as a load and a store. Page
        tables that lie where no memory is make an access fault; the engine calls it a page fault.
        """
        if cause in _LOAD_CAUSES and changes_memory(
            fetch_word(self.state, self._ram, self._base, pc) or 0
        ):
            cause += 2
        if cause in _PAGE_TO_ACCESS and tables_are_missing(
            self.state, self._ram, self._base, address
        ):
            return _PAGE_TO_ACCESS[Cause(cause)]
        return cause

    def _on_breakpoint(self, uc: u.Uc, _: object) -> bool:
        self.state.load()
        enter_exception(self.state, Cause.BREAKPOINT, self.state.pc, self.state.pc)
        self.state.store()
        return True

    def _access_fault(self, error: u.UcError) -> None:
        """The engine stopped at an address where nothing is: for the guest that is an exception."""
        cause = _NO_ACCESS.get(error.errno)
        if cause is None:
            raise error
        state = self.state
        state.load()
        value = state.pc
        if cause != Cause.FETCH_ACCESS:
            word = fetch_word(state, self._ram, self._base, state.pc)
            value = 0 if word is None else data_address(state, word)
            cause = Cause(self._by_the_book(cause, state.pc, value))
        enter_exception(state, cause, value, state.pc)
        state.store()
