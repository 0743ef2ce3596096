"""The short way for a whole kick, beside the long way: the same in every byte."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Buffer

IN, OUT, FLUSH = at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_FLUSH
NO_EVENT_INDEX = {"features": 1 << at.VIRTIO_F_VERSION_1}


def pair(make_machine: Any, **options: Any) -> list[Any]:
    """Two machines, the second without the short way."""
    machines = [make_machine(**options), make_machine(**options)]
    machines[1].device.make_express = lambda queue, ring: None
    for machine in machines:
        machine.driver.start()
        machine.disk.content[:] = bytes(range(256)) * (len(machine.disk.content) // 256)
    assert machines[0].device.queues[0].express is not None
    assert machines[1].device.queues[0].express is None
    return machines


def same(machines: list[Any]) -> bool:
    first, second = (
        (each.ram, each.disk.content, each.disk.calls, each.levels, each.device.state)
        for each in machines
    )
    return bool(first == second)


def put(machine: Any, places: tuple[int, int, int], kind: int, sector: int, data: int) -> None:
    """A request of 1 KiB at address ``data`` in the descriptors ``places``."""
    header = data - 4096
    machine.memory.write(header, at.LITTLE.blk_request.pack(kind, 0, sector) + b"\xff")
    machine.memory.write(data, bytes([sector & 0xFF]) * 1024)
    write = at.VIRTQ_DESC_F_WRITE if kind == IN else 0
    ring, (first, second, third) = machine.driver.ring, places
    ring.set_descriptor(first, header, 16, at.VIRTQ_DESC_F_NEXT, second)
    ring.set_descriptor(second, data, 1024, at.VIRTQ_DESC_F_NEXT | write, third)
    ring.set_descriptor(third, header + 16, 1, at.VIRTQ_DESC_F_WRITE, 0)
    ring.offer(first)


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize(
    "places",
    [(0, 1, 2), (2, 1, 0), (5, 9, 3), (5, 6, 9), (13, 14, 15), (14, 15, 0), (15, 0, 1), (3, 15, 4)],
)
def test_descriptors_anywhere_in_the_table(
    make_machine: Any, places: tuple[int, int, int], kind: int
) -> None:
    machines = pair(make_machine)
    for machine in machines:
        put(machine, places, kind, 5, 0x8010_1000)
        machine.driver.ring.publish()
        machine.registers.notify(0)
    assert same(machines)
    assert machines[0].disk.calls == [("read" if kind == IN else "write", 5 * 512, 1024)]


@pytest.mark.parametrize("driver", [{}, NO_EVENT_INDEX])
def test_kicks_of_usual_and_other_requests(make_machine: Any, driver: dict[str, Any]) -> None:
    machines = pair(make_machine, driver=driver)
    chance = random.Random(3)
    for _ in range(200):
        kick = [(chance.choice([IN, OUT, FLUSH]), chance.randrange(2100)) for _ in range(5)]
        event = chance.randrange(10)
        for machine in machines:
            ring = machine.driver.ring
            ring.used_event = ring.used_index + event & 0xFFFF
            for number, (kind, sector) in enumerate(kick):
                first = 3 * number
                data = 0x8010_1000 + 0x2000 * number
                put(machine, (first, first + 1, first + 2), kind, sector, data)
            ring.publish()
            machine.registers.notify(0)
            machine.registers.take_interrupt()
        assert same(machines)


def test_where_a_ring_lies_is_known(make_machine: Any) -> None:
    machine = make_machine()
    machine.driver.start()
    queue = machine.device.queues[0]
    assert queue.express is not None
    assert queue.ring.lies_in(machine.base, machine.base + len(machine.ram))
    area = queue.state.device_area
    assert not queue.ring.lies_in(area + 4, machine.base + len(machine.ram))
    assert not queue.ring.lies_in(machine.base, area + 4)


def test_a_jump_of_the_available_index_breaks_the_device(make_machine: Any) -> None:
    machines = pair(make_machine)
    for machine in machines:
        ring = machine.driver.ring
        ring.add([Buffer(0x8010_0000, 16), Buffer(0x8010_0010, 1, True)])
        ring.publish()
        machine.memory.write(ring.available + 2, (17).to_bytes(2, "little"))
        machine.registers.notify(0)
        assert machine.registers.status & at.STATUS_NEEDS_RESET
    assert same(machines)


# -- packed queues -----------------------------------------------------------------------------


def put_packed(machine: Any, kind: int, sector: int, data: int, way: int) -> None:
    """A request of 1 KiB at address ``data``: in three descriptors, a table, or four."""
    header = data - 4096
    machine.memory.write(header, at.LITTLE.blk_request.pack(kind, 0, sector) + b"\xff")
    machine.memory.write(data, bytes([sector & 0xFF]) * 1024)
    room = 1024 if kind in (IN, OUT) else 0
    buffers = [
        Buffer(header, 16),
        Buffer(data, room, kind == IN),
        Buffer(header + 16, 1, True),
    ]
    ring = machine.driver.ring
    if way == 0:
        ring.add([each for each in buffers if each.length])
    elif way == 1:
        ring.add_indirect([each for each in buffers if each.length], header + 64)
    else:
        ring.add([Buffer(header, 9), Buffer(header + 9, 7), *buffers[1:]])


@pytest.mark.parametrize("size", [16, 31])
@pytest.mark.parametrize("driver", [{}, {"features": 5 << 32 | 1 << 28}])
def test_packed_kicks_of_usual_and_other_requests(
    make_machine: Any, size: int, driver: dict[str, Any]
) -> None:
    machines = pair(make_machine, packed=True, driver=driver, queue_size=32)
    for machine in machines:
        machine.driver.queue_size = size
        machine.driver.start()
    assert machines[0].device.queues[0].express is not None
    chance = random.Random(4)
    for _ in range(200):
        kick = [
            (chance.choice([IN, OUT, FLUSH]), chance.randrange(2100), chance.randrange(3))
            for _ in range(chance.randrange(1, 5))
        ]
        event = chance.randrange(size), chance.randrange(3)
        for machine in machines:
            ring = machine.driver.ring
            ring.driver_event = event
            for number, (kind, sector, way) in enumerate(kick):
                put_packed(machine, kind, sector, 0x8010_1000 + 0x2000 * number, way)
            ring.publish()
            machine.registers.notify(0)
            machine.registers.take_interrupt()
            assert len(ring.collect()) == len(kick)
        assert same(machines)


def test_a_packed_list_that_is_not_all_available_breaks_the_device(make_machine: Any) -> None:
    machines = pair(make_machine, packed=True)
    for machine in machines:
        ring = machine.driver.ring
        put_packed(machine, IN, 0, 0x8010_1000, 0)
        ring.publish()
        machine.memory.write(
            ring.descriptors + 16 + 14, (at.VIRTQ_DESC_F_NEXT).to_bytes(2, "little")
        )
        machine.registers.notify(0)
    assert same(machines)


@pytest.mark.parametrize("place", [0x8000_0000 - 512, 0x8040_0000 - 512])
@pytest.mark.parametrize("packed", [False, True])
def test_data_outside_ram_is_ioerr(make_machine: Any, place: int, packed: bool) -> None:
    machines = pair(make_machine, packed=packed)
    for machine in machines:
        header = machine.arena.take(32)
        machine.memory.write(header, at.LITTLE.blk_request.pack(IN, 0, 0) + b"\xff")
        ring = machine.driver.ring
        ring.add([Buffer(header, 16), Buffer(place, 1024, True), Buffer(header + 16, 1, True)])
        ring.publish()
        machine.registers.notify(0)
        assert machine.memory.read(header + 16, 1) == b"\1"
    assert same(machines)


def test_a_packed_lists_id_is_its_last_descriptors_pkd_35(make_machine: Any) -> None:
    machines = pair(make_machine, packed=True)
    for machine in machines:
        header, ring = machine.arena.take(32), machine.driver.ring
        machine.memory.write(header, at.LITTLE.blk_request.pack(IN, 0, 0) + b"\xff")
        next_one, write = at.VIRTQ_DESC_F_NEXT, at.VIRTQ_DESC_F_WRITE
        ring.put(header, 16, next_one, 7)
        ring.put(0x8010_0000, 512, next_one | write, 8)
        ring.put(header + 16, 1, write, 9)
        ring.publish()
        machine.registers.notify(0)
        assert ring.get_descriptor(0)[3] == 9
        assert machine.memory.read(header + 16, 1) == b"\0"
    assert same(machines)


def test_a_packed_table_has_to_be_negotiated_pkd_21(make_machine: Any) -> None:
    machines = pair(make_machine, packed=True, driver={"features": 5 << 32})
    for machine in machines:
        put_packed(machine, IN, 0, 0x8010_1000, 1)
        machine.driver.ring.publish()
        machine.registers.notify(0)
        assert machine.registers.status & at.STATUS_NEEDS_RESET
    assert same(machines)


def test_where_a_packed_ring_lies_is_known(make_machine: Any) -> None:
    machine = make_machine(packed=True)
    machine.driver.start()
    ring, area = machine.device.queues[0].ring, machine.device.queues[0].state.descriptor_area
    assert ring.lies_in(area, area + 16 * 16)
    assert not ring.lies_in(area + 16, area + 16 * 16)
    assert not ring.lies_in(area, area + 16 * 16 - 1)
