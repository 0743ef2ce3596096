"""What becomes of requests that the disk cannot do: reported, ignored, or kept for a retry."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from pyvirtio import BackendError, ErrorPolicy, GuestMemory, MemoryDisk, VirtioBlk, VirtioMmio
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Registers

IN, OUT, FLUSH = at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_FLUSH
STOP = ErrorPolicy(reads="stop", writes="stop")
KINDS = [
    {},
    {"memory": "callbacks"},
    {"packed": True},
    {"packed": True, "in_order": True},
    {"notify": "deferred"},
]


@pytest.fixture(params=KINDS, ids=str)
def make(request: pytest.FixtureRequest, make_started: Any) -> Any:
    def make(policy: ErrorPolicy, **options: Any) -> Any:
        machine = make_started(errors=policy, **request.param, **options)
        machine.stops = []
        machine.device.on_stop = machine.stops.append
        return machine

    return make


def fail(machine: Any, number: int = errno.EIO) -> None:
    machine.disk.error = BackendError(number, "the test's error")


def finish(machine: Any) -> Any:
    machine.mmio.poll()
    return machine.driver.collect()


def submit(machine: Any) -> list[int]:
    """A write, a read, a flush and a write."""
    driver = machine.driver
    heads = [
        driver.submit(OUT, 0, b"w" * 512),
        driver.submit(IN, 1, incoming=512),
        driver.submit(FLUSH),
        driver.submit(OUT, 2, b"x" * 512),
    ]
    driver.kick()
    return heads


def test_report_is_the_default(make: Any) -> None:
    machine = make(ErrorPolicy())
    fail(machine)
    heads = submit(machine)
    done = finish(machine)
    assert [(done[head].status, done[head].used_length) for head in heads] == [(1, 1)] * 4
    assert not machine.device.paused


def test_ignore_answers_that_all_went_well(make: Any) -> None:
    machine = make(ErrorPolicy(reads="ignore", writes="ignore"))
    fail(machine)
    heads = submit(machine)
    done = finish(machine)
    answers = [(done[head].status, done[head].used_length) for head in heads]
    assert answers == [(0, 1), (0, 513), (0, 1), (0, 1)]


def test_stop_keeps_the_request_and_tries_it_again(make: Any) -> None:
    machine = make(STOP)
    fail(machine)
    heads = submit(machine)
    assert finish(machine) == {}
    assert machine.device.paused
    assert [each.errno for each in machine.stops] == [errno.EIO]
    machine.device.resume()  # the error is there still
    assert finish(machine) == {}
    assert machine.device.paused
    assert len(machine.stops) == 2
    machine.disk.error = None
    machine.device.resume()
    done = finish(machine)
    assert list(done) == heads
    assert {each.status for each in done.values()} == {0}
    assert machine.disk.content[:512] == b"w" * 512
    assert machine.disk.content[1024:1536] == b"x" * 512
    machine.driver.write(3, b"y" * 512)


def test_reads_and_writes_have_policies_of_their_own(make: Any) -> None:
    machine = make(ErrorPolicy(reads="report", writes="stop"))
    fail(machine)
    head = machine.driver.submit(IN, 0, incoming=512)
    machine.driver.kick()
    assert finish(machine)[head].status == 1
    machine.driver.submit(FLUSH)
    machine.driver.kick()
    assert finish(machine) == {}
    assert machine.device.paused


def test_no_space_has_a_policy_of_its_own(make: Any) -> None:
    machine = make(ErrorPolicy(no_space="stop"))
    fail(machine)
    head = machine.driver.submit(OUT, 0, bytes(512))
    machine.driver.kick()
    assert finish(machine)[head].status == 1
    fail(machine, errno.ENOSPC)
    head = machine.driver.submit(OUT, 0, bytes(512))
    machine.driver.kick()
    assert finish(machine) == {}
    machine.disk.error = None
    machine.device.resume()
    assert finish(machine)[head].status == 0


def test_a_reset_forgets_what_was_kept(make: Any) -> None:
    machine = make(STOP)
    fail(machine)
    submit(machine)
    finish(machine)
    machine.disk.error = None
    machine.driver.start()
    machine.disk.calls.clear()
    machine.device.resume()
    machine.mmio.poll()
    assert machine.disk.calls == []
    machine.driver.flush()


def test_the_drivers_own_errors_stop_nothing(make: Any) -> None:
    machine = make(STOP)
    head = machine.driver.submit(IN, 1 << 40, incoming=512)
    machine.driver.kick()
    assert finish(machine)[head].status == 1
    assert not machine.device.paused


def test_what_is_kept_goes_along_with_the_device(make: Any, make_disk: Any) -> None:
    machine = make(STOP)
    fail(machine)
    heads = submit(machine)
    finish(machine)
    stream = StateWriter()
    machine.mmio.save_state(stream)
    disk = make_disk(1 << 20)
    ram = bytearray(machine.ram)
    memory = GuestMemory.from_buffer(ram, machine.base)
    features = machine.device.offered_features
    device = VirtioBlk(
        disk,
        queue_size=16,
        packed=bool(features >> at.VIRTIO_F_RING_PACKED & 1),
        in_order=bool(features >> at.VIRTIO_F_IN_ORDER & 1),
        errors=STOP,
    )
    mmio = VirtioMmio(device, memory)
    reader = StateReader(bytes(stream), name="disk", version=mmio.state_version)
    adopt = mmio.load_state(reader)
    reader.end()
    adopt()
    driver = machine.driver
    driver.registers = Registers(mmio.read, mmio.write)
    driver.memory = driver.ring.memory = memory
    mmio.poll()
    device.kick(0)
    done = driver.collect()
    assert list(done) == heads
    assert {each.status for each in done.values()} == {0}
    assert disk.content[:512] == b"w" * 512


@pytest.mark.parametrize("policy", [ErrorPolicy(), STOP])
def test_a_disk_that_is_closed_answers_ioerr(make: Any, policy: ErrorPolicy) -> None:
    """Whatever the policy: it will not come back."""
    machine = make(policy)
    machine.driver.write(0, b"w" * 512)
    machine.disk.close()
    heads = submit(machine)
    done = finish(machine)
    assert [done[head].status for head in heads] == [1] * 4


def test_a_disk_closed_below_another(make_started: Any) -> None:
    from pyvirtio import ZonedDisk

    below = MemoryDisk(1 << 20)
    machine = make_started(disk=ZonedDisk(below, zone_size=1 << 20, conventional=1))
    machine.driver.write(0, b"w" * 512)
    below.close()
    done = machine.driver.request(IN, 0, incoming=512)
    assert (done.status, done.used_length) == (1, 1)


@pytest.mark.parametrize("options", [{"reads": "enospc"}, {"writes": ""}, {"no_space": "x"}])
def test_a_policy_that_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        ErrorPolicy(**options)
