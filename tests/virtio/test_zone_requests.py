"""Zoned block devices (§5.2.6): negotiation, configuration, requests and their statuses."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from pyvirtio import MemoryDisk
from pyvirtio.backend.zoned import ZonedDisk
from pyvirtio.backend.zones import ZoneModel, ZoneState
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import DriverError
from pyvirtio.virtio.driver.blk import UNDERSTOOD

ZONE = 128
"""Sectors."""
INVALID, UNALIGNED, OPEN, ACTIVE = 3, 4, 5, 6
WITHOUT = {"features": UNDERSTOOD & ~(1 << at.VIRTIO_BLK_F_ZONED)}
COMMANDS = (15, 16, 18, 20, 22, 24, 26)


def zoned(**options: Any) -> ZonedDisk:
    options.setdefault("conventional", 1)
    options.setdefault("max_append", 8192)
    return ZonedDisk(MemoryDisk(8 * ZONE * 512), zone_size=ZONE * 512, **options)


@pytest.fixture(params=["buffer", "callbacks"])
def machine(request: pytest.FixtureRequest, make_started: Any) -> Any:
    return make_started(disk=zoned(max_open=2, max_active=3), memory=request.param)


def status(machine: Any, kind: int, sector: int, data: bytes = b"", room: int = 0) -> int:
    completion = machine.driver.request(kind, sector, data, room)
    assert completion.status == 0 or completion.used_length == 1
    return int(completion.status)


def test_config_of_the_zones_blk_19_to_30(make_machine: Any) -> None:
    machine = make_machine(disk=zoned(max_open=2, max_active=3, write_granularity=4096))
    fields = struct.unpack("<5IB3x", machine.device.read_config(at.BLK_CONFIG_ZONED, 24))
    assert fields == (ZONE, 2, 3, 16, 4096, 1)
    assert machine.device.read_config(at.BLK_CONFIG_SIZE, 4) == bytes(4)
    machine = make_machine(disk=zoned(), size_max=4096, queue_size=4)
    assert struct.unpack("<I", machine.device.read_config(84, 4)) == (16,)
    machine = make_machine(disk=zoned(), size_max=512, queue_size=4)
    assert struct.unpack("<I", machine.device.read_config(84, 4)) == (2,)  # BLK-27


def test_a_disk_without_zones_does_not_offer_them_blk_15(make_machine: Any) -> None:
    machine = make_machine()
    assert not machine.device.offered_features >> at.VIRTIO_BLK_F_ZONED & 1
    assert machine.device.read_config(at.BLK_CONFIG_ZONED, 24) == bytes(24)


def test_host_managed_needs_a_driver_that_knows_zones_blk_18(make_machine: Any) -> None:
    machine = make_machine(disk=zoned(), driver=WITHOUT)
    with pytest.raises(DriverError, match="refuses"):
        machine.driver.start()


def test_host_managed_offers_no_discard_blk_06(make_machine: Any) -> None:
    device = make_machine(disk=zoned()).device
    assert not device.offered_features >> at.VIRTIO_BLK_F_DISCARD & 1


def test_host_aware_goes_on_without_zones_blk_17_blk_81(make_started: Any) -> None:
    machine = make_started(disk=zoned(model=ZoneModel.HOST_AWARE), driver=WITHOUT)
    assert machine.device.read_config(at.BLK_CONFIG_ZONED, 24) == bytes(24)
    machine.driver.write(ZONE + 5, b"w" * 512)
    assert machine.driver.read(ZONE + 5, 1) == b"w" * 512
    for kind in COMMANDS:
        assert status(machine, kind, ZONE, room=64) == at.VIRTIO_BLK_S_UNSUPP


def test_host_aware_with_zones_keeps_telling_of_them(make_started: Any) -> None:
    machine = make_started(disk=zoned(model=ZoneModel.HOST_AWARE))
    assert machine.device.read_config(92, 1) == b"\2"


def test_legacy_has_no_zones_blk_16(make_machine: Any) -> None:
    machine = make_machine(disk=zoned(model=ZoneModel.HOST_AWARE), legacy=True)
    assert not machine.device.offered_features >> at.VIRTIO_BLK_F_ZONED & 1
    assert machine.device.read_config(at.BLK_CONFIG_ZONED, 24) == bytes(24)
    with pytest.raises(ValueError, match="no zones"):
        make_machine(disk=zoned(), legacy=True)


def test_report_tells_of_as_many_as_fit_blk_110_to_112(machine: Any) -> None:
    machine.driver.write(ZONE, b"w" * 1024)
    assert machine.driver.report_zones(5, room=3) == [
        (ZONE, 0, 0, 1, 0),
        (ZONE, ZONE, ZONE + 2, 2, 2),
        (ZONE, 2 * ZONE, 2 * ZONE, 2, 1),
    ]
    assert len(machine.driver.report_zones(6 * ZONE + 1, room=10)) == 2
    done = machine.driver.request(at.VIRTIO_BLK_T_ZONE_REPORT, 0, incoming=64 + 127)
    assert (done.status, done.used_length, done.data[0]) == (0, 64 + 64 + 1, 1)
    done = machine.driver.request(at.VIRTIO_BLK_T_ZONE_REPORT, 0, incoming=64)
    assert (done.status, done.used_length, done.data) == (0, 65, bytes(64))
    assert status(machine, at.VIRTIO_BLK_T_ZONE_REPORT, 0, room=63) == INVALID
    assert status(machine, at.VIRTIO_BLK_T_ZONE_REPORT, 8 * ZONE, room=128) == INVALID


def test_management_blk_82_to_89_blk_113_blk_114(machine: Any) -> None:
    zones = machine.disk.zones
    steps = [
        (at.VIRTIO_BLK_T_ZONE_OPEN, ZoneState.EXPLICIT_OPEN),
        (at.VIRTIO_BLK_T_ZONE_OPEN, ZoneState.EXPLICIT_OPEN),
        (at.VIRTIO_BLK_T_ZONE_CLOSE, ZoneState.EMPTY),
        (at.VIRTIO_BLK_T_ZONE_FINISH, ZoneState.FULL),
        (at.VIRTIO_BLK_T_ZONE_FINISH, ZoneState.FULL),
        (at.VIRTIO_BLK_T_ZONE_RESET, ZoneState.EMPTY),
        (at.VIRTIO_BLK_T_ZONE_RESET, ZoneState.EMPTY),
    ]
    for kind, after in steps:
        assert status(machine, kind, ZONE) == 0
        assert zones[1].state == after
    for kind in (18, 20, 22, 24):
        assert status(machine, kind, 0) == INVALID  # conventional
        assert status(machine, kind, ZONE + 1) == INVALID
        assert status(machine, kind, 8 * ZONE) == INVALID
    status(machine, at.VIRTIO_BLK_T_ZONE_FINISH, ZONE)
    for kind in (at.VIRTIO_BLK_T_ZONE_OPEN, at.VIRTIO_BLK_T_ZONE_CLOSE):
        assert status(machine, kind, ZONE) == INVALID
    assert status(machine, at.VIRTIO_BLK_T_ZONE_RESET_ALL, 0) == 0
    assert zones[1].state == ZoneState.EMPTY


def test_resources_blk_85_blk_90_blk_115(machine: Any) -> None:
    for number in (1, 2):
        assert status(machine, at.VIRTIO_BLK_T_ZONE_OPEN, number * ZONE) == 0
    assert status(machine, at.VIRTIO_BLK_T_ZONE_OPEN, 3 * ZONE) == OPEN
    assert status(machine, at.VIRTIO_BLK_T_OUT, 3 * ZONE, bytes(512)) == OPEN
    machine.driver.write(ZONE, bytes(512))
    assert status(machine, at.VIRTIO_BLK_T_ZONE_CLOSE, ZONE) == 0
    assert status(machine, at.VIRTIO_BLK_T_ZONE_OPEN, 3 * ZONE) == 0
    assert status(machine, at.VIRTIO_BLK_T_ZONE_OPEN, 4 * ZONE) == ACTIVE
    assert status(machine, at.VIRTIO_BLK_T_ZONE_APPEND, 4 * ZONE, bytes(512), 8) == ACTIVE


def test_append_blk_83_blk_91_to_95(machine: Any) -> None:
    assert machine.driver.append(ZONE, b"a" * 1024) == ZONE
    assert machine.driver.append(ZONE, b"b" * 512) == ZONE + 2
    assert machine.driver.read(ZONE, 3) == b"a" * 1024 + b"b" * 512
    append = at.VIRTIO_BLK_T_ZONE_APPEND
    assert status(machine, append, 0, bytes(512), 8) == INVALID
    assert status(machine, append, ZONE + 1, bytes(512), 8) == INVALID
    assert status(machine, append, ZONE, bytes(8704), 8) == INVALID
    assert status(machine, append, ZONE, bytes(512), 7) == at.VIRTIO_BLK_S_IOERR
    assert status(machine, append, ZONE, bytes(100), 8) == at.VIRTIO_BLK_S_IOERR
    assert status(machine, append, 8 * ZONE, bytes(512), 8) == INVALID


def test_no_append_at_all_blk_94(make_started: Any) -> None:
    machine = make_started(disk=zoned(max_append=0))
    append = at.VIRTIO_BLK_T_ZONE_APPEND
    assert status(machine, append, ZONE, bytes(512), 8) == at.VIRTIO_BLK_S_UNSUPP


def test_reads_and_writes_blk_92_blk_96_to_102(machine: Any) -> None:
    out, read = at.VIRTIO_BLK_T_OUT, at.VIRTIO_BLK_T_IN
    assert status(machine, out, ZONE + 1, bytes(512)) == UNALIGNED
    machine.driver.write(ZONE, b"w" * 512 * (ZONE - 1))
    assert status(machine, out, 2 * ZONE - 1, bytes(1024)) == INVALID
    assert status(machine, read, 2 * ZONE - 1, room=1024) == INVALID
    assert machine.driver.read(2 * ZONE - 1, 1) == bytes(512)
    machine.disk.fail_zone(machine.disk.zones[1], ZoneState.READ_ONLY)
    assert machine.driver.read(ZONE, 1) == b"w" * 512
    assert status(machine, out, 2 * ZONE - 1, bytes(512)) == INVALID
    machine.disk.fail_zone(machine.disk.zones[1], ZoneState.OFFLINE)
    assert status(machine, read, ZONE, room=512) == INVALID


def test_secure_erase_resets_zones_blk_103_to_105(make_started: Any) -> None:
    machine = make_started(disk=zoned(), secure_erase=True)
    assert struct.unpack("<I", machine.device.read_config(68, 4))[0] == ZONE
    machine.driver.write(ZONE, b"s" * 512)
    machine.driver.secure_erase(ZONE, ZONE)
    assert machine.disk.zones[1].state == ZoneState.EMPTY
    assert machine.disk.below.read(ZONE * 512, 512) == bytes(512)
    erase = at.VIRTIO_BLK_T_SECURE_ERASE
    assert status(machine, erase, 0, machine.driver.segment(ZONE, 1)) == at.VIRTIO_BLK_S_IOERR


def test_a_read_only_device_changes_no_zone(make_started: Any) -> None:
    machine = make_started(disk=zoned(), read_only=True)
    for kind in (15, 18, 20, 22, 24, 26):
        assert status(machine, kind, ZONE, room=8) == at.VIRTIO_BLK_S_IOERR
    assert len(machine.driver.report_zones()) == 8


@pytest.mark.parametrize("memory", ["buffer", "callbacks"])
def test_a_long_write_past_the_end_of_a_zone_writes_nothing_blk_92(
    make_started: Any, memory: str
) -> None:
    """Longer than what is moved at one time where RAM is behind callbacks."""
    size = 3 << 20
    disk = ZonedDisk(MemoryDisk(4 * size), zone_size=size, zone_capacity=2 << 20, conventional=1)
    machine = make_started(disk=disk, memory=memory)
    start = size // 512
    assert status(machine, at.VIRTIO_BLK_T_OUT, start, b"x" * (5 << 19)) == 3
    assert disk.zones[1].written == 0
    assert status(machine, at.VIRTIO_BLK_T_OUT, start, b"x" * (3 << 19)) == 0
    assert disk.zones[1].written == 3 << 19
