"""The packed ring (§2.8) through MMIO: requests, notifications, and what a wrong ring comes to."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

import pyvirtio
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Buffer, PackedDriverRing
from pyvirtio.virtio.packed import PackedRing
from pyvirtio.virtio.ring import QueueState

OK, IOERR, UNSUPP = 0, 1, 2
NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2
ALL = (1 << 41) - 1
NO_EVENT_IDX = {"features": ALL & ~(1 << at.VIRTIO_F_EVENT_IDX)}
NO_INDIRECT = {"features": ALL & ~(1 << at.VIRTIO_F_INDIRECT_DESC)}


@pytest.fixture
def packed(make_machine: Any) -> Any:
    """``packed(**options)``: a started machine whose queue is packed, of ``size`` entries."""

    def make(*, size: int = 0, queue_index: int = 0, **options: Any) -> Any:
        machine = make_machine(packed=True, **options)
        machine.driver.queue_size = size or machine.driver.queue_size
        machine.driver.queue_index = queue_index
        machine.driver.start()
        machine.mmio.poll()
        assert isinstance(machine.driver.ring, PackedDriverRing)
        assert isinstance(machine.device.queues[queue_index].ring, PackedRing)
        return machine

    return make


@pytest.fixture(params=["buffer", "callbacks"])
def machine(packed: Any, request: pytest.FixtureRequest) -> Any:
    """One of them, over either kind of guest memory."""
    return packed(memory=request.param)


def flushes(machine: Any, count: int) -> None:
    for _ in range(count):
        machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()


def interrupted(machine: Any) -> bool:
    return bool(machine.registers.take_interrupt())


def broken(machine: Any) -> bool:
    return bool(machine.registers.status & at.STATUS_NEEDS_RESET)


# -- the feature -------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "offered"), [({}, 0), ({"packed": True}, 1)])
def test_packed_queues_are_an_option(make_machine: Any, options: Any, offered: int) -> None:
    features = make_machine(**options).registers.offered_features()
    assert features >> at.VIRTIO_F_RING_PACKED & 1 == offered


def test_a_driver_of_split_queues_goes_on(make_started: Any) -> None:
    features = ALL & ~(1 << at.VIRTIO_F_RING_PACKED)
    machine = make_started(packed=True, driver={"features": features})
    machine.driver.write(3, b"s" * 512)
    assert machine.driver.ring.used_index == 1


def test_a_legacy_device_has_none(make_machine: Any) -> None:
    machine = make_machine(packed=True, legacy=True)
    machine.driver.start()
    machine.driver.flush()
    assert not machine.device.offered_features >> 32


# -- requests ----------------------------------------------------------------------------------


def test_read(machine: Any) -> None:
    machine.disk.content[512:2048] = data = os.urandom(1536)
    done = machine.driver.request(at.VIRTIO_BLK_T_IN, 1, incoming=1536)
    assert (done.status, done.used_length, done.data) == (OK, 1537, data)


def test_write(machine: Any) -> None:
    data = os.urandom(1024)
    done = machine.driver.request(at.VIRTIO_BLK_T_OUT, 3, data)
    assert (done.status, done.used_length) == (OK, 1)
    assert bytes(machine.disk.content) == bytes(1536) + data + bytes((1 << 20) - 2560)


@pytest.mark.parametrize("kind", [at.VIRTIO_BLK_T_FLUSH, at.VIRTIO_BLK_T_FLUSH_OUT])
def test_flush(machine: Any, kind: int) -> None:
    done = machine.driver.request(kind)
    assert (done.status, done.used_length) == (OK, 1)
    assert machine.disk.calls == [("flush",)]


def test_get_id(packed: Any) -> None:
    done = packed(serial="vd0").driver.request(at.VIRTIO_BLK_T_GET_ID, incoming=20)
    assert (done.status, done.used_length) == (OK, 21)
    assert done.data == b"vd0".ljust(20, b"\0")


def test_discard(machine: Any) -> None:
    machine.driver.discard(8, 16)
    assert machine.disk.calls == [("discard", 4096, 8192)]


def test_write_zeroes(machine: Any) -> None:
    machine.disk.content[:4096] = b"z" * 4096
    machine.driver.write_zeroes(1, 2, unmap=True)
    assert machine.disk.calls == [("zeroes", 512, 1024, True)]
    assert machine.disk.content[:4096] == b"z" * 512 + bytes(1024) + b"z" * 2560


def test_an_unknown_request_is_unsupported(machine: Any) -> None:
    done = machine.driver.request(99)
    assert (done.status, done.used_length) == (UNSUPP, 1)


def test_an_error_of_the_disk_is_ioerr(machine: Any) -> None:
    machine.disk.error = OSError(5, "broken")
    done = machine.driver.request(at.VIRTIO_BLK_T_IN, incoming=512)
    assert (done.status, done.used_length) == (IOERR, 1)


def test_transfers_longer_than_the_bounce_buffer(packed: Any, make_disk: Any) -> None:
    machine = packed(memory="callbacks", disk=make_disk(1 << 22))
    size = (1 << 20) + 3 * 512
    data = os.urandom(size)
    assert machine.driver.request(at.VIRTIO_BLK_T_OUT, 5, data).status == OK
    done = machine.driver.request(at.VIRTIO_BLK_T_IN, 5, incoming=size, cuts=[16, 700_000])
    assert (done.status, done.data) == (OK, data)


@pytest.mark.parametrize("cuts", [[], [1], [15, 1], [8, 300], [4, 4, 4, 4], [16, 1, 510]])
def test_framing_means_nothing(machine: Any, cuts: list[int]) -> None:
    data = os.urandom(512)
    assert machine.driver.request(at.VIRTIO_BLK_T_OUT, 1, data, cuts=cuts).status == OK
    done = machine.driver.request(at.VIRTIO_BLK_T_IN, 1, incoming=512, cuts=cuts)
    assert (done.status, done.used_length, done.data) == (OK, 513, data)


def test_several_queues(packed: Any) -> None:
    machine = packed(num_queues=3, queue_index=2)
    machine.driver.write(0, b"2" * 512)
    assert machine.disk.content[:512] == b"2" * 512


def test_the_long_queue_of_a_kick_is_served_whole(packed: Any) -> None:
    machine = packed(queue_size=4096)
    ring = machine.driver.ring
    header = machine.arena.take(17)
    machine.memory.write(header, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_FLUSH, 0, 0))
    for _ in range(2048):
        ring.add([Buffer(header, 16), Buffer(header + 16, 1, True)])
    ring.publish()
    machine.registers.notify(0)
    assert len(ring.collect()) == 2048


def test_kicks_to_be_polled(packed: Any) -> None:
    machine = packed(notify="deferred")
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.kick()
    assert machine.disk.calls == []
    assert machine.driver.ring.device_event[1] == DISABLE  # PKD-29
    machine.mmio.poll()
    assert len(machine.driver.collect()) == 1
    assert machine.driver.ring.device_event[1] == DESC


# -- the ring ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 13, 16, 100, 128])
def test_any_size_goes_around_pkd_31(packed: Any, size: int) -> None:
    machine = packed(queue_size=128, size=size)
    indirect = 0 if size < 3 else None
    for each in range(40 + size):
        data = bytes([each]) * 512
        assert (
            machine.driver.request(at.VIRTIO_BLK_T_OUT, each, data, indirect=indirect).status == 0
        )
    assert machine.disk.content[512 * 39 : 512 * 40] == bytes([39]) * 512


def test_the_largest_queue(packed: Any) -> None:
    machine = packed(queue_size=32768)
    state = machine.device.queues[0].state
    ring = machine.driver.ring
    # Both sides as after 32766 descriptors.
    state.next_avail = state.used_index = ring.slot = ring.used_slot = 32766
    for slot in range(8):
        ring.set_descriptor(slot, 0, 0, AVAIL | USED)
    ring.want_next_interrupt()
    machine.driver.write(7, b"L" * 512)
    machine.driver.write(8, b"M" * 512)
    assert machine.disk.content[7 * 512 : 9 * 512] == b"L" * 512 + b"M" * 512
    assert (state.used_index, state.used_wrap, state.avail_wrap) == (4, False, False)


def test_a_used_descriptor_has_both_flags_as_the_wrap_counter_pkd_32_pkd_33(packed: Any) -> None:
    machine = packed(queue_size=4)
    ring = machine.driver.ring
    driver = machine.driver
    ids, flags = [], []
    for _ in range(4):
        ids.append(driver.submit(at.VIRTIO_BLK_T_FLUSH))
        slot = (ring.slot - 2) % 4
        driver.kick()
        flags.append(ring.get_descriptor(slot)[2])
        assert ring.get_descriptor(slot)[3] == ids[-1]
        driver.collect()
    assert flags == [AVAIL | USED | WRITE] * 2 + [WRITE] * 2


def test_a_list_is_used_by_its_first_descriptor_alone_pkd_33(packed: Any) -> None:
    machine = packed()
    driver = machine.driver
    ring = driver.ring
    driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    driver.submit(at.VIRTIO_BLK_T_FLUSH)
    ring.publish()
    before = [ring.get_descriptor(slot) for slot in range(16)]
    machine.registers.notify(0)
    after = [ring.get_descriptor(slot) for slot in range(16)]
    assert [slot for slot in range(16) if before[slot] != after[slot]] == [0, 3]
    assert (after[0][1], after[3][1]) == (513, 1)
    assert (after[0][0], after[3][0]) == (before[0][0], before[3][0])


def test_the_id_of_a_list_is_its_last_descriptors_pkd_35(packed: Any) -> None:
    machine = packed()
    ring = machine.driver.ring
    header = machine.arena.take(17)
    machine.memory.write(header, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_FLUSH, 0, 0))
    ring.put(header, 16, NEXT, 0x1111)
    ring.put(header + 16, 1, WRITE, 0xFEED)
    ring.publish()
    machine.registers.notify(0)
    assert ring.get_descriptor(0)[1:] == (1, AVAIL | USED | WRITE, 0xFEED)


def test_write_is_set_where_something_was_written_pkd_34() -> None:
    ram = bytearray(4096)
    state = QueueState(4, 4, driver_area=64, device_area=68)
    memory = pyvirtio.GuestMemory.from_buffer(ram)
    ring = PackedRing(state, memory)
    driver = PackedDriverRing(memory, 4, 0, 64, 68)
    for written in (0, 1):
        driver.add([Buffer(1024, 512, True)])
        driver.publish()
        assert ring.ready() == 1
        ring.push(ring.pop(), written)
        ring.publish()
        assert driver.get_descriptor(written)[2] == AVAIL | USED | (WRITE if written else 0)


def test_used_in_another_order_than_taken_pkd_03() -> None:
    """Lists of several lengths, given back in reverse: each at the next used place."""
    memory = pyvirtio.GuestMemory.from_buffer(bytearray(4096))
    ring = PackedRing(QueueState(7, 7, driver_area=128, device_area=132), memory)
    driver = PackedDriverRing(memory, 7, 0, 128, 132)
    for _ in range(10):
        ids = [driver.add([Buffer(1024, 8)] * length) for length in (1, 3, 2)]
        driver.publish()
        assert ring.ready() == 3
        chains = [ring.pop() for _ in range(3)]
        assert ([each.head for each in chains], [each.slots for each in chains]) == (ids, [1, 3, 2])
        for chain in reversed(chains):
            ring.push(chain, 5)
        assert driver.collect() == []
        ring.publish()
        assert driver.collect() == [(each, 5) for each in reversed(ids)]
    assert ring.ready() == 0


def test_the_first_of_a_batch_is_shown_last() -> None:
    memory = pyvirtio.GuestMemory.from_buffer(bytearray(4096))
    ring = PackedRing(QueueState(8, 8, driver_area=128, device_area=132), memory)
    driver = PackedDriverRing(memory, 8, 0, 128, 132)
    for _ in range(3):
        driver.add([Buffer(1024, 8)])
    driver.publish()
    ring.ready()
    order: list[int] = []
    open_ring = ring._open_ring

    class Spy:
        def __init__(self) -> None:
            self.words = open_ring()

        def __setitem__(self, index: int, value: int) -> None:
            order.append(index // 8)
            self.words[index] = value

        def release(self) -> None:
            self.words.release()

    ring._open_ring = Spy  # type: ignore[assignment]
    for _ in range(3):
        ring.push(ring.pop(), 0)
    ring.publish()
    assert order == [2, 1, 0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_queue_goes_on_from_its_state_as_plain_data(packed: Any, count: int) -> None:
    """A ring made anew from what was saved of the old one."""
    machine = packed(queue_size=8)
    queue = machine.device.queues[0]
    for each in range(count):
        machine.driver.write(each, b"a" * 512)
    saved = QueueState(**dataclasses.asdict(queue.state))
    queue.ring = PackedRing(saved, machine.memory, indirect=True, event_idx=True)
    queue.express = None  # the old ring's
    machine.driver.write(9, b"b" * 512)
    assert machine.disk.content[9 * 512 : 10 * 512] == b"b" * 512


def test_a_second_start_begins_at_the_beginning(packed: Any) -> None:
    machine = packed(queue_size=4)
    machine.driver.write(1, b"1" * 512)
    machine.driver.write(1, b"1" * 512)
    machine.driver.start()
    machine.driver.write(2, b"2" * 512)
    assert machine.disk.content[512:1536] == b"1" * 512 + b"2" * 512


def test_a_disabled_queue_begins_at_the_beginning(packed: Any) -> None:
    machine = packed(queue_size=4)
    machine.driver.write(1, b"1" * 512)
    machine.driver.write(1, b"1" * 512)
    machine.registers.select_queue(0)
    machine.registers.store(at.MMIO_QUEUE_READY, 0)
    machine.driver.set_up_queue()
    machine.driver.write(2, b"2" * 512)
    assert machine.disk.content[1024:1536] == b"2" * 512


# -- indirect tables ---------------------------------------------------------------------------


def test_indirect_descriptors_pkd_37(machine: Any) -> None:
    data = os.urandom(4096)
    driver = machine.driver
    assert driver.request(at.VIRTIO_BLK_T_OUT, 8, data, indirect=0).status == OK
    done = driver.request(at.VIRTIO_BLK_T_IN, 8, incoming=4096, cuts=[16, 512, 1024], indirect=0)
    assert (done.status, done.used_length, done.data) == (OK, 4097, data)
    assert machine.device.queues[0].state.used_index == 2


def put_table(
    machine: Any, flags: int = 0, extra: int = 0, ident: int = 0, count: int | None = None
) -> None:
    """A flush in an indirect table whose descriptors have ``extra`` flags and ``ident``."""
    ring = machine.driver.ring
    header = machine.arena.take(17)
    machine.memory.write(header, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_FLUSH, 0, 0) + b"\xff")
    table = machine.arena.take(32)
    machine.memory.write(
        table,
        ring.descriptor(header, 16, extra & ~WRITE, ident)
        + ring.descriptor(header + 16, 1, WRITE | extra, ident),
    )
    ring.put(table, 32 if count is None else count, INDIRECT | flags, 9)
    ring.publish()
    machine.registers.notify(0)


@pytest.mark.parametrize("extra", [NEXT, INDIRECT, AVAIL, USED, AVAIL | USED, 0xFFFD])
def test_other_flags_and_ids_in_a_table_are_ignored_pkd_36(machine: Any, extra: int) -> None:
    put_table(machine, extra=extra, ident=77)
    assert machine.driver.ring.get_descriptor(0)[1:] == (1, AVAIL | USED | WRITE, 9)
    assert machine.disk.calls == [("flush",)]


def test_write_on_an_indirect_descriptor_is_ignored_pkd_36(machine: Any) -> None:
    put_table(machine, flags=WRITE)
    assert machine.disk.calls == [("flush",)]


def test_an_indirect_descriptor_has_to_be_negotiated_pkd_21(packed: Any) -> None:
    machine = packed(driver=NO_INDIRECT)
    put_table(machine)
    assert broken(machine)


@pytest.mark.parametrize("length", [0, 1, 15, 17, 33, 0xFFFF_FFFF, 0xFFFF_FFF0, 16 * 1025])
def test_an_indirect_table_of_a_wrong_length(packed: Any, length: int) -> None:
    machine = packed(strict=True)
    with pytest.raises(pyvirtio.GuestError, match="an indirect table of"):
        put_table(machine, count=length)
    assert broken(machine)
    assert machine.disk.calls == []


def test_an_indirect_descriptor_with_a_next_one_pkd_24(machine: Any) -> None:
    put_table(machine, flags=NEXT)
    assert broken(machine)


def test_an_indirect_descriptor_at_the_end_of_a_list_pkd_24(packed: Any) -> None:
    machine = packed()
    machine.driver.submit(at.VIRTIO_BLK_T_FLUSH, indirect=1)
    machine.driver.kick()
    assert broken(machine)


def test_a_table_outside_ram(machine: Any) -> None:
    machine.driver.ring.put(0x10, 32, INDIRECT)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert broken(machine)


def test_a_table_with_readable_after_writable_pkd_15(machine: Any) -> None:
    machine.driver.ring.add_indirect(
        [Buffer(0x8010_0000, 16, True), Buffer(0x8010_0010, 1)], 0x8020_0000
    )
    machine.driver.kick()
    assert broken(machine)


# -- wrong rings -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 129, 32768, 0xFFFF_FFFF])
def test_a_wrong_size_is_refused(packed: Any, size: int) -> None:
    machine = packed(queue_size=128)
    registers, ring = machine.registers, machine.driver.ring
    registers.select_queue(0)
    registers.store(at.MMIO_QUEUE_READY, 0)
    assert not registers.enable_queue(size, ring.descriptors, ring.available, ring.used)
    assert broken(machine)


@pytest.mark.parametrize("wrong", [(8, 0, 0), (0, 2, 0), (0, 0, 2), (1, 1, 1), (1 << 40, 0, 0)])
def test_a_wrong_address_is_refused_pkd_01(packed: Any, wrong: tuple[int, int, int]) -> None:
    machine = packed()
    registers, ring = machine.registers, machine.driver.ring
    registers.select_queue(0)
    registers.store(at.MMIO_QUEUE_READY, 0)
    areas = (ring.descriptors, ring.available, ring.used)
    moved = [area + offset for area, offset in zip(areas, wrong, strict=True)]
    assert not registers.enable_queue(16, *moved)
    assert broken(machine)


@pytest.mark.parametrize("state", [{"next_avail": 4}, {"used_index": 4}, {"used_index": 1}])
def test_a_state_that_cannot_be_is_refused(state: dict[str, int]) -> None:
    """The last: more places in flight than there are."""
    whole = QueueState(4, 4, driver_area=64, device_area=68, **state)
    with pytest.raises(pyvirtio.GuestError, match="a queue of 4"):
        PackedRing(whole, pyvirtio.GuestMemory.from_buffer(bytearray(4096)))


def test_a_list_as_long_as_the_ring(packed: Any) -> None:
    machine = packed(queue_size=16)
    machine.disk.content[:512] = b"f" * 512
    done = machine.driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=512, cuts=[8, 8] + [1] * 13)
    assert (done.status, done.data) == (OK, b"f" * 512)
    assert machine.device.queues[0].state.used_wrap is False


def test_a_list_without_an_end_pkd_14(machine: Any) -> None:
    for _ in range(16):
        machine.driver.ring.put(0x8010_0000, 16, NEXT)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert broken(machine)
    assert machine.disk.calls == []


@pytest.mark.parametrize("flags", [0, USED, AVAIL | USED])
def test_a_list_that_is_not_all_available_pkd_18(machine: Any, flags: int) -> None:
    ring = machine.driver.ring
    machine.memory.write(0x8010_0000, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_FLUSH, 0, 0))
    ring.put(0x8010_0000, 16, NEXT)
    ring.set_descriptor(1, 0x8010_0010, 1, WRITE | flags)
    ring.publish()
    machine.registers.notify(0)
    assert broken(machine)
    assert machine.disk.calls == []


def test_readable_after_writable_pkd_15(machine: Any) -> None:
    ring = machine.driver.ring
    ring.add([Buffer(0x8010_0000, 16, True), Buffer(0x8010_0010, 1)])
    machine.driver.kick()
    assert broken(machine)


@pytest.mark.parametrize("flags", [0, AVAIL | USED, USED, NEXT, WRITE, INDIRECT])
def test_what_is_not_available_is_not_touched_pkd_07(machine: Any, flags: int) -> None:
    machine.driver.ring.set_descriptor(0, 0x8010_0000, 512, flags, 3)
    before = bytes(machine.ram)
    machine.registers.notify(0)
    assert (bytes(machine.ram), machine.registers.status) == (before, 15)


def test_what_was_done_before_a_broken_list_is_the_drivers_to_see(packed: Any) -> None:
    machine = packed()
    head = machine.driver.submit(at.VIRTIO_BLK_T_FLUSH)
    machine.driver.ring.put(0x8010_0000, 16, INDIRECT | NEXT)
    machine.driver.kick()
    assert broken(machine)
    assert machine.driver.collect()[head].status == OK


def test_a_request_over_the_ring_itself_ends(machine: Any) -> None:
    """A read that puts the disk's bytes over the descriptors behind it."""
    ring = machine.driver.ring
    available = at.LITTLE.desc.pack(ring.descriptors, 512, 0, AVAIL | WRITE)
    machine.disk.content[:512] = available * 32
    header = machine.arena.take(17)
    machine.memory.write(header, at.LITTLE.blk_request.pack(at.VIRTIO_BLK_T_IN, 0, 0))
    ring.add(
        [Buffer(header, 16), Buffer(ring.descriptors, 512, True), Buffer(header + 16, 1, True)]
    )
    ring.publish()
    machine.registers.notify(0)
    assert len(machine.disk.calls) <= 1024


