"""The image that is open, and the requests that are under way on it."""

from __future__ import annotations

import errno
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from ...errors import PyvirtioError, UnsupportedError, message_of
from .text import CommandError, warn

if TYPE_CHECKING:
    from ...backend.blkdebug import BlkdebugDisk
    from ...backend.blockdev import Graph
    from ...backend.disk import Disk
    from ..objects import Objects
    from .table import Command

__all__ = ["CACHE_MODES", "OpenFlags", "Session", "debugger", "error_number", "reason"]

CACHE_MODES: dict[str, tuple[bool, bool, bool]] = {
    "off": (True, False, False),
    "none": (True, False, False),
    "directsync": (True, False, True),
    "writeback": (False, False, False),
    "unsafe": (False, True, False),
    "writethrough": (False, False, True),
}
"""Of each cache mode: past the host's cache? flushes ignored? every write flushed?"""

_HEAD_START = 0.05
"""Seconds that an asynchronous request has to get as far as it can, before the next command: so
requests meet each other in the order in which they were made."""

_EXCLUSIVE = (
    {"overlap-check", "overlap-check.template"},
    {"cache-size", "l2-cache-size", "refcount-cache-size"},
)
"""Options that replace each other when an image is reopened."""

AIO_MODES = ("threads", "native", "io_uring")
DISCARD_MODES = {"off": False, "ignore": False, "on": True, "unmap": True}


class OpenFlags:
    """How an image is to be opened."""

    def __init__(self) -> None:
        self.read_only = False
        self.direct = False
        self.no_flush = False
        self.writethrough = True
        self.discard = True
        self.native = False
        self.snapshot = False
        self.copy_on_read = False
        self.force_share = False

    def set_cache(self, mode: str) -> bool:
        """Take a cache mode; False if there is none of that name."""
        if mode not in CACHE_MODES:
            return False
        self.direct, self.no_flush, self.writethrough = CACHE_MODES[mode]
        return True

    def set_discard(self, mode: str) -> bool:
        """Take a discard mode; False if there is none of that name."""
        if mode not in DISCARD_MODES:
            return False
        self.discard = DISCARD_MODES[mode]
        return True

    def set_aio(self, mode: str) -> bool:
        """Take a mode of asynchronous I/O; False if there is none of that name."""
        self.native = mode == "native"
        return mode in AIO_MODES


