"""Every request type, through MMIO registers, over both kinds of guest memory (§5.2.6)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest

from pyvirtio.virtio import layout as at

OK, IOERR, UNSUPP = 0, 1, 2


def test_read_gives_the_sectors(started: Any) -> None:
    started.disk.content[512:2048] = data = os.urandom(1536)
    done = started.driver.request(at.VIRTIO_BLK_T_IN, 1, incoming=1536)
    assert (done.status, done.used_length, done.data) == (OK, 1537, data)


def test_write_changes_the_sectors_and_no_others(started: Any) -> None:
    data = os.urandom(1024)
    done = started.driver.request(at.VIRTIO_BLK_T_OUT, 3, data)
    assert (done.status, done.used_length) == (OK, 1)
    assert bytes(started.disk.content) == bytes(1536) + data + bytes((1 << 20) - 2560)


def test_flush_reaches_the_disk(started: Any) -> None:
    done = started.driver.request(at.VIRTIO_BLK_T_FLUSH)
    assert (done.status, done.used_length) == (OK, 1)
    assert started.disk.calls == [("flush",)]


def test_flush_out_is_a_flush_blk_118(started: Any) -> None:
    assert started.driver.request(at.VIRTIO_BLK_T_FLUSH_OUT).status == OK
    assert started.disk.calls == [("flush",)]


@pytest.mark.parametrize("serial", ["", "vd0", "x" * 19, "y" * 20])
def test_get_id_is_padded_with_nul_blk_108(make_started: Any, serial: str) -> None:
    machine = make_started(serial=serial)
    done = machine.driver.request(at.VIRTIO_BLK_T_GET_ID, incoming=20)
    assert (done.status, done.used_length) == (OK, 21)
    assert done.data == serial.encode().ljust(20, b"\0")


def test_get_id_into_a_short_buffer_gives_what_fits_blk_43(make_started: Any) -> None:
    machine = make_started(serial="0123456789")
    done = machine.driver.request(at.VIRTIO_BLK_T_GET_ID, incoming=4)
    assert (done.status, done.used_length, done.data) == (OK, 5, b"0123")


def test_get_id_into_a_long_buffer_writes_20_bytes_blk_43(make_started: Any) -> None:
    done = make_started(serial="s").driver.request(at.VIRTIO_BLK_T_GET_ID, incoming=32)
    assert (done.status, done.used_length) == (OK, 21)
    assert done.data == b"s".ljust(20, b"\0") + b"\xff" * 12


def test_a_longer_serial_is_refused(make_machine: Any) -> None:
    with pytest.raises(ValueError, match="20 characters"):
        make_machine(serial="z" * 21)


def test_discard_reaches_the_disk(started: Any) -> None:
    started.driver.discard(8, 16)
    assert started.disk.calls == [("discard", 4096, 8192)]


def test_discard_takes_several_ranges(started: Any) -> None:
    driver = started.driver
    done = driver.request(at.VIRTIO_BLK_T_DISCARD, 0, driver.segment(0, 1) + driver.segment(4, 2))
    assert (done.status, done.used_length) == (OK, 1)
    assert started.disk.calls == [("discard", 0, 512), ("discard", 2048, 1024)]


@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes_makes_zeroes_blk_72(started: Any, unmap: bool) -> None:
    started.disk.content[:] = b"\xee" * (1 << 20)
    started.driver.write_zeroes(3, 5, unmap=unmap)
    assert started.disk.calls == [("zeroes", 1536, 2560, unmap)]
    assert started.driver.read(2, 7) == b"\xee" * 512 + bytes(2560) + b"\xee" * 512


def test_discard_with_unmap_is_unsupported_blk_69(started: Any) -> None:
    segment = started.driver.segment(0, 1, 1)
    assert started.driver.request(at.VIRTIO_BLK_T_DISCARD, 0, segment).status == UNSUPP
    assert started.disk.calls == []


@pytest.mark.parametrize("kind", [at.VIRTIO_BLK_T_DISCARD, at.VIRTIO_BLK_T_WRITE_ZEROES])
@pytest.mark.parametrize("bit", [1, 7, 31])
def test_unknown_flags_are_unsupported_blk_68(make_started: Any, kind: int, bit: int) -> None:
    machine = make_started()
    segment = machine.driver.segment(0, 1, 1 << bit)
    assert machine.driver.request(kind, 0, segment).status == UNSUPP
    assert machine.disk.calls == []


@pytest.mark.parametrize("kind", [at.VIRTIO_BLK_T_DISCARD, at.VIRTIO_BLK_T_WRITE_ZEROES])
@pytest.mark.parametrize(
    ("sector", "count"), [(2047, 2), (2048, 1), ((1 << 64) - 1, 2), (0, 0x400000), (0, 1 << 31)]
)
def test_ranges_outside_the_disk_fail_whole(
    make_started: Any, kind: int, sector: int, count: int
) -> None:
    machine = make_started()
    good = machine.driver.segment(0, 1) if kind == at.VIRTIO_BLK_T_DISCARD else b""
    data = good + machine.driver.segment(sector, count)
    assert machine.driver.request(kind, 0, data).status == IOERR
    assert machine.disk.calls == []


@pytest.mark.parametrize("length", [1, 15, 17, 31])
def test_partial_ranges_fail_blk_42(make_started: Any, length: int) -> None:
    machine = make_started()
    assert machine.driver.request(at.VIRTIO_BLK_T_DISCARD, 0, bytes(length)).status == IOERR


def test_too_many_ranges_fail_blk_44_blk_46(make_started: Any) -> None:
    machine = make_started()
    driver = machine.driver
    for kind, offset in ((at.VIRTIO_BLK_T_DISCARD, 40), (at.VIRTIO_BLK_T_WRITE_ZEROES, 52)):
        most = machine.registers.config(offset, 4)
        assert driver.request(kind, 0, driver.segment(0, 1) * most).status == OK
        assert driver.request(kind, 0, driver.segment(0, 1) * (most + 1)).status == IOERR


@pytest.mark.parametrize("kind", [2, 3, 6, 7, 9, 10, 12, 14, 15, 16, 24, 26, 99, 0x100, 2**32 - 1])
def test_unknown_types_are_unsupported_blk_107(make_started: Any, kind: int) -> None:
    machine = make_started()
    done = machine.driver.request(kind, 0, bytes(512), 512)
    assert (done.status, done.used_length) == (UNSUPP, 1)


@pytest.mark.parametrize("kind", [at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT])
@pytest.mark.parametrize(
    ("sector", "count"), [(2048, 1), (2047, 2), (1 << 63, 1), ((1 << 64) - 1, 1), (1 << 55, 1)]
)
def test_access_beyond_capacity_fails_blk_37(
    started: Any, kind: int, sector: int, count: int
) -> None:
    size = 512 * count
    out, into = (b"", size) if kind == at.VIRTIO_BLK_T_IN else (bytes(size), 0)
    done = started.driver.request(kind, sector, out, into)
    assert (done.status, done.data) == (IOERR, b"\xff" * into)
    assert started.disk.calls == []


@pytest.mark.parametrize("length", [1, 511, 513, 1023])
@pytest.mark.parametrize("kind", [at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT])
def test_parts_of_sectors_fail_blk_41(make_started: Any, kind: int, length: int) -> None:
    machine = make_started()
    out, into = (b"", length) if kind == at.VIRTIO_BLK_T_IN else (bytes(length), 0)
    assert machine.driver.request(kind, 0, out, into).status == IOERR
    assert machine.disk.calls == []


def test_the_last_sector_can_be_used(started: Any) -> None:
    started.driver.write(2047, b"L" * 512)
    assert started.driver.read(2047, 1) == b"L" * 512


def test_data_in_the_wrong_direction_fails(started: Any) -> None:
    assert started.driver.request(at.VIRTIO_BLK_T_IN, 0, bytes(512)).status == IOERR
    assert started.driver.request(at.VIRTIO_BLK_T_OUT, 0, b"", 512).status == IOERR
    assert started.disk.calls == []


@pytest.mark.parametrize(
    "kind", [at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_DISCARD, at.VIRTIO_BLK_T_WRITE_ZEROES]
)
@pytest.mark.parametrize("accept", [True, False])
def test_a_read_only_device_writes_nothing_blk_66_blk_67(
    make_started: Any, kind: int, accept: bool
) -> None:
    features = -1 if accept else ~(1 << at.VIRTIO_BLK_F_RO)
    machine = make_started(read_only=True, driver={"features": features & (1 << 34) - 1})
    done = machine.driver.request(kind, 0, machine.driver.segment(0, 1) * 32)
    assert done.status in (IOERR, UNSUPP)
    if kind == at.VIRTIO_BLK_T_OUT:
        assert done.status == IOERR
    assert machine.disk.calls == []


def test_a_read_only_disk_makes_a_read_only_device(make_machine: Any, make_disk: Any) -> None:
    machine = make_machine(disk=make_disk(4096, read_only=True))
    assert machine.registers.offered_features() >> at.VIRTIO_BLK_F_RO & 1
    with pytest.raises(ValueError, match="read-only"):
        make_machine(disk=make_disk(4096, read_only=True), read_only=False)


def test_an_error_of_the_disk_is_ioerr(started: Any) -> None:
    started.disk.error = OSError(5, "broken")
    for kind in (at.VIRTIO_BLK_T_IN, at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_FLUSH):
        out = bytes(512) if kind == at.VIRTIO_BLK_T_OUT else b""
        into = 512 if kind == at.VIRTIO_BLK_T_IN else 0
        done = started.driver.request(kind, 0, out, into)
        assert (done.status, done.used_length) == (IOERR, 1)
    started.disk.error = None
    assert started.driver.read(0, 1) == bytes(512)


def test_a_closed_disk_is_ioerr(started: Any) -> None:
    started.disk.close()
    assert started.driver.request(at.VIRTIO_BLK_T_IN, 0, incoming=512).status == IOERR


def test_a_bug_in_the_disk_needs_a_reset(started: Any, caplog: Any) -> None:
    started.disk.error = ZeroDivisionError("a bug")
    started.driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    started.driver.kick()
    assert started.registers.status & at.STATUS_NEEDS_RESET
    assert "a bug" in caplog.text
    assert "Traceback" in caplog.text


def test_a_bug_in_the_disk_is_raised_under_strict(make_started: Any) -> None:
    machine = make_started(strict=True)
    machine.disk.error = ZeroDivisionError("a bug")
    machine.driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=512)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        machine.driver.kick()
    assert machine.registers.status & at.STATUS_NEEDS_RESET


def test_framing_means_nothing_vq_s_08(make_started: Any) -> None:
    """Header, data and status cut at every place, and merged."""
    for cut_out, cut_in in itertools.product((1, 8, 15, 16, 17, 272), (1, 511, 512)):
        machine = make_started()
        machine.disk.content[512:1024] = expected = os.urandom(512)
        driver = machine.driver
        done = driver.request(
            at.VIRTIO_BLK_T_IN, 1, incoming=512, cuts=[min(cut_out, 15), 16, cut_in]
        )
        assert (done.status, done.used_length, done.data) == (OK, 513, expected)
        data = os.urandom(512)
        done = driver.request(at.VIRTIO_BLK_T_OUT, 1, data, cuts=[cut_out, 100])
        assert (done.status, done.used_length) == (OK, 1)
        assert machine.disk.content[512:1024] == data


def test_header_byte_by_byte_vq_s_08(started: Any) -> None:
    started.driver.registers.status = 0
    machine = started
    machine.driver.queue_size = 16
    machine.driver.start()
    machine.disk.content[1024:1536] = b"H" * 512
    cuts = [2] * 8
    assert machine.driver.request(at.VIRTIO_BLK_T_IN, 2, incoming=512, cuts=cuts).data == b"H" * 512


@pytest.mark.parametrize("direct", [0, 1, 2])
def test_indirect_descriptors_vq_s_24(started: Any, direct: int) -> None:
    data = os.urandom(4096)
    driver = started.driver
    assert driver.request(at.VIRTIO_BLK_T_OUT, 8, data, indirect=direct).status == OK
    done = driver.request(
        at.VIRTIO_BLK_T_IN, 8, incoming=4096, cuts=[16, 512, 1024], indirect=direct
    )
    assert (done.status, done.used_length, done.data) == (OK, 4097, data)


def test_transfers_longer_than_the_bounce_buffer(make_started: Any, make_disk: Any) -> None:
    machine = make_started(memory="callbacks", disk=make_disk(1 << 22))
    machine.disk.content[:] = os.urandom(1 << 22)
    size = (1 << 20) + 3 * 512
    done = machine.driver.request(at.VIRTIO_BLK_T_IN, 1, incoming=size, cuts=[16, 700_000])
    assert (done.status, done.used_length) == (OK, size + 1)
    assert done.data == machine.disk.content[512 : 512 + size]
    data = os.urandom(size)
    assert machine.driver.request(at.VIRTIO_BLK_T_OUT, 5, data).status == OK
    assert machine.disk.content[5 * 512 : 5 * 512 + size] == data


def test_many_requests_in_one_kick(started: Any) -> None:
    driver = started.driver
    heads = [driver.submit(at.VIRTIO_BLK_T_OUT, each, bytes([each]) * 512) for each in range(5)]
    driver.kick()
    done = driver.collect()
    assert list(done) == heads
    assert [started.disk.content[512 * each] for each in range(5)] == list(range(5))


def test_the_ring_wraps(started: Any) -> None:
    for each in range(70):
        started.driver.write(each, bytes([each]) * 512)
    assert started.driver.read(69, 1) == bytes([69]) * 512


def test_the_indices_wrap_at_16_bits(make_started: Any) -> None:
    machine = make_started(queue_size=4, disk=None)
    ring = machine.driver.ring
    state = machine.device.queues[0].state
    # Both sides as after 65530 requests.
    for each in range(65530):
        machine.driver.ring.set_available(each, 0) if each < 4 else None
    state.next_avail = state.used_index = 65530
    live = machine.device.queues[0].ring
    live.published = 65530
    ring._next_avail = ring._published = ring._next_used = 65530
    ring.available_index = 65530
    ring.store16(ring.used + 2, 65530)
    ring.store16(ring.used + 4 + 8 * 4, 65530)
    ring.used_event = 65530
    for each in range(12):
        machine.driver.write(each, b"w" * 512)
    assert ring.used_index == 6


def test_guest_memory_is_not_copied(make_started: Callable[..., Any]) -> None:
    machine = make_started()
    seen = []
    original = machine.disk._readv

    def spy(offset: int, views: list[memoryview], length: int) -> None:
        seen.extend(view.obj is machine.ram for view in views)
        original(offset, views, length)

    machine.disk._readv = spy
    machine.driver.read(0, 1)
    assert seen == [True]


def test_no_view_outlives_its_request(started: Any) -> None:
    started.driver.read(0, 1)
    with pytest.raises(ValueError, match="released"):
        len(started.disk.views[0])
    started.ram.extend(b"x")  # would fail with a view open
