"""The event log: in order, checked, and whole up to where its writer died."""

from __future__ import annotations

import io
import struct
import zlib

import pytest

from pyvirtio.errors import ImageError, UnsupportedError
from pyvirtio.machine.log import EventLog, ReplayError

EVENTS = [(0, 1, b"first"), (5, 2, b""), (5, 1, b"same moment"), (1 << 60, 65535, bytes(1000))]


@pytest.fixture
def log() -> EventLog:
    log = EventLog()
    for event in EVENTS:
        log.append(*event)
    return log


def written(log: EventLog) -> bytes:
    file = io.BytesIO()
    log.write(file)
    return file.getvalue()


def test_what_was_written_is_read(log):
    found = EventLog.read(io.BytesIO(written(log)))
    assert [tuple(found[n]) for n in range(len(found))] == EVENTS


def test_log_that_ends_anywhere_is_good_up_to_its_last_whole_event(log):
    data = written(log)
    lengths = [len(EventLog.read(io.BytesIO(data[:end]))) for end in range(16, len(data) + 1)]
    assert sorted(set(lengths)) == [0, 1, 2, 3, 4]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("at", range(60))
def test_any_changed_byte_is_noticed(log, at):
    data = bytearray(written(log))
    data[at] ^= 1
    try:
        found = EventLog.read(io.BytesIO(data))
    except ImageError:
        return
    # Only a length can make an event look unfinished.
    assert len(found) < len(EVENTS)


def test_missing_event_is_noticed(log):
    whole, fewer = written(log), EventLog()
    fewer.append(*EVENTS[0])
    cut = len(written(fewer))
    second = 14 + 4
    with pytest.raises(ImageError, match="Event 1 of the log has a wrong checksum"):
        EventLog.read(io.BytesIO(whole[:cut] + whole[cut + second :]))


def test_newer_log_is_refused():
    header = struct.pack("<8sI", b"\x93pyvlog\n", 2)
    with pytest.raises(UnsupportedError, match="version 2"):
        EventLog.read(io.BytesIO(header + struct.pack("<I", zlib.crc32(header))))


def test_time_does_not_go_back(log):
    with pytest.raises(ValueError, match="position 7"):
        log.append(7, 1, b"")


def test_cursor_starts_at_a_position_and_gives_events_in_order(log):
    cursor = log.cursor(5)
    assert cursor.take(5, 2) == b""
    assert cursor.take(5, 1) == b"same moment"
    assert cursor.peek().position == 1 << 60


@pytest.mark.parametrize(("position", "kind"), [(4, 2), (5, 1), (6, 2)])
def test_replay_that_wants_something_else_is_an_error(log, position, kind):
    with pytest.raises(ReplayError):
        log.cursor(1).take(position, kind)


def test_log_that_takes_another_way_forgets_what_came_after(log):
    log.truncate(log.index(5))
    log.append(3, 9, b"new")
    assert [log[n].kind for n in range(len(log))] == [1, 9]
