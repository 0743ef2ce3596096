"""Rings and memory over vhost-user: what starts and stops them, and what waits for what."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import BlockDriver
from pyvirtio.virtio.vhost_user import layout as vu
from pyvirtio.virtio.vhost_user.layout import ProtocolFeature, Request
from support.vhost_user import Rig, settle

PATIENCE = 30


class Held(pyvirtio.MemoryDisk):
    """A disk whose reads wait to be let go."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self.entered.release()
        assert self.go.wait(PATIENCE)
        super()._readv(offset, views, length)


def held_up(make_rig: Callable[..., Rig]) -> tuple[Rig, BlockDriver, int]:
    """A device of two threads with a read under way."""
    rig = make_rig(Held(), io_threads=2)
    driver = rig.driver()
    head = driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=4096)
    driver.kick()
    assert rig.disk.entered.acquire(timeout=PATIENCE)
    return rig, driver, head


def release_soon(rig: Rig) -> threading.Event:
    """Lets the read go after a moment; the event is set just before."""
    going = threading.Event()

    def go() -> None:
        going.set()
        rig.disk.go.set()

    threading.Timer(0.3, go).start()
    return going


def test_a_stop_waits_for_what_is_under_way(make_rig: Callable[..., Rig]) -> None:
    rig, driver, head = held_up(make_rig)
    going = release_soon(rig)
    front: Any = driver.registers
    front.stop_queue(front.vrings[0])
    assert going.is_set()
    assert front.vrings[0].base == 1
    assert driver.collect()[head].status == 0


@pytest.mark.parametrize("slots", [False, True])
def test_memory_that_changes_waits_for_what_is_under_way(
    make_rig: Callable[..., Rig], slots: bool
) -> None:
    rig, driver, head = held_up(make_rig)
    going = release_soon(rig)
    front: Any = driver.registers
    region, fd = front.ram.region, front.ram.fd
    if slots:
        payload = vu.SINGLE_REGION.pack(*region)
        assert front.link.order(Request.REM_MEM_REG, payload) == 0
        assert front.link.order(Request.ADD_MEM_REG, payload, [fd]) == 0
    else:
        payload = vu.TABLE_HEAD.pack(1) + vu.REGION.pack(*region)
        assert front.link.order(Request.SET_MEM_TABLE, payload, [fd]) == 0
    assert going.is_set()
    assert driver.collect()[head].status == 0
    assert driver.read(0, 8) == bytes(4096)


def test_a_front_end_that_goes_is_waited_for(make_rig: Callable[..., Rig]) -> None:
    """The next one comes when nothing is under way any more."""
    rig, driver, _ = held_up(make_rig)
    going = release_soon(rig)
    driver.registers.close()  # type: ignore[attr-defined]
    assert rig.driver().read(0, 1) == bytes(512)
    assert going.is_set()


