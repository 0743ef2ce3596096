"""Suspension: a driver has its device stand still and go on later (VIRTIO_F_SUSPEND, virtio 1.4).

A driver that sets SUSPEND asks for it. The device takes no more buffers then, and when all that it
had taken are used and told of, it shows SUSPEND in place of DRIVER_OK (BF-70, BF-72 to BF-74): at
once, unless worker threads are busy or an error has a request wait for the host. Until then both
bits are in :attr:`.queue.DeviceState.status`, and the driver sees DRIVER_OK as before.

A device that is suspended uses no queue, sends nothing and changes nothing that the driver can see
(BF-64 to BF-68). DRIVER_OK wakes it: what was made available, kicked or not, is served, and what
has changed is told (BF-69, BF-71).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .layout import STATUS_DRIVER_OK, STATUS_SUSPEND, VIRTIO_F_SUSPEND

if TYPE_CHECKING:
    from .device import VirtioDevice

__all__ = ["asked_for", "finish", "is_suspended", "is_suspending", "shown"]

_BOTH: Final = STATUS_SUSPEND | STATUS_DRIVER_OK


def is_suspending(status: int) -> bool:
    """A device with this status (as it is kept, not as it is shown) is to stand still soon."""
    return status & _BOTH == _BOTH


def shown(status: int) -> int:
    """What the driver sees of a status."""
    return status & ~STATUS_SUSPEND if is_suspending(status) else status


def is_suspended(status: int) -> bool:
    """A device with this status stands still."""
    return status & _BOTH == STATUS_SUSPEND


def asked_for(device: VirtioDevice, value: int) -> bool:
    """Whether a driver that writes ``value`` to the status suspends the device, or wakes it: then
    that is done. Ignored where it may not (BF-57, BF-63). The lock is held."""
    status = device.state.status
    if is_suspended(status) and value & STATUS_DRIVER_OK:
        _wake(device)
        return True
    if value & ~status & STATUS_SUSPEND and status & STATUS_DRIVER_OK:
        allowed = device.accepted(VIRTIO_F_SUSPEND) and not device.state.broken
        if allowed:
            _begin(device)
        return allowed
    return False


def _begin(device: VirtioDevice) -> None:
    device.state.status |= STATUS_SUSPEND
    for queue in device.queues:
        if not queue.held:  # else what was taken is done, and nothing more
            queue.park()
    device.attention = True
    finish(device)


def finish(device: VirtioDevice) -> None:
    """Show SUSPEND if that was asked for and nothing is under way any more."""
    with device.lock:
        state = device.state
        if (
            is_suspending(state.status)
            and device.service.quiet()
            and not device.telling
            and not any(queue.held for queue in device.queues)
        ):
            state.status &= ~STATUS_DRIVER_OK
            device.refresh_rings()


def _wake(device: VirtioDevice) -> None:
    state = device.state
    state.status = state.status & ~STATUS_SUSPEND | STATUS_DRIVER_OK
    if state.broken:  # something was wrong with a queue that was enabled meanwhile
        device.config_due()
        return
    device.refresh_rings()
    device.woken()
    device.service.resume()
