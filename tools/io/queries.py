"""The commands about the image as a whole: flushing, resizing, asking."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...errors import PyvirtioError, message_of
from ..qjson import described
from .help_texts import HELP
from .session import Session, error_number, reason
from .table import Arguments, Command
from .text import MAX_REQUEST, CommandError, number, report, show_size
from .transfers import check_range

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["COMMANDS"]

_SECTOR = 512
_PROTOCOLS = (
    "file",
    "host_device",
    "host_cdrom",
    "null-co",
    "null-aio",
    "nbd",
    "blkdebug",
    "blkverify",
)
_PREALLOCATION = ("off", "metadata", "falloc", "full")


def _aio_flush(session: Session, arguments: Arguments) -> None:
    session.drain()


def _flush(session: Session, arguments: Arguments) -> None:
    if session.request(session.image.flush):
        raise CommandError


def _truncate(session: Session, arguments: Arguments) -> None:
    mode = arguments.last("m") or "off"
    if mode not in _PREALLOCATION:
        session.fail(f"Invalid preallocation mode '{mode}'")
    size = number(arguments.operands[0])
    disk = session.image
    session.deliver()
    try:
        disk.truncate(size, preallocation=mode, shrink=True)
    except (PyvirtioError, ValueError) as error:
        session.fail(message_of(error))


def _length(session: Session, arguments: Arguments) -> None:
    print(show_size(session.image.size))


def _info(session: Session, arguments: Arguments) -> None:
    disk = session.image
    if session.flags.copy_on_read:  # what QEMU has no node for
        disk = disk.children["file"]
    facts = disk.info()
    if not disk.read_only:
        # QEMU marks them when it opens the image, not when it is first written.
        for bitmap in facts.specific.get("bitmaps", ()):
            if "in-use" not in bitmap["flags"]:
                bitmap["flags"].insert(0, "in-use")
    print("format name:", facts.format)
    if facts.format in _PROTOCOLS:
        print("format name:", facts.format)
    if facts.format in ("null-co", "null-aio", "nbd"):
        raise CommandError  # QEMU has nothing more to say of these, and fails
    print("cluster size:", show_size(facts.cluster_size or 0))
    print("vm state offset:", show_size(facts.vm_state_offset or 0))
    if facts.specific:
        print("Format specific information:")
        print(*described(facts.specific, 1), sep="\n")


def _discard(session: Session, arguments: Arguments) -> None:
    offset = number(arguments.operands[0])
    count = number(arguments.operands[1])
    if count > MAX_REQUEST:
        print(f"length cannot exceed {MAX_REQUEST}, given {arguments.operands[1]}")
        raise CommandError
    disk = session.image

    def work() -> None:
        check_range(disk, offset, count)
        disk.discard(offset, count)

    start = time.monotonic()
    status = session.request(work)
    spent = time.monotonic() - start
    if status:
        print("discard failed:", reason(status))
        raise CommandError
    if "q" not in arguments:
        report("discard", spent, offset, count, count, terse="C" in arguments)


def _allocated_run(disk: Disk, offset: int, length: int) -> tuple[bool, int]:
    """Whether bytes from ``offset`` on are in this layer itself, and how many are alike; 0 at the
    end of the disk."""
    inside = min(length, disk.size - offset)
    if inside <= 0:
        return False, 0
    extent = disk.block_status(offset, inside)
    return extent.allocated and extent.depth == 0, extent.length


def _alloc(session: Session, arguments: Arguments) -> None:
    start = offset = number(arguments.operands[0])
    count = number(arguments.operands[1]) if len(arguments.operands) > 1 else _SECTOR
    left, allocated = count, 0
    while left:
        try:
            here, run = _allocated_run(session.image, offset, left)
        except (PyvirtioError, ValueError) as error:
            print("is_allocated failed:", reason(error_number(error)))
            raise CommandError from None
        if not run:
            count -= left
            break
        offset += run
        left -= run
        allocated += run if here else 0
    print(f"{allocated}/{count} bytes allocated at offset {show_size(start)}")


def _map(session: Session, arguments: Arguments) -> None:
    disk = session.image
    offset = 0
    while offset < disk.size:
        try:
            first, total = _allocated_run(disk, offset, disk.size - offset)
            while total < disk.size - offset:
                here, run = _allocated_run(disk, offset + total, disk.size - offset - total)
                if here is not first or not run:
                    break
                total += run
        except (PyvirtioError, ValueError) as error:
            session.fail(f"Failed to get allocation status: {reason(error_number(error))}")
        state = "    allocated" if first else "not allocated"
        print(
            f"{show_size(total)} ({total:#x}) bytes {state} at offset {show_size(offset)} "
            f"({offset:#x})"
        )
        offset += total


COMMANDS = [
    Command("aio_flush", _aio_flush, "completes all outstanding aio requests"),
    Command("flush", _flush, "flush all in-core file state to disk", alias="f"),
    Command(
        "truncate",
        _truncate,
        "truncates the current file at the given offset",
        "[-m prealloc_mode] off",
        "m:",
        least=1,
        most=3,
        operands=(1, None),
        alias="t",
        writes=True,
    ),
    Command("length", _length, "gets the length of the current file", alias="l"),
    Command("info", _info, "prints information about the current file", alias="i"),
    Command(
        "discard",
        _discard,
        "discards a number of bytes at a specified offset",
        "[-Cq] off len",
        "Cq",
        least=2,
        most=None,
        operands=(2, 2),
        alias="d",
        writes=True,
        help=HELP["discard"],
    ),
    Command(
        "alloc",
        _alloc,
        "checks if offset is allocated in the file",
        "offset [count]",
        least=1,
        most=2,
        alias="a",
    ),
    Command("map", _map, "prints the allocated areas of a file", ""),
]
