"""A hostile vhost-user front-end: random messages, plausible ones, each with something wrong.

``python -m support.vhost_fuzz --minutes 10`` goes on for so long. Whatever the messages say: the
server serves the next front-end, and nothing of a connection that has ended is left behind.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pyvirtio.virtio.driver import DriverError
from pyvirtio.virtio.vhost_user import layout as vu
from pyvirtio.virtio.vhost_user.layout import Request
from support.vhost_user import Rig, open_descriptors

__all__ = ["BIG", "alive", "endure", "play", "sequences"]

BIG = 0xFFFF_FFFF_FFFF_FFFF
_GROWTH = 500
"""Blocks of memory by which Python and hypothesis may grow in a round of messages."""

_numbers = st.one_of(
    st.sampled_from([0, 1, 2, 8, 16, 256, 0x100, 0x1000, 1 << 31, 1 << 40, BIG]),
    st.integers(0, BIG),
)
_STRUCTS = (
    vu.U64,
    vu.VRING_STATE,
    vu.VRING_ADDR,
    vu.SINGLE_REGION,
    vu.LOG,
    vu.INFLIGHT,
    vu.STATE_TRANSFER,
    vu.CONFIG_HEAD,
    struct.Struct("="),
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[int, int, bytes, int]:
    """Request, flags, payload, number of descriptors."""
    request = draw(st.one_of(st.sampled_from(list(Request)), st.integers(0, 50)))
    struct_ = draw(st.sampled_from(_STRUCTS))
    count = len(struct_.unpack(bytes(struct_.size)))
    data = b"".join(struct.pack("=Q", draw(_numbers)) for _ in range(count + 1))
    payload = draw(st.sampled_from([data[: struct_.size], data]))
    return request, draw(st.sampled_from([1, 9])), payload[:256], draw(st.integers(0, 2))


sequences = st.lists(messages(), max_size=25)


def alive(rig: Rig) -> bool:
    """The server serves the next front-end, with a driver and all."""
    front = rig.front(ram := rig.ram())
    driver = rig.driver(front)
    driver.write(0, bytes(512))
    front.close()
    rig.forget(front, ram)
    return rig.failure is None


def play(rig: Rig, sequence: list[Any], set_up_before: bool) -> None:
    """Send these, to a server with a driver at work or without. Raises if that harms it."""
    ours, theirs = socket.socketpair(), os.pipe()
    front = rig.front(ram := rig.ram(1 << 16))
    front.link.timeout = 10
    fds = [ram.fd, theirs[1], ours[0].fileno()]
    try:
        if set_up_before:
            driver = rig.driver(front)
            driver.write(0, bytes(512))
        for request, flags, payload, count in sequence:
            front.link.channel.send(request, flags & ~1, payload, fds[:count])
        front.link.channel.send(Request.GET_FEATURES, 0)
        while front.link.receive().request != Request.GET_FEATURES:
            pass
    except (OSError, EOFError):  # hung up on
        pass
    except DriverError as error:
        raise RuntimeError(f"the server is stuck: {error}") from error
    front.close()
    rig.forget(front, ram)
    for each in ours:
        each.close()
    for fd in theirs:
        os.close(fd)
    if not alive(rig):
        raise RuntimeError("the server has ended") from rig.failure


def _left(rig: Rig) -> tuple[int, int, int]:
    """File descriptors, mappings and blocks of memory, when every session but one has ended."""
    link = rig.link()
    link.ask_u64(Request.GET_FEATURES)
    gc.collect()
    with open("/proc/self/maps") as maps:
        found = open_descriptors(), sum("memfd" in line for line in maps), sys.getallocatedblocks()
    link.close()
    return found


def endure(folder: Path, rounds: int, start: int = 0) -> None:
    """Two rounds of the same random messages: the second leaves nothing behind, or this raises."""
    with Rig(folder, packed=True, num_queues=2) as rig:

        @seed(start)
        @settings(
            max_examples=rounds,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(sequences, st.booleans())
        def run(sequence: list[Any], set_up_before: bool) -> None:
            play(rig, sequence, set_up_before)

        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # who keeps records of what was refused would grow
        try:
            run()
            before = _left(rig)
            run()
            after = _left(rig)
        finally:
            logging.disable(disabled)
    for what, first, second, most in zip(
        ("descriptors", "mappings", "blocks of memory"), before, after, (0, 0, _GROWTH), strict=True
    ):
        if second > first + most:
            raise RuntimeError(f"{second} {what} after messages, {first} before")


def main() -> int:
    """Fuzz until a fault is found or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    number = 0
    while time.monotonic() < deadline:
        with tempfile.TemporaryDirectory(prefix="vhost-fuzz-") as folder:
            try:
                endure(Path(folder), 100, options.seed + number)
            except BaseException:
                print(f"seed {options.seed + number}", flush=True)
                raise
        number += 1
    print(f"{200 * number} sequences of messages from seed {options.seed} on, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
