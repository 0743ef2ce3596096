"""Virtio over MMIO: the registers (virtio 1.4 §4.2.2, and §4.2.4 for the legacy interface).

:class:`VirtioMmio` is what an emulator plugs into its bus. Every access may be repeated without
harm: an emulator that stops its CPU inside the access will execute it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ..backend.state import StateReader, StateWriter
from ..errors import GuestError
from . import layout as at
from .layout import MMIO_INTERRUPT_USED_BUFFER, MMIO_QUEUE_NOTIFY, ByteOrder
from .line import InterruptLine
from .memory import GuestMemory
from .ring import QueueState
from .split import legacy_layout
from .transport import TransportDevice

__all__ = ["VirtioMmio"]

_NO_SHARED_MEMORY = range(at.MMIO_SHM_LEN_LOW, at.MMIO_SHM_BASE_HIGH + 4, 4)
_DEFAULT_ALIGN = 4096
"""§2.7.2: what QueueAlign is for drivers that never write it."""


class VirtioMmio:
    """One virtio-mmio slot with a device in it.

    ``memory`` is the guest's RAM. ``interrupt(level)`` is called when the level of the interrupt
    line changes, with True or False; :attr:`irq_level` can be asked instead. It must not stop the
    CPU from inside a callback of Unicorn.

    ``notify="inline"`` serves a queue inside the write to QueueNotify; ``"deferred"`` leaves it to
    :meth:`poll`, for emulators whose MMIO callbacks must not take long.

    ``notification_data`` offers that: a kick then says how far the ring is filled. The device has
    no use for it; it is for emulators that watch QueueNotify.

    ``legacy`` is version 1 of the interface; ``order`` is then the guest's byte order.
    """

    size = at.MMIO_SIZE
    """Bytes of address space to map."""

    def __init__(
        self,
        device: TransportDevice,
        memory: GuestMemory,
        interrupt: Callable[[bool], object] | None = None,
        *,
        legacy: bool = False,
        order: ByteOrder = "little",
        notify: Literal["inline", "deferred"] = "inline",
        vendor_id: int = at.VENDOR_QEMU,
        notification_data: bool = False,
    ) -> None:
        if notify not in ("inline", "deferred"):
            raise ValueError(f"notify is {notify!r}, must be 'inline' or 'deferred'")
        self.device = device
        self._kick: Callable[[int], None] = device.kick
        self.legacy = legacy
        self.vendor_id = vendor_id
        self._order: ByteOrder = order
        self._line = InterruptLine(interrupt)
        """Its causes are the bits of InterruptStatus."""
        self._page_size = 0  # not reset: Linux writes it once, before the first reset
        self._select_registers()
        self._reset_registers()
        device.connect(
            memory,
            self,
            legacy=legacy,
            order=order,
            defer=notify == "deferred",
            features=1 << at.VIRTIO_F_RING_RESET
            | 1 << at.VIRTIO_F_SUSPEND
            | notification_data << at.VIRTIO_F_NOTIFICATION_DATA,
        )

    # -- the plug ----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The guest loads ``size`` bytes at ``offset`` from the start of the slot.

        Registers answer aligned 4-byte loads, others (and unknown registers) give 0 (MMIO-14,
        MMIO-16, MMIO-17); the configuration answers any.
        """
        if offset >= at.MMIO_CONFIG:
            data = self.device.read_config(offset - at.MMIO_CONFIG, size)
            return int.from_bytes(data, self._order)
        if size != 4:
            return 0
        handler = self._readers.get(offset)
        return 0 if handler is None else handler()

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest stores ``value``; what is no store to a register is ignored, as for loads."""
        if offset == MMIO_QUEUE_NOTIFY and size == 4:
            self._kick(value)
        elif offset >= at.MMIO_CONFIG:
            data = (value & (1 << 8 * size) - 1).to_bytes(size, self._order)
            self.device.write_config(offset - at.MMIO_CONFIG, data)
        elif size == 4:
            handler = self._writers.get(offset)
            if handler is not None:
                handler(value & 0xFFFF_FFFF)

    def poll(self) -> bool:
        """Serve what was kicked and is not done yet (``notify="deferred"``); True if there was."""
        return self.device.poll()

    @property
    def irq_level(self) -> bool:
        """The level of the interrupt line."""
        return self._line.level

    # -- the device's side (Transport) ---------------------------------------------------------

    def queue_interrupt(self, index: int) -> None:
        """See :class:`~.transport.Transport`."""
        self._line.add(MMIO_INTERRUPT_USED_BUFFER)

    def note_interrupt(self, index: int | None) -> None:
        """See :class:`~.transport.Transport`."""
        config = at.MMIO_INTERRUPT_CONFIG_CHANGE
        self._line.note(config if index is None else MMIO_INTERRUPT_USED_BUFFER)

    def deliver(self) -> None:
        """See :class:`~.transport.Transport`."""
        self._line.update()

    # -- registers ---------------------------------------------------------------------------

    def _select_registers(self) -> None:
        """The registers of this version, by offset."""
        device = self.device
        version = 1 if self.legacy else 2
        self._readers: dict[int, Callable[[], int]] = {
            at.MMIO_MAGIC_VALUE: lambda: at.MMIO_MAGIC,
            at.MMIO_VERSION: lambda: version,
            at.MMIO_DEVICE_ID: lambda: device.device_id,
            at.MMIO_VENDOR_ID: lambda: self.vendor_id,
            at.MMIO_DEVICE_FEATURES: self._read_features,
            at.MMIO_QUEUE_SIZE_MAX: self._read_queue_size_max,
            at.MMIO_INTERRUPT_STATUS: lambda: self._line.causes,
            at.MMIO_STATUS: lambda: device.status,
        }
        self._writers: dict[int, Callable[[int], None]] = {
            at.MMIO_DEVICE_FEATURES_SEL: self._write_device_features_sel,
            at.MMIO_DRIVER_FEATURES: self._write_features,
            at.MMIO_DRIVER_FEATURES_SEL: self._write_driver_features_sel,
            at.MMIO_QUEUE_SEL: self._write_queue_sel,
            at.MMIO_QUEUE_SIZE: self._write_queue_size,
            at.MMIO_INTERRUPT_ACK: self._write_interrupt_ack,
            at.MMIO_STATUS: self._write_status,
        }
        if self.legacy:
            self._readers[at.MMIO_QUEUE_PFN] = self._read_queue_pfn
            self._writers |= {
                at.MMIO_GUEST_PAGE_SIZE: self._write_page_size,
                at.MMIO_QUEUE_ALIGN: self._write_queue_align,
                at.MMIO_QUEUE_PFN: self._write_queue_pfn,
            }
            return
        self._readers |= {
            at.MMIO_QUEUE_READY: self._read_queue_ready,
            at.MMIO_QUEUE_RESET: self._read_queue_reset,
            at.MMIO_CONFIG_GENERATION: lambda: device.config_generation,
        }
        self._readers |= dict.fromkeys(_NO_SHARED_MEMORY, lambda: 0xFFFF_FFFF)  # MMIO-41
        self._writers[at.MMIO_QUEUE_READY] = self._write_queue_ready
        self._writers[at.MMIO_QUEUE_RESET] = self._write_queue_reset
        for low, area in (
            (at.MMIO_QUEUE_DESC_LOW, "descriptor_area"),
            (at.MMIO_QUEUE_DRIVER_LOW, "driver_area"),
            (at.MMIO_QUEUE_DEVICE_LOW, "device_area"),
        ):
            self._writers[low] = self._address_writer(area, 0)
            self._writers[low + 4] = self._address_writer(area, 32)

    def _reset_registers(self) -> None:
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._queue_sel = 0
        self._queue_align: dict[int, int] = {}
        self._queue_pfn: dict[int, int] = {}

    def _read_features(self) -> int:
        select = self._device_features_sel
        return self.device.offered_features >> 32 * select & 0xFFFF_FFFF if select < 4 else 0

    def _write_device_features_sel(self, value: int) -> None:
        self._device_features_sel = value

    def _write_driver_features_sel(self, value: int) -> None:
        self._driver_features_sel = value

    def _write_features(self, value: int) -> None:
        select = self._driver_features_sel
        if select < 4:
            self.device.set_driver_features(value << 32 * select, 0xFFFF_FFFF << 32 * select)

    def _write_status(self, value: int) -> None:
        if value and not value & 0xFF:
            return  # bits that mean nothing, and no reset
        if value == 0:
            self._reset_registers()
            self.device.set_status(0)
            self._line.remove(-1)
        else:
            self.device.set_status(value & 0xFF)
        data = self.device.accepted(at.VIRTIO_F_NOTIFICATION_DATA)
        self._kick = self._kick_with_data if data else self.device.kick

    def _kick_with_data(self, value: int) -> None:
        """The queue, and in the upper half where the next chain goes: all is read from the ring."""
        self.device.kick(value & 0xFFFF)

    def _write_interrupt_ack(self, value: int) -> None:
        self._line.remove(value)

    # -- saving and loading --------------------------------------------------------------------

    state_version = 1
    """Of what :meth:`save_state` writes."""

    def save_state(self, stream: StateWriter) -> None:
        """Write the registers and the device behind them; guest memory is saved by itself."""
        for value in (
            self._device_features_sel,
            self._driver_features_sel,
            self._queue_sel,
            self._line.causes,
            self._page_size,
        ):
            stream.u32(value)
        for table in (self._queue_align, self._queue_pfn):
            stream.u32(len(table))
            for index, value in table.items():
                stream.u32(index)
                stream.u32(value)
        self.device.save_state(stream)

    def load_state(self, stream: StateReader) -> Callable[[], object]:
        """Read what :meth:`save_state` has written; returns how to put it in force.

        Nothing is changed before that. The interrupt line is set then, if its level is another.
        Raises what :meth:`.device.VirtioDevice.load_state` does.
        """
        selectors = stream.u32(), stream.u32(), stream.u32()
        interrupt_status, page_size = stream.u32(), stream.u32()
        align, pfn = ({stream.u32(): stream.u32() for _ in range(stream.u32())} for _ in range(2))
        adopt_device = self.device.load_state(stream)

        def adopt() -> None:
            self._device_features_sel, self._driver_features_sel, self._queue_sel = selectors
            self._line.causes, self._page_size = interrupt_status, page_size
            self._queue_align, self._queue_pfn = align, pfn
            adopt_device()
            self._line.update()

        return adopt

    # -- registers of the selected queue -------------------------------------------------------

    def _selected(self) -> QueueState | None:
        return self.device.queue_state(self._queue_sel)

    def _write_queue_sel(self, value: int) -> None:
        self._queue_sel = value

    def _read_queue_size_max(self) -> int:
        queue = self._selected()
        return 0 if queue is None else queue.max_size

    def _write_queue_size(self, value: int) -> None:
        # Checked when the queue is enabled (MMIO-27); not changed while it is (MMIO-28).
        queue = self._selected()
        if queue is not None and not queue.ready:
            queue.size = value

    def _read_queue_ready(self) -> int:
        queue = self._selected()
        return 0 if queue is None else int(queue.ready)

    def _write_queue_ready(self, value: int) -> None:
        queue = self._selected()
        if queue is None:
            return
        if value & 1:
            self.device.enable_queue(self._queue_sel)
        elif queue.ready:
            self.device.disable_queue(self._queue_sel)

    def _read_queue_reset(self) -> int:
        """1 while a reset goes on, 0 before and after (MMIO-09, MMIO-10, MMIO-12, MMIO-13)."""
        if self._selected() is None:
            return 0
        return int(self.device.resetting(self._queue_sel))

    def _write_queue_reset(self, value: int) -> None:
        if self._selected() is not None and value == 1:  # MMIO-11
            self.device.reset_queue(self._queue_sel)

    def _address_writer(self, area: str, shift: int) -> Callable[[int], None]:
        keep = 0xFFFF_FFFF << (32 - shift)

        def write(value: int) -> None:
            queue = self._selected()
            if queue is not None and not queue.ready:
                setattr(queue, area, getattr(queue, area) & keep | value << shift)

        return write

    # -- legacy ------------------------------------------------------------------------------

    def _write_page_size(self, value: int) -> None:
        self._page_size = value

    def _write_queue_align(self, value: int) -> None:
        if self._selected() is not None:
            self._queue_align[self._queue_sel] = value

    def _read_queue_pfn(self) -> int:
        return self._queue_pfn.get(self._queue_sel, 0)

    def _write_queue_pfn(self, value: int) -> None:
        index = self._queue_sel
        queue = self._selected()
        if queue is None:
            return
        if value == 0:
            self._queue_pfn.pop(index, None)
            self.device.disable_queue(index)
            return
        if queue.ready:
            return
        align = self._queue_align.get(index, _DEFAULT_ALIGN)
        page = self._page_size
        for name, number in (("GuestPageSize", page), ("QueueAlign", align)):
            if number <= 0 or number & (number - 1):  # MMIO-50, MMIO-51
                self.device.guest_error(GuestError(f"{name} is {number}, no power of two"))
                return
        areas = legacy_layout(value * page, queue.size, align)
        queue.descriptor_area, queue.driver_area, queue.device_area = areas
        self.device.enable_queue(index)
        if queue.ready:
            self._queue_pfn[index] = value
