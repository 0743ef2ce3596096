"""The vhost-user protocol's fine print: answers to refused messages, what is told of the
configuration, the log, front-ends that wait."""

from __future__ import annotations

import errno
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
from pyvirtio.virtio.driver import BlockDriver, Link, SharedRam
from pyvirtio.virtio.driver.vhost_user import UNDERSTOOD, connect
from pyvirtio.virtio.vhost_user import layout as vu
from pyvirtio.virtio.vhost_user.layout import ProtocolFeature, Request
from pyvirtio.virtio.vhost_user.log import DirtyLog
from pyvirtio.virtio.vhost_user.memory import map_file
from support.vhost_user import Rig

PATIENCE = 30


def start_ring(front: Any) -> None:
    """Start an empty ring, without a driver."""
    arena = front.ram.arena()
    front.select_queue(0)
    front.enable_queue(16, arena.take(4096), arena.take(4096), arena.take(4096))
    front.start_queue(front.vrings[0])


# -- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.GET_VRING_BASE, vu.VRING_STATE.pack(7, 0)),
        (Request.GET_FEATURES, bytes(8)),
        (Request.GET_INFLIGHT_FD, vu.INFLIGHT.pack(0, 0, 9, 16)),
        (Request.GET_STATUS, bytes(8)),
    ],
)
def test_a_message_with_a_reply_of_its_own_is_never_acknowledged(
    rig: Rig, request_: int, payload: bytes
) -> None:
    """An error would be taken for the answer: the connection ends instead."""
    front = rig.front()
    front.set_up()
    front.link.send(request_, payload, flags=vu.FLAG_NEED_REPLY)
    with pytest.raises((EOFError, ConnectionResetError)):
        front.link.receive()


@pytest.mark.parametrize("flags", [0, vu.FLAG_NEED_REPLY])
def test_post_copy_was_not_offered_and_is_refused(rig: Rig, flags: int) -> None:
    front = rig.front()
    front.set_up()
    front.link.send(28, flags=flags)
    if flags:
        assert vu.U64.unpack(front.link.receive().payload)[0] != 0
        assert front.link.ask_u64(Request.GET_FEATURES)
    else:
        with pytest.raises((EOFError, ConnectionResetError)):
            front.link.receive()


def test_a_good_message_with_a_reply_of_its_own_is_answered_once(rig: Rig) -> None:
    front = rig.front()
    front.set_up()
    front.link.send(Request.GET_QUEUE_NUM, flags=vu.FLAG_NEED_REPLY)
    front.link.send(Request.GET_STATUS)
    assert [front.link.receive().request for _ in range(2)] == [
        Request.GET_QUEUE_NUM,
        Request.GET_STATUS,
    ]


def test_no_acknowledgement_is_sent_where_none_was_asked_for_or_negotiated(rig: Rig) -> None:
    features = UNDERSTOOD & ~(1 << ProtocolFeature.REPLY_ACK)
    for front, flags in ((rig.front(), 0), (rig.front(protocol_features=features), 8)):
        front.set_up()
        front.link.send(Request.SET_OWNER, flags=flags)
        assert front.link.ask(Request.GET_FEATURES).request == Request.GET_FEATURES
        front.close()


def test_a_state_transfer_that_is_refused_says_so_in_its_reply(rig: Rig) -> None:
    """With rings that run, and in a phase that there is not."""
    driver = rig.driver()
    front: Any = driver.registers
    reading, writing = os.pipe()
    payload = vu.STATE_TRANSFER.pack(vu.STATE_SAVE, 0)
    reply = front.link.ask(Request.SET_DEVICE_STATE_FD, payload, [writing])
    assert vu.U64.unpack(reply.payload)[0] == vu.STATE_NO_FD | 1
    front.stop_queue(front.vrings[0])
    payload = vu.STATE_TRANSFER.pack(vu.STATE_SAVE, 1)
    reply = front.link.ask(Request.SET_DEVICE_STATE_FD, payload, [writing])
    assert vu.U64.unpack(reply.payload)[0] == vu.STATE_NO_FD | 1
    os.close(writing)
    assert os.read(reading, 1) == b""  # nobody has it open any more
    os.close(reading)


