"""The split ring (§2.7): notifications, and what a wrong ring comes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import pyvirtio
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Buffer

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_EVENT_IDX = {"features": (1 << 34) - 1 & ~(1 << at.VIRTIO_F_EVENT_IDX)}
NO_INDIRECT = {"features": (1 << 34) - 1 & ~(1 << at.VIRTIO_F_INDIRECT_DESC)}


def flushes(machine: Any, count: int) -> None:
    for _ in range(count):
        machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()


def interrupted(machine: Any) -> bool:
    return bool(machine.registers.take_interrupt())


def test_interrupt_unless_suppressed_vq_s_32_vq_s_33(make_started: Any) -> None:
    machine = make_started(driver=NO_EVENT_IDX)
    flushes(machine, 1)
    assert interrupted(machine)
    machine.driver.ring.want_interrupts(False)
    flushes(machine, 1)
    assert not interrupted(machine)


def test_used_event_is_ignored_without_event_idx_vq_s_31(make_started: Any) -> None:
    machine = make_started(driver=NO_EVENT_IDX)
    machine.driver.ring.used_event = 1000
    flushes(machine, 1)
    assert interrupted(machine)


def test_flags_are_ignored_with_event_idx_vq_s_34(make_started: Any) -> None:
    machine = make_started()
    machine.driver.ring.want_interrupts(False)
    flushes(machine, 1)
    assert interrupted(machine)


@pytest.mark.parametrize("event", range(6))
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_used_event_says_when_vq_s_35_vq_s_36(make_started: Any, event: int, batch: int) -> None:
    machine = make_started()
    machine.driver.ring.used_event = event
    done = 0
    while done < 8:
        flushes(machine, batch)
        assert interrupted(machine) == (done <= event < done + batch)
        done += batch
        machine.driver.ring.collect()


def test_used_flags_are_zero_with_event_idx_vq_s_51(make_started: Any) -> None:
    machine = make_started(notify="deferred")
    flushes(machine, 1)
    assert machine.driver.ring.used_flags == 0
    machine.mmio.poll()
    assert machine.driver.ring.used_flags == 0


def test_avail_event_asks_for_the_next_kick_vq_s_47(make_started: Any) -> None:
    machine = make_started()
    for count in (1, 3, 2):
        flushes(machine, count)
        assert machine.driver.ring.available_event == machine.driver.ring.available_index
        machine.driver.ring.collect()


def test_spurious_kicks_are_harmless_vq_s_53(make_started: Any) -> None:
    machine = make_started()
    before = bytes(machine.ram)
    for index in (0, 0, 1, 77, 0xFFFF, 0xFFFF_FFFF):
        machine.registers.notify(index)
    assert (bytes(machine.ram), machine.registers.status) == (before, 15)


def test_descriptors_and_readable_buffers_are_never_written_vq_s_12_vq_s_15(
    started: Any,
) -> None:
    driver = started.driver
    ring = driver.ring
    driver.submit(at.VIRTIO_BLK_T_OUT, 0, b"r" * 512)
    before = started.memory.read(ring.descriptors, 16 * ring.size)
    chain = started.driver._pending
    driver.kick()
    assert len(chain) == 1
    assert started.memory.read(ring.descriptors, 16 * ring.size) == before


def test_the_write_flag_of_an_indirect_descriptor_is_ignored_vq_s_23(make_started: Any) -> None:
    machine = make_started()
    head = machine.driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512, indirect=0)
    ring = machine.driver.ring
    address, length, flags, _ = at.LITTLE.desc.unpack(
        machine.memory.read(ring.descriptors + 16 * head, 16)
    )
    ring.set_descriptor(head, address, length, flags | WRITE)
    machine.driver.kick()
    assert machine.driver.collect()[head].status == 0


def test_an_indirect_table_may_be_longer_than_the_queue_vq_s_20(make_started: Any) -> None:
    machine = make_started(queue_size=4)
    done = machine.driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=512, cuts=[1] * 100, indirect=0)
    assert done.status == 0


def test_other_rounds_are_published_before_the_failure(make_started: Any) -> None:
    machine = make_started()
    head = machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.offer(500)
    machine.driver.kick()
    assert machine.driver.collect()[head].status == 0
    assert machine.registers.status & at.STATUS_NEEDS_RESET


# -- wrong rings, each by what it writes ---------------------------------------------------------


def loop_of_one(machine: Any, ring: Any) -> None:
    ring.set_descriptor(0, machine.base, 16, NEXT, 0)
    ring.offer(0)


def loop_of_two(machine: Any, ring: Any) -> None:
    ring.set_descriptor(0, machine.base, 16, NEXT, 1)
    ring.set_descriptor(1, machine.base, 16, NEXT, 0)
    ring.offer(0)


def head_outside(machine: Any, ring: Any) -> None:
    ring.offer(ring.size)


def next_outside(machine: Any, ring: Any) -> None:
    ring.set_descriptor(0, machine.base, 16, NEXT, ring.size)
    ring.offer(0)


def index_jump(machine: Any, ring: Any) -> None:
    ring._next_avail = ring.size + 1


def index_back(machine: Any, ring: Any) -> None:
    ring._next_avail = 0xFFFF


def readable_after_writable(machine: Any, ring: Any) -> None:
    ring.add([Buffer(machine.base, 1, True), Buffer(machine.base, 16)])


def no_status(machine: Any, ring: Any) -> None:
    ring.add([Buffer(machine.base, 16)])


def empty_status(machine: Any, ring: Any) -> None:
    ring.add([Buffer(machine.base, 16), Buffer(machine.base, 0, True)])


def no_header(machine: Any, ring: Any) -> None:
    ring.add([Buffer(machine.base, 513, True)])


def short_header(machine: Any, ring: Any) -> None:
    ring.add([Buffer(machine.base, 15), Buffer(machine.base, 513, True)])


def header_outside(machine: Any, ring: Any) -> None:
    ring.add([Buffer(0, 16), Buffer(machine.base, 1, True)])


def status_outside(machine: Any, ring: Any) -> None:
    ring.add([Buffer(machine.base, 16), Buffer(0x1000, 1, True)])


def table(machine: Any, ring: Any, entries: list[tuple[int, ...]], length: int | None) -> None:
    at_ = machine.arena.take(4096)
    data = b"".join(ring.descriptor(*entry) for entry in entries)
    machine.memory.write(at_, data)
    ring.set_descriptor(0, at_, len(data) if length is None else length, INDIRECT)
    ring.offer(0)


def nested_table(machine: Any, ring: Any) -> None:
    table(machine, ring, [(machine.base, 16, INDIRECT)], None)


def looped_table(machine: Any, ring: Any) -> None:
    table(machine, ring, [(machine.base, 16, NEXT, 1), (machine.base, 16, NEXT, 0)], None)


def table_next_outside(machine: Any, ring: Any) -> None:
    table(machine, ring, [(machine.base, 16, NEXT, 1)], None)


def empty_table(machine: Any, ring: Any) -> None:
    table(machine, ring, [], 0)


def ragged_table(machine: Any, ring: Any) -> None:
    table(machine, ring, [(machine.base, 16)] * 2, 24)


def huge_table(machine: Any, ring: Any) -> None:
    ring.set_descriptor(0, machine.base, 0xFFFF_FFF0, INDIRECT)
    for each in range(1 << 16):
        machine.ram[16 * each : 16 * each + 16] = ring.descriptor(
            machine.base, 1, NEXT, (each + 1) & 0xFFFF
        )
    ring.offer(0)


def table_outside(machine: Any, ring: Any) -> None:
    ring.set_descriptor(0, 0x1000, 16, INDIRECT)
    ring.offer(0)


def indirect_and_next(machine: Any, ring: Any) -> None:
    ring.set_descriptor(0, machine.base, 16, INDIRECT | NEXT, 1)
    ring.offer(0)


def request_and_next(machine: Any, ring: Any) -> None:
    """A table that would be a request."""
    header = machine.arena.take(32)
    machine.memory.write(header, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_FLUSH, 0, 0))
    table = machine.arena.take(32)
    entries = (header, 16, NEXT, 1), (header + 16, 1, WRITE, 0)
    machine.memory.write(table, b"".join(ring.descriptor(*entry) for entry in entries))
    ring.set_descriptor(0, table, 32, INDIRECT | NEXT, 1)
    ring.offer(0)


def writable_loop(machine: Any, ring: Any) -> None:
    """As many descriptors as the queue has would be a request."""
    header = machine.arena.take(32)
    machine.memory.write(header, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_GET_ID, 0, 0))
    ring.set_descriptor(0, header, 16, NEXT, 1)
    ring.set_descriptor(1, header + 16, 1, NEXT | WRITE, 1)
    ring.offer(0)


@pytest.mark.parametrize(
    "break_ring",
    [
        loop_of_one,
        loop_of_two,
        head_outside,
        next_outside,
        index_jump,
        index_back,
        readable_after_writable,
        no_status,
        empty_status,
        no_header,
        short_header,
        header_outside,
        status_outside,
        nested_table,
        looped_table,
        table_next_outside,
        empty_table,
        ragged_table,
        table_outside,
        indirect_and_next,
        request_and_next,
        writable_loop,
    ],
)
@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
def test_a_wrong_ring_needs_a_reset(
    make_started: Any, memory: str, break_ring: Callable[[Any, Any], None]
) -> None:
    machine = make_started(memory=memory)
    break_ring(machine, machine.driver.ring)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert machine.registers.status & at.STATUS_NEEDS_RESET
    machine.registers.notify(0)  # nothing more happens
    machine.registers.status = 0
    machine.ram[:] = bytes(len(machine.ram))
    machine.driver.start()
    machine.driver.flush()


def test_a_huge_indirect_table_is_not_followed_far(make_started: Any) -> None:
    machine = make_started()
    # Rings out of the way of the table, which covers the start of RAM.
    machine.registers.status = 0
    machine.arena.take(2 << 20)
    machine.driver.start()
    huge_table(machine, machine.driver.ring)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert machine.registers.status & at.STATUS_NEEDS_RESET


def test_indirect_without_the_feature_needs_a_reset_vq_s_18(make_started: Any) -> None:
    machine = make_started(driver=NO_INDIRECT)
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH, indirect=0)
    machine.driver.kick()
    assert machine.registers.status & at.STATUS_NEEDS_RESET


@pytest.mark.parametrize("address", [0, 0x1000, (1 << 64) - 512, (1 << 64) - 1, 0x803F_FFFF])
@pytest.mark.parametrize("kind", [at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_GET_ID])
@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
def test_data_outside_ram_is_ioerr(make_started: Any, memory: str, kind: int, address: int) -> None:
    machine = make_started(memory=memory, serial="s")
    header = machine.arena.take(32)
    machine.memory.write(header, at.LITTLE.blk_request.pack(kind, 0, 0) + b"\xff")
    data = Buffer(address, 1024, kind != at.VIRTIO_BLK_T_OUT)
    status = Buffer(header + 16, 1, True)
    head = machine.driver.ring.add([Buffer(header, 16), data, status])
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert machine.driver.ring.collect() == [(head, 1)]
    assert machine.memory.read(header + 16, 1) == b"\x01"
    assert machine.registers.status == 15


@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
@pytest.mark.parametrize("parts", [1024, 1025])
def test_a_chain_longer_than_4_gib_is_ioerr_vq_s_16(
    make_started: Any, parts: int, memory: str
) -> None:
    """Of a disk that is large enough, into RAM over and over; header and status count, too."""
    disk = pyvirtio.NullDisk(1 << 40)
    machine = make_started(disk=disk, queue_size=4096, memory=memory)
    header = machine.arena.take(64)
    machine.memory.write(header, at.LITTLE.blk_request.pack(0, 0, 0))
    whole = Buffer(machine.base, len(machine.ram), True)
    chain = [Buffer(header, 16), *[whole] * parts, Buffer(header + 16, 1, True)]
    head = machine.driver.ring.add(chain)
    machine.driver.ring.publish()
    before = bytes(machine.ram[: machine.driver.ring.used - machine.base])
    machine.registers.notify(0)
    assert machine.driver.ring.collect() == [(head, 1)]
    assert machine.memory.read(header + 16, 1) == b"\x01"
    assert bytes(machine.ram[: len(before)]) == before


def test_empty_descriptors_are_skipped(started: Any) -> None:
    header = started.arena.take(32)
    data = started.arena.take(512)
    started.disk.content[:512] = b"e" * 512
    started.memory.write(header, at.LITTLE.blk_request.pack(0, 0, 0))
    ring = started.driver.ring
    head = ring.add(
        [
            Buffer(header, 16),
            Buffer(data, 0, True),
            Buffer(data, 512, True),
            Buffer(data, 0, True),
            Buffer(header + 16, 1, True),
            Buffer(0, 0, True),
        ]
    )
    ring.publish()
    started.registers.notify(0)
    assert ring.collect() == [(head, 513)]
    assert started.memory.read(data, 512) == b"e" * 512


@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
def test_a_device_made_to_feed_itself_stops(make_started: Any, memory: str) -> None:
    """Reads that land on the available index: each makes the next available."""
    machine = make_started(driver=NO_EVENT_IDX, memory=memory)
    ring = machine.driver.ring
    header = machine.arena.take(32)
    target = ring.available & ~511
    seen = [0]

    def read(offset: int, views: list[memoryview], length: int) -> None:
        seen[0] += 1
        index = (seen[0] + 1) & 0xFFFF
        start = ring.available + 2 - target
        views[0][:] = machine.memory.read(target, 512)  # all else stays
        views[0][start : start + 2] = index.to_bytes(2, "little")

    machine.disk._readv = read
    machine.memory.write(header, at.LITTLE.blk_request.pack(0, 0, 0))
    ring.set_descriptor(0, header, 16, NEXT, 1)
    ring.set_descriptor(1, target, 512, NEXT | WRITE, 2)
    ring.set_descriptor(2, header + 16, 1, WRITE)
    ring.available_index = 1
    machine.registers.notify(0)
    assert seen[0] == 1024
    assert machine.mmio.poll()  # what is left is not lost
    assert seen[0] == 2048


@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("negotiated", [False, True])
def test_notify_on_empty_bf_100(
    make_machine: Any, memory: str, event_idx: bool, negotiated: bool
) -> None:
    """Interrupts that are not wanted come all the same when nothing is left to be done."""
    machine = make_machine(legacy=True, memory=memory)
    driver = machine.driver
    driver.features |= negotiated << at.VIRTIO_F_NOTIFY_ON_EMPTY
    if not event_idx:
        driver.features &= ~(1 << at.VIRTIO_F_EVENT_IDX)
    driver.start()
    driver.ring.want_interrupts(False)
    if event_idx:
        driver.ring.used_event = 9
    driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    driver.ring.publish()
    machine.registers.notify(0)
    assert machine.registers.take_interrupt() == int(negotiated)