def test_readable_buffers_are_never_written_pkd_05(machine: Any) -> None:
    driver = machine.driver
    driver.submit(at.VIRTIO_BLK_T_OUT, 0, b"r" * 512)
    descriptor = driver.ring.get_descriptor(0)
    before = machine.memory.read(descriptor[0], 16 + 512)
    driver.kick()
    assert machine.memory.read(descriptor[0], 16 + 512) == before


def test_spurious_kicks_are_harmless_pkd_12(packed: Any) -> None:
    machine = packed()
    before = bytes(machine.ram)
    for index in (0, 0, 1, 77, 0xFFFF):
        machine.registers.notify(index)
    assert (bytes(machine.ram), machine.registers.status) == (before, 15)


# -- notifications -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [ENABLE, 3, ENABLE | 4, 0xFFFC])
def test_interrupt_where_enabled_or_reserved_pkd_38(machine: Any, flags: int) -> None:
    machine.driver.ring.driver_event = (0x1234, flags)
    flushes(machine, 1)
    assert interrupted(machine)


@pytest.mark.parametrize("driver", [{}, NO_EVENT_IDX])
@pytest.mark.parametrize("flags", [DISABLE, 0xFFFD])
def test_no_interrupt_where_disabled(packed: Any, driver: Any, flags: int) -> None:
    machine = packed(driver=driver)
    machine.driver.ring.driver_event = (0, flags)
    flushes(machine, 1)
    assert not interrupted(machine)