def test_state_that_is_longer_than_a_pipe_is_refused_and_not_waited_for(rig: Rig) -> None:
    """Its sender writes all of it before it asks how that went."""
    front = rig.front()
    front.set_up()
    reading, writing = os.pipe()
    payload = vu.STATE_TRANSFER.pack(vu.STATE_LOAD, 0)
    front.link.ask(Request.SET_DEVICE_STATE_FD, payload, [reading])
    os.close(reading)
    done = threading.Event()

    def send() -> None:
        try:
            for _ in range(64):
                os.write(writing, bytes(1 << 16))
        except BrokenPipeError:
            pass
        os.close(writing)
        done.set()

    threading.Thread(target=send, daemon=True).start()
    assert done.wait(PATIENCE)
    assert front.link.ask_u64(Request.CHECK_DEVICE_STATE) == 1


def test_another_devices_state_is_refused(rig: Rig) -> None:
    front = rig.front()
    front.set_up()

    def transfer(direction: int, data: bytes = b"") -> bytes:
        reading, writing = os.pipe()
        loads = direction == vu.STATE_LOAD
        ours, theirs = (writing, reading) if loads else (reading, writing)
        payload = vu.STATE_TRANSFER.pack(direction, 0)
        front.link.ask(Request.SET_DEVICE_STATE_FD, payload, [theirs])
        os.close(theirs)
        if loads:
            os.write(ours, data)
        else:
            data = os.read(ours, 1 << 16)
        os.close(ours)
        return data

    state = bytearray(transfer(vu.STATE_SAVE))
    assert front.link.ask_u64(Request.CHECK_DEVICE_STATE) == 0
    place = state.index(b"device") + len(b"device") + 4
    assert state[place : place + 4] == (2).to_bytes(4, "little")  # after the version
    transfer(vu.STATE_LOAD, state)
    assert front.link.ask_u64(Request.CHECK_DEVICE_STATE) == 0
    state[place] = 1
    transfer(vu.STATE_LOAD, state)
    assert front.link.ask_u64(Request.CHECK_DEVICE_STATE) == 1


@pytest.mark.parametrize("config", [False, True])
def test_a_change_of_configuration_is_told_with_config_alone(
    make_rig: Callable[..., Rig], config: bool
) -> None:
    rig = make_rig()
    absent = 0 if config else 1 << ProtocolFeature.CONFIG
    front = rig.front(protocol_features=UNDERSTOOD & ~absent)
    front.set_up()
    front.accept_features(1 << at.VIRTIO_F_VERSION_1)
    start_ring(front)
    front.link.ask(Request.GET_FEATURES)
    rig.disk.truncate(2 << 20)
    assert front.backend is not None
    assert bool(select.select([front.backend], [], [], 0)[0]) == config


def told(front: Any) -> bool:
    """The back-end has said that the configuration is another now."""
    front.link.ask(Request.GET_FEATURES)  # what it had to say it has said
    return bool(front.take_interrupt() & at.MMIO_INTERRUPT_CONFIG_CHANGE)


def test_a_resize_before_there_is_a_driver_is_told_when_its_rings_start(
    make_rig: Callable[..., Rig],
) -> None:
    """A front-end has read the configuration long before, and gives the driver what it has read."""
    rig = make_rig()
    front = rig.front()
    front.set_up()
    front.config_bytes(0, 60)
    rig.disk.truncate(2 << 20)
    assert not told(front)
    front.accept_features(1 << at.VIRTIO_F_VERSION_1)
    start_ring(front)
    assert told(front)


def test_a_resize_while_all_rings_are_stopped_is_told_when_they_go_on(
    make_rig: Callable[..., Rig],
) -> None:
    """A back-end that is suspended has nothing to say ("Suspended device state")."""
    rig = make_rig()
    driver = rig.driver()
    front: Any = driver.registers
    told(front)  # its driver has read the configuration only now
    front.stop_queue(front.vrings[0])
    rig.disk.truncate(2 << 20)
    assert not told(front)
    front.start_queue(front.vrings[0])
    assert told(front)
    front.stop_queue(front.vrings[0])
    front.start_queue(front.vrings[0])
    assert not told(front)


