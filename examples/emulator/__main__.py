"""``python -m examples.emulator linux``: the board on this terminal."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import pyvirtio

from . import layout as at
from .board import Board
from .clock import Clock, InstructionClock, WallClock
from .console import Console
from .firmware import CACHE, find_u_boot
from .gdbstub import GdbServer
from .image import ImageFileError
from .kernel import is_linux
from .linux import COMMAND_LINE, find_linux
from .packages import PackageError
from .recording import RecordedBoard
from .rootfs import make_overlay
from .script import ScriptError, Session, run_script
from .syscon import Power

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the emulator; the process's exit status."""
    options = _parser().parse_args(arguments)
    switch = _Switch()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, switch.on_signal)
    try:
        if options.guest == "linux":
            _choose_linux(options)
        with ExitStack() as stack:
            disks = [
                stack.enter_context(
                    pyvirtio.open_disk(path, read_only=options.read_only, format=kind)
                )
                for path, kind in options.disk
            ]
            status = _run(options, disks, switch)
    except (OSError, pyvirtio.PyvirtioError, ImageFileError, PackageError, ScriptError) as error:
        print(f"{_parser().prog}: {error}", file=sys.stderr)
        status = 1
    return 128 + switch.number if switch.number else status


def _choose_linux(options: argparse.Namespace) -> None:
    """Fill in what it takes to boot Debian's Linux, where the user has not chosen otherwise."""
    linux = find_linux()
    options.kernel = options.kernel or linux.kernel
    options.append = f"{COMMAND_LINE} root=/dev/vda {options.append}".rstrip()
    options.initrd_data = linux.initramfs
    if not options.disk:
        overlay = CACHE.with_name("linux") / "shell.qcow2"
        if not overlay.exists():
            make_overlay(overlay)
        options.disk = [(str(overlay), "qcow2")]
        print(f"[/dev/vda is {overlay}; remove it for a fresh one]", file=sys.stderr)


class _Switch:
    """Switches the running board off when a signal comes.

    An exception would be lost if it came up inside one of the engine's hooks.
    """

    def __init__(self) -> None:
        self.board: Board | None = None
        self.number = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self.board is None:
            raise SystemExit(128 + number)
        self.board.finisher.power = Power.QUIT


def _run(options: argparse.Namespace, disks: Sequence[pyvirtio.Disk], switch: _Switch) -> int:
    """Run board after board until one does not end in a reset."""
    program = options.bios or options.kernel or find_u_boot()
    if options.script is None:
        with Console() as console:
            while True:
                board = _switch_on(options, disks, program, console.send)
                switch.board = board
                power = console.run(board)
                if power is not Power.RESET:
                    break
                board.close()
        print(f"\n[the board is {power.value}]", file=sys.stderr)
        _debug(options, board)
        board.close()
        return 1 if power is Power.FAILED else 0
    session = Session(_show)
    switch.board = _switch_on(options, disks, program, session.send_out)
    session.connect(switch.board)
    run_script(options.script, session)
    _debug(options, switch.board)
    return 0


def _debug(options: argparse.Namespace, board: Board) -> None:
    """Let gdb have the run that is over, if the user wants that."""
    if isinstance(board, RecordedBoard):
        server = GdbServer(board, options.gdb)
        print(f"[gdb-multiarch -ex 'target remote :{server.port}']", file=sys.stderr, flush=True)
        server.serve()
        server.close()


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _switch_on(
    options: argparse.Namespace,
    disks: Sequence[pyvirtio.Disk],
    program: Path,
    send: Callable[[int], None],
) -> Board:
    clock: Clock = WallClock() if options.clock == "wall" else InstructionClock()
    kind = Board if options.gdb is None else RecordedBoard
    board = kind(
        send,
        ram=options.ram,
        disks=disks,
        clock=clock,
        legacy_virtio=options.legacy_virtio,
        pci=options.pci,
        aia=options.aia,
    )
    initrd = options.initrd.read_bytes() if options.initrd else options.initrd_data
    if options.bios and options.kernel:
        board.load(options.kernel, at.RAM_BASE + at.KERNEL_OFFSET)
    elif options.kernel and is_linux(program):
        board.start_supervisor(board.load_linux(program), options.append, initrd)
        return board
    if options.sbi:
        start = board.load(program, at.RAM_BASE + at.KERNEL_OFFSET)
        board.start_supervisor(start, options.append, initrd)
    else:
        board.start(board.load(program), options.append, initrd)
    return board


def _disk(path: str) -> tuple[str, str | None]:
    return path, "raw" if path.endswith(".raw") else None


def _bytes(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper(), 0)
    return int(text[:-1]) * unit if unit else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.emulator",
        description="A RISC-V board with disks. Without a program it starts U-Boot; "
        "with the word linux, Debian's Linux.",
        epilog="On the terminal, Ctrl-A X leaves and Ctrl-A H helps.",
    )
    add = parser.add_argument
    add("guest", nargs="?", choices=("linux",), help="boot Debian's Linux from a disk of its own")
    add(
        "--disk",
        action="append",
        type=_disk,
        default=[],
        metavar="IMAGE",
        help="an image of any format, raw if it is named *.raw; may be repeated",
    )
    add(
        "--raw-disk",
        action="append",
        type=lambda path: (path, "raw"),
        dest="disk",
        metavar="IMAGE",
        help="an image without a format, whatever is in it",
    )
    add("--read-only", action="store_true", help="the guest may not write to the disks")
    add("--bios", type=Path, help="firmware: an ELF file, or bytes that start at 0x80000000")
    add(
        "--kernel",
        type=Path,
        help="a Linux kernel (Image, Image.gz, vmlinuz.efi), which is started in supervisor mode; "
        "or an ELF file: alone, it is started in machine mode",
    )
    add("--initrd", type=Path, metavar="FILE", help="the kernel's first file system")
    add(
        "--sbi",
        action="store_true",
        help="start the program in supervisor mode, with firmware (SBI) below it",
    )
    add("--append", default="", metavar="TEXT", help="the kernel's command line")
    add("--ram", type=_bytes, default=256 << 20, metavar="SIZE", help="memory (default: 256M)")
    add(
        "--clock",
        choices=("instructions", "wall"),
        default="instructions",
        help="what guest time is made of; by instructions, runs are repeatable (default)",
    )
    add("--pci", action="store_true", help="the disks are on PCI; else they are virtio-mmio")
    add(
        "--aia",
        action="store_true",
        help="interrupts by messages, as Linux knows them: disks on PCI have MSI-X",
    )
    add(
        "--legacy-virtio",
        action="store_true",
        help="for old guests: virtio-mmio version 1; with --pci, transitional devices",
    )
    add(
        "--gdb",
        type=int,
        metavar="PORT",
        help="record the run; when it is over, let gdb go back and forth in it (0: any port)",
    )
    add("--script", type=Path, help="talk to the guest by a script instead of the terminal")
    parser.set_defaults(initrd_data=b"")
    return parser


if __name__ == "__main__":
    sys.exit(main())