class Session:
    """One run of the program."""

    def __init__(self, program: str, commands: list[Command]) -> None:
        self.program = program
        self.commands = commands
        self.disk: Disk | None = None
        self.flags = OpenFlags()
        self.objects: Objects | None = None
        self.image_opts = False
        self.quitting = False
        self._name: str | None = None
        self._options: dict[str, Any] = {}
        self.wrote = False
        """A command has changed the image."""
        self._corrupted = False
        self._flush_failed = False
        self._pending: set[threading.Thread] = set()
        self._done: queue.SimpleQueue[tuple[threading.Thread, Callable[[], None]]] = (
            queue.SimpleQueue()
        )

    def find(self, name: str) -> Command | None:
        """The command of that name or short name."""
        for command in self.commands:
            if name in (command.name, command.alias):
                return command
        return None

    @property
    def image(self) -> Disk:
        """The image, which a command has made sure is open."""
        if self.disk is None:
            raise CommandError
        return self.disk

    # -- messages --------------------------------------------------------------------------------

    def error(self, message: str) -> None:
        """An error on standard error, in the program's name."""
        sys.stderr.write(f"{self.program}: {message}\n")

    def fail(self, message: str) -> NoReturn:
        """An error that ends the command."""
        self.error(message)
        raise CommandError

    def warn(self, message: str) -> None:
        """What the block layer finds odd."""
        if message.startswith("Image format was not"):
            lines = message.replace("\n", "\n         ")
            sys.stderr.write(f"WARNING: {lines}\n")
        else:
            warn(self.program, message)

    # -- the image -------------------------------------------------------------------------------

    def open(self, name: str | None, flags: OpenFlags, options: dict[str, Any]) -> None:
        """Open an image. Raises CommandError when it cannot be, and has said so."""
        if self.disk is not None:
            self.fail("file open already, try 'help close'")
        if flags.force_share:
            if options.get("force-share", "on") != "on":
                self.fail("-U conflicts with image options")
            options["force-share"] = "on"
        try:
            self.disk = self._open(name, flags, options)
        except (PyvirtioError, ValueError, OSError, RecursionError) as error:
            device = "" if name is None else f" device {name}"
            self.fail(f"can't open{device}: {message_of(error)}")
        self._name, self.flags, self._options = name, flags, options

    def _open(self, name: str | None, flags: OpenFlags, options: dict[str, Any]) -> Disk:
        from ...backend.blockdev import Context, open_node

        context = Context(
            self._graph(),
            read_only=flags.read_only,
            direct=flags.direct,
            no_flush=flags.no_flush,
            discard="unmap" if flags.discard else "ignore",
        )
        if flags.native and not flags.direct and options.get("cache.direct") != "on":
            raise ValueError(
                "aio=native was specified, but it requires cache.direct=on, which was not "
                "specified."
            )
        if flags.snapshot:
            from .snapshot import open_snapshot

            below = open_node(replace(context, read_only=True), name, options)
            disk: Disk = open_snapshot(below)
        else:
            disk = open_node(context, name, options)
        if flags.copy_on_read:
            if disk.read_only:
                disk.close()
                raise ValueError("Can't use copy-on-read on read-only device")
            from ...backend.copy_on_read import CopyOnReadDisk

            disk = CopyOnReadDisk(disk)
        self._listen(disk)
        return disk

    def _graph(self) -> Graph:
        """What the nodes of one image share: the objects of the command line."""
        from ...backend.blockdev import Graph
        from ..messages import say_findings

        graph = Graph(warn=self.warn, tell_repairs=say_findings)
        if self.objects is not None:
            graph.secrets = self.objects.secrets
            graph.objects = self.objects.named
        return graph

    def _listen(self, disk: Disk) -> None:
        """Have corruption reported, and suspended requests where there are breakpoints."""
        image = disk
        while not hasattr(image, "on_corruption") and len(image.children) == 1:
            image = next(iter(image.children.values()))
        if hasattr(image, "on_corruption"):
            image.on_corruption(self._tell_corruption)
        node = debugger(disk)
        if node is not None:
            node.rules.report = print

    def _tell_corruption(self, event: Any) -> None:
        self._corrupted = event.fatal
        verdict = "Marking image as corrupt" if event.fatal else "Image is corrupt"
        kind = "corruption" if event.fatal else "non-fatal corruption"
        sys.stderr.write(
            f"qcow2: {verdict}: {event.message}; further {kind} events will be suppressed\n"
        )

    def close(self) -> None:
        """Finish what is under way and close the image."""
        self.drain()
        disk, self.disk = self.disk, None
        if disk is None:
            return
        self._flush_last(disk)
        try:
            disk.close()
        except (PyvirtioError, ValueError) as error:
            if not self._flush_failed:
                self.error(f"Failed to close the image: {message_of(error)}")

    def _flush_last(self, disk: Disk) -> None:
        """Flush before closing, and complain of what is lost cache by cache, as QEMU does."""
        self._flush_failed = False
        # What has not been written, or has been refused already, is not lost now.
        self._flush_failed = not self.wrote or self._corrupted
        if self._corrupted or disk.read_only:
            return
        for cache in getattr(disk, "unflushed", ()):
            try:
                disk.flush()
                return
            except (PyvirtioError, ValueError) as error:
                self._flush_failed = True
                self.error(f"Failed to flush the {cache} cache: {reason(error_number(error))}")

    def reopen(self, flags: OpenFlags, options: dict[str, Any]) -> None:
        """Have the image open in another way. Raises CommandError if that cannot be: it then is
        open as it was."""
        disk = self.image
        self.drain()
        options = {
            option: value
            for option, value in options.items()
            if not self._is_fixed(disk, option, value)
        }
        if self.flags.copy_on_read and flags.read_only:
            self.fail("Can't set node '' to r/o with copy-on-read enabled")
        unchanged = flags.__dict__ == self.flags.__dict__ and not options
        if unchanged:
            return
        if not options and flags.read_only != disk.read_only:
            only = dict(self.flags.__dict__, read_only=flags.read_only)
            if only == flags.__dict__:
                self._switch(disk, flags)
                return
        self._replace(disk, flags, options)

    def _is_fixed(self, disk: Disk, option: str, value: Any) -> bool:
        """True for an option that reopening cannot change, and that has that value already. Raises
        CommandError if it has another."""
        *way, name = option.split(".")
        if name not in ("driver", "node-name") and not option.startswith(("file.", "backing.")):
            return False
        node: Disk | None = disk
        for child in way:
            node = None if node is None else node.children.get(child)
        known = self._options.get(option)
        if node is not None and name in ("driver", "filename"):
            known = node.format_name if name == "driver" else node.filename
        if value != known:
            self.fail(f"Cannot change the option '{name}'")
        return True

    def _switch(self, disk: Disk, flags: OpenFlags) -> None:
        try:
            disk.reopen(read_only=flags.read_only)
        except (PyvirtioError, ValueError) as error:
            self.fail(message_of(error))
        self.flags = flags

    def _replace(self, disk: Disk, flags: OpenFlags, options: dict[str, Any]) -> None:
        """Close the image and open it with other options."""
        former = self._options
        replaced = {"read-only"}
        for group in _EXCLUSIVE:
            if group & options.keys():
                replaced |= group
        kept = {name: value for name, value in former.items() if name not in replaced}
        changed = kept | options
        self.disk = None
        try:
            disk.close()
            self.disk = self._open(self._name, flags, dict(changed))
        except (PyvirtioError, ValueError) as error:
            text = message_of(error)
            self.disk = self._open(self._name, self.flags, dict(former))
            unknown = text.rpartition(" does not support the option ")
            self.fail(f"Cannot change the option {unknown[2]}" if unknown[0] else text)
        self.flags, self._options = flags, changed

    # -- requests --------------------------------------------------------------------------------

    def request(self, work: Callable[[], None]) -> int:
        """Do something on the image now; 0, or the number of the error."""
        try:
            work()
        except (PyvirtioError, ValueError, OSError, MemoryError) as error:
            return error_number(error)
        finally:
            self.deliver()
        return 0

    def start(self, work: Callable[[], None], done: Callable[[int], None]) -> None:
        """Do something on the image meanwhile; ``done`` is called with 0 or an error's number, in
        the main thread, when it lets others have a turn."""
        finished = threading.Event()

        def body() -> None:
            try:
                work()
                status = 0
            except (PyvirtioError, ValueError, OSError, MemoryError) as error:
                status = error_number(error)
            self._done.put((thread, lambda: done(status)))
            finished.set()

        thread = threading.Thread(target=body, daemon=True)
        self._pending.add(thread)
        thread.start()
        finished.wait(_HEAD_START)

    def deliver(self) -> None:
        """Let requests that are done say so."""
        while True:
            try:
                thread, done = self._done.get_nowait()
            except queue.Empty:
                return
            self._pending.discard(thread)
            done()

    def wait(self, seconds: float) -> None:
        """Wait so long, letting requests that are done say so."""
        end = time.monotonic() + seconds
        while True:
            try:
                thread, done = self._done.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
            self._pending.discard(thread)
            done()

    def settle(self) -> None:
        """Give requests under way the time to get as far as they can."""
        if self._pending:
            self.wait(_HEAD_START)

    def drain(self) -> None:
        """Wait for all requests."""
        while self._pending:
            thread, done = self._done.get()
            self._pending.discard(thread)
            done()

    def finish(self) -> None:
        """The program ends: nothing stays suspended."""
        if self.disk is not None and self._pending:
            node = debugger(self.disk)
            if node is not None:
                node.rules.resume_all()
        self.close()


def debugger(disk: Disk) -> BlkdebugDisk | None:
    """The filter that breakpoints are set in; None if there is none."""
    node: Disk | None = disk
    while node is not None:
        if node.format_name == "blkdebug":
            from ...backend.blkdebug import debug_node

            return debug_node(node)
        children = node.children
        node = children.get("file") or children.get("image") or children.get("raw")
    return None


def error_number(error: BaseException) -> int:
    """The number of an error, as a C function would return it."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, UnsupportedError):
        return errno.ENOTSUP
    if isinstance(error, PyvirtioError):
        return errno.EIO
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return errno.EINVAL


def reason(number: int) -> str:
    """The C library's words for an error."""
    return os.strerror(number)
