"""Virtio over PCI (virtio 1.4 §4.1): one function, to be plugged into an emulator's PCI bus.

The bus gives :class:`VirtioPci` the guest's accesses to configuration space (``config_read``,
``config_write``) and to the BARs (``bar_read``, ``bar_write``, or :meth:`VirtioPci.find` for an
address), and is told of the level of INTA# and of MSI-X messages:

    BAR 0   I/O, the legacy interface; only with ``transitional``
    BAR 1   memory, MSI-X table and pending bits; only with ``msi``
    BAR 4   memory, 64 bits, prefetchable: common configuration at 0, ISR status at 0x1000,
            device configuration at 0x2000, notifications from 0x3000, 4 bytes for each queue
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from ..backend.state import StateReader, StateWriter
from . import layout
from . import pci_layout as at
from .layout import ByteOrder
from .memory import GuestMemory
from .pci_common import CommonConfig
from .pci_function import Bar, ConfigSpace
from .pci_interrupts import PciInterrupts
from .pci_legacy import LegacyRegisters
from .transport import TransportDevice

__all__ = ["VirtioPci"]

_LEGACY, _MSIX, _MODERN = 0, 1, 4
"""The BARs."""
_PART: Final = 0x1000
_COMMON, _ISR, _DEVICE, _NOTIFY = range(0, 4 * _PART, _PART)
_NOTIFY_STEP: Final = 4
"""notify_off_multiplier; notification data needs 4 (PCI-66)."""
_LEGACY_SIZE: Final = 128
_CLASS_STORAGE: Final = 0x01_00_00
"""SCSI storage, as QEMU says of its virtio-blk."""


class VirtioPci:
    """A PCI function with a virtio device in it.

    ``memory`` is the guest's RAM. ``interrupt(level)`` is called when the level of INTA# changes;
    :attr:`irq_level` can be asked instead. ``msi(address, data)`` delivers a message (a 32-bit
    write); without it there is no MSI-X. ``vectors`` is the size of its table, by default one for
    each queue and one for configuration changes. ``on_map(bar, address)`` is called when the guest
    moves a BAR, with None when it is not enabled any more.

    ``notify="inline"`` serves a queue inside the notifying write; ``"deferred"`` leaves it to
    :meth:`poll`. ``notification_data`` offers that.

    ``transitional`` adds the legacy interface, whose structures have the guest's byte ``order``.
    Which of the two a driver uses is decided by the first register that it touches after a reset.

    ``vendor_data``: a PCI vendor id and bytes of this vendor's, for a capability of their own
    (§4.1.4.6) that drivers of other vendors pass over.

    With ``io_threads`` in the device the three callables are called from those, too.
    """

    def __init__(
        self,
        device: TransportDevice,
        memory: GuestMemory,
        interrupt: Callable[[bool], object] | None = None,
        msi: Callable[[int, int], object] | None = None,
        *,
        vectors: int | None = None,
        transitional: bool = False,
        order: ByteOrder = "little",
        notify: Literal["inline", "deferred"] = "inline",
        notification_data: bool = False,
        on_map: Callable[[int, int | None], object] | None = None,
        vendor_data: tuple[int, bytes] | None = None,
    ) -> None:
        if notify not in ("inline", "deferred"):
            raise ValueError(f"notify is {notify!r}, must be 'inline' or 'deferred'")
        if order != "little" and not transitional:
            raise ValueError("only a legacy interface has the guest's byte order")
        if vectors is None:
            vectors = min(device.num_queues + 1, at.MSIX_VECTORS_MAX)
        if vendor_data is not None and vendor_data[0] == at.VIRTIO_PCI_VENDOR:
            raise ValueError("vendor data is of another vendor than virtio's own")  # PCI-83
        self.device = device
        self._vendor_data = vendor_data
        self._transitional = transitional
        self._on_map = on_map
        self._held_kicks: set[int] = set()
        self._held_status = 0
        self.interrupts = PciInterrupts(device.num_queues, vectors, interrupt, msi)
        registers = (device, self.interrupts)
        self._common = CommonConfig(*registers, self._write_status, self._read_status)
        self._legacy = LegacyRegisters(
            *registers,
            order,
            set_status=self._write_status,
            get_status=self._read_status,
            kick=self._kick,
        )
        self.bars = self._make_bars()
        """The BARs that there are; sizes and kinds do not change."""
        self._config = self._make_config_space()
        self._mapped: dict[int, int | None] = {bar.index: None for bar in self.bars}
        self._enabled: frozenset[int] = frozenset()
        self._bus_master = False
        device.connect(
            memory,
            self,
            transitional=transitional,
            order=order,
            defer=notify == "deferred",
            features=1 << layout.VIRTIO_F_RING_RESET
            | 1 << layout.VIRTIO_F_SUSPEND
            | notification_data << layout.VIRTIO_F_NOTIFICATION_DATA,
        )

    def _make_bars(self) -> tuple[Bar, ...]:
        bars = [Bar(_MODERN, 4 * _PART, wide=True, prefetchable=True)]
        if self.interrupts.msix is not None:
            bars.insert(0, Bar(_MSIX, self.interrupts.msix.bar_size))
        if self._transitional:
            bars.insert(0, Bar(_LEGACY, _LEGACY_SIZE, io=True))
        return tuple(bars)

    def _make_config_space(self) -> ConfigSpace:
        kind = self.device.device_id
        transitional = self._transitional
        config = ConfigSpace(
            vendor_id=at.VIRTIO_PCI_VENDOR,
            device_id=at.VIRTIO_PCI_TRANSITIONAL_IDS[kind]
            if transitional
            else at.VIRTIO_PCI_DEVICE_BASE + kind,
            revision=0 if transitional else 1,  # PCI-12, PCI-06
            class_code=_CLASS_STORAGE,
            subsystem_vendor_id=at.VIRTIO_PCI_VENDOR,
            subsystem_id=kind if transitional else at.VIRTIO_PCI_SUBSYSTEM,  # PCI-13, PCI-07
            bars=self.bars,
        )
        step = at.CAP_NOTIFY.pack(_NOTIFY_STEP)
        for kind, offset, length, rest in (
            (at.VIRTIO_PCI_CAP_COMMON_CFG, _COMMON, at.COMMON_SIZE, b""),
            (at.VIRTIO_PCI_CAP_NOTIFY_CFG, _NOTIFY, _NOTIFY_STEP * self.device.num_queues, step),
            (at.VIRTIO_PCI_CAP_ISR_CFG, _ISR, 1, b""),
            (at.VIRTIO_PCI_CAP_DEVICE_CFG, _DEVICE, _PART, b""),
        ):
            config.add_capability(_capability(kind, offset, length, rest))
        # Bar, offset, length and data of the window are the guest's to write.
        mask = bytes((0, 0, 0, 0, 0xFF, 0, 0, 0)) + b"\xff" * 12
        window = at.CAP.pack(
            at.PCI_CAP_ID_VENDOR, 0, at.CAP.size + 4, at.VIRTIO_PCI_CAP_PCI_CFG, 0, 0, 0, 0
        )
        self._window = config.add_capability(window + at.CAP_CFG.pack(0), mask)
        self._msix_capability: int | None = None
        if (msix := self.interrupts.msix) is not None:
            body = bytes((at.PCI_CAP_ID_MSIX, 0)) + (msix.vectors - 1).to_bytes(2, "little")
            for where in (0, msix.pending_offset):
                body += (where | _MSIX).to_bytes(4, "little")
            control = at.MSIX_CONTROL_ENABLE | at.MSIX_CONTROL_MASK_ALL
            mask = bytes(2) + control.to_bytes(2, "little")
            self._msix_capability = config.add_capability(body, mask)
        if self._vendor_data is not None:
            vendor, data = self._vendor_data
            data += bytes(-(at.CAP_VENDOR.size + len(data)) % 4)  # PCI-84
            size, kind = at.CAP_VENDOR.size + len(data), at.VIRTIO_PCI_CAP_VENDOR_CFG
            if size > 0xFF:
                raise ValueError(f"{len(data)} bytes of vendor data are too many")
            head = at.CAP_VENDOR.pack(at.PCI_CAP_ID_VENDOR, 0, size, kind, vendor)
            config.add_capability(head + data)
        features = bytes((at.PCI_CAP_ID_AF, 0, 6, at.AF_CAP_TP_FLR, 0, 0))
        self._af_capability = config.add_capability(features)
        return config

    # -- configuration space -------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """The guest reads 1, 2 or 4 bytes of configuration space."""
        data = self._window + at.CAP_DATA
        if offset < data + 4 and data < offset + size:
            self._read_through_window()
        if offset <= at.PCI_STATUS < offset + size:
            status = self._config.load(at.PCI_STATUS, 2) & ~at.PCI_STATUS_INTERRUPT
            if self.interrupts.intx_status:  # PCI-74
                status |= at.PCI_STATUS_INTERRUPT
            self._config.store(at.PCI_STATUS, 2, status)
        return self._config.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The guest writes."""
        config = self._config
        flr = self._af_capability + 4
        if offset <= flr < offset + size and value >> 8 * (flr - offset) & at.AF_CONTROL_FLR:
            self.reset()
            return
        config.write(offset, size, value)
        data = self._window + at.CAP_DATA
        if offset < data + 4 and data < offset + size:
            self._write_through_window()
        self._follow_config_space()

    def _follow_config_space(self) -> None:
        """Configuration space is another: BARs, bus mastering, interrupts."""
        interrupts = self.interrupts
        command = self._config.command
        self._bus_master = bool(command & at.PCI_COMMAND_MASTER)
        self._enabled = frozenset(bar.index for bar in self.bars if self._config.enabled(bar))
        control = 0
        if self._msix_capability is not None:
            control = self._config.load(self._msix_capability + 2, 2)
        msix = bool(control & at.MSIX_CONTROL_ENABLE)
        interrupts.choose(msix=msix, intx_disabled=bool(command & at.PCI_COMMAND_INTX_DISABLE))
        if interrupts.msix is not None:
            interrupts.msix.set_open(
                msix and not control & at.MSIX_CONTROL_MASK_ALL and self._bus_master
            )
        for bar in self.bars:
            address = self._config.address_of(bar)
            if address != self._mapped[bar.index]:
                self._mapped[bar.index] = address
                if self._on_map is not None:
                    self._on_map(bar.index, address)
        if self._bus_master:
            self._release_held()

    def _release_held(self) -> None:
        """Do what has waited for bus mastering."""
        status, self._held_status = self._held_status, 0
        kicks, self._held_kicks = self._held_kicks, set()
        if status:
            self._write_status(status)
        for index in sorted(kicks):
            self.device.kick(index)

    def reset(self) -> None:
        """Power-on or bus reset, or one of the function alone: all is as it was at first."""
        self._write_status(0)
        if self.interrupts.msix is not None:
            self.interrupts.msix.reset()
        self._config.reset()
        self._follow_config_space()

    def _window_target(self) -> tuple[int, int] | None:
        """Offset in the modern BAR and length that the window shows (PCI-89, PCI-90)."""
        load, window = self._config.load, self._window
        offset, length = load(window + at.CAP_OFFSET, 4), load(window + at.CAP_LENGTH, 4)
        if load(window + at.CAP_BAR, 1) != _MODERN or length not in (1, 2, 4):
            return None
        return None if offset % length or offset + length > 4 * _PART else (offset, length)

    def _read_through_window(self) -> None:
        target = self._window_target()
        if target is not None:
            self._config.store(self._window + at.CAP_DATA, 4, self._modern_read(*target))

    def _write_through_window(self) -> None:
        target = self._window_target()
        if target is not None:
            value = self._config.load(self._window + at.CAP_DATA, target[1])
            self._modern_write(*target, value)

    # -- BARs --------------------------------------------------------------------------------

    def bar_address(self, bar: int) -> int | None:
        """Where the guest has put BAR ``bar``, None where that is nowhere, or not enabled."""
        return self._mapped.get(bar)

    def find(self, address: int, *, io: bool = False) -> tuple[int, int] | None:
        """The BAR at an address of memory or I/O space, and the offset in it; or None."""
        for bar in self.bars:
            start = self._mapped[bar.index]
            if bar.io == io and start is not None and start <= address < start + bar.size:
                return bar.index, address - start
        return None

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """The guest reads 1 to 8 bytes of a BAR; one that is not enabled gives all ones."""
        if bar not in self._enabled:
            return (1 << 8 * size) - 1
        if bar == _MODERN:
            return self._modern_read(offset, size)
        if bar == _MSIX and self.interrupts.msix is not None:
            return self.interrupts.msix.read(offset, size)
        self._choose(legacy=True)
        return self._legacy.read(offset, size) if self.device.legacy else 0

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """The guest writes; a BAR that is not enabled ignores it."""
        if bar not in self._enabled:
            return
        if bar == _MODERN:
            self._modern_write(offset, size, value)
        elif bar == _MSIX and self.interrupts.msix is not None:
            self.interrupts.msix.write(offset, size, value)
        else:
            self._choose(legacy=True)
            if self.device.legacy or (offset, value) == (at.LEGACY_STATUS, 0):
                self._legacy.write(offset, size, value)

    def notifies(self, bar: int, offset: int) -> bool:
        """A write there tells a queue that it has something available (for ``"deferred"``: now
        there is something to :meth:`poll`)."""
        if bar == _LEGACY and self._transitional:
            return offset == at.LEGACY_QUEUE_NOTIFY
        return bar == _MODERN and offset >= _NOTIFY

    def poll(self) -> bool:
        """Serve what was kicked and is not done yet (``notify="deferred"``); True if there was."""
        return self._bus_master and self.device.poll()

    @property
    def irq_level(self) -> bool:
        """The level of INTA#."""
        return self.interrupts.line.level

    def _choose(self, *, legacy: bool) -> None:
        """A register of one interface is used: after a reset that is the driver's choice."""
        if self.device.legacy != legacy and self.device.status == 0:
            self.device.use_interface(legacy=legacy)

    def _modern_read(self, offset: int, size: int) -> int:
        part, offset = offset - offset % _PART, offset % _PART
        if part == _COMMON:
            self._choose(legacy=False)
            return self._common.read(offset, size)
        if part == _DEVICE:
            self._choose(legacy=False)
            self._common.device_config_read()
            return int.from_bytes(self.device.read_config(offset, size), "little")
        return self.interrupts.read_isr() if part == _ISR and offset == 0 else 0

    def _modern_write(self, offset: int, size: int, value: int) -> None:
        if offset >= _NOTIFY:
            # The address says which queue; the value repeats it, and is not looked at.
            self._kick((offset - _NOTIFY) // _NOTIFY_STEP)
        elif offset >= _DEVICE:
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self.device.write_config(offset - _DEVICE, data)
        elif offset < _PART:
            self._choose(legacy=False)
            self._common.write(offset, size, value)

    def _kick(self, index: int) -> None:
        if self._bus_master:
            self.device.kick(index)
        elif index < self.device.num_queues:
            self._held_kicks.add(index)

    def _read_status(self) -> int:
        return self.device.status | self._held_status

    def _write_status(self, value: int) -> None:
        """PCI-37; DRIVER_OK waits until memory may be accessed."""
        if value == 0:
            self._held_status = 0
            self._held_kicks = set()
            self._common.reset()
            self._legacy.reset()
            self.device.set_status(0)
            self.interrupts.reset()
        elif value & ~self.device.status & layout.STATUS_DRIVER_OK and not self._bus_master:
            self._held_status = value
        else:
            self.device.set_status(value)

    # -- the device's side (Transport) ---------------------------------------------------------

    def queue_interrupt(self, index: int) -> None:
        """See :class:`~.transport.Transport`."""
        self.interrupts.queue_interrupt(index)

    def note_interrupt(self, index: int | None) -> None:
        """See :class:`~.transport.Transport`."""
        self.interrupts.note(index)

    def deliver(self) -> None:
        """See :class:`~.transport.Transport`."""
        self.interrupts.deliver()

    # -- saving and loading --------------------------------------------------------------------

    state_version = 1
    """Of what :meth:`save_state` writes."""

    def save_state(self, stream: StateWriter) -> None:
        """Write the function and the device behind it; guest memory is saved by itself."""
        self._config.save(stream)
        stream.flag(self.device.legacy)
        stream.u8(self._held_status)
        stream.u32(len(self._held_kicks))
        for index in sorted(self._held_kicks):
            stream.u32(index)
        self._common.save(stream)
        self._legacy.save(stream)
        self.interrupts.save(stream)
        self.device.save_state(stream)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read what :meth:`save_state` has written; returns how to put it in force.

        Nothing is changed before that. The bus is told of BARs and the interrupt line then, where
        they are others. Raises ImageError for the state of another function, and what
        :meth:`.device.VirtioDevice.load_state` does.
        """
        config = self._config.load_saved(stream)
        legacy, held_status = stream.flag(), stream.u8()
        if legacy and not self._transitional:
            raise stream.malformed("is of a transitional device")
        held_kicks = {stream.u32() for _ in range(stream.u32())}
        parts = [each.load(stream) for each in (self._common, self._legacy, self.interrupts)]
        adopt_device = self.device.load_state(stream)

        def adopt() -> None:
            self._config.data = config
            self._held_status, self._held_kicks = held_status, held_kicks
            for adopt_part in parts:
                adopt_part()
            adopt_device()
            self._follow_config_space()

        return adopt


def _capability(kind: int, offset: int, length: int, rest: bytes) -> bytes:
    """A virtio structure of the modern BAR."""
    size = at.CAP.size + len(rest)
    return at.CAP.pack(at.PCI_CAP_ID_VENDOR, 0, size, kind, _MODERN, 0, offset, length) + rest
