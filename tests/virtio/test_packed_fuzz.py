"""Random packed rings: nothing is raised, work is bounded, the model agrees."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyvirtio
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Buffer, PackedDriverRing
from pyvirtio.virtio.packed import PackedRing
from pyvirtio.virtio.ring import QueueState

SETTINGS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
RAM, RAM_SIZE = 0x8000_0000, 1 << 22
HEADERS_AT, TABLES_AT = RAM + 0x10_0000, RAM + 0x11_0000

ADDRESSES = st.one_of(
    st.sampled_from([HEADERS_AT, HEADERS_AT + 16, HEADERS_AT + 32, TABLES_AT, TABLES_AT + 64]),
    st.integers(RAM, RAM + RAM_SIZE),
    st.integers(RAM, RAM + 300),  # the ring and the events
    st.sampled_from([0, 1, (1 << 64) - 1, (1 << 64) - 512, RAM + RAM_SIZE - 1]),
)
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 1, 16, 16, 16, 17, 32, 48, 64, 512, 512, 4096, (1 << 32) - 1]),
    st.integers(0, (1 << 32) - 1),
)
KIND_FLAGS = st.sampled_from([0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7])
OWNERS = st.sampled_from(["available"] * 9 + ["used", "zero", "other"])
DESCRIPTORS = st.tuples(ADDRESSES, LENGTHS, KIND_FLAGS, st.integers(0, 0xFFFF), OWNERS)
USUAL = st.tuples(st.integers(0, 3), st.sampled_from([0, 2]), ADDRESSES, st.integers(0, 3)).map(
    lambda each: [
        (HEADERS_AT + 16 * each[0], 16, 1, 0, "available"),
        (each[2], 512 * each[3], 1 | each[1], 0, "available"),
        (TABLES_AT + 256, 1, 2, each[0], "available"),
    ]
)
TABLE = [(TABLES_AT, 48, 4, 7, "available")]
CHAINS = st.lists(
    st.one_of(USUAL, USUAL, st.just(TABLE), DESCRIPTORS.map(lambda each: [each])),
    min_size=1,
    max_size=12,
)
HEADERS = st.tuples(
    st.sampled_from([0, 1, 4, 5, 8, 11, 13, 99]),
    st.just(0),
    st.one_of(st.integers(0, 2050), st.integers(0, (1 << 64) - 1)),
)
EVENTS = st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))


@SETTINGS
@given(
    size=st.sampled_from([1, 3, 8, 16]),
    chains=CHAINS,
    table=st.lists(st.tuples(ADDRESSES, LENGTHS, st.integers(0, 0xFFFF)), min_size=8, max_size=8),
    headers=st.lists(HEADERS, min_size=1, max_size=4),
    event=EVENTS,
    event_idx=st.booleans(),
    memory=st.sampled_from(["buffer", "callbacks"]),
    notify=st.sampled_from(["inline", "deferred"]),
)
def test_any_packed_ring_is_survived(
    make_machine: Any,
    size: int,
    chains: list[list[tuple[int, int, int, int, str]]],
    table: list[tuple[int, int, int]],
    headers: list[tuple[int, int, int]],
    event: tuple[int, int],
    event_idx: bool,
    memory: str,
    notify: str,
) -> None:
    features = (1 << 41) - 1 & ~(0 if event_idx else 1 << at.VIRTIO_F_EVENT_IDX)
    machine = make_machine(packed=True, memory=memory, notify=notify, driver={"features": features})
    machine.driver.queue_size = size
    machine.driver.start()
    machine.disk.content[: 1 << 14] = bytes(range(256)) * 64
    ring = machine.driver.ring
    for position, header in enumerate(headers):
        machine.memory.write(HEADERS_AT + 16 * position, at.LITTLE.blk_request.pack(*header))
    for position, (address, length, flags) in enumerate(table):
        entry = ring.descriptor(address, length, flags, position)
        machine.memory.write(TABLES_AT + 16 * position, entry)
    ring.driver_event = event
    for chain in chains:  # a kick for each: wrap counters are met
        for address, length, flags, ident, owner in chain:
            available = ring.available_flags()
            owners = {
                "available": available,
                "used": available ^ at.VIRTQ_DESC_F_USED,
                "zero": 0,
                "other": available ^ at.VIRTQ_DESC_F_AVAIL ^ at.VIRTQ_DESC_F_USED,
            }
            slot = ring.slot
            ring.put(address, length, flags, ident)
            ring.set_descriptor(slot, address, length, flags | owners[owner], ident)
        ring._first = None
        machine.registers.notify(0)
        machine.mmio.poll()
        ring.collect()
    assert machine.registers.status in (15, 15 | at.STATUS_NEEDS_RESET)
    assert len(machine.disk.calls) <= 1100 * 33
    machine.ram.extend(b"")  # no view is open
    machine.driver.start()
    assert machine.driver.request(at.VIRTIO_BLK_T_FLUSH, indirect=0).status == 0


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "zero", "flush", "discard"]),
        st.integers(0, 2047),
        st.integers(1, 24),
        st.integers(0, 255),
        st.lists(st.integers(1, 700), max_size=5),
        st.sampled_from([None, 0]),
    ),
    max_size=40,
)


@SETTINGS
@given(
    operations=OPERATIONS,
    size=st.sampled_from([11, 12, 17, 64]),
    event_idx=st.booleans(),
    memory=st.sampled_from(["buffer", "callbacks"]),
    notify=st.sampled_from(["inline", "deferred"]),
)
def test_the_device_is_its_disk(
    make_machine: Any, operations: list[Any], size: int, event_idx: bool, memory: str, notify: str
) -> None:
    features = (1 << 41) - 1 & ~(0 if event_idx else 1 << at.VIRTIO_F_EVENT_IDX)
    machine = make_machine(
        packed=True, memory=memory, notify=notify, queue_size=64, driver={"features": features}
    )
    driver = machine.driver
    driver.queue_size = size
    driver.start()
    model = bytearray(1 << 20)
    for name, sector, count, fill, cuts, indirect in operations:
        count = min(count, 2048 - sector)
        start, end = 512 * sector, 512 * (sector + count)
        options = {"cuts": cuts, "indirect": indirect}
        if name == "read":
            done = driver.request(at.VIRTIO_BLK_T_IN, sector, incoming=end - start, **options)
            assert (done.used_length, done.data) == (end - start + 1, model[start:end])
        elif name == "write":
            model[start:end] = data = bytes([fill]) * (end - start)
            done = driver.request(at.VIRTIO_BLK_T_OUT, sector, data, **options)
        elif name == "zero":
            model[start:end] = bytes(end - start)
            segment = driver.segment(sector, count, fill & 1)
            done = driver.request(at.VIRTIO_BLK_T_WRITE_ZEROES, 0, segment, **options)
        elif name == "discard":
            segment = driver.segment(sector, count)
            done = driver.request(at.VIRTIO_BLK_T_DISCARD, 0, segment, **options)
        else:
            done = driver.request(at.VIRTIO_BLK_T_FLUSH, **options)
        assert done.status == 0
    assert machine.disk.content == model


@SETTINGS
@given(
    size=st.integers(1, 40),
    rounds=st.lists(
        st.tuples(
            st.lists(st.integers(1, 6), min_size=1, max_size=6),  # lengths of lists
            st.randoms(use_true_random=False),
            st.one_of(st.none(), st.integers(0, 50)),  # an interrupt: never, or that far ahead
        ),
        max_size=30,
    ),
)
def test_rings_agree_with_a_list(size: int, rounds: list[Any]) -> None:
    """Both ends of a ring beside a plain list of what is in flight, given back in any order."""
    memory = pyvirtio.GuestMemory.from_buffer(bytearray(4096))
    state = QueueState(40, size, driver_area=1024, device_area=1028)
    ring = PackedRing(state, memory, event_idx=True)
    driver = PackedDriverRing(memory, size, 0, 1024, 1028, event_idx=True)
    flying: list[tuple[int, Any]] = []
    room = size
    for lengths, chance, ahead in rounds:
        added = []
        for length in lengths:
            if length <= room:
                room -= length
                added.append((driver.add([Buffer(2048, 8)] * length), length))
        driver.publish()
        assert ring.ready() == len(added)
        for ident, length in added:
            chain = ring.pop()
            assert (chain.head, chain.slots, len(chain.readable)) == (ident, length, length)
            flying.append((ident, chain))
        chance.shuffle(flying)
        done = [flying.pop() for _ in range(chance.randint(0, len(flying)))]
        place = driver.used_slot + (0 if driver.used_wrap else size) + (ahead or 0)
        place %= 2 * size
        driver.driver_event = (place % size | (place < size) << 15, 1 if ahead is None else 2)
        for ident, chain in done:
            ring.push(chain, ident)
        assert driver.collect() == []
        freed = sum(chain.slots for _, chain in done)
        room += freed
        wanted = ahead is not None and ahead % (2 * size) < freed
        assert ring.publish() == wanted
        assert driver.collect() == [(ident, ident) for ident, _ in done]
