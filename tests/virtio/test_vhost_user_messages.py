"""A hostile front-end: messages that break the rules, in random order, and in pieces."""

from __future__ import annotations

import gc
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvirtio.virtio.driver import DriverError, Link
from pyvirtio.virtio.vhost_user import layout as vu
from pyvirtio.virtio.vhost_user import memory
from pyvirtio.virtio.vhost_user.layout import Request
from support.vhost_user import Rig, open_descriptors

EXAMPLES = int(os.environ.get("PYVIRTIO_VHOST_FUZZ", "40"))
BIG = 0xFFFF_FFFF_FFFF_FFFF


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, packed=True, num_queues=2) as rig:
        yield rig


def hung_up(link: Link) -> bool:
    """The server closes the connection, after whatever it had to say."""
    with suppress(ConnectionResetError, BrokenPipeError):
        try:
            while True:
                link.receive().close()
        except EOFError:
            return True
        except DriverError:
            return False
    return True


def alive(rig: Rig) -> bool:
    """The server serves the next front-end, with a driver and all."""
    driver = rig.driver(rig.front(ram := rig.ram()))
    driver.write(0, bytes(512))
    driver.registers.close()  # type: ignore[attr-defined]
    ram.close()
    return rig.failure is None


BROKEN = {
    "version 0": struct.pack("=III", Request.GET_FEATURES, 0, 0),
    "version 2": struct.pack("=III", Request.GET_FEATURES, 2, 0),
    "a huge payload": struct.pack("=III", Request.SET_CONFIG, 1, 0xFFFF_FFFF),
    "one byte more than any payload": struct.pack("=III", Request.GET_CONFIG, 1, 269),
    "an unknown message": struct.pack("=III", 200, 1, 0),
    "message 0": struct.pack("=III", 0, 1, 0),
    "a payload where there is none": struct.pack("=IIIQ", Request.GET_FEATURES, 1, 8, 0),
    "too short a payload": struct.pack("=IIII", Request.SET_FEATURES, 1, 4, 0),
    "a ring that is not there": struct.pack("=IIIII", Request.SET_VRING_NUM, 1, 8, 2, 16),
    "a ring of none": struct.pack("=IIIII", Request.SET_VRING_NUM, 1, 8, 0, 0),
    "too long a ring": struct.pack("=IIIII", Request.SET_VRING_NUM, 1, 8, 0, 0x8000_0000),
    "ring 255 to be kicked": struct.pack("=IIIQ", Request.SET_VRING_KICK, 1, 8, 0x1FF),
    "a kick without its descriptor": struct.pack("=IIIQ", Request.SET_VRING_KICK, 1, 8, 0),
    "regions without files": struct.pack("=III4x", Request.SET_MEM_TABLE, 1, 8)[:12]
    + vu.TABLE_HEAD.pack(8),
    "what was not negotiated": struct.pack("=III", Request.GET_STATUS, 1, 0),
    "features from nowhere": struct.pack("=IIIQ", Request.SET_FEATURES, 1, 8, BIG),
    "protocol features from nowhere": struct.pack(
        "=IIIQ", Request.SET_PROTOCOL_FEATURES, 1, 8, BIG
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_message_that_breaks_a_rule_ends_the_connection_and_no_more(rig: Rig, name: str) -> None:
    link = rig.link()
    link.channel.send_bytes(BROKEN[name])
    assert hung_up(link)
    link.close()
    assert alive(rig)


def test_a_refusal_is_acknowledged_where_that_was_negotiated(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    assert front.link.order(Request.SET_VRING_NUM, vu.VRING_STATE.pack(0, 0)) != 0
    assert front.link.order(Request.SET_VRING_NUM, vu.VRING_STATE.pack(0, 16)) == 0
    assert front.link.order(200) != 0


def test_a_message_may_come_byte_by_byte(rig: Rig) -> None:
    link = rig.link()
    data = vu.HEADER.pack(Request.SET_FEATURES, vu.VERSION, 8) + vu.U64.pack(0)
    for byte in data + vu.HEADER.pack(Request.GET_FEATURES, vu.VERSION, 0):
        link.channel.send_bytes(bytes([byte]))
    assert link.receive().request == Request.GET_FEATURES
    link.close()


def test_half_a_message_with_descriptors_leaves_none_behind(rig: Rig) -> None:
    def count() -> int:
        gc.collect()
        link = rig.link()
        link.ask_u64(Request.GET_FEATURES)  # those before are gone by now
        found = open_descriptors()
        link.close()
        return found

    before = count()
    for _ in range(3):
        link = rig.link()
        link.channel.send_bytes(vu.HEADER.pack(Request.SET_MEM_TABLE, 1, 100), [0, 1, 2])
        link.close()
    assert count() == before


REGIONS = {
    "beyond its file": (0, 0x2000, 0, 0),
    "beyond its file by its offset": (0, 0x1000, 0, 0x1000),
    "with an offset that overflows": (0, 0x1000, 0, BIG),
    "of no bytes": (0, 0, 0, 0),
    "beyond the address space": (BIG - 0xFFF, 0x2000, 0, 0),
    "beyond the user's address space": (0, 0x1000, BIG, 0),
    "of all the address space": (0, BIG, 0, 0),
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_that_cannot_be_is_refused(rig: Rig, name: str) -> None:
    front = rig.front()
    front.set_up()
    fd = os.memfd_create("small")
    os.ftruncate(fd, 0x1000)
    assert front.link.order(Request.ADD_MEM_REG, vu.SINGLE_REGION.pack(*REGIONS[name]), [fd]) != 0
    table = vu.TABLE_HEAD.pack(1) + vu.REGION.pack(*REGIONS[name])
    assert front.link.order(Request.SET_MEM_TABLE, table, [fd]) != 0
    os.close(fd)


@pytest.mark.parametrize("place", ["guest", "user"])
def test_regions_that_overlap_are_refused(rig: Rig, place: str) -> None:
    front = rig.front()
    front.set_up()
    guest, size, user, _ = front.ram.region
    far = 1 << 45
    region = (guest + size - 1, 4096, far, 0) if place == "guest" else (far, 4096, user - 4095, 0)
    payload = vu.SINGLE_REGION.pack(*region)
    assert front.link.order(Request.ADD_MEM_REG, payload, [front.ram.fd]) != 0


def test_memory_that_is_no_file_is_refused(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    reading, writing = os.pipe()
    payload = vu.SINGLE_REGION.pack(1 << 45, 4096, 1 << 45, 0)
    assert front.link.order(Request.ADD_MEM_REG, payload, [reading]) != 0
    os.close(reading)
    os.close(writing)


def test_there_is_an_end_to_memory_slots(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    front = rig.front()
    front.set_up()
    assert front.link.ask_u64(Request.GET_MAX_MEM_SLOTS) == memory.MAX_SLOTS
    monkeypatch.setattr(memory, "MAX_SLOTS", 3)
    results = [
        front.link.order(
            Request.ADD_MEM_REG,
            vu.SINGLE_REGION.pack((1 << 40) + 4096 * slot, 4096, (1 << 40) + 4096 * slot, 0),
            [front.ram.fd],
        )
        for slot in range(3)
    ]
    assert results == [0, 0, 1]


def test_notes_of_requests_that_cannot_be_are_refused(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    fd = os.memfd_create("small")
    os.ftruncate(fd, 4096)
    for size, offset, queues, entries in (
        (8192, 0, 1, 16),
        (4096, 8, 1, 16),
        (4096, 1, 1, 16),
        (BIG, 1, 1, 16),
        (0, 0, 1, 16),
        (4096, 0, 3, 16),
        (4096, 0, 1, 0),
        (4096, 0, 1, 65535),
    ):
        payload = vu.INFLIGHT.pack(size, offset, queues, entries)
        assert front.link.order(Request.SET_INFLIGHT_FD, payload, [fd]) != 0
    os.close(fd)


numbers = st.one_of(
    st.sampled_from([0, 1, 2, 8, 16, 256, 0x100, 0x1000, 1 << 31, 1 << 40, BIG]),
    st.integers(0, BIG),
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[int, int, bytes, int]:
    """Request, flags, payload, number of descriptors: plausible, each with something wrong."""
    request = draw(st.one_of(st.sampled_from(list(Request)), st.integers(0, 50)))
    struct_ = draw(
        st.sampled_from(
            [
                vu.U64,
                vu.VRING_STATE,
                vu.VRING_ADDR,
                vu.SINGLE_REGION,
                vu.LOG,
                vu.INFLIGHT,
                vu.STATE_TRANSFER,
                vu.CONFIG_HEAD,
                struct.Struct("="),
            ]
        )
    )
    count = len(struct_.unpack(bytes(struct_.size)))
    data = b"".join(struct.pack("=Q", draw(numbers)) for _ in range(count + 1))
    payload = draw(st.sampled_from([data[: struct_.size], data]))
    return request, draw(st.sampled_from([1, 9])), payload[:256], draw(st.integers(0, 2))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(messages(), max_size=25), st.booleans())
def test_no_sequence_of_messages_does_harm(
    rig: Rig, sequence: list[Any], set_up_before: bool
) -> None:
    """None ends the server; what it has open afterwards is what it had before."""
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
    front.close()
    rig._fronts.remove(front)
    ram.close()
    rig._rams.remove(ram)
    for each in ours:
        each.close()
    for fd in theirs:
        os.close(fd)
    assert alive(rig)
    rig._fronts.pop()
    rig._rams.pop()
