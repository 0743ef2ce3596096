"""Worker threads: requests side by side, completions in any order, and what waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyvirtio import BackendError, ErrorPolicy, GuestMemory, VirtioBlk, VirtioMmio
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Arena, BlockDriver

IN, OUT, FLUSH = at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_FLUSH
PATIENCE = 30
"""Seconds after which a test that waits has failed."""


class Gate:
    """Holds requests up, at chosen offsets, until they are let go."""

    def __init__(self, disk: Any) -> None:
        self.closed: dict[int, threading.Event] = {}
        self.entered = threading.Semaphore(0)
        self.most = self.now = 0
        self._lock = threading.Lock()
        self._original = disk._note
        disk._note = self._note

    def hold(self, sector: int) -> None:
        self.closed[sector * 512] = threading.Event()

    def let_go(self, sector: int) -> None:
        self.closed[sector * 512].set()

    def wait_for_one(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)

    def _note(self, *call: Any) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        event = self.closed.get(call[1]) if len(call) > 1 else None
        if event is not None:
            self.entered.release()
            assert event.wait(PATIENCE)
        with self._lock:
            self.now -= 1
        self._original(*call)


@pytest.fixture
def make(make_machine: Any) -> Iterator[Callable[..., Any]]:
    machines = []

    def make(**options: Any) -> Any:
        options.setdefault("io_threads", 3)
        machine = make_machine(**options)
        machine.interrupted = threading.Event()
        machine.mmio._line.callback = lambda level: machine.interrupted.set()
        machine.gate = Gate(machine.disk)
        machine.done = {}
        machine.driver._wait = lambda: machine.interrupted.wait(PATIENCE)
        machine.driver.start()
        machines.append(machine)
        return machine

    yield make
    for machine in machines:
        for event in machine.gate.closed.values():
            event.set()
        machine.device.detach()


def wait_for(machine: Any, *heads: int) -> Any:
    """What came back, when all of ``heads`` have."""
    while True:
        machine.done |= machine.driver.collect()
        if all(head in machine.done for head in heads):
            return machine.done
        assert machine.interrupted.wait(PATIENCE)
        machine.interrupted.clear()


def write(machine: Any, sector: int, letter: bytes = b"w") -> int:
    head = machine.driver.submit(OUT, sector, letter * 512)
    machine.driver.kick()
    return int(head)


@pytest.fixture(
    params=[{}, {"packed": True}, {"memory": "callbacks"}, {"notify": "deferred"}], ids=str
)
def machine(request: pytest.FixtureRequest, make: Any) -> Any:
    return make(**request.param)


def test_requests_of_one_queue_run_side_by_side_in_any_order(machine: Any) -> None:
    machine.gate.hold(0)
    first = write(machine, 0)
    machine.gate.wait_for_one()
    second = write(machine, 1)
    assert list(wait_for(machine, second)) == [second]
    machine.gate.let_go(0)
    done = wait_for(machine, first)
    assert [done[first].status, done[second].status] == [0, 0]


def test_registers_answer_while_a_request_is_under_way(machine: Any) -> None:
    machine.gate.hold(0)
    head = write(machine, 0)
    machine.gate.wait_for_one()
    assert machine.registers.status == 15
    assert machine.driver.capacity == 2048
    machine.gate.let_go(0)
    wait_for(machine, head)


@pytest.mark.parametrize("packed", [False, True])
def test_in_order_keeps_the_order(make: Any, packed: bool) -> None:
    machine = make(in_order=True, packed=packed)
    machine.gate.hold(0)
    heads = [write(machine, 0)]
    machine.gate.wait_for_one()
    heads += [write(machine, number) for number in range(1, 5)]
    service = machine.device.service
    while True:  # until a thread has looked at the queue, and left it
        with machine.device.lock:
            if not service._kicked:
                assert len(service._inside) == 1
                break
    machine.gate.let_go(0)
    assert list(wait_for(machine, *heads)) == heads
    assert machine.gate.most == 1
    assert [call[1] for call in machine.disk.calls] == [0, 512, 1024, 1536, 2048]


def test_pause_waits_and_resume_loses_no_kick(machine: Any) -> None:
    machine.gate.hold(0)
    first = write(machine, 0)
    machine.gate.wait_for_one()
    paused = threading.Event()
    thread = threading.Thread(target=lambda: (machine.device.pause(), paused.set()))
    thread.start()
    while not machine.device.paused:
        pass
    second = write(machine, 1)
    assert not paused.is_set()
    machine.gate.let_go(0)
    thread.join(PATIENCE)
    assert paused.is_set()
    assert list(wait_for(machine, first)) == [first]
    assert machine.device.service.idle()
    machine.device.resume()
    assert wait_for(machine, second)[second].status == 0


def test_a_reset_waits_and_nothing_is_written_after(machine: Any) -> None:
    machine.gate.hold(0)
    write(machine, 0)
    machine.gate.wait_for_one()
    thread = threading.Thread(target=setattr, args=(machine.registers, "status", 0))
    thread.start()
    while machine.device.queues[0].ring is not None:
        pass
    assert machine.registers.status == 15
    before = bytes(machine.ram)
    machine.gate.let_go(0)
    thread.join(PATIENCE)
    assert machine.registers.status == 0
    status = next(iter(machine.driver._pending.values())).status - machine.base
    used = machine.driver.ring.used - machine.base
    after = bytes(machine.ram)
    assert before[:status] + before[status + 1 :] == after[:status] + after[status + 1 :]
    assert machine.memory.read(used + machine.base, 4) is not None


def test_a_stopped_queue_has_used_what_it_had_taken(machine: Any) -> None:
    machine.gate.hold(0)
    head = write(machine, 0)
    machine.gate.wait_for_one()
    thread = threading.Thread(target=machine.device.stop_queue, args=(0,))
    thread.start()
    machine.gate.let_go(0)
    thread.join(PATIENCE)
    assert list(machine.driver.collect()) == [head]
    state = machine.device.queue_state(0)
    assert state.next_avail == state.used_index


def test_what_is_stopped_is_tried_again(make: Any) -> None:
    machine = make(errors=ErrorPolicy(writes="stop"))
    stopped = threading.Event()
    machine.device.on_stop = lambda error: stopped.set()
    machine.disk.error = BackendError(28, "the test's disk is full")
    heads = [machine.driver.submit(OUT, number, b"k" * 512) for number in range(5)]
    machine.driver.kick()
    assert stopped.wait(PATIENCE)
    machine.device.pause()
    machine.disk.error = None
    machine.device.resume()
    done = wait_for(machine, *heads)
    assert {done[head].status for head in heads} == {0}
    assert machine.disk.content[: 5 * 512] == b"k" * 5 * 512


def test_resume_may_come_from_the_stop_itself(make: Any) -> None:
    machine = make(errors=ErrorPolicy(writes="stop"))

    def mend(error: Exception) -> None:
        machine.disk.error = None
        machine.device.resume()

    machine.device.on_stop = mend
    machine.disk.error = BackendError(28, "the test's disk is full")
    heads = [machine.driver.submit(OUT, number, bytes(512)) for number in range(5)]
    machine.driver.kick()
    done = wait_for(machine, *heads)
    assert {done[head].status for head in heads} == {0}


def test_a_device_with_threads_is_saved_while_it_is_paused(make: Any, make_disk: Any) -> None:
    machine = make(errors=ErrorPolicy(writes="stop"))
    machine.gate.hold(0)
    head = write(machine, 0)
    machine.gate.wait_for_one()
    with pytest.raises(ValueError, match="inside"):
        machine.mmio.save_state(StateWriter())
    machine.disk.error = BackendError(28, "the test's disk is full")
    machine.gate.let_go(0)
    machine.device.pause()
    stream = StateWriter()
    machine.mmio.save_state(stream)
    memory = GuestMemory.from_buffer(bytearray(machine.ram), machine.base)
    device = VirtioBlk(make_disk(1 << 20), queue_size=16, io_threads=1)
    levels: list[bool] = []
    woken = threading.Event()
    mmio = VirtioMmio(device, memory, lambda level: (levels.append(level), woken.set()))
    mmio.load_state(StateReader(bytes(stream), name="disk", version=1))()
    assert woken.wait(PATIENCE)
    driver = machine.driver
    driver.memory = driver.ring.memory = memory
    assert driver.collect()[head].status == 0
    assert device.disk.content[:512] == b"w" * 512
    device.detach()


def test_a_device_with_threads_is_not_saved_while_it_may_serve(machine: Any) -> None:
    """None is under way; but one could be, before guest memory has been saved, too."""
    with pytest.raises(ValueError, match="while it is paused"):
        machine.mmio.save_state(StateWriter())
    machine.device.pause()
    machine.mmio.save_state(StateWriter())


def test_a_bug_below_stops_the_device_and_not_the_threads(machine: Any) -> None:
    machine.disk.error = RuntimeError("a bug")
    write(machine, 0)
    while not machine.registers.status & at.STATUS_NEEDS_RESET:
        machine.interrupted.wait(1)
    machine.disk.error = None
    machine.driver.start()
    head = write(machine, 0)
    machine.done.clear()
    assert wait_for(machine, head)[head].status == 0


def test_a_broken_ring_needs_a_reset(machine: Any) -> None:
    ring = machine.driver.ring
    if hasattr(ring, "offer"):
        ring.offer(9999)
    else:
        ring.put(0x10, 16, at.VIRTQ_DESC_F_INDIRECT | at.VIRTQ_DESC_F_NEXT)
        for _ in range(ring.size - 1):
            ring.put(0x10, 16, at.VIRTQ_DESC_F_NEXT)
    ring.publish()
    machine.registers.notify(0)
    while not machine.registers.load(at.MMIO_INTERRUPT_STATUS) & 2:
        machine.interrupted.wait(1)
    assert machine.registers.status & at.STATUS_NEEDS_RESET


def test_several_queues_and_many_requests(make_machine: Any) -> None:
    machine = make_machine(io_threads=3, num_queues=2, queue_size=64)
    machine.mmio._line.callback = lambda level: woken.set()
    woken = threading.Event()
    second = BlockDriver(
        machine.registers,
        machine.memory,
        Arena(machine.base + (2 << 20), 2 << 20),
        queue_index=1,
        queue_size=64,
    )
    machine.arena.end = machine.base + (2 << 20)
    first = machine.driver
    first.identify()
    first.negotiate()
    second.features = first.features
    first.set_up_queue()
    second.set_up_queue()
    machine.registers.status |= at.STATUS_DRIVER_OK
    drivers = (first, second)
    left = {each: list(range(number, 600, 2)) for number, each in enumerate(drivers)}
    waiting = dict.fromkeys(drivers, 0)
    while any(left.values()) or any(waiting.values()):
        for each in drivers:
            for sector in left[each][: 16 - waiting[each]]:
                each.submit(OUT, sector, bytes([sector & 0xFF]) * 512)
                left[each].remove(sector)
                waiting[each] += 1
            each.kick()
            done = each.collect()
            assert {completion.status for completion in done.values()} <= {0}
            waiting[each] -= len(done)
        if all(waiting.values()):
            woken.wait(0.01)
            woken.clear()
    machine.device.detach()
    for sector in range(600):
        assert machine.disk.content[sector * 512] == sector & 0xFF


def test_close_ends_the_threads(make: Any) -> None:
    others = set(threading.enumerate())
    machine = make(io_threads=2)
    head = write(machine, 0)
    wait_for(machine, head)
    assert set(threading.enumerate()) - others
    machine.device.detach()
    assert not set(threading.enumerate()) - others


@pytest.mark.parametrize("options", [{"io_threads": -1}, {"io_threads": 1, "strict": True}])
def test_threads_that_cannot_be(make_disk: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="io_threads"):
        VirtioBlk(make_disk(512), **options)


def test_the_emulator_is_called_under_no_lock_for_needs_reset(make: Any) -> None:
    """An emulator with a lock of its own would be locked up: one thread in each."""
    machine = make()
    free = []

    def called(level: bool) -> None:
        def try_it() -> None:
            free.append(machine.device.lock.acquire(timeout=2))
            machine.device.lock.release()

        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join(PATIENCE)
        machine.interrupted.set()

    machine.mmio._line.callback = called
    machine.driver.ring.offer(9999)
    machine.driver.ring.publish()
    machine.registers.notify(0)
    assert machine.interrupted.wait(PATIENCE)
    assert free == [True]


def test_no_interrupt_comes_after_a_reset_bf_28(make: Any) -> None:
    """The thread that has used a buffer is slow to tell of it, and the driver quick to reset."""
    machine = make()
    told, go_on = threading.Event(), threading.Event()
    tell = machine.device.service._tell

    def slow(*arguments: Any) -> None:
        if arguments[1]:
            told.set()
            assert go_on.wait(PATIENCE)
        tell(*arguments)

    machine.device.service._tell = slow
    write(machine, 0)
    assert told.wait(PATIENCE)
    machine.interrupted.clear()
    machine.registers.status = 0
    go_on.set()
    while machine.device.service._busy:
        pass
    assert machine.registers.load(at.MMIO_INTERRUPT_STATUS) == 0
    assert not machine.mmio.irq_level


def test_a_disk_that_shrinks_under_a_request_answers_ioerr(machine: Any) -> None:
    machine.gate.hold(2000)
    original = machine.disk._writev

    def late(offset: int, views: Any, length: int) -> None:
        machine.disk.truncate(1 << 19, shrink=True)
        machine.disk.writev(offset, views)

    machine.disk._writev = late
    head = write(machine, 2000)
    machine.gate.let_go(2000)
    assert wait_for(machine, head)[head].status == at.VIRTIO_BLK_S_IOERR
    machine.disk._writev = original
    assert not machine.registers.status & at.STATUS_NEEDS_RESET
    machine.done.clear()
    head = write(machine, 1)
    assert wait_for(machine, head)[head].status == 0


def test_a_device_closed_from_a_threads_own_callback_leaves_no_thread(make: Any) -> None:
    machine = make()
    closed: list[threading.Thread] = []

    def close(level: bool) -> None:
        threads = list(machine.device.service._threads)
        machine.device.detach()
        closed.extend(threads)

    machine.mmio._line.callback = close
    write(machine, 0)
    deadline = time.monotonic() + PATIENCE
    while not closed or any(each.is_alive() for each in closed):
        assert time.monotonic() < deadline, closed
        time.sleep(0.01)
