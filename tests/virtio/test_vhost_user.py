"""The vhost-user back-end, driven by the front-end of the library over a real socket."""

from __future__ import annotations

import gc
import os
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import BlockDriver, Completion, Link, SharedRam
from pyvirtio.virtio.driver.vhost_user import UNDERSTOOD
from pyvirtio.virtio.vhost_user import layout as vu
from pyvirtio.virtio.vhost_user.layout import ProtocolFeature, Request
from support.vhost_user import Rig, open_descriptors, settle

SECTOR = 512
MARK = bytes(range(256)) * 4


def without(*features: ProtocolFeature) -> int:
    return UNDERSTOOD & ~sum(1 << feature for feature in features)


def completion(driver: BlockDriver, head: int) -> Completion:
    """What comes of a request; interrupts may come for nothing."""
    front: Any = driver.registers
    while head not in (done := driver.collect()):
        assert front.wait()
    return done[head]


# -- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inflight", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_driver_reads_what_it_wrote(
    make_rig: Callable[..., Rig], packed: bool, inflight: bool
) -> None:
    rig = make_rig(packed=packed, serial="vd0")
    driver = rig.driver(rig.front(inflight=inflight))
    for round in range(20):  # several times around the ring
        driver.write(2 * round, MARK)
    driver.flush()
    assert all(driver.read(2 * round, 2) == MARK for round in range(20))
    assert driver.serial() == "vd0"
    assert bool(driver.features >> at.VIRTIO_F_RING_PACKED & 1) == packed
    assert rig.disk.read(0, len(MARK)) == MARK


@pytest.mark.parametrize("packed", [False, True])
def test_workers_do_requests_and_leave_no_notes(make_rig: Callable[..., Rig], packed: bool) -> None:
    rig = make_rig(packed=packed, io_threads=3, num_queues=2)
    driver = rig.driver(queue_size=64)
    front: Any = driver.registers
    for round in range(10):
        kind = at.VIRTIO_BLK_T_OUT if round % 2 == 0 else at.VIRTIO_BLK_T_IN
        writing = kind == at.VIRTIO_BLK_T_OUT
        mark = driver.arena.mark()
        heads = {
            driver.submit(kind, 2 * n, MARK if writing else b"", 0 if writing else len(MARK))
            for n in range(12)
        }
        driver.kick()
        while heads:
            done = driver.collect()
            assert all(each.status == 0 for each in done.values())
            assert writing or all(each.data == MARK for each in done.values())
            heads -= set(done)
            if heads:
                assert front.wait()
        driver.arena.give_back(mark)
    vring = front.vrings[0]
    front.stop_queue(vring)
    front.start_queue(vring)
    assert driver.read(0, 2) == MARK


@pytest.mark.parametrize(
    "absent",
    [
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ProtocolFeature.STATUS,
        ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.MQ,
        ProtocolFeature.RESET_DEVICE,
    ],
)
def test_each_protocol_feature_can_be_left_out(rig: Rig, absent: ProtocolFeature) -> None:
    driver = rig.driver(rig.front(protocol_features=without(absent)))
    driver.write(1, MARK)
    assert driver.read(1, 2) == MARK


