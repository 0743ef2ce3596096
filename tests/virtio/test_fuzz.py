"""Random rings and register accesses: nothing is raised, work is bounded, the model agrees."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvirtio.virtio import layout as at

SETTINGS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 7, 15, 16, 512, 0xFFFF, 0x8000_0000, 0xFFFF_FFFF]),
    st.integers(0, 0xFFFF_FFFF),
)
ADDRESSES = st.one_of(
    st.integers(0x8000_0000, 0x8000_0000 + (1 << 22)),
    st.sampled_from([0, 1, (1 << 64) - 1, (1 << 64) - 512, 0x8000_0000, 0x803F_FFFF]),
)
DESCRIPTORS = st.tuples(
    ADDRESSES,
    st.one_of(
        st.sampled_from([0, 1, 16, 17, 512, 4096, (1 << 32) - 1]), st.integers(0, 1 << 32 - 1)
    ),
    st.integers(0, 7),
    st.integers(0, 20),
)
HEADERS = st.tuples(
    st.sampled_from([0, 1, 4, 5, 8, 11, 13, 99]),
    st.just(0),
    st.one_of(st.integers(0, 2050), st.integers(0, (1 << 64) - 1)),
)


@SETTINGS
@given(
    descriptors=st.lists(DESCRIPTORS, min_size=16, max_size=16),
    headers=st.lists(HEADERS, min_size=1, max_size=4),
    heads=st.lists(st.integers(0, 17), max_size=16),
    jump=st.integers(-3, 20),
    memory=st.sampled_from(["buffer", "callbacks"]),
)
def test_any_ring_is_survived(
    make_started: Any,
    descriptors: list[tuple[int, int, int, int]],
    headers: list[tuple[int, int, int]],
    heads: list[int],
    jump: int,
    memory: str,
) -> None:
    machine = make_started(memory=memory)
    ring = machine.driver.ring
    start = machine.arena.take(16 * len(headers))
    for position, header in enumerate(headers):
        machine.memory.write(start + 16 * position, at.LITTLE.blk_request.pack(*header))
    for index, (address, length, flags, following) in enumerate(descriptors):
        if length == 16 and not flags & at.VIRTQ_DESC_F_WRITE:
            address = start
        ring.set_descriptor(index, address, length, flags, following)
    for head in heads:
        ring.offer(head)
    ring._next_avail = (ring._next_avail + (jump if jump < 0 else 0)) & 0xFFFF
    ring.publish()
    machine.registers.notify(0)
    assert machine.registers.status in (15, 15 | at.STATUS_NEEDS_RESET)
    assert len(machine.disk.calls) <= 64 * 33
    machine.ram.extend(b"")  # no view is open
    machine.registers.status = 0
    assert machine.registers.status == 0


HEADER = 0x8010_0000


def near_usual(kind: int) -> list[list[int]]:
    """The usual chain's fields, and every variant that differs from it in one of them."""
    flags = 3 if kind == at.VIRTIO_BLK_T_IN else 1
    fields: list[tuple[int, tuple[int, ...]]] = [
        (HEADER, (0, 1 << 63)),
        (16, (15, 17)),
        (1, (0, 2, 4)),
        (1, (0, 2, 99)),
        (0x8020_0000, (0x803F_FFFF, 5, (1 << 64) - 1)),
        (1024, (0, 511, 1 << 31)),
        (flags, (0, 1, 2, 3, 7)),
        (2, (0, 1, 3, 0xFFFF)),
        (HEADER + 16, (0, 0x8040_0000)),
        (1, (0, 2)),
        (2, (0, 1, 3, 6)),
        (0, (1, 99)),
    ]
    chains = [[value for value, _ in fields]]
    for position, (_, others) in enumerate(fields):
        for other in others:
            chains.append([*chains[0][:position], other, *chains[0][position + 1 :]])
    return chains


