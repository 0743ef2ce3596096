"""A command to a QMP monitor: QEMU's, or that of our server, which speaks alike."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

__all__ = ["qmp"]


def qmp(path: Path, execute: str, **arguments: Any) -> Any:
    """Have the monitor that listens at ``path`` do something; what it returned.

    Underscores in names stand for hyphens. Raises RuntimeError with what the monitor said.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        with client.makefile("rw") as stream:
            stream.readline()
            _ask(stream, "qmp_capabilities", {})
            return _ask(stream, execute, {k.replace("_", "-"): v for k, v in arguments.items()})


def _ask(stream: Any, execute: str, arguments: dict[str, Any]) -> Any:
    stream.write(json.dumps({"execute": execute, "arguments": arguments}) + "\n")
    stream.flush()
    for line in stream:
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"]["desc"])
        if "return" in answer:
            return answer["return"]
    raise RuntimeError(f"the monitor hangs up at {execute}")
