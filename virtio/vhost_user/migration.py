"""What the device keeps outside guest memory and rings, sent to another back-end ("Migrating
back-end state"): through a pipe, between stopping the rings here and starting them there.
"""

from __future__ import annotations

import logging
import os

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
    """One transfer at a time, of the state of ``device``."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device
        self._failed = False
        self._fd = -1

    def begin(self, direction: int, fd: int) -> None:
        """Write the state to ``fd``, or be ready to read it; the descriptor is this one's."""
        self.close()
        self._failed = False
        if direction == STATE_LOAD:
            os.set_blocking(fd, False)
            self._fd = fd
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
        if self._fd >= 0:
            try:
                self._load(self._read())
            except (OSError, PyvirtioError) as error:
                _log.warning("the device's state cannot be taken: %s", error)
                self._failed = True
            finally:
                self.close()
        failed, self._failed = self._failed, False
        return int(failed)

    def _read(self) -> bytes:
        data = bytearray()
        while part := os.read(self._fd, _MOST):  # its writer has closed it
            data += part
            if len(data) > _MOST:
                raise OSError("more state than a device has")
        return bytes(data)

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
        """Give up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
