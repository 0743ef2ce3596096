"""``pyvirtio-serve vhost-user-blk``: an image as a disk for a VMM.

The options follow QEMU's conventions for such programs (docs/interop/vhost-user.rst, "Backend
program conventions"): ``--fd``, ``--print-capabilities``, ``--blk-file``, ``--socket-path``; no
forking; SIGTERM does what is under way, flushes and ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import socket
from contextlib import ExitStack

from ... import Disk, VhostUserServer, VirtioBlk, open_disk
from ...errors import PyvirtioError, message_of
from ..messages import say_more
from .handover import HandoverDisk
from .monitor import Monitor
from .signals import on_signals
from .sockets import passed_sockets

__all__ = ["make_parser", "run"]

_CAPABILITIES = {"type": "block", "features": ["read-only", "blk-file"]}


def run(program: str, arguments: list[str]) -> int:
    """Serve until told to end; the exit status."""
    parser = make_parser(program)
    options = parser.parse_args(arguments)
    if options.print_capabilities:
        print(json.dumps(_CAPABILITIES))
        return 0
    if (options.image is None) == (options.blk_file is None):
        parser.error("one image is needed")
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format=f"{program}: %(message)s")
    try:
        passed = passed_sockets()
        if (options.socket is not None) + (options.fd is not None) + len(passed) != 1:
            parser.error("one of --socket, --fd and a passed socket is needed")
        _serve(options, passed[0] if passed else None)
    except (OSError, ValueError, PyvirtioError) as error:
        say_more(f"{program}: {message_of(error)}\n")
        return 1
    return 0


def _serve(options: argparse.Namespace, listener: socket.socket | None) -> None:
    with ExitStack() as stack:
        disk = stack.enter_context(_open(options))
        device = VirtioBlk(
            disk,
            serial=options.serial,
            num_queues=options.queues,
            queue_size=options.queue_size,
            packed=options.packed,
            in_order=options.in_order,
            io_threads=options.io_threads,
        )
        connection = None if options.fd is None else socket.socket(fileno=options.fd)
        if connection is not None and connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            listener, connection = connection, None
        uses = {}
        if isinstance(disk, HandoverDisk):
            uses = {"on_start": disk.hold, "on_stop": disk.let_go}
        server = stack.enter_context(
            VhostUserServer(
                device, options.socket, listener=listener, connection=connection, **uses
            )
        )
        if options.monitor is not None:
            stack.enter_context(Monitor(options.monitor, server, disk))
        on_signals(server.stop)
        stack.callback(device.detach)
        server.serve()
        server.close()
        if not disk.read_only:
            disk.flush()


def _open(options: argparse.Namespace) -> Disk:
    """The image's disk."""

    def image(read_only: bool, locking: bool) -> Disk:
        name = options.blk_file if options.image is None else options.image
        return open_disk(name, format=options.format, read_only=read_only, locking=locking)

    if options.migration:
        return HandoverDisk(image, read_only=options.read_only)
    return image(options.read_only, True)


def make_parser(program: str) -> argparse.ArgumentParser:
    """The options there are."""
    parser = argparse.ArgumentParser(
        program, description="Serve an image as a vhost-user-blk device.", allow_abbrev=False
    )
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="any format that pyvirtio knows")
    add("--blk-file", metavar="IMAGE", help="the same")
    add("--socket", "--socket-path", metavar="PATH", help="listen at this UNIX socket")
    add(
        "--fd",
        type=int,
        metavar="N",
        help="serve this descriptor, a socket that is connected or listens",
    )
    add("--format", metavar="FORMAT", help="of the image; its first bytes tell if not given")
    add("--read-only", action="store_true", help="nothing is written")
    add("--queues", type=int, default=1, metavar="N", help="request queues (default: 1)")
    add("--queue-size", type=int, default=256, metavar="N", help="their entries (default: 256)")
    add("--packed", action="store_true", help="offer packed queues, too")
    add("--in-order", action="store_true", help="offer in-order use of buffers")
    add(
        "--serial", default="", metavar="TEXT", help="the disk's serial number, up to 20 characters"
    )
    add("--io-threads", type=int, default=0, metavar="N", help="threads for requests (default: 0)")
    add("--monitor", metavar="PATH", help="take commands (as QMP's block_resize) at this socket")
    add(
        "--migration",
        action="store_true",
        help="hold the image only while the guest's queues are in use, for live migration",
    )
    add("--print-capabilities", action="store_true", help="print them as JSON, and end")
    add("--verbose", action="store_true", help="tell of front-ends that come and go")
    return parser
