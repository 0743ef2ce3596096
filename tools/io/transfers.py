"""The commands that move data: ``read`` and ``write``, their vectored and asynchronous forms."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import BackendError, UnsupportedError
from .help_texts import HELP
from .session import Session, reason
from .table import Arguments, Command, complain, usage
from .text import MAX_REQUEST, CommandError, dump, number, pattern_byte, report

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["COMMANDS", "check_range"]

_SECTOR = 512
_READ_FILL = 0xAB
_WRITE_FILL = 0xCD


def check_range(disk: Disk, offset: int, length: int) -> None:
    """Raise BackendError for a request that leaves the disk."""
    if offset > disk.size or length > disk.size - offset:
        raise BackendError(errno.EIO, "Input/output error")


def _length(text: str, *, limit: bool = True, hint: str = "") -> int:
    value = number(text)
    if limit and value > MAX_REQUEST:
        print(f"length cannot exceed {MAX_REQUEST}{hint}, given {text}")
        raise CommandError
    return value


def _check_sectors(offset: int, count: int) -> None:
    for value, name in ((offset, "offset"), (count, "count")):
        if value % _SECTOR:
            print(f"{value} is not a sector-aligned value for '{name}'")
            raise CommandError


def _vector(texts: list[str]) -> int:
    """The lengths of several buffers, added."""
    total = 0
    for text in texts:
        value = number(text)
        if value > MAX_REQUEST:
            print(f"Argument '{text}' exceeds maximum size {MAX_REQUEST}")
            raise CommandError
        if total > MAX_REQUEST - value:
            print(f"The total number of bytes exceed the maximum size {MAX_REQUEST}")
            raise CommandError
        total += value
    return total


def _reader(disk: Disk, offset: int, data: bytearray) -> Callable[[], None]:
    def work() -> None:
        check_range(disk, offset, len(data))
        disk.readv(offset, [memoryview(data)])

    return work


def _state_reader(disk: Disk, offset: int, data: bytearray) -> Callable[[], None]:
    def work() -> None:
        vmstate = getattr(disk, "vmstate", None)
        if vmstate is None:
            raise UnsupportedError("no VM state", feature="vmstate")
        there = max(0, min(len(data), vmstate.size - offset))
        if there:
            vmstate.readv(offset, [memoryview(data)[:there]])
        data[there:] = bytes(len(data) - there)

    return work


def _state_writer(session: Session, disk: Disk, offset: int, data: bytes) -> Callable[[], None]:
    def work() -> None:
        vmstate = getattr(disk, "vmstate", None)
        if vmstate is None:
            raise UnsupportedError("no VM state", feature="vmstate")
        vmstate.writev(offset, [data])
        if session.flags.writethrough:
            disk.flush()

    return work


def _writer(
    session: Session, disk: Disk, offset: int, data: bytes, *, fua: bool
) -> Callable[[], None]:
    fua = fua or session.flags.writethrough

    def work() -> None:
        check_range(disk, offset, len(data))
        disk.writev(offset, [data], fua=fua)

    return work


def _zeroer(
    session: Session, disk: Disk, offset: int, count: int, arguments: Arguments
) -> Callable[[], None]:
    fua = "f" in arguments or session.flags.writethrough

    def work() -> None:
        check_range(disk, offset, count)
        unit = disk.limits.write_zeroes_alignment
        if "n" in arguments and (offset % unit or (count % unit and offset + count < disk.size)):
            raise UnsupportedError("not without writing", feature="zeroes")
        disk.write_zeroes(offset, count, unmap="u" in arguments, fallback="n" not in arguments)
        if fua:
            disk.flush()

    return work


def _compressor(disk: Disk, offset: int, data: bytes) -> Callable[[], None]:
    def work() -> None:
        check_range(disk, offset, len(data))
        unit = disk.limits.discard_alignment
        aligned = not (offset % unit or len(data) % unit)
        if (
            disk.format_name == "qcow2"
            and aligned
            and any(
                extent.host_offset is not None and extent.depth == 0
                for extent in disk.extents(offset, len(data))
            )
        ):
            raise BackendError(errno.EIO, "QEMU compresses only what is not allocated")
        disk.write_compressed(offset, [data])

    return work


def _timed(session: Session, work: Callable[[], None], what: str) -> float:
    """Seconds that the work took; a failure is told and ends the command."""
    start = time.monotonic()
    status = session.request(work)
    spent = time.monotonic() - start
    if status:
        print(f"{what} failed: {reason(status)}")
        raise CommandError
    return spent


# -- read ------------------------------------------------------------------------------------------


def _read(session: Session, arguments: Arguments) -> None:
    pattern = arguments.last("P")
    byte = None if pattern is None else pattern_byte(pattern)
    start = number(arguments.last("s") or "0")
    wanted = arguments.last("l")
    pattern_count = None if wanted is None else number(wanted)
    offset = number(arguments.operands[0])
    count = _length(arguments.operands[1])
    if byte is None and ("l" in arguments or "s" in arguments):
        usage(READ)
    if pattern_count is None:
        pattern_count = count - start
    if pattern_count < 0 or pattern_count + start > count:
        print("pattern verification range exceeds end of read data")
        raise CommandError
    if "b" in arguments:
        _check_sectors(offset, count)
    data = bytearray([_READ_FILL]) * count
    make = _state_reader if "b" in arguments else _reader
    spent = _timed(session, make(session.image, offset, data), "read")
    failed = byte is not None and not _matches(data[start : start + pattern_count], byte)
    if failed:
        _tell_mismatch(offset + start, pattern_count)
    _show_read(arguments, data, spent, offset)
    if failed:
        raise CommandError


def _matches(data: bytearray, byte: int) -> bool:
    return data.count(byte) == len(data)


def _tell_mismatch(offset: int, count: int) -> None:
    print(f"Pattern verification failed at offset {offset}, {count} bytes")


def _show_read(arguments: Arguments, data: bytearray, spent: float, offset: int) -> None:
    if "q" in arguments:
        return
    if "v" in arguments:
        dump(data, offset)
    report("read", spent, offset, len(data), len(data), terse="C" in arguments)


def _readv(session: Session, arguments: Arguments) -> None:
    pattern = arguments.last("P")
    byte = None if pattern is None else pattern_byte(pattern)
    offset = number(arguments.operands[0])
    data = bytearray([_READ_FILL]) * _vector(arguments.operands[1:])
    spent = _timed(session, _reader(session.image, offset, data), "readv")
    failed = byte is not None and not _matches(data, byte)
    if failed:
        _tell_mismatch(offset, len(data))
    _show_read(arguments, data, spent, offset)
    if failed:
        raise CommandError


def _aio_read(session: Session, arguments: Arguments) -> None:
    pattern = arguments.last("P")
    byte = None if pattern is None else pattern_byte(pattern)
    if "i" in arguments:
        print("injecting invalid read request")
        return
    offset = number(arguments.operands[0])
    data = bytearray([_READ_FILL]) * _vector(arguments.operands[1:])
    start = time.monotonic()

    def done(status: int) -> None:
        spent = time.monotonic() - start
        if status:
            print("readv failed:", reason(status))
            return
        if byte is not None and not _matches(data, byte):
            _tell_mismatch(offset, len(data))
        _show_read(arguments, data, spent, offset)

    session.start(_reader(session.image, offset, data), done)


# -- write -----------------------------------------------------------------------------------------


def _check_write(arguments: Arguments) -> None:
    """Refuse options that do not go together."""
    for wrong, message in (
        (
            "b" in arguments and "z" in arguments,
            "-b and -z cannot be specified at the same time",
        ),
        (
            "f" in arguments and ("b" in arguments or "c" in arguments),
            "-f and -b or -c cannot be specified at the same time",
        ),
        ("n" in arguments and "z" not in arguments, "-n requires -z to be specified"),
        ("u" in arguments and "z" not in arguments, "-u requires -z to be specified"),
        (
            ("z" in arguments) + ("P" in arguments) + ("s" in arguments) > 1,
            "Only one of -z, -P, and -s can be specified at the same time",
        ),
    ):
        if wrong:
            print(message)
            raise CommandError


def _write(session: Session, arguments: Arguments) -> None:
    pattern = arguments.last("P")
    byte = _WRITE_FILL if pattern is None else pattern_byte(pattern)
    _check_write(arguments)
    offset = number(arguments.operands[0])
    count = _length(arguments.operands[1], limit="n" not in arguments, hint=" without -n")
    if "b" in arguments or "c" in arguments:
        _check_sectors(offset, count)
    disk = session.image
    if "z" in arguments:
        work = _zeroer(session, disk, offset, count, arguments)
    else:
        source = arguments.last("s")
        data = bytes([byte]) * count if source is None else _from_file(source, count)
        if "b" in arguments:
            work = _state_writer(session, disk, offset, data)
        elif "c" in arguments:
            work = _compressor(disk, offset, data)
        else:
            work = _writer(session, disk, offset, data, fua="f" in arguments)
    spent = _timed(session, work, "write")
    if "q" not in arguments:
        report("wrote", spent, offset, count, count, terse="C" in arguments)


def _from_file(path: str, count: int) -> bytes:
    """``count`` bytes of a file, over and over."""
    try:
        with open(path, "rb") as file:
            data = file.read(count)
    except OSError as error:
        complain(f"{path}: {error.strerror}")
    if not data:
        complain(f"{path}: file is empty")
    return (data * (count // len(data) + 1))[:count]


def _writev(session: Session, arguments: Arguments) -> None:
    pattern = arguments.last("P")
    byte = _WRITE_FILL if pattern is None else pattern_byte(pattern)
    offset = number(arguments.operands[0])
    data = bytes([byte]) * _vector(arguments.operands[1:])
    work = _writer(session, session.image, offset, data, fua="f" in arguments)
    spent = _timed(session, work, "writev")
    if "q" not in arguments:
        report("wrote", spent, offset, len(data), len(data), terse="C" in arguments)


def _aio_write(session: Session, arguments: Arguments) -> None:
    pattern = arguments.last("P")
    byte = _WRITE_FILL if pattern is None else pattern_byte(pattern)
    if "i" in arguments:
        print("injecting invalid write request")
        return
    zeroes = "z" in arguments
    if zeroes and len(arguments.operands) != 2:
        print("-z supports only a single length parameter")
        raise CommandError
    if "u" in arguments and not zeroes:
        print("-u requires -z to be specified")
        raise CommandError
    offset = number(arguments.operands[0])
    disk = session.image
    if zeroes:
        count = number(arguments.operands[1])
        work = _zeroer(session, disk, offset, count, arguments)
    else:
        count = _vector(arguments.operands[1:])
        data = bytes([byte]) * count
        work = _writer(session, disk, offset, data, fua="f" in arguments)
    start = time.monotonic()

    def done(status: int) -> None:
        spent = time.monotonic() - start
        if status:
            print("aio_write failed:", reason(status))
        elif "q" not in arguments:
            report("wrote", spent, offset, count, count, terse="C" in arguments)

    session.start(work, done)


READ = Command(
    "read",
    _read,
    "reads a number of bytes at a specified offset",
    "[-abCqv] [-P pattern [-s off] [-l len]] off len",
    "bCl:pP:qs:v",
    least=2,
    most=None,
    operands=(2, 2),
    alias="r",
    help=HELP["read"],
)

COMMANDS = [
    READ,
    Command(
        "readv",
        _readv,
        "reads a number of bytes at a specified offset",
        "[-Cqv] [-P pattern] off len [len..]",
        "CP:qv",
        least=2,
        most=None,
        operands=(2, None),
        help=HELP["readv"],
    ),
    Command(
        "write",
        _write,
        "writes a number of bytes at a specified offset",
        "[-bcCfnquz] [-P pattern | -s source_file] off len",
        "bcCfnpP:qs:uz",
        least=2,
        most=None,
        operands=(2, 2),
        alias="w",
        writes=True,
        help=HELP["write"],
    ),
    Command(
        "writev",
        _writev,
        "writes a number of bytes at a specified offset",
        "[-Cfq] [-P pattern] off len [len..]",
        "CfqP:",
        least=2,
        most=None,
        operands=(2, None),
        writes=True,
        help=HELP["writev"],
    ),
    Command(
        "aio_read",
        _aio_read,
        "asynchronously reads a number of bytes",
        "[-Ciqv] [-P pattern] off len [len..]",
        "CP:iqv",
        least=2,
        most=None,
        operands=(2, None),
        help=HELP["aio_read"],
    ),
    Command(
        "aio_write",
        _aio_write,
        "asynchronously writes a number of bytes",
        "[-Cfiquz] [-P pattern] off len [len..]",
        "CfiqP:uz",
        least=2,
        most=None,
        operands=(2, None),
        writes=True,
        help=HELP["aio_write"],
    ),
]