def test_a_front_end_that_comes_to_another_server_is_told_to_look(tmp_path: Path) -> None:
    """It has the configuration of the one before, whose disk may have had another size."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        Rig(tmp_path / "one") as one,
        Rig(tmp_path / "two", pyvirtio.MemoryDisk(2 << 20)) as two,
    ):
        front: Any = one.front()
        front.set_up()
        front.config_bytes(0, 60)
        driver = one.driver(front)
        assert not told(front)
        front.reconnect(two.path)
        assert told(front)
        assert driver.capacity == (2 << 20) // 512


# -- the log -------------------------------------------------------------------------------------


def logging(rig: Rig, size: int) -> tuple[BlockDriver, Any, SharedRam]:
    driver = rig.driver()
    front: Any = driver.registers
    log = SharedRam(size, 0)
    front.link.ask(Request.SET_LOG_BASE, vu.LOG.pack(size, 0), [log.fd])
    front.features |= 1 << vu.VHOST_F_LOG_ALL
    front.accept_features(front.features)
    return driver, front, log


def test_a_log_that_is_smaller_than_memory_is_not_left(rig: Rig) -> None:
    driver, _, log = logging(rig, 4096)  # of 128 MiB; the memory begins at 256 MiB
    assert driver.read(0, 8) == bytes(4096)
    assert not any(bytes(log.buffer))
    log.close()


def test_a_write_across_the_bytes_of_the_log_marks_both() -> None:
    fd = os.memfd_create("log")
    os.ftruncate(fd, 4096)
    log = DirtyLog(map_file(os.dup(fd), 0, 4096))
    log.mark(3 * 0x8000 - 1, 2)
    log.mark(10 * 0x8000, 0x8000)
    log.mark(4096 * 0x8000 - 1, 1 << 40)
    log.close()
    marked = [index for index, byte in enumerate(os.pread(fd, 4096, 0)) if byte]
    assert marked == [2, 3, 10, 4095]
    os.close(fd)


def test_who_waits_for_the_log_is_told(rig: Rig) -> None:
    driver, front, log = logging(rig, 1 << 16)
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    assert front.link.order(Request.SET_LOG_FD, b"", [event]) == 0
    driver.read(0, 8)
    assert select.select([event], [], [], PATIENCE)[0]
    os.close(event)
    log.close()


@pytest.mark.parametrize("kind", ["a pipe's wrong end", "a pipe nobody reads", "full"])
def test_a_log_that_cannot_be_told_of_harms_nobody(rig: Rig, kind: str) -> None:
    driver, front, log = logging(rig, 1 << 20)
    reading, writing = os.pipe()
    full = os.eventfd(0xFFFF_FFFF, os.EFD_CLOEXEC)
    os.eventfd_write(full, 0xFFFF_FFFE_FFFF_FFFF)
    fd = {"a pipe's wrong end": reading, "a pipe nobody reads": writing, "full": full}[kind]
    assert front.link.order(Request.SET_LOG_FD, b"", [fd]) == 0
    for each in (reading, writing, full):
        os.close(each)
    assert driver.read(0, 8) == bytes(4096)
    assert driver.read(0, 8) == bytes(4096)
    log.close()


# -- the server ----------------------------------------------------------------------------------


def test_a_front_end_that_comes_while_another_is_here_waits_for_its_end(rig: Rig) -> None:
    first = rig.driver()
    second: Link = rig.link()
    second.send(Request.GET_FEATURES)
    first.write(0, b"x" * 512)
    assert not select.select([second.channel], [], [], 0.2)[0]
    first.registers.close()  # type: ignore[attr-defined]
    assert second.receive().request == Request.GET_FEATURES
    second.close()


class Full(socket.socket):
    """A listener that the host has no descriptors for, at first."""

    refused = 0

    def accept(self) -> Any:
        if self.refused < 2:
            self.refused += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_a_server_without_descriptors_tries_again(tmp_path: Path) -> None:
    listener = Full(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    device = pyvirtio.VirtioBlk(pyvirtio.MemoryDisk(1 << 20))
    server = pyvirtio.VhostUserServer(device, listener=listener)
    thread = threading.Thread(target=server.serve)
    thread.start()
    link = connect(tmp_path / "s", PATIENCE)
    assert link.ask_u64(Request.GET_FEATURES)
    link.close()
    server.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    server.close()
