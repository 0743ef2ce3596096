"""Counters and traces: what they say of a device, and that it works the same without them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyvirtio.virtio import layout as at
from pyvirtio.virtio.counters import Counters, TypeCounters
from pyvirtio.virtio.tracing import RequestTrace

IN, OUT, FLUSH = at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_FLUSH
KINDS = [{}, {"packed": True}, {"notify": "deferred"}, {"io_threads": 2}]


@pytest.fixture(params=KINDS, ids=str)
def machine(request: pytest.FixtureRequest, make_machine: Any) -> Any:
    machine = make_machine(**request.param)
    machine.driver._wait = lambda: (machine.mmio.poll(), machine.device.service.drain())
    machine.driver.start()
    yield machine
    machine.device.detach()


def work(machine: Any) -> None:
    """Two writes, a read that fails, a flush."""
    driver = machine.driver
    requests = [(OUT, 0, bytes(512), 0), (OUT, 1, bytes(1024), 0), (IN, 1 << 40, b"", 512)]
    for request in [*requests, (FLUSH, 0, b"", 0)]:
        head = driver.submit(*request)
        driver.kick()
        while head not in driver.collect():
            driver._wait()


def test_requests_are_counted_by_type(machine: Any) -> None:
    counters = Counters()
    stop = machine.device.observe(counters)
    work(machine)
    types = counters.types
    assert {name: (each.requests, each.errors, each.bytes) for name, each in types.items()} == {
        "OUT": (2, 0, 1536),
        "IN": (1, 1, 0),
        "FLUSH": (1, 0, 0),
    }
    assert sum(types["OUT"].histogram) == 2
    assert counters.kicks == 4
    assert counters.interrupts_sent + counters.interrupts_suppressed >= 4
    assert "FLUSH" in str(counters)
    assert json.loads(json.dumps(counters.as_dict()))["types"]["OUT"]["requests"] == 2
    stop()
    stop()
    work(machine)
    assert counters.kicks == 4


def test_interrupts_that_the_driver_did_not_want_are_counted(make_started: Any) -> None:
    features = 1 << at.VIRTIO_F_VERSION_1
    machine = make_started(driver={"features": features})
    counters = Counters()
    machine.device.observe(counters)
    machine.driver.flush()
    machine.driver.ring.want_interrupts(False)
    machine.driver.flush()
    assert (counters.interrupts_sent, counters.interrupts_suppressed) == (1, 1)


def test_percentiles_come_from_the_histogram() -> None:
    counters = TypeCounters(requests=100)
    counters.histogram[10], counters.histogram[20] = 99, 1
    assert counters.percentile(0.99) == 1 << 10
    assert counters.percentile(1) == 1 << 20
    assert TypeCounters().percentile(0.5) == 0


def test_a_device_that_is_not_watched_has_its_short_way(make_started: Any) -> None:
    machine = make_started()
    queue = machine.device.queues[0]
    assert queue.express is not None
    stop = machine.device.observe(Counters())
    assert queue.express is None
    stop()
    assert queue.express is not None


def test_several_watch_at_a_time(machine: Any) -> None:
    first, second = Counters(), Counters()
    machine.device.observe(first)
    stop = machine.device.observe(second)
    machine.driver._wait()
    work(machine)
    stop()
    work(machine)
    assert (first.kicks, second.kicks) == (8, 4)


def test_a_trace_as_json_lines(machine: Any, tmp_path: Any) -> None:
    trace = RequestTrace()
    machine.device.observe(trace)
    work(machine)
    trace.save_jsonl(tmp_path / "trace.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [(each["type"], each["sector"], each["length"], each["status"]) for each in lines] == [
        ("OUT", 0, 512, 0),
        ("OUT", 1, 1024, 0),
        ("IN", 1 << 40, 0, 1),
        ("FLUSH", 0, 0, 0),
    ]
    assert all(each["started"] <= each["finished"] for each in lines)


def test_a_trace_for_perfetto(machine: Any, tmp_path: Any) -> None:
    trace = RequestTrace(limit=3)
    machine.device.observe(trace)
    work(machine)
    trace.save_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    bars = [each for each in events if each["ph"] == "X"]
    assert [each["name"] for each in bars] == ["OUT", "IN", "FLUSH"]
    assert all(each["ts"] >= 0 and each["dur"] >= 0 for each in bars)
    assert bars[0]["args"] == {"queue": 0, "sector": 1, "length": 1024, "status": 0}


def test_an_empty_trace_can_be_saved(tmp_path: Any) -> None:
    RequestTrace().save_chrome(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
