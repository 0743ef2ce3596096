"""Zoned block devices (virtio 1.4 §5.2.6.2, "ZONED"): configuration, states, limits, writes."""

from __future__ import annotations

from typing import Any

import pytest

from .. import layout as at
from .bench import Bench, pattern
from .device import CannotMakeError
from .plugin import Rules, shows

OK, IOERR, UNSUPP, INVALID, UNALIGNED, OPEN, ACTIVE = range(7)
APPEND, REPORT = at.VIRTIO_BLK_T_ZONE_APPEND, at.VIRTIO_BLK_T_ZONE_REPORT
DO_OPEN, DO_CLOSE = at.VIRTIO_BLK_T_ZONE_OPEN, at.VIRTIO_BLK_T_ZONE_CLOSE
DO_FINISH, DO_RESET = at.VIRTIO_BLK_T_ZONE_FINISH, at.VIRTIO_BLK_T_ZONE_RESET
DO_RESET_ALL = at.VIRTIO_BLK_T_ZONE_RESET_ALL
CONVENTIONAL, REQUIRED, PREFERRED = 1, 2, 3
NOT_WP, EMPTY, IMPLICIT, EXPLICIT, CLOSED, FULL = 0, 1, 2, 3, 4, 14


class Zones:
    """A started driver of a zoned device, and what its configuration and report say."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.driver = bench.start()
        read = bench.registers.config
        base = at.BLK_CONFIG_ZONED
        self.size, self.max_open, self.max_active, self.max_append, self.granularity = (
            read(base + 4 * number, 4) for number in range(5)
        )
        self.model = read(base + 20, 1)
        self.report = self.driver.report_zones(0, 64)
        self.sequential = [zone[1] for zone in self.report if zone[3] == REQUIRED]
        self.conventional = [zone[1] for zone in self.report if zone[3] == CONVENTIONAL]
        if self.driver.request(DO_RESET_ALL).status != OK:
            pytest.skip("the device does not reset its zones")

    @property
    def unit(self) -> int:
        """Bytes of the smallest write."""
        return int(max(self.granularity, 512))

    def status(self, kind: int, sector: int, data: bytes = b"", room: int = 0) -> int:
        """What a request is answered."""
        return int(self.driver.request(kind, sector, data, room).status)

    def append(self, sector: int, data: bytes) -> int:
        """The same for an append."""
        return self.status(APPEND, sector, data, 8)

    def write(self, sector: int, units: int = 1) -> int:
        """The same for a write."""
        return self.status(at.VIRTIO_BLK_T_OUT, sector, pattern(self.unit * units))

    def zone(self, start: int) -> tuple[int, int, int, int, int]:
        """Capacity, start, write pointer, type and state of a zone."""
        found: tuple[int, int, int, int, int] = self.driver.report_zones(start, 1)[0]
        return found

    def state(self, start: int) -> int:
        """Of the zone that begins there."""
        return self.zone(start)[4]

    def need_conventional(self) -> int:
        """A conventional zone, or the test is skipped."""
        if not self.conventional:
            pytest.skip("the device has no conventional zone")
        return int(self.conventional[0])

    def fill_open(self) -> list[int]:
        """Open zones until the limit; which."""
        if not self.max_open or self.max_open + 1 >= len(self.sequential):
            pytest.skip("the device has no limit for open zones that could be reached")
        for start in self.sequential[: self.max_open]:
            assert self.status(DO_OPEN, start) == OK
        return self.sequential[: self.max_open]

    def fill_active(self) -> list[int]:
        """Make zones active, closed ones, until the limit; which."""
        if not self.max_active or self.max_active + 1 >= len(self.sequential):
            pytest.skip("the device has no limit for active zones that could be reached")
        for start in self.sequential[: self.max_active]:
            assert self.write(start) == OK
            assert self.status(DO_CLOSE, start) == OK
        return self.sequential[: self.max_active]

    def fail(self, start: int, *, offline: bool) -> None:
        """Have a zone fail, or skip the test."""
        try:
            self.bench.device.fail_zone(start, offline=offline)
        except CannotMakeError as error:
            pytest.skip(str(error))


@pytest.fixture
def zones(make_bench: Any) -> Zones:
    """A host-managed device."""
    bench = make_bench(zoned="managed")
    bench.need_modern()
    bench.need(at.VIRTIO_BLK_F_ZONED, "ZONED")
    return Zones(bench)


# -- negotiation and configuration ---------------------------------------------------------------


@shows("BLK-17", "BLK-21")
def test_a_host_aware_device_works_without_zones(make_bench: Any, rule: Rules) -> None:
    bench = make_bench(zoned="aware")
    bench.need_modern()
    bench.need(at.VIRTIO_BLK_F_ZONED, "ZONED")
    with rule("BLK-21"):
        bench.start()
        assert bench.registers.config(92, 1) == 2
    with rule("BLK-17"):
        bench.start(without=[at.VIRTIO_BLK_F_ZONED]).flush()
        assert [bench.registers.read_config(offset, 1) for offset in range(72, 96)] == [0] * 24


@shows("BLK-18")
def test_a_host_managed_device_needs_a_driver_that_knows_zones(make_bench: Any) -> None:
    bench = make_bench(zoned="managed")
    bench.need_status()
    bench.need(at.VIRTIO_BLK_F_ZONED, "ZONED")
    bench.driver().identify()
    features = bench.registers.offered_features() & ~(1 << at.VIRTIO_BLK_F_ZONED)
    bench.registers.accept_features(features & ~(1 << at.VIRTIO_BLK_F_DISCARD))
    bench.registers.status |= at.STATUS_FEATURES_OK
    assert not bench.registers.status & at.STATUS_FEATURES_OK


@shows("BLK-19")
def test_the_model_of_a_device_without_zones_is_none(make_bench: Any) -> None:
    bench = make_bench(zoned="none")
    bench.need_modern()
    bench.need(at.VIRTIO_BLK_F_ZONED, "ZONED")
    bench.start()
    assert bench.registers.config(92, 1) == 0


@shows("BLK-20", "BLK-22", "BLK-27", "BLK-30", "BLK-111", "BLK-112")
def test_configuration_agrees_with_the_report(zones: Zones, rule: Rules) -> None:
    read = zones.bench.registers.config
    with rule("BLK-20"):
        assert zones.model == 1
    starts = [zone[1] for zone in zones.report]
    with rule("BLK-22"):
        assert starts == list(range(0, zones.driver.capacity, zones.size))
    features = zones.driver.features
    if features >> at.VIRTIO_BLK_F_SEG_MAX & 1 and features >> at.VIRTIO_BLK_F_SIZE_MAX & 1:
        with rule("BLK-27"):
            assert zones.max_append * 512 <= read(8, 4) * read(12, 4)
    with rule("BLK-30"):
        assert [read(offset, 1) for offset in (93, 94, 95)] == [0, 0, 0]
    with rule("BLK-111"):
        assert all(zone[0] <= zones.size for zone in zones.report)
    with rule("BLK-112"):
        assert all((zone[3] == CONVENTIONAL) == (zone[4] == NOT_WP) for zone in zones.report)


@shows("BLK-103", "BLK-104", "BLK-105")
def test_secure_erase_resets_zones(zones: Zones, rule: Rules) -> None:
    zones.bench.need(at.VIRTIO_BLK_F_SECURE_ERASE, "SECURE_ERASE")
    erase = at.VIRTIO_BLK_T_SECURE_ERASE
    start = zones.sequential[0]
    assert zones.write(start) == OK
    with rule("BLK-103"):
        assert zones.bench.registers.config(68, 4) % zones.size == 0
    with rule("BLK-104"):
        assert zones.status(erase, 0, zones.driver.segment(start, zones.size // 2)) != OK
    with rule("BLK-105"):
        assert zones.status(erase, 0, zones.driver.segment(start, zones.size)) == OK
        assert zones.state(start) == EMPTY


# -- reports ---------------------------------------------------------------------------------


@shows("BLK-110")
@pytest.mark.parametrize("room", [0, 63, 64, 127, 128, 200])
def test_a_report_counts_whole_descriptors(zones: Zones, room: int) -> None:
    done = zones.driver.request(REPORT, 0, incoming=64 + room)
    assert done.status == OK
    assert int.from_bytes(done.data[:8], "little") == min(room // 64, len(zones.report))


# -- states ----------------------------------------------------------------------------------


@shows("BLK-82", "BLK-83")
def test_conventional_zones_are_not_managed(zones: Zones, rule: Rules) -> None:
    start = zones.need_conventional()
    for kind in (DO_OPEN, DO_CLOSE, DO_FINISH, DO_RESET):
        with rule("BLK-82"):
            assert zones.status(kind, start) == INVALID, f"request {kind}"
    with rule("BLK-83"):
        assert zones.append(start, pattern(zones.unit)) == (INVALID if zones.max_append else UNSUPP)


@shows("BLK-84", "BLK-86")
def test_a_full_zone_is_not_opened_and_not_closed(zones: Zones, rule: Rules) -> None:
    start = zones.sequential[0]
    assert zones.status(DO_FINISH, start) == OK
    assert zones.state(start) == FULL
    with rule("BLK-84"):
        assert zones.status(DO_OPEN, start) == INVALID
    with rule("BLK-86"):
        assert zones.status(DO_CLOSE, start) == INVALID
    assert zones.state(start) == FULL


@shows("BLK-89", "BLK-113", "BLK-114")
def test_transitions(zones: Zones, rule: Rules) -> None:
    first, second = zones.sequential[:2]
    with rule("BLK-113"):
        for kind, state in ((DO_RESET, EMPTY), (DO_OPEN, EXPLICIT), (DO_OPEN, EXPLICIT)):
            assert (zones.status(kind, first), zones.state(first)) == (OK, state)
    with rule("BLK-114"):
        assert (zones.status(DO_CLOSE, first), zones.state(first)) == (OK, EMPTY)
        assert zones.status(DO_OPEN, first) == zones.write(first) == OK
        assert (zones.status(DO_CLOSE, first), zones.state(first)) == (OK, CLOSED)
    with rule("BLK-113"):
        assert (zones.status(DO_CLOSE, first), zones.state(first)) == (OK, CLOSED)
        for _ in range(2):
            assert (zones.status(DO_FINISH, first), zones.state(first)) == (OK, FULL)
    assert zones.write(second) == OK
    with rule("BLK-89"):
        assert zones.status(DO_RESET_ALL, 0) == OK
        assert {zones.state(start) for start in zones.sequential} == {EMPTY}


@shows("BLK-24", "BLK-85", "BLK-116")
def test_limit_of_open_zones(zones: Zones, rule: Rules) -> None:
    zones.fill_open()
    another = zones.sequential[zones.max_open]
    with rule("BLK-24", "BLK-85", "BLK-116"):
        assert zones.status(DO_OPEN, another) in (OPEN, ACTIVE)
        assert zones.state(another) == EMPTY


@shows("BLK-25", "BLK-85", "BLK-90", "BLK-116")
def test_limit_of_active_zones(zones: Zones, rule: Rules) -> None:
    zones.fill_active()
    another = zones.sequential[zones.max_active]
    with rule("BLK-25", "BLK-85", "BLK-116"):
        assert zones.status(DO_OPEN, another) == ACTIVE
    with rule("BLK-90"):
        assert zones.write(another) == ACTIVE
        if zones.max_append:
            assert zones.append(another, pattern(zones.unit)) == ACTIVE
    assert zones.state(another) == EMPTY


@shows("BLK-90")
def test_a_write_that_finds_no_zone_to_be_opened(zones: Zones) -> None:
    zones.fill_open()  # explicitly: the device may not close them
    assert zones.write(zones.sequential[zones.max_open]) in (OPEN, ACTIVE)


@shows("BLK-115")
def test_both_limits_at_once(zones: Zones) -> None:
    active = zones.fill_active()
    if zones.max_open < 1 or zones.max_open > len(active):
        pytest.skip("both limits cannot be reached at once")
    for start in active[: zones.max_open]:
        assert zones.status(DO_OPEN, start) == OK
    assert zones.status(DO_OPEN, zones.sequential[zones.max_active]) == ACTIVE


# -- data ------------------------------------------------------------------------------------


@shows("BLK-26", "BLK-93", "BLK-95")
def test_appends(zones: Zones, rule: Rules) -> None:
    if not zones.max_append:
        pytest.skip("the device does not append")
    start = zones.sequential[0]
    for number in range(3):
        with rule("BLK-93"):
            place = zones.driver.append(start, pattern(zones.unit, number))
            assert place == start + number * zones.unit // 512
            assert zones.driver.read(place, zones.unit // 512) == pattern(zones.unit, number)
    most = zones.max_append * 512
    largest = min(most, zones.zone(start)[0] * 512) // zones.unit * zones.unit
    with rule("BLK-26"):
        assert zones.append(zones.sequential[1], pattern(largest)) == OK
    if largest == most:
        with rule("BLK-95"):
            assert zones.append(zones.sequential[2], pattern(most + zones.unit)) == INVALID


@shows("BLK-94")
def test_a_device_without_appends(make_bench: Any) -> None:
    bench = make_bench(zoned="no-append")
    bench.need_modern()
    bench.need(at.VIRTIO_BLK_F_ZONED, "ZONED")
    zones = Zones(bench)
    if zones.max_append:
        pytest.skip("the device appends")
    assert zones.append(zones.sequential[0], pattern(zones.unit)) == UNSUPP


@shows("BLK-91")
def test_an_append_inside_of_a_zone(zones: Zones) -> None:
    start = zones.sequential[0]
    expected = INVALID if zones.max_append else UNSUPP
    assert zones.append(start + zones.unit // 512, pattern(zones.unit)) == expected


@shows("BLK-29", "BLK-97")
def test_writes_go_to_the_write_pointer(zones: Zones, rule: Rules) -> None:
    start = zones.sequential[0]
    step = zones.unit // 512
    with rule("BLK-97"):
        assert zones.write(start) == OK
        for place in (start, start + 2 * step):
            assert zones.write(place) == UNALIGNED
        assert zones.write(start + step) == OK
        assert zones.zone(start)[2] == start + 2 * step
    if step > 1:
        with rule("BLK-29"):
            data = pattern(zones.unit // 2)
            assert zones.status(at.VIRTIO_BLK_T_OUT, start + 2 * step, data) != OK


@shows("BLK-92", "BLK-96")
def test_writes_end_with_the_zone(zones: Zones, rule: Rules) -> None:
    start = zones.sequential[0]
    capacity = zones.zone(start)[0]
    step = zones.unit // 512
    chunk = max(min(capacity - step, 64), step) // step * step
    place = start
    while place + step < start + capacity:
        count = min(chunk, start + capacity - step - place)
        data = pattern(512 * count)
        assert zones.status(at.VIRTIO_BLK_T_OUT, place, data) == OK
        place += count
    with rule("BLK-92"):
        assert zones.write(place, 2) == INVALID
        if zones.max_append >= 2 * step:
            assert zones.append(start, pattern(2 * zones.unit)) == INVALID
    with rule("BLK-96"):
        data = pattern(512 * (zones.size - (place - start) + step))
        assert zones.status(at.VIRTIO_BLK_T_OUT, place, data) == INVALID
        edge = start + zones.size - 1
        assert zones.status(at.VIRTIO_BLK_T_IN, edge, room=1024) == INVALID
    assert zones.write(place) == OK
    assert zones.state(start) == FULL


@shows("BLK-101", "BLK-102")
def test_what_is_not_written_reads_as_a_pattern(zones: Zones, rule: Rules) -> None:
    start = zones.sequential[0]
    assert zones.write(start, 4) == OK
    assert zones.status(DO_RESET, start) == OK
    assert zones.write(start) == OK
    done = zones.driver.request(at.VIRTIO_BLK_T_IN, start + zones.unit // 512, incoming=512)
    with rule("BLK-101"):
        assert done.status != OK or done.data != pattern(zones.unit * 2)[zones.unit :][:512]
    with rule("BLK-102"):
        assert done.status != OK or len(set(done.data)) == 1


# -- zones that fail -------------------------------------------------------------------------


@shows("BLK-84", "BLK-87", "BLK-88", "BLK-99")
def test_a_read_only_zone(zones: Zones, rule: Rules) -> None:
    start = zones.sequential[0]
    assert zones.write(start) == OK
    zones.fail(start, offline=False)
    state = zones.state(start)
    for kind, ident in ((DO_OPEN, "BLK-84"), (DO_FINISH, "BLK-87"), (DO_RESET, "BLK-88")):
        with rule(ident):
            assert zones.status(kind, start) == INVALID
            assert zones.state(start) == state
    with rule("BLK-99"):
        assert zones.write(start + zones.unit // 512) == INVALID


@shows("BLK-100")
def test_an_offline_zone(zones: Zones) -> None:
    start = zones.sequential[0]
    zones.fail(start, offline=True)
    assert zones.status(at.VIRTIO_BLK_T_IN, start, room=512) == INVALID
    assert zones.write(start) == INVALID
    for kind in (DO_OPEN, DO_CLOSE, DO_FINISH, DO_RESET):
        assert zones.status(kind, start) == INVALID, f"request {kind}"
