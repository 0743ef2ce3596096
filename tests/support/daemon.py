"""qemu-storage-daemon as a judge of dirty bitmaps: what it reads, and what it does."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

__all__ = ["StorageDaemon", "bits_digest"]


class StorageDaemon:
    """One image open in QEMU, driven over QMP. A context manager; leaving it closes the image."""

    def __init__(self, path: Path | str, *, read_only: bool = False) -> None:
        state = "on" if read_only else "off"
        self._process = subprocess.Popen(
            [
                *("qemu-storage-daemon", "--chardev", "stdio,id=c", "--monitor", "chardev=c"),
                *("--blockdev", f"driver=file,filename={path},node-name=f,read-only={state}"),
                *("--blockdev", f"driver=qcow2,file=f,node-name=q,read-only={state}"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.command("qmp_capabilities")

    def command(self, execute: str, **arguments: Any) -> Any:
        """Run a command; what it returned. Raises RuntimeError with what QEMU said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"execute": execute, "arguments": arguments})
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        for answer in self._process.stdout:
            message = json.loads(answer)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise RuntimeError(message["error"]["desc"])
        assert self._process.stderr is not None
        raise RuntimeError(self._process.stderr.read())

    def bitmaps(self) -> dict[str, dict[str, Any]]:
        """QEMU's description of every bitmap, by name."""
        nodes = self.command("query-named-block-nodes", flat=True)
        node = next(n for n in nodes if n["node-name"] == "q")
        return {bitmap["name"]: bitmap for bitmap in node.get("dirty-bitmaps", [])}

    def digest(self, name: str) -> str:
        """SHA-256 of a bitmap's bits."""
        answer = self.command("x-debug-block-dirty-bitmap-sha256", node="q", name=name)
        return str(answer["sha256"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(RuntimeError):
            self.command("quit")
        self._process.communicate(timeout=60)


def bits_digest(dirty: Iterable[tuple[int, int]], granularity: int, size: int) -> str:
    """SHA-256 of a bitmap as QEMU computes it: the bits in whole 64-bit words."""
    count = -(-size // granularity)
    bits = 0
    for offset, length in dirty:
        first, end = offset // granularity, -(-(offset + length) // granularity)
        bits |= (1 << end) - (1 << first)
    return hashlib.sha256(bits.to_bytes(-(-count // 64) * 8, "little")).hexdigest()