def test_rings_are_enabled_by_features_alone_where_there_are_no_protocol_features(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    front = rig.front(protocol_features=0)
    front.set_up()
    front.features = 1 << at.VIRTIO_F_VERSION_1
    assert front.link.ask_u64(Request.GET_FEATURES) >> vu.VHOST_USER_F_PROTOCOL_FEATURES & 1
    # A front-end of its own: the driver needs a configuration, which is a protocol feature.
    front.protocol_features = 1 << ProtocolFeature.CONFIG
    driver = BlockDriver(front, front.ram.memory, front.ram.arena(), wait=front.wait)
    front.link.send(Request.SET_PROTOCOL_FEATURES, vu.U64.pack(1 << ProtocolFeature.CONFIG))
    front._send_features = lambda: front.link.order(  # type: ignore[method-assign]
        Request.SET_FEATURES, vu.U64.pack(front.features)
    )
    orders: list[int] = []
    order = front.link.order

    def but_enable(request: int, *rest: Any) -> int:
        orders.append(request)
        return 0 if request == Request.SET_VRING_ENABLE else order(request, *rest)

    front.link.order = but_enable  # type: ignore[method-assign]
    driver.start()
    assert Request.SET_VRING_ENABLE in orders
    assert driver.read(0, 1) == bytes(512)


def test_a_kick_of_a_ring_that_is_not_enabled_is_not_lost(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    front.link.order(Request.SET_VRING_ENABLE, vu.VRING_STATE.pack(0, 0))
    head = driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    driver.kick()
    assert front.link.order(Request.SET_VRING_KICK, vu.U64.pack(0), [front.vrings[0].kick]) == 0
    settle(front.link)
    assert driver.collect() == {}
    front.link.order(Request.SET_VRING_ENABLE, vu.VRING_STATE.pack(0, 1))
    while head not in (done := driver.collect()):
        assert front.wait()
    assert done[head].status == 0


def test_a_stopped_ring_is_not_served_when_memory_changes(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    front.stop_queue(front.vrings[0])
    driver.submit(at.VIRTIO_BLK_T_FLUSH)
    driver.ring.publish()
    other = rig.ram(4096)
    other.base = front.ram.base + front.ram.size
    payload = vu.SINGLE_REGION.pack(*other.region)
    assert front.link.order(Request.ADD_MEM_REG, payload, [other.fd]) == 0
    assert driver.collect() == {}


def closed(reading: int) -> bool:
    """Nobody has the other end of a pipe any more."""
    while select.select([reading], [], [], 0)[0]:
        if not os.read(reading, 64):
            return True
    return False


def test_descriptors_that_nobody_asked_for_are_closed(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    reading, writing = os.pipe()
    assert front.link.order(Request.SET_VRING_NUM, vu.VRING_STATE.pack(0, 16), [writing]) != 0
    assert front.link.order(Request.REM_MEM_REG, bytes(40), [writing]) != 0
    assert front.link.order(200, b"", [writing] * 8) != 0
    front.link.ask(Request.GET_FEATURES)  # the message before is done with
    os.close(writing)
    assert closed(reading)
    os.close(reading)


def test_a_stop_gives_back_kick_and_call(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    ends = []
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL):
        reading, writing = os.pipe()
        front.link.order(request, vu.U64.pack(0), [writing])
        os.close(writing)
        ends.append(reading)
    front.stop_queue(front.vrings[0])
    for end in ends:
        assert closed(end)
        os.close(end)


@pytest.mark.parametrize("number", [2, 0xFFFF_FFFF])
def test_a_ring_is_enabled_or_not(rig: Rig, number: int) -> None:
    front = rig.front()
    front.set_up()
    assert front.link.order(Request.SET_VRING_ENABLE, vu.VRING_STATE.pack(0, number)) != 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_reset_forgets_requests_rings_and_their_places(
    make_rig: Callable[..., Rig], packed: bool
) -> None:
    """It comes without GET_VRING_BASE: rings are stopped and disabled by it alone."""
    rig = make_rig(packed=packed)
    driver = rig.driver()
    front: Any = driver.registers
    # A request that was taken, and never answered.
    rig.device.process = lambda *_: pyvirtio.virtio.service.HELD  # type: ignore[method-assign]
    driver.submit(at.VIRTIO_BLK_T_FLUSH)
    driver.kick()
    settle(front.link)
    del rig.device.process
    assert front.link.order(Request.RESET_DEVICE) == 0
    assert front.link.ask_u64(Request.GET_STATUS) == 0
    front.accept_features(driver.features)
    assert not rig.device.queue_state(0).ready
    assert front.link.order(Request.SET_VRING_ENABLE, vu.VRING_STATE.pack(0, 1)) == 0
    assert not rig.device.queue_state(0).ready  # it is not started
    front.link.order(Request.RESET_DEVICE)
    front.accept_features(driver.features)
    kick = front.vrings[0].kick
    assert front.link.order(Request.SET_VRING_KICK, vu.U64.pack(0), [kick]) == 0
    assert not rig.device.queue_state(0).ready  # it is not enabled
    front.stop_queue(front.vrings[0])
    for vring in front.vrings.values():
        vring.started = vring.enabled = False
        vring.base = 0
    driver.set_up_queue()
    driver.write(0, b"x" * 512)
    assert driver.read(0, 1) == b"x" * 512


@pytest.mark.parametrize("packed", [False, True])
def test_a_ring_that_starts_needs_no_kick(make_rig: Callable[..., Rig], packed: bool) -> None:
    driver = make_rig(packed=packed).driver()
    front: Any = driver.registers
    front.stop_queue(front.vrings[0])
    head = driver.submit(at.VIRTIO_BLK_T_FLUSH)
    driver.ring.publish()
    front.start_queue(front.vrings[0])
    while head not in (done := driver.collect()):
        assert front.wait()
    assert done[head].status == 0


def test_a_new_call_descriptor_is_signalled(rig: Rig) -> None:
    """What the old one was signalled with may never have been read."""
    driver = rig.driver()
    front: Any = driver.registers
    new = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    assert front.link.order(Request.SET_VRING_CALL, vu.U64.pack(0), [new]) == 0
    assert os.eventfd_read(new) == 1
    os.close(new)


@pytest.mark.parametrize(
    "request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]
)
def test_a_descriptor_comes_where_it_is_announced(rig: Rig, request_: Request) -> None:
    front = rig.front()
    front.set_up()
    event = os.eventfd(0)
    assert front.link.order(request_, vu.U64.pack(0)) != 0
    assert front.link.order(request_, vu.U64.pack(vu.VRING_NO_FD), [event]) != 0
    assert front.link.order(request_, vu.U64.pack(0), [event]) == 0
    os.close(event)


def test_memory_that_is_replaced_is_unmapped(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    marks = []
    for round in range(3):
        ram = rig.ram(4096)
        table = vu.TABLE_HEAD.pack(1) + vu.REGION.pack(*ram.region)
        assert front.link.order(Request.SET_MEM_TABLE, table, [ram.fd]) == 0
        inode = os.fstat(ram.fd).st_ino
        marks.append(inode)
        maps = Path("/proc/self/maps").read_text()
        # This process has mapped all of them itself, too.
        assert [maps.count(f" {each} ") for each in marks] == [1] * round + [2]
