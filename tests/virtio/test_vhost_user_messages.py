"""A hostile front-end: messages that break the rules, in random order, and in pieces."""

from __future__ import annotations

import gc
import os
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
from support import vhost_fuzz
from support.vhost_fuzz import BIG, alive, endure, play, sequences
from support.vhost_user import Rig, open_descriptors


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


def test_a_log_descriptor_that_cannot_be_written_does_no_harm(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    log = os.memfd_create("log")
    os.ftruncate(log, 1 << 20)
    front.link.ask(Request.SET_LOG_BASE, vu.LOG.pack(1 << 20, 0), [log])
    read_only = os.open("/dev/null", os.O_RDONLY)
    assert front.link.order(Request.SET_LOG_FD, b"", [read_only]) == 0
    for sector in range(3):
        driver.write(sector, bytes(512))
    os.close(log)
    os.close(read_only)
    front.close()
    assert alive(rig)


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


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(sequences, st.booleans())
def test_no_sequence_of_messages_does_harm(
    rig: Rig, sequence: list[Any], set_up_before: bool
) -> None:
    """What ``make fuzz-vhost`` goes on with."""
    play(rig, sequence, set_up_before)


def test_the_same_messages_again_leave_nothing_behind(tmp_path: Path) -> None:
    """Neither descriptors nor mappings nor memory."""
    endure(tmp_path, rounds=30)


def test_what_is_left_behind_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else that would show nothing."""
    kept: list[int] = []
    monkeypatch.setattr(vhost_fuzz, "play", lambda *_: kept.append(os.dup(1)))
    with pytest.raises(RuntimeError, match="descriptors"):
        endure(tmp_path, rounds=4)
    for fd in kept:
        os.close(fd)