@pytest.mark.parametrize("options", [{}, {"read_only": True}, {"driver": {"features": 1 << 32}}])
@pytest.mark.parametrize("indirect", [None, 48, 32, 64])
@pytest.mark.parametrize("kind", [0, 1, 4, 99])
def test_the_express_way_is_the_long_way(
    make_machine: Any, kind: int, indirect: int | None, options: dict[str, Any]
) -> None:
    """The same rings, with the short cut for usual requests and without: the same in every byte."""
    machines = [make_machine(**options), make_machine(**options)]
    machines[1].device.make_express = lambda queue, ring: None
    cases = [(chain, 3, None) for chain in near_usual(kind)]
    usual = cases[0][0]
    cases += [(usual, sector, None) for sector in (0, 2046, 2047, 2048, 1 << 63)]
    cases += [(usual, 3, OSError(5, "I/O"))]
    for chain, sector, error in cases:
        for machine in machines:
            run_chain(machine, kind, sector, chain, indirect, error)
        ends = [
            (each.ram, each.disk.content, each.disk.calls, each.levels, each.device.state)
            for each in machines
        ]
        assert ends[0] == ends[1], (chain, sector, error)
    assert machines[0].disk.calls or kind == 99 or options or indirect in (32, 64)


def run_chain(
    machine: Any,
    kind: int,
    sector: int,
    chain: list[int],
    indirect: int | None,
    error: Exception | None,
) -> None:
    """Bring the device up afresh and have it do this chain."""
    machine.arena.give_back(machine.base)
    machine.driver.start()
    machine.disk.error = error
    machine.ram[0x20_0000:0x20_1000] = b"r" * 4096
    machine.memory.write(HEADER, at.LITTLE.blk_request.pack(kind, 0, sector) + b"\xff")
    ring = machine.driver.ring
    descriptors = [chain[start : start + 4] for start in (0, 4, 8)]
    if indirect is None:
        for index, fields in enumerate(descriptors):
            ring.set_descriptor(index, *fields)
    else:
        entries = b"".join(ring.descriptor(*fields) for fields in descriptors)
        machine.memory.write(0x8018_0000, entries)
        ring.set_descriptor(0, 0x8018_0000, indirect, at.VIRTQ_DESC_F_INDIRECT, 0)
    ring.offer(0)
    ring.publish()
    machine.registers.notify(0)


@SETTINGS
@given(
    accesses=st.lists(
        st.tuples(
            st.booleans(),
            st.one_of(
                st.sampled_from(range(0, 0x100, 4)), st.integers(0, 0x220), st.just(at.MMIO_STATUS)
            ),
            st.sampled_from([4, 4, 4, 1, 2, 8]),
            WORDS,
        ),
        max_size=60,
    ),
    legacy=st.booleans(),
    notify=st.sampled_from(["inline", "deferred"]),
)
def test_any_register_access_is_survived(
    make_machine: Any, accesses: list[tuple[bool, int, int, int]], legacy: bool, notify: str
) -> None:
    machine = make_machine(legacy=legacy, notify=notify)
    for is_read, offset, size, value in accesses:
        if is_read:
            assert 0 <= machine.mmio.read(offset, size) < 1 << 8 * size
        else:
            machine.mmio.write(offset, size, value & (1 << 8 * size) - 1)
        machine.mmio.poll()
    machine.driver.start()
    machine.driver.flush()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "zero", "flush", "discard"]),
        st.integers(0, 2047),
        st.integers(1, 24),
        st.integers(0, 255),
        st.lists(st.integers(1, 700), max_size=5),
        st.sampled_from([None, 0, 1]),
    ),
    max_size=40,
)


@SETTINGS
@given(
    operations=OPERATIONS,
    memory=st.sampled_from(["buffer", "callbacks"]),
    legacy=st.booleans(),
    notify=st.sampled_from(["inline", "deferred"]),
)
def test_the_device_is_its_disk(
    make_started: Any, operations: list[Any], memory: str, legacy: bool, notify: str
) -> None:
    machine = make_started(memory=memory, legacy=legacy, notify=notify, queue_size=64)
    model = bytearray(1 << 20)
    driver = machine.driver
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
