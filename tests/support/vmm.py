"""QEMU with our guest and a disk of ours, and our server as a process: started, told, killed."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from support.qmp import qmp

if TYPE_CHECKING:
    from support.x86_guest import Guest

__all__ = ["Server", "Vmm", "vhost_user_disk"]


class Server:
    """``pyvirtio-serve vhost-user-blk`` on ``image``, listening in ``folder``."""

    def __init__(self, image: Path, folder: Path, *options: str) -> None:
        self.socket = folder / "blk.sock"
        self.monitor = folder / "monitor.sock"
        self._log = folder / "server.log"
        self._command = [
            *(sys.executable, "-m", "pyvirtio.tools.serve", "vhost-user-blk", "--verbose"),
            *("--serial", "disk"),
            *("--socket", str(self.socket), "--monitor", str(self.monitor), *options, str(image)),
        ]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.monitor))
                except OSError:
                    time.sleep(0.05)
                else:
                    return process
        raise RuntimeError(f"the server does not start: {self.log}")

    @property
    def log(self) -> str:
        """What the server has said."""
        return self._log.read_text()

    def kill(self) -> None:
        """SIGKILL it, and start it again."""
        self._process.kill()
        self._process.wait()
        self.monitor.unlink()
        self._process = self._start()

    def command(self, execute: str, **arguments: Any) -> Any:
        """A command to its monitor; what that returned."""
        return qmp(self.monitor, execute, **arguments)

    def end(self) -> int:
        """SIGTERM it; its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end; its exit status."""
        return self._process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


_RAM = f"{256 << 10 | 8}K"
"""256 MiB, and a little more. QEMU 7.2 without KVM loses what a guest writes to its memory while
it migrates (it forgets to watch pages again that were written), but for memory whose size is no
multiple of 256 KiB, which it goes through page by page."""

_ARGUMENTS = "console=ttyS0 quiet tsc=unstable mitigations=off init_on_alloc=0"
"""Memory is not cleared before it is used: what the disk puts there then is all that changes it."""


def vhost_user_disk(server: Server, *, packed: bool = False, queues: int = 1) -> list[str]:
    """QEMU's options for a disk of that server."""
    ring = "on" if packed else "off"
    return [
        *("-chardev", f"socket,id=disk,path={server.socket},reconnect=1", "-device"),
        f"vhost-user-blk-pci,chardev=disk,addr=4,packed={ring},num-queues={queues}",
    ]


