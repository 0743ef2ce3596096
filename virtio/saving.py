"""A device's state as bytes: everything outside guest memory and the transport's registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..backend.state import StateReader, StateWriter
from ..errors import GuestError, UnsupportedError
from . import layout as at
from .queue import DeviceState
from .ring import Chain, QueueState

if TYPE_CHECKING:
    from .device import VirtioDevice

__all__ = ["load_device", "save_device"]

_KNOWN_STATUS = (
    at.STATUS_ACKNOWLEDGE
    | at.STATUS_DRIVER
    | at.STATUS_DRIVER_OK
    | at.STATUS_FEATURES_OK
    | at.STATUS_SUSPEND
    | at.STATUS_NEEDS_RESET
    | at.STATUS_FAILED
)

_QueueFlags = tuple[bool, bool, list[Chain]]
"""Of a queue: whether it is pending, and its kicks suppressed; the chains that it holds."""


def save_device(device: VirtioDevice, stream: StateWriter) -> None:
    """Write the state of ``device``, of which no request is under way."""
    state = device.state
    stream.u32(device.device_id)
    stream.u32(device.state_version)
    stream.flag(device.legacy)
    stream.flag(device.structs is at.BIG)
    stream.u64(device.offered_features)
    stream.u64(state.driver_features & 0xFFFF_FFFF_FFFF_FFFF)
    stream.u64(state.driver_features >> 64 & 0xFFFF_FFFF_FFFF_FFFF)
    stream.u8(state.status)
    stream.u32(state.config_generation)
    stream.flag(state.broken)
    stream.u16(len(device.queues))
    for queue in device.queues:
        queue.state.save(stream)
        stream.flag(queue.pending)
        ring = queue.ring
        stream.flag(queue.suppressed if ring is None else ring.suppressed)
        stream.u32(len(queue.held))
        for chain in queue.held:
            chain.save(stream)
    device.save_own(stream)


def load_device(device: VirtioDevice, stream: StateReader) -> Callable[[], object]:
    """Read and check what :func:`save_device` has written; returns how to put it in force.

    Raises ImageError for the state of another kind of device, of one with other queues or
    features, or attached in another way; UnsupportedError for a newer one.
    """
    device_id, version = stream.u32(), stream.u32()
    if device_id != device.device_id:
        raise stream.malformed(f"is of a device of type {device_id}, not {device.device_id}")
    if version != device.state_version:
        raise UnsupportedError(
            f"Device state of version {version}, known is {device.state_version}",
            feature=f"device state version {version}",
        )
    legacy, big = stream.flag(), stream.flag()
    before = device.legacy, device.structs
    try:  # what follows is checked by a device of that interface
        if device.transitional:
            device.legacy = legacy
            device.structs = device.legacy_structs if legacy else at.LITTLE
        if (legacy, big) != (device.legacy, device.structs is at.BIG):
            raise stream.malformed("is of another virtio version or byte order")
        return _load_as(device, stream, legacy)
    finally:
        device.legacy, device.structs = before


def _load_as(device: VirtioDevice, stream: StateReader, legacy: bool) -> Callable[[], object]:
    offered = stream.u64()
    features = stream.u64() | stream.u64() << 64
    status = stream.u8()
    missing = features & ~device.offered_features
    if not status & (at.STATUS_FEATURES_OK | at.STATUS_DRIVER_OK | at.STATUS_SUSPEND):
        missing &= offered  # what a driver tries out before is its own affair
    if missing:
        raise stream.malformed(f"needs features {missing:#x}, which are not offered")
    may_suspend = features >> at.VIRTIO_F_SUSPEND & 1 and not legacy
    if status & ~_KNOWN_STATUS or (status & at.STATUS_SUSPEND and not may_suspend):
        raise stream.malformed(f"has a status of {status:#x}")
    state = DeviceState([], status, features, stream.u32(), stream.flag())
    count = stream.u16()
    if count != len(device.queues):
        raise stream.malformed(f"has {count} queues, not {len(device.queues)}")
    extras: list[_QueueFlags] = []
    for queue in device.queues:
        queue_state = QueueState.load(stream, queue.state.max_size)
        state.queues.append(queue_state)
        pending, suppressed, count = stream.flag(), stream.flag(), stream.u32()
        if count > queue_state.max_size:
            raise stream.malformed(f"has {count} requests of a queue of {queue_state.max_size}")
        held = [Chain.load(stream, queue_state.max_size) for _ in range(count)]
        extras.append((pending, suppressed, held))
    adopt_own = device.load_own(stream)
    if not state.broken:
        _check_rings(device, state, stream)

    def adopt() -> None:
        with device.holding():
            if legacy != device.legacy:
                device.set_status(0)
                device.use_interface(legacy=legacy)
            _take_over(device, state, extras)
            adopt_own()
            device.told()
        if not device.service.defer:
            for queue in device.queues:
                if queue.held or not device.service.inline:
                    device.kick(queue.index)

    return adopt


def _take_over(device: VirtioDevice, state: DeviceState, extras: list[_QueueFlags]) -> None:
    for queue in device.queues:
        queue.drop()
    device.service.drain()
    device.state = state
    device.resets += 1
    for queue, queue_state in zip(device.queues, state.queues, strict=True):
        queue.state = queue_state
    for queue, (_, _, held) in zip(device.queues, extras, strict=True):
        queue.held[:] = held
    device.refresh_rings()
    for queue, (pending, suppressed, held) in zip(device.queues, extras, strict=True):
        queue.suppressed = suppressed
        ring = queue.ring
        if ring is not None:
            ring.suppressed = suppressed
            # Worker threads are told of every queue.
            queue.pending = device.service.inline and (pending or bool(held))


def _check_rings(device: VirtioDevice, state: DeviceState, stream: StateReader) -> None:
    """Raise ImageError if a queue that is enabled in ``state`` could not work."""
    for index, queue in enumerate(state.queues):
        if queue.ready:
            try:
                device.make_ring(queue, state.driver_features)
            except GuestError as error:
                raise stream.malformed(f"has a queue {index} that cannot be: {error}") from None