def test_several_queues_are_served(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(num_queues=3)
    front = rig.front()
    front.set_up()
    assert front.num_queues == 3
    driver = rig.driver(front, queue_index=2)
    driver.write(4, MARK)
    assert driver.read(4, 2) == MARK


def test_a_read_only_disk_offers_ro_and_refuses_writes(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(read_only=True)
    driver = rig.driver()
    assert driver.features >> at.VIRTIO_BLK_F_RO & 1
    assert driver.request(at.VIRTIO_BLK_T_OUT, 0, bytes(512)).status == at.VIRTIO_BLK_S_IOERR


def test_memory_in_the_middle_of_a_file_is_found(rig: Rig) -> None:
    """The offset need not be one of a page."""
    front = rig.front(rig.ram(1 << 20))
    ram = front.ram
    old = ram.region
    part = (old[0] + 0x1200, old[1] - 0x1200, old[2] + 0x1200, old[3] + 0x1200)
    payload = vu.TABLE_HEAD.pack(1) + vu.REGION.pack(*part)
    front.share_memory = lambda: front._ordered(  # type: ignore[method-assign]
        Request.SET_MEM_TABLE, payload, [ram.fd]
    )
    arena = ram.arena()
    arena.take(0x2000)
    driver = BlockDriver(front, ram.memory, arena, wait=front.wait)
    driver.start()
    driver.write(0, MARK)
    assert driver.read(0, 2) == MARK


# -- configuration -------------------------------------------------------------------------------


def test_configuration_is_read_from_any_offset(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    whole = front.config_bytes(0, 60)
    assert int.from_bytes(whole[:8], "little") == (1 << 20) // SECTOR
    assert front.config_bytes(20, 4) == whole[20:24]


def test_configuration_out_of_bounds_has_an_empty_reply(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    for offset, size in ((0, 257), (250, 10), (0xFFFF_FFF0, 4)):
        payload = vu.CONFIG_HEAD.pack(offset, size, 0) + bytes(min(size, 200))
        assert front.link.ask(Request.GET_CONFIG, payload).payload == b""


def test_only_writeback_can_be_written(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    front.write_config(at.BLK_CONFIG_WRITEBACK, 1, 0)
    assert front.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 0
    payload = vu.CONFIG_HEAD.pack(0, 8, 0) + bytes(8)
    assert front.link.order(Request.SET_CONFIG, payload) != 0
    assert driver.capacity == (1 << 20) // SECTOR


def test_writethrough_outlives_a_stop_of_the_machine_and_not_a_reset(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    front.write_config(at.BLK_CONFIG_WRITEBACK, 1, 0)
    front.stop_queue(front.vrings[0])
    front.link.order(Request.SET_STATUS, vu.U64.pack(0))  # as QEMU does at a mere stop
    front.accept_features(driver.features)
    assert front.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 0
    front.status = 0
    front.accept_features(driver.features)
    assert front.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 1


def test_a_resize_is_told_over_the_back_ends_channel(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(pyvirtio.MemoryDisk(1 << 20))
    driver = rig.driver()
    front: Any = driver.registers
    front.take_interrupt()
    rig.disk.truncate(2 << 20)
    assert front.take_interrupt() & at.MMIO_INTERRUPT_CONFIG_CHANGE
    assert driver.capacity == (2 << 20) // SECTOR
    driver.write(3000, MARK)


# -- life ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_stopped_ring_goes_on_where_it_was(make_rig: Callable[..., Rig], packed: bool) -> None:
    rig = make_rig(packed=packed)
    driver = rig.driver(rig.front(inflight=False))
    front: Any = driver.registers
    vring = front.vrings[0]
    for round in range(23):
        driver.write(round, MARK)
    front.stop_queue(vring)
    assert vring.base & 0xFFFF != 0
    head = driver.submit(at.VIRTIO_BLK_T_IN, 22, incoming=1024)
    driver.kick()
    assert driver.collect() == {}  # nobody serves it
    front.start_queue(vring)
    assert completion(driver, head).data == MARK


@pytest.mark.parametrize("packed", [False, True])
def test_a_queue_that_was_reset_begins_anew_whatever_was_noted(
    make_rig: Callable[..., Rig], packed: bool
) -> None:
    driver = make_rig(packed=packed).driver()
    for round in range(5):
        driver.write(round, MARK)
    assert driver.registers.reset_queue()
    driver.set_up_queue()
    assert driver.read(4, 2) == MARK


def test_a_disabled_ring_is_not_served(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    enable = lambda on: front.link.order(Request.SET_VRING_ENABLE, vu.VRING_STATE.pack(0, on))  # noqa: E731
    assert enable(0) == 0
    head = driver.submit(at.VIRTIO_BLK_T_FLUSH)
    driver.kick()
    settle(front.link)
    assert driver.collect() == {}
    assert enable(1) == 0
    assert completion(driver, head).status == 0


def test_memory_can_be_told_anew_under_a_live_ring(rig: Rig) -> None:
    """As QEMU does whenever the guest's firmware moves memory about."""
    front = rig.front(protocol_features=without(ProtocolFeature.CONFIGURE_MEM_SLOTS))
    driver = rig.driver(front)
    driver.write(0, MARK)
    other = rig.ram(4096)
    other.base = front.ram.base + front.ram.size
    table = vu.TABLE_HEAD.pack(2) + b"".join(
        vu.REGION.pack(*ram.region) for ram in (front.ram, other)
    )
    assert front.link.order(Request.SET_MEM_TABLE, table, [front.ram.fd, other.fd]) == 0
    assert driver.read(0, 2) == MARK


def test_memory_slots_come_and_go_under_a_live_ring(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    assert front.link.ask_u64(Request.GET_MAX_MEM_SLOTS) > 8
    other = rig.ram(4096)
    other.base = front.ram.base + front.ram.size
    payload = vu.SINGLE_REGION.pack(*other.region)
    assert front.link.order(Request.ADD_MEM_REG, payload, [other.fd]) == 0
    driver.write(0, MARK)
    assert front.link.order(Request.REM_MEM_REG, payload) == 0
    assert front.link.order(Request.REM_MEM_REG, payload) != 0
    assert driver.read(0, 2) == MARK


def test_a_ring_whose_memory_goes_is_told_of_and_comes_back_with_it(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    payload = vu.SINGLE_REGION.pack(*front.ram.region)
    assert front.link.order(Request.REM_MEM_REG, payload) == 0
    assert select.select([front.vrings[0].error], [], [], 10)[0]
    head = driver.submit(at.VIRTIO_BLK_T_FLUSH)
    driver.kick()
    assert front.link.order(Request.ADD_MEM_REG, payload, [front.ram.fd]) == 0
    assert completion(driver, head).status == 0


def test_a_broken_ring_is_told_of_and_a_new_driver_starts_over(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    ring: Any = driver.ring
    ring.available_index = 1000
    front.notify(0)
    assert select.select([front.vrings[0].error], [], [], 10)[0]
    assert front.status & at.STATUS_NEEDS_RESET
    assert front.take_interrupt() & at.MMIO_INTERRUPT_CONFIG_CHANGE
    again = rig.driver(front)
    again.write(0, MARK)
    assert again.read(0, 2) == MARK


def test_a_broken_device_is_mended_by_a_mere_restart_of_its_rings(rig: Rig) -> None:
    """What QEMU 7.2 does at a reset of the guest: it has no other message."""
    front = rig.front(
        protocol_features=without(ProtocolFeature.RESET_DEVICE, ProtocolFeature.STATUS)
    )
    driver = rig.driver(front)
    ring: Any = driver.ring
    ring.available_index = 1000
    front.notify(0)
    assert select.select([front.vrings[0].error], [], [], 10)[0]
    again = rig.driver(front)
    again.write(0, MARK)
    assert again.read(0, 2) == MARK


def test_features_that_were_not_offered_are_refused(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    front.accept_features(1 << 60)
    front.status = at.STATUS_ACKNOWLEDGE | at.STATUS_DRIVER | at.STATUS_FEATURES_OK
    assert not front.status & at.STATUS_FEATURES_OK


def test_the_next_front_end_finds_a_fresh_device(rig: Rig) -> None:
    first = rig.driver()
    first.write(0, MARK)
    first.registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, 0)
    first.registers.close()  # type: ignore[attr-defined]
    second = rig.driver()
    assert second.read(0, 2) == MARK
    assert second.registers.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 1


def test_no_descriptor_is_left_when_front_ends_come_and_go(rig: Rig) -> None:
    def visit() -> None:
        front = rig.front(ram)
        driver = rig.driver(front)
        driver.write(0, MARK)
        front.close()
        rig.front(ram).link.ask_u64(Request.GET_FEATURES)  # the one before is gone by now
        rig._fronts.pop().close()

    gc.collect()
    ram = rig.ram()
    visit()
    rig.front(ram).link.ask_u64(Request.GET_FEATURES)
    before = open_descriptors()
    rig._fronts.pop().close()
    for _ in range(3):
        visit()
    rig.front(ram).link.ask_u64(Request.GET_FEATURES)
    assert open_descriptors() == before


@pytest.mark.parametrize("packed", [False, True])
def test_a_new_server_does_again_what_the_old_one_had_under_way(
    tmp_path: Path, packed: bool
) -> None:
    """The first server takes requests and dies; the second has its notes and their memory."""
    disk = pyvirtio.MemoryDisk(1 << 20)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = Rig(tmp_path / "one", disk, packed=packed)
    driver = first.driver()
    front: Any = driver.registers
    driver.write(0, MARK)
    # As if it had been killed while it did these: they are noted, and never answered, and nothing
    # is written to the rings any more.
    taken, ended, left = threading.Event(), threading.Event(), [2, 1, 0]

    def process(*_: object) -> int:
        if not left.pop(0):
            taken.set()
            assert ended.wait(60)
        return pyvirtio.virtio.service.HELD

    first.device.process = process  # type: ignore[method-assign]
    heads = [driver.submit(at.VIRTIO_BLK_T_OUT, 4 + round, MARK[:512]) for round in range(3)]
    driver.kick()
    assert taken.wait(10)
    with Rig(tmp_path / "two", disk, packed=packed) as second:
        front.reconnect(second.path)
        while len(heads) > 0:
            assert front.wait()
            done = driver.collect()
            assert all(each.status == 0 for each in done.values())
            heads = [head for head in heads if head not in done]
        assert driver.read(4, 1) == driver.read(6, 1) == MARK[:512]
        front.close()
    ended.set()
    first.__exit__()


class Volatile(pyvirtio.MemoryDisk):
    """A disk that keeps things back, and cannot give them away."""

    volatile = True

    def _flush(self) -> None:
        raise OSError("no")


@pytest.mark.parametrize("inflight", [False, True])
def test_what_cannot_be_kept_is_not_said_to_be_done(
    make_rig: Callable[..., Rig], inflight: bool
) -> None:
    """With notes the guest may go on with another server, and must not miss what it saw done."""
    rig = make_rig(Volatile(1 << 20))
    driver = rig.driver(rig.front(inflight=inflight))
    front: Any = driver.registers
    head = driver.submit(at.VIRTIO_BLK_T_OUT, 0, bytes(512))
    driver.kick()
    if not inflight:
        assert completion(driver, head).status == 0
        return
    assert select.select([front.vrings[0].error], [], [], 10)[0]
    assert driver.collect() == {}
    assert front.status & at.STATUS_NEEDS_RESET


# -- kicks and calls -----------------------------------------------------------------------------


def test_a_ring_without_a_kick_descriptor_is_polled(rig: Rig) -> None:
    protocol = without(ProtocolFeature.INBAND_NOTIFICATIONS)
    driver = rig.driver(rig.front(protocol_features=protocol))
    front: Any = driver.registers
    assert front.link.order(Request.SET_VRING_KICK, vu.U64.pack(vu.VRING_NO_FD)) == 0
    head = driver.submit(at.VIRTIO_BLK_T_FLUSH)
    driver.ring.publish()
    assert completion(driver, head).status == 0


def test_kicks_and_calls_can_be_messages(rig: Rig) -> None:
    driver = rig.driver()
    front: Any = driver.registers
    front.take_interrupt()  # of its configuration
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL):
        assert front.link.order(request, vu.U64.pack(vu.VRING_NO_FD)) == 0
    head = driver.submit(at.VIRTIO_BLK_T_FLUSH)
    driver.ring.publish()
    assert front.link.order(Request.VRING_KICK, vu.VRING_STATE.pack(0, 0)) == 0
    assert select.select([front.backend], [], [], 10)[0]
    message = front.backend.receive()
    assert (message.request, message.payload) == (4, vu.VRING_STATE.pack(0, 0))
    assert driver.collect()[head].status == 0


def test_descriptors_that_are_no_event_descriptors_do_no_harm(rig: Rig) -> None:
    """A file to be kicked by is refused; a call descriptor that is full is not waited for."""
    driver = rig.driver()
    front: Any = driver.registers
    assert front.link.order(Request.SET_VRING_KICK, vu.U64.pack(0), [front.ram.fd]) != 0
    reading, writing = os.pipe()
    full = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(full, 0xFFFF_FFFF_FFFF_FFFE)
    assert front.link.order(Request.SET_VRING_CALL, vu.U64.pack(0), [full]) == 0
    assert front.link.order(Request.SET_VRING_KICK, vu.U64.pack(0), [reading]) == 0
    driver.submit(at.VIRTIO_BLK_T_FLUSH)
    driver.ring.publish()
    os.write(writing, b"x")
    while not driver.ring.collect():
        front.config_bytes(0, 8)
    for fd in (reading, writing, full):
        os.close(fd)
    front.config_bytes(0, 8)


# -- migration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_every_page_that_the_device_writes_is_logged(
    make_rig: Callable[..., Rig], packed: bool
) -> None:
    driver = make_rig(packed=packed).driver()
    front: Any = driver.registers
    ram = front.ram
    log = SharedRam((ram.base + ram.size) // 0x8000 // 4096 * 4096 + 4096, 0)
    payload = vu.LOG.pack(log.size, 0)
    front.link.ask(Request.SET_LOG_BASE, payload, [log.fd])
    front.features |= 1 << vu.VHOST_F_LOG_ALL
    front.accept_features(front.features)
    address = ram.base + (512 << 10)
    log.buffer[:] = bytes(log.size)
    while driver.arena.mark() < address:
        driver.arena.take(4096)
    driver.read(0, 16)
    logged = [index for index, byte in enumerate(bytes(log.buffer)) if byte]
    written = {address // 0x8000, driver.ring.used // 0x8000}
    assert written <= set(logged)
    assert len(logged) < 8  # and not all of memory
    front.features &= ~(1 << vu.VHOST_F_LOG_ALL)
    front.accept_features(front.features)
    log.buffer[:] = bytes(log.size)
    driver.read(0, 16)
    assert not any(bytes(log.buffer))
    log.close()


def transfer(link: Link, direction: int, data: bytes = b"") -> tuple[int, bytes]:
    """One transfer of device state; what CHECK_DEVICE_STATE says, and what was sent to us."""
    reading, writing = os.pipe()
    ours, theirs = (reading, writing) if direction == vu.STATE_SAVE else (writing, reading)
    payload = vu.STATE_TRANSFER.pack(direction, 0)
    reply = link.ask(Request.SET_DEVICE_STATE_FD, payload, [theirs])
    os.close(theirs)
    assert vu.U64.unpack(reply.payload)[0] == vu.STATE_NO_FD
    if direction == vu.STATE_SAVE:
        while part := os.read(ours, 4096):
            data += part
    else:
        os.write(ours, data)
    os.close(ours)
    return link.ask_u64(Request.CHECK_DEVICE_STATE), data


def test_device_state_goes_to_another_back_end(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    driver = rig.driver()
    front: Any = driver.registers
    front.write_config(at.BLK_CONFIG_WRITEBACK, 1, 0)
    front.stop_queue(front.vrings[0])
    status, state = transfer(front.link, vu.STATE_SAVE)
    assert status == 0
    assert state
    front.close()
    other = rig.front()
    other.set_up()
    other.accept_features(driver.features)
    assert other.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 1
    assert transfer(other.link, vu.STATE_LOAD, state)[0] == 0
    assert other.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 0


def test_device_state_that_is_none_is_told_of(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    for data in (b"", b"rubbish", bytes(60_000)):
        assert transfer(front.link, vu.STATE_LOAD, data)[0] == 1
    assert transfer(front.link, vu.STATE_SAVE)[0] == 0


# -- the server ----------------------------------------------------------------------------------


def test_a_socket_of_a_dead_server_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "blk.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    disk = pyvirtio.MemoryDisk(1 << 20)
    with (
        pyvirtio.VhostUserServer(pyvirtio.VirtioBlk(disk), path),
        pytest.raises(OSError, match="in use"),
    ):
        pyvirtio.VhostUserServer(pyvirtio.VirtioBlk(disk), path)
    assert not path.exists()
    path.write_text("no socket")
    with pytest.raises(OSError, match="in use"):
        pyvirtio.VhostUserServer(pyvirtio.VirtioBlk(disk), path)
    assert path.read_text() == "no socket"


def test_a_socket_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """It was put there after the server's own was taken away."""
    path = tmp_path / "blk.sock"
    server = pyvirtio.VhostUserServer(pyvirtio.VirtioBlk(pyvirtio.MemoryDisk(1 << 20)), path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        server.close()
        assert path.exists()


def test_a_server_can_be_given_its_only_connection() -> None:
    ours, theirs = socket.socketpair()
    disk = pyvirtio.MemoryDisk(1 << 20)
    server = pyvirtio.VhostUserServer(pyvirtio.VirtioBlk(disk), connection=theirs)
    thread = threading.Thread(target=server.serve)
    thread.start()
    link = Link(ours)
    assert link.ask_u64(Request.GET_FEATURES)
    link.close()
    thread.join(30)
    assert not thread.is_alive()
    server.close()