def test_an_event_counts_only_with_event_idx_pkd_38(packed: Any) -> None:
    machine = packed(driver=NO_EVENT_IDX)
    machine.driver.ring.driver_event = (9, DESC)
    flushes(machine, 1)
    assert interrupted(machine)


@pytest.mark.parametrize("size", [6, 8, 16])
@pytest.mark.parametrize("event", range(16))
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_event_says_when_pkd_39(packed: Any, size: int, event: int, batch: int) -> None:
    """Flushes take two places; an event at either is met. Twice around the ring."""
    machine = packed(size=size)
    place = event % (2 * size)
    off_wrap = place % size | (place < size) << 15
    done = 0
    while done < 2 * size:
        machine.driver.ring.driver_event = (off_wrap, DESC)
        flushes(machine, batch)
        met = {each % (2 * size) for each in range(done, done + 2 * batch)}
        assert interrupted(machine) == (place in met)
        done += 2 * batch
        machine.driver.ring.collect()


def test_the_device_asks_for_the_next_kick_pkd_39(packed: Any) -> None:
    machine = packed(queue_size=8)
    for count in (1, 3, 2, 1, 3, 2):
        flushes(machine, count)
        ring = machine.driver.ring
        assert ring.device_event == (ring.slot | ring.wrap << 15, DESC)
        machine.driver.collect()


def test_without_event_idx_the_device_asks_for_every_kick(packed: Any) -> None:
    machine = packed(driver=NO_EVENT_IDX, notify="deferred")
    for _ in range(3):
        flushes(machine, 1)
        assert machine.driver.ring.device_event[1] == DISABLE
        machine.mmio.poll()
        assert machine.driver.ring.device_event[1] == ENABLE
        machine.driver.collect()


def test_flags_of_the_event_are_read_before_its_place(packed: Any) -> None:
    """The driver writes them in the other order: read so, they never come from two events."""
    machine = packed()
    ring = machine.device.queues[0].ring
    read, origin = ring._read_event, ring._event_origin
    order: list[int] = []

    def spy(at_offset: int) -> Any:
        order.append(at_offset - origin)
        return read(at_offset)

    ring._read_event = spy
    machine.driver.ring.driver_event = (1 << 15, DESC)
    flushes(machine, 1)
    assert order == [2, 0]
