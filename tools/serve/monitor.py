"""A running server's ear: commands on a UNIX socket, in QMP's form, one JSON object a line.

``qmp_capabilities`` does nothing but answer; ``query-block`` tells the disk's size;
``block_resize`` changes it, of which the guest hears at once; ``quit`` ends the server. Other
arguments and commands are errors as in QEMU.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from ... import Disk, VhostUserServer, __version__
from ...backend.listener import UnixListener
from ...errors import PyvirtioError

__all__ = ["Monitor"]

_LONGEST = 1 << 16
"""Bytes of a line."""


class Monitor:
    """Listens at ``path`` in the loop of ``server``, for one client after the other."""

    def __init__(self, path: str, server: VhostUserServer, disk: Disk) -> None:
        """Raises OSError if it cannot listen there."""
        self._server = server
        self._disk = disk
        self._client: socket.socket | None = None
        self._received = b""
        self._owned = UnixListener(path)
        self._listener = self._owned.socket
        self._listener.setblocking(False)
        server.watch(self._listener.fileno(), self._accept)
        self._commands: dict[str, Callable[[dict[str, Any]], object]] = {
            "qmp_capabilities": lambda arguments: {},
            "query-block": self._query,
            "block_resize": self._resize,
            "quit": self._quit,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more. The server's loop is not running any more."""
        self._hang_up()
        self._owned.close()

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            client, _ = self._listener.accept()
            self._hang_up()
            client.setblocking(False)
            self._client = client
            self._server.watch(client.fileno(), self._receive)
            package = f"pyvirtio {__version__}"
            self._send({"QMP": {"version": {"package": package}, "capabilities": []}})

    def _hang_up(self) -> None:
        if self._client is not None:
            self._server.forget(self._client.fileno())
            self._client.close()
            self._client = None
        self._received = b""

    def _receive(self) -> None:
        assert self._client is not None, "only a client is watched for this"
        try:
            data = self._client.recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._received += data
        *lines, self._received = self._received.split(b"\n")
        if not data or len(self._received) > _LONGEST:
            self._hang_up()
        for line in lines:
            if line.strip():
                self._send(self._answer(line))

    def _send(self, message: dict[str, Any]) -> None:
        if self._client is not None:
            try:
                self._client.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                self._hang_up()

    def _answer(self, line: bytes) -> dict[str, Any]:
        """Run a command; what to say to it."""
        try:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("QMP input must be a JSON object")
            command = message.get("execute")
            arguments = message.get("arguments", {})
            if command not in self._commands:
                raise ValueError(f"The command {command} has not been found")
            if not isinstance(arguments, dict):
                raise ValueError("QMP input member 'arguments' must be an object")
            answer: dict[str, Any] = {"return": self._commands[command](arguments)}
        except (PyvirtioError, OSError, ValueError, RecursionError) as error:
            return {"error": {"class": "GenericError", "desc": str(error)}}
        if "id" in message:
            answer["id"] = message["id"]
        return answer

    def _query(self, arguments: dict[str, Any]) -> object:
        disk = self._disk
        image = {"format": disk.format_name, "virtual-size": disk.size}
        inserted = {"ro": disk.read_only, "drv": disk.format_name, "image": image}
        return [{"device": "disk", "locked": False, "removable": False, "inserted": inserted}]

    def _resize(self, arguments: dict[str, Any]) -> object:
        size = arguments.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError("Parameter 'size' expects an integer that is not negative")
        # As in QEMU: a guest is not asked whether it can do without what is cut off.
        self._disk.truncate(size, shrink=True)
        return {}

    def _quit(self, arguments: dict[str, Any]) -> object:
        self._server.stop()
        return {}
