"""Who may be at work on an image at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvirtio.qcow2.requests import RequestGate


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


class Guest:
    """A thread that is inside a gate until it is told to leave."""

    def __init__(self, gate: RequestGate) -> None:
        self.inside = threading.Event()
        self._go = threading.Event()
        self.gate = gate
        self.thread = in_thread(self._run)

    def _run(self) -> None:
        with self.gate.lock:
            self.gate.enter()
        self.inside.set()
        # Out of the package's sight, this counts as a thread that was interrupted: a second.
        self._go.wait(20)
        self.gate.leave()

    def leave(self) -> None:
        self._go.set()
        self.thread.join(20)


def entered(gate: RequestGate) -> Guest:
    guest = Guest(gate)
    assert guest.inside.wait(20)
    return guest


def test_what_waits_for_the_requests_inside_is_called_when_they_have_left() -> None:
    gate = RequestGate()
    first = entered(gate)
    called: list[str] = []
    with gate.lock:
        gate.when_left(lambda: called.append("now"))
    assert not called
    first.leave()
    assert called == ["now"]


def test_it_does_not_wait_for_requests_that_came_later() -> None:
    gate = RequestGate()
    first = entered(gate)
    called: list[str] = []
    with gate.lock:
        gate.when_left(lambda: called.append("now"))
    second = entered(gate)
    first.leave()
    assert called == ["now"]
    second.leave()


def test_with_nobody_inside_it_is_called_at_once() -> None:
    gate = RequestGate()
    called: list[str] = []
    with gate.lock:
        gate.when_left(lambda: called.append("now"))
    assert called == ["now"]


def test_nobody_enters_while_another_is_alone() -> None:
    gate = RequestGate()
    gate.close()
    guest = Guest(gate)
    assert not guest.inside.wait(0.05)
    gate.open()
    assert guest.inside.wait(20)
    guest.leave()


def test_alone_means_after_those_inside_have_left() -> None:
    gate = RequestGate()
    guest = entered(gate)
    alone = threading.Event()

    def be_alone() -> None:
        with gate.exclusive():
            alone.set()

    thread = in_thread(be_alone)
    assert not alone.wait(0.05)
    guest.leave()
    assert alone.wait(20)
    thread.join(20)


def waits_for(first: int, count: int) -> bool:
    """Whether a request for these clusters waits for an allocation of clusters 10 to 14."""
    gate = RequestGate()
    gate.lock.acquire()
    allocation = gate.begin_allocation(10, 5)
    done = threading.Event()
    answers: list[bool] = []

    def work() -> None:
        with gate.lock:
            answers.append(gate.wait_for_allocations(first, count))
        done.set()

    in_thread(work)
    gate.lock.release()
    done.wait(0.05)
    with gate.lock:
        gate.end_allocation(allocation)
    assert done.wait(20)
    return answers[0]


def test_only_requests_for_the_same_clusters_wait_for_an_allocation() -> None:
    assert [waits_for(8, 2), waits_for(15, 3)] == [False, False]
    assert [waits_for(14, 1), waits_for(8, 3), waits_for(11, 1)] == [True, True, True]
