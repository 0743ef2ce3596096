"""VIRTIO_F_IN_ORDER (§2.7.9, §2.8.9; BF-92, VQ-S-56): batches, their place and their length."""

from __future__ import annotations

from typing import Any

import pytest

from pyvirtio.virtio import layout as at

IN, OUT, FLUSH = at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_FLUSH
LONG_WAY = {"memory": "callbacks"}


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def used_element(machine: Any, slot: int) -> tuple[int, int]:
    """The id and length that stand in a place of the used (or packed) ring."""
    ring = machine.driver.ring
    if machine.device.accepted(at.VIRTIO_F_RING_PACKED):
        _, length, _, ident = ring.get_descriptor(slot)
        return ident, length
    return at.LITTLE.used_elem.unpack(machine.memory.read(ring.used + 4 + 8 * slot, 8))


def test_it_is_offered_only_where_asked_for(make_machine: Any) -> None:
    assert not make_machine().device.offered_features >> at.VIRTIO_F_IN_ORDER & 1
    assert make_machine(in_order=True).device.offered_features >> at.VIRTIO_F_IN_ORDER & 1


def test_one_element_stands_for_a_batch_vq_s_56(make_started: Any, packed: bool) -> None:
    machine = make_started(in_order=True, packed=packed, **LONG_WAY)
    heads = [machine.driver.submit(IN, number, incoming=512) for number in range(4)]
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert used_element(machine, 0) == (heads[3], 513)
    if not packed:
        assert [used_element(machine, slot) for slot in (1, 2, 3)] == [(0, 0)] * 3
        assert machine.driver.ring.used_index == 4
    done = machine.driver.collect()
    assert [done[head].used_length for head in heads] == [513] * 4
    machine.driver.write(0, b"n" * 512)  # the next batch begins in the right place


def test_a_short_answer_ends_its_batch(make_started: Any, packed: bool) -> None:
    """The driver takes a skipped buffer for written in full; a failed read is not."""
    machine = make_started(in_order=True, packed=packed, **LONG_WAY)
    sectors = (0, 1, 1 << 30, 2, 3)
    heads = [machine.driver.submit(IN, sector, incoming=512) for sector in sectors]
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert used_element(machine, 0) == (heads[2], 1)
    after = 9 if packed else 3
    assert used_element(machine, after) == (heads[4], 513)
    done = machine.driver.collect()
    assert [done[head].status for head in heads] == [0, 0, 1, 0, 0]
    assert [done[head].used_length for head in heads] == [513, 513, 1, 513, 513]


@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
def test_around_the_ring_with_requests_of_every_kind(
    make_started: Any, packed: bool, memory: str
) -> None:
    machine = make_started(in_order=True, packed=packed, memory=memory, queue_size=16)
    kinds = [(OUT, b"w" * 512, 0), (IN, b"", 512), (FLUSH, b"", 0), (IN, b"", 100)]
    start = machine.arena.mark()
    for turn in range(30):
        machine.arena.give_back(start)
        heads = []
        for each in range(turn % 4 + 1):
            kind, data, room = kinds[(turn + each) % 4]
            heads.append((machine.driver.submit(kind, 0, data, room), room))
        machine.driver.kick()
        done = machine.driver.collect()
        assert list(done) == [head for head, _ in heads]
        for head, room in heads:
            status, length = (1, 1) if room == 100 else (0, room + 1)
            assert (done[head].status, done[head].used_length) == (status, length)


def test_interrupts_count_the_whole_batch(make_started: Any, packed: bool) -> None:
    """The wanted one is in the middle of a batch (VQ-S-35, PKD-39)."""
    machine = make_started(in_order=True, packed=packed, **LONG_WAY)
    for number in range(4):
        machine.driver.submit(IN, number, incoming=512)
    ring = machine.driver.ring
    if packed:
        ring.driver_event = (6 | 1 << 15, at.RING_EVENT_FLAGS_DESC)
    else:
        ring.used_event = 2
    ring.publish()
    machine.registers.notify(0)
    assert machine.levels == [True]


def test_a_batch_is_not_joined_once_around_the_indices(make_started: Any) -> None:
    """65536 requests later a used index is what it was; what was done there is another matter."""
    machine = make_started(in_order=True)
    driver, ring = machine.driver, machine.driver.ring
    driver.flush()  # the long way: it could be joined by what is used at 1
    live = machine.device.queues[0].ring
    state = machine.device.queues[0].state
    live.published = state.next_avail = state.used_index = 0  # as 65535 short requests later
    ring._next_avail = ring._published = ring._next_used = 0
    ring.available_index = 0
    ring.store16(ring.used + 2, 0)
    machine.disk.error = OSError("no")
    failed = driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    other = driver.submit(at.VIRTIO_BLK_T_GET_ID, 0, incoming=20)
    driver.kick()
    elements = machine.memory.read(ring.used + 4, 16)
    assert at.LITTLE.used_elem.unpack_from(elements) == (failed, 1)
    assert at.LITTLE.used_elem.unpack_from(elements, 8) == (other, 21)
