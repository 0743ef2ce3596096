"""What the device keeps outside guest memory and rings, sent to another back-end ("Migrating
back-end state"): through a pipe, between stopping the rings here and starting them there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress

from ...backend.state import StateReader, StateWriter
from ...errors import PyvirtioError
from ..device import VirtioDevice
from .layout import STATE_LOAD, STATE_SAVE

__all__ = ["StateTransfer"]

_log = logging.getLogger(__name__)

_MAGIC = "pyvirtio vhost-user device"
_VERSION = 1
_MOST = 1 << 16
"""Bytes of state: what a pipe takes without somebody at its other end."""


class StateTransfer:
    """One transfer at a time, of the state of ``device``.

    ``watch(fd, callback)`` has ``callback`` called when there is something to read, until
    ``forget(fd)``: who sends state sends all of it before it asks how that went.
    """

    def __init__(
        self,
        device: VirtioDevice,
        watch: Callable[[int, Callable[[], object]], object],
        forget: Callable[[int], object],
    ) -> None:
        self._device = device
        self._watch = watch
        self._forget = forget
        self._failed = False
        self._fd = -1
        self._loading = False
        """Begun, and not ended."""
        self._complete = False
        self._received = bytearray()

    def begin(self, direction: int, fd: int) -> None:
        """Write the state to ``fd``, or be ready to read it; the descriptor is this one's."""
        self.close()
        self._failed = self._loading = self._complete = False
        if direction == STATE_LOAD:
            os.set_blocking(fd, False)
            self._fd, self._loading = fd, True
            self._received.clear()
            with suppress(OSError):  # a file, all of which is there
                self._watch(fd, self._receive)
            return
        try:
            self._failed = direction != STATE_SAVE
            if not self._failed:
                self._save(fd)
        except OSError as error:
            _log.warning("the device's state cannot be written: %s", error)
            self._failed = True
        finally:
            os.close(fd)

    def _save(self, fd: int) -> None:
        stream = StateWriter()
        stream.text(_MAGIC)
        stream.u32(_VERSION)
        stream.u32(self._device.device_id)
        self._device.save_own(stream)
        os.set_blocking(fd, False)
        data = bytes(stream)
        if os.write(fd, data) != len(data):
            raise OSError("the pipe is too small")

    def end(self) -> int:
        """Take what was sent, if this end reads; 0 if all went well, else 1."""
        while self._receive():
            pass
        self.close()
        try:
            if self._complete:
                self._load(bytes(self._received))
        except (OSError, PyvirtioError) as error:
            _log.warning("the device's state cannot be taken: %s", error)
            self._failed = True
        failed = self._failed or (self._loading and not self._complete)
        self._failed = self._loading = self._complete = False
        return int(failed)

    def _receive(self) -> bool:
        """Read some of what is sent; whether there may be more now."""
        if self._fd < 0:
            return False
        try:
            part = os.read(self._fd, _MOST)
        except BlockingIOError:
            return False
        except OSError as error:
            _log.warning("the device's state cannot be read: %s", error)
            self.close()
            return False
        self._received += part
        self._complete = not part  # its writer has closed it
        if self._complete or len(self._received) > _MOST:
            self.close()
        return True

    def _load(self, data: bytes) -> None:
        stream = StateReader(data, name="device", version=_VERSION)
        if stream.text() != _MAGIC or stream.u32() != _VERSION:
            raise stream.malformed("is of another program or version")
        if stream.u32() != self._device.device_id:
            raise stream.malformed("is of another kind of device")
        adopt = self._device.load_own(stream)
        stream.end()
        adopt()

    def close(self) -> None:
        """Read no more."""
        if self._fd >= 0:
            self._forget(self._fd)
            os.close(self._fd)
            self._fd = -1