class Vmm:
    """QEMU, without KVM, with a disk by the options ``disk``, and a shell in its guest on the
    serial line.

    ``monitor``: where it takes commands. With ``incoming``, a path, its guest comes there from
    another QEMU: see :meth:`start_migration`; both have monitors then. ``memory_slot``: memory can
    be plugged in, up to 1 GiB (the guest keeps 64 MiB for it).
    """

    def __init__(
        self,
        guest: Guest,
        disk: Sequence[str],
        *,
        cpus: int = 1,
        monitor: Path | None = None,
        incoming: Path | None = None,
        memory_slot: bool = False,
    ) -> None:
        self.incoming = incoming
        self._monitor = monitor
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-nodefaults", "-nographic", "-serial", "stdio"),
                *("-machine", "pc,accel=tcg,memory-backend=ram", "-cpu", "max"),
                *("-m", f"{_RAM},slots=1,maxmem=1G" if memory_slot else _RAM),
                *(
                    "-smp",
                    str(cpus),
                    "-object",
                    f"memory-backend-memfd,id=ram,share=on,size={_RAM}",
                ),
                *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs)),
                *("-append", _ARGUMENTS),
                *disk,
                *("-drive", f"if=none,id=tools,file={guest.tools},format=raw,readonly=on"),
                *("-device", "virtio-blk-pci,drive=tools,serial=tools,addr=5"),
                *(() if monitor is None else ("-qmp", f"unix:{monitor},server=on,wait=off")),
                *(() if incoming is None else ("-incoming", f"unix:{incoming}")),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        self._said = b""
        self.commands = 0
        """How many the shell was given; a guest that moves takes its shell along."""

    def wait_for(self, pattern: str, timeout: float = 120) -> re.Match[str]:
        """Wait until the guest has said that; what is before is dropped. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while True:
            text = self._said.decode(errors="replace")
            if (found := re.search(pattern, text)) is not None:
                self._said = text[found.end() :].encode()
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no {pattern!r} in {text!r}")
            for _ in self._selector.select(left):
                if not (data := os.read(self._output.fileno(), 1 << 16)):
                    raise EOFError(f"QEMU has ended: {text!r}")
                self._said += data

    def start(self, command: str) -> int:
        """Have the guest's shell run a command; what :meth:`result` takes."""
        self.commands += 1
        number = self.commands
        self._input.write(f'{command}\necho "done {number} $?"\n'.encode())
        self._input.flush()
        return number

    def result(self, number: int, timeout: float = 120) -> tuple[int, str]:
        """The exit status of the command of that number, and what it said."""
        found = self.wait_for(rf"(?s)^(.*?)done {number} (\d+)\n", timeout)
        return int(found[2]), found[1]

    def run(self, command: str, timeout: float = 120) -> str:
        """The same at once. Raises RuntimeError if the command fails."""
        status, output = self.result(self.start(command), timeout)
        if status:
            raise RuntimeError(f"{command}: {status}: {output}")
        return output

    def boot(self) -> None:
        """Wait for the guest to come up."""
        self.wait_for(r"the guest is up\s")

    def reboot(self) -> None:
        """Have the guest start again, in the same QEMU."""
        self.start("reboot -f")
        self.boot()

    def power_off(self) -> None:
        """End the guest, and QEMU."""
        self.start("poweroff -f")
        self._process.wait(60)

    def kill(self) -> None:
        """End QEMU."""
        self._process.kill()
        self._process.wait()

    def wait_for_monitor(self) -> None:
        """Wait until QEMU runs; then it listens for a guest to come, too."""
        if self._monitor is None:
            raise ValueError("this one has no monitor")
        deadline = time.monotonic() + 60
        while not self._monitor.exists():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError("QEMU does not start")
            time.sleep(0.05)
        self.command("query-status")

    def command(self, execute: str, **arguments: Any) -> Any:
        """A command to QEMU's monitor; what that returned."""
        if self._monitor is None:
            raise ValueError("this one has no monitor")
        return qmp(self._monitor, execute, **arguments)

    def start_migration(self, there: Vmm) -> None:
        """Have the guest's memory copied to that QEMU, again and again, and come back when all of
        it was copied once. The guest runs on."""
        there.wait_for_monitor()
        # It goes when what is left takes no more than this many milliseconds: with a guest that
        # does anything, and then a line this slow, never.
        self.command("migrate-set-parameters", downtime_limit=1, max_bandwidth=32 << 20)
        self.command("migrate", uri=f"unix:{there.incoming}")
        self._wait_for_migration(lambda found: found["ram"]["dirty-sync-count"] > 1)
        self.command("migrate-set-parameters", max_bandwidth=64 << 10)
        if (found := self.command("query-migrate"))["status"] != "active":
            raise RuntimeError(f"the guest was too idle to be watched: {found}")

    def finish_migration(self) -> None:
        """Have the guest stop here and go on there."""
        self.command("migrate-set-parameters", downtime_limit=60_000, max_bandwidth=1 << 30)
        self._wait_for_migration(lambda found: found["status"] == "completed")

    def _wait_for_migration(self, reached: Callable[[Any], bool]) -> None:
        deadline = time.monotonic() + 300
        while not ("ram" in (found := self.command("query-migrate")) and reached(found)):
            if found["status"] not in ("setup", "active", "device"):
                raise RuntimeError(f"the migration has ended: {found}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the guest does not go: {found}")
            time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._selector.close()
        self._input.close()
        self._output.close()
