"""Zones on any disk: states, write pointers, limits, and what is left after a power failure."""

from __future__ import annotations

import random
import threading

import pytest

from pyvirtio import BackendError, ImageError, MemoryDisk
from pyvirtio.backend.zoned import ZonedDisk
from pyvirtio.backend.zones import ZoneError, ZoneFault, ZoneModel, ZoneState
from support.filters import FaultyDisk
from support.images import KeptDisk

ZONE = 64 << 10
EMPTY, IOPEN, EOPEN = ZoneState.EMPTY, ZoneState.IMPLICIT_OPEN, ZoneState.EXPLICIT_OPEN
CLOSED, FULL = ZoneState.CLOSED, ZoneState.FULL
RDONLY, OFFLINE = ZoneState.READ_ONLY, ZoneState.OFFLINE


def make(size=8 * ZONE, **options):
    options.setdefault("zone_size", ZONE)
    return ZonedDisk(MemoryDisk(size), **options)


def put(disk, index, state):
    """Bring a zone into a state."""
    zone = disk.zones[index]
    if state in (IOPEN, CLOSED):
        disk.write(zone.start, b"d" * 512)
    if state == EOPEN:
        disk.open_zone(zone)
    elif state == CLOSED:
        disk.close_zone(zone)
    elif state == FULL:
        disk.finish_zone(zone)
    elif state in (RDONLY, OFFLINE):
        disk.fail_zone(zone, state)
    assert zone.state == state
    return zone


def fault(action, *arguments):
    with pytest.raises(ZoneError) as caught:
        action(*arguments)
    return caught.value.fault


@pytest.mark.parametrize(
    ("state", "action", "after"),
    [
        (EMPTY, "open", EOPEN),
        (EMPTY, "close", EMPTY),
        (EMPTY, "finish", FULL),
        (EMPTY, "reset", EMPTY),
        (IOPEN, "open", EOPEN),
        (IOPEN, "close", CLOSED),
        (IOPEN, "finish", FULL),
        (IOPEN, "reset", EMPTY),
        (EOPEN, "open", EOPEN),
        (EOPEN, "close", EMPTY),
        (EOPEN, "finish", FULL),
        (EOPEN, "reset", EMPTY),
        (CLOSED, "open", EOPEN),
        (CLOSED, "close", CLOSED),
        (CLOSED, "finish", FULL),
        (CLOSED, "reset", EMPTY),
        (FULL, "open", None),
        (FULL, "close", None),
        (FULL, "finish", FULL),
        (FULL, "reset", EMPTY),
        *[
            (state, action, None)
            for state in (RDONLY, OFFLINE)
            for action in ("open", "close", "finish", "reset")
        ],
    ],
)
def test_the_table_of_states(state, action, after):
    disk = make()
    zone = put(disk, 1, state)
    call = getattr(disk, f"{action}_zone")
    if after is None:
        assert fault(call, zone) == ZoneFault.INVALID
        assert zone.state == state
    else:
        call(zone)
        assert zone.state == after


def test_an_open_zone_with_data_closes_to_closed():
    disk = make()
    zone = put(disk, 0, IOPEN)
    disk.open_zone(zone)
    disk.close_zone(zone)
    assert zone.state == CLOSED


def test_conventional_zones_are_written_anywhere_and_have_no_commands():
    disk = make(conventional=2)
    disk.write(ZONE - 512, b"c" * 1024)
    disk.write(512, b"d" * 512)
    assert disk.read(ZONE - 512, 1024) == b"c" * 1024
    zone = disk.zones[0]
    assert zone.state == ZoneState.NOT_WP
    for action in (disk.open_zone, disk.close_zone, disk.finish_zone, disk.reset_zone):
        assert fault(action, zone) == ZoneFault.INVALID


def test_writes_go_to_the_write_pointer():
    disk = make(write_granularity=4096)
    disk.write(ZONE, b"a" * 4096)
    assert fault(disk.write, ZONE, b"b" * 4096) == ZoneFault.UNALIGNED
    assert fault(disk.write, ZONE + 8192, b"b" * 4096) == ZoneFault.UNALIGNED
    assert fault(disk.write, ZONE + 4096, b"b" * 512) == ZoneFault.UNALIGNED
    disk.write(ZONE + 4096, b"b" * 4096)
    assert disk.read(ZONE, 8192) == b"a" * 4096 + b"b" * 4096
    assert disk.zones[1].pointer == ZONE + 8192


def test_writes_end_at_the_capacity_and_the_zone_is_full_then():
    disk = make(zone_capacity=ZONE // 2)
    zone = disk.zones[0]
    assert fault(disk.write, 0, bytes(ZONE // 2 + 512)) == ZoneFault.INVALID
    disk.write(0, b"x" * (ZONE // 2))
    assert zone.state == FULL
    assert fault(disk.write, ZONE // 2, bytes(512)) == ZoneFault.INVALID
    assert fault(disk.write, 0, bytes(512)) == ZoneFault.INVALID
    assert disk.read(ZONE // 2, 512) == bytes(512)


def test_a_request_across_a_boundary_is_refused():
    disk = make()
    assert fault(disk.write, ZONE - 512, bytes(1024)) == ZoneFault.INVALID
    disk.write(0, b"x" * (ZONE - 512))
    assert fault(disk.write, ZONE - 512, bytes(1024)) == ZoneFault.INVALID
    assert fault(disk.read, ZONE - 512, 1024) == ZoneFault.INVALID


def test_what_was_not_written_reads_as_zeroes_whatever_lies_below():
    below = MemoryDisk(4 * ZONE)
    below.write(0, b"o" * (4 * ZONE))
    disk = ZonedDisk(below, zone_size=ZONE)
    disk.write(0, b"n" * 1024)
    assert disk.read(0, 2048) == b"n" * 1024 + bytes(1024)
    disk.finish_zone(disk.zones[0])
    assert disk.read(0, 2048) == b"n" * 1024 + bytes(1024)
    disk.reset_zone(disk.zones[0])
    assert disk.read(0, 2048) == bytes(2048)
    extents = list(disk.extents())
    assert all(each.zero for each in extents)


def test_append_gives_the_place():
    disk = make(max_append=8192)
    views = [memoryview(b"p" * 512), memoryview(b"q" * 512)]
    assert disk.append(ZONE, views) == ZONE
    assert disk.append(ZONE, views) == ZONE + 1024
    assert disk.read(ZONE, 2048) == (b"p" * 512 + b"q" * 512) * 2


def test_append_has_its_rules():
    disk = make(conventional=1, max_append=8192)
    assert fault(disk.append, 0, [memoryview(bytes(512))]) == ZoneFault.INVALID
    assert fault(disk.append, ZONE + 512, [memoryview(bytes(512))]) == ZoneFault.INVALID
    assert fault(disk.append, ZONE, [memoryview(bytes(8704))]) == ZoneFault.INVALID
    none = make(max_append=0)
    assert fault(none.append, ZONE, [memoryview(bytes(512))]) == ZoneFault.UNSUPPORTED


def test_limits_on_open_zones_close_implicit_ones_first():
    disk = make(max_open=2)
    put(disk, 0, IOPEN)
    put(disk, 1, EOPEN)
    put(disk, 2, EOPEN)
    assert disk.zones[0].state == CLOSED
    zone = disk.zones[3]
    assert fault(disk.open_zone, zone) == ZoneFault.OPEN
    assert fault(disk.write, zone.start, bytes(512)) == ZoneFault.OPEN
    assert zone.state == EMPTY
    disk.close_zone(disk.zones[1])
    disk.write(zone.start, bytes(512))


def test_limits_on_active_zones_come_first():
    disk = make(max_open=2, max_active=2)
    put(disk, 0, EOPEN)
    put(disk, 1, EOPEN)
    assert fault(disk.open_zone, disk.zones[2]) == ZoneFault.ACTIVE
    disk.finish_zone(disk.zones[0])
    put(disk, 2, IOPEN)


def test_reset_all_leaves_nothing_but_what_failed():
    disk = make(conventional=1)
    for index, state in enumerate((IOPEN, EOPEN, CLOSED, FULL, RDONLY), 1):
        put(disk, index, state)
    disk.reset_all()
    states = [zone.state for zone in disk.zones]
    assert states == [ZoneState.NOT_WP, EMPTY, EMPTY, EMPTY, EMPTY, RDONLY, EMPTY, EMPTY]


def test_failed_zones():
    disk = make()
    put(disk, 0, IOPEN)
    put(disk, 0, RDONLY)
    assert disk.read(0, 512) == b"d" * 512
    assert fault(disk.write, 512, bytes(512)) == ZoneFault.INVALID
    put(disk, 0, OFFLINE)
    assert fault(disk.read, 0, 512) == ZoneFault.INVALID


def test_host_aware_zones_may_be_written_anywhere():
    below = MemoryDisk(4 * ZONE)
    below.write(0, b"o" * ZONE)
    disk = ZonedDisk(below, zone_size=ZONE, model=ZoneModel.HOST_AWARE)
    disk.write(4096, b"w" * 512)
    assert disk.read(0, 8192) == bytes(4096) + b"w" * 512 + bytes(3584)
    assert disk.zones[0].pointer == 4608
    disk.write(0, b"v" * 512)
    assert disk.zones[0].pointer == 4608


def test_zeroes_are_written_like_data():
    disk = make()
    disk.write(0, b"x" * 512)
    disk.write_zeroes(512, 1024)
    assert disk.zones[0].pointer == 1536
    assert fault(disk.write_zeroes, 0, 512) == ZoneFault.UNALIGNED


def test_the_store_has_what_was_flushed():
    below, store = MemoryDisk(8 * ZONE), MemoryDisk(growable=True)

    def opened():
        return ZonedDisk(
            MemoryDisk(bytearray(below.getvalue())),
            zone_size=ZONE,
            conventional=1,
            store=MemoryDisk(bytearray(store.getvalue())),
        )

    disk = ZonedDisk(below, zone_size=ZONE, conventional=1, store=store)
    disk.write(ZONE, b"a" * 512)
    disk.flush()
    disk.write(ZONE + 512, b"b" * 512)
    disk.open_zone(disk.zones[2])
    after = opened()  # the power fails here
    assert [zone.state for zone in after.zones[:3]] == [ZoneState.NOT_WP, CLOSED, EMPTY]
    assert after.read(ZONE, 1024) == b"a" * 512 + bytes(512)
    disk.finish_zone(disk.zones[3])
    disk.reset_zone(disk.zones[1])
    after = opened()
    assert [zone.state for zone in after.zones[:4]] == [ZoneState.NOT_WP, EMPTY, EMPTY, FULL]
    assert after.read(ZONE, 512) == bytes(512)


@pytest.mark.parametrize(
    "options", [{"zone_size": 2 * ZONE}, {"conventional": 2}, {"model": ZoneModel.HOST_AWARE}]
)
def test_a_store_of_other_zones_is_refused(options):
    store = MemoryDisk(growable=True)
    make(conventional=1, store=store)
    with pytest.raises(ImageError, match="other zones"):
        make(**{"conventional": 1, "store": store, **options})


@pytest.mark.parametrize("entry", [b"\1", b"\xff" * 8 + b"\4", bytes(8) + b"\7", bytes(8) + b"\0"])
def test_a_damaged_store_is_refused(entry):
    store = MemoryDisk(growable=True)
    make(store=store)
    store.write(64 + 16, entry)
    with pytest.raises(ImageError, match="zone 1 that cannot be"):
        make(store=store)


@pytest.mark.parametrize(
    "options",
    [
        {"zone_size": 1000},
        {"zone_size": 0},
        {"zone_capacity": 2 * ZONE},
        {"write_granularity": 100},
        {"write_granularity": 1024, "zone_capacity": 512},
        {"max_append": 2 * ZONE},
        {"max_open": 3, "max_active": 2},
        {"conventional": -1},
        {"model": ZoneModel.NONE},
    ],
)
def test_zones_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=r"zone|max_open|write_granularity"):
        make(**options)


def test_an_append_has_its_place_when_the_one_before_is_done():
    disk = make()
    asked, below = threading.Semaphore(0), disk.below
    entered, go = threading.Event(), threading.Event()
    lock_of, write = disk._writer, below._writev

    def writer(zone):
        asked.release()
        return lock_of(zone)

    def slow(*arguments):
        entered.set()
        assert go.wait(30)
        write(*arguments)

    disk._writer, below._writev = writer, slow
    places = []
    data = [memoryview(bytes(512))]
    threads = [threading.Thread(target=lambda: places.append(disk.append(0, data)))]
    threads.append(threading.Thread(target=lambda: places.append(disk.append(0, data))))
    threads[0].start()
    assert entered.wait(30)
    assert asked.acquire(timeout=30)
    threads[1].start()
    assert asked.acquire(timeout=30)
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(places) == [0, 512]


def test_appends_from_many_threads_have_places_of_their_own():
    disk = make()
    places = []

    def work(letter):
        data = [memoryview(letter * 512)]
        places.extend((disk.append(0, data), letter) for _ in range(20))

    threads = [threading.Thread(target=work, args=(bytes([65 + n]),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(place for place, _ in places) == list(range(0, 80 * 512, 512))
    assert all(disk.read(place, 512) == letter * 512 for place, letter in places)


def test_any_sequence_agrees_with_a_model():
    """Writes, appends, resets and finishes at random, and power failures in between."""
    chance = random.Random(11)
    below, store = MemoryDisk(6 * ZONE), MemoryDisk(growable=True)
    disk = ZonedDisk(below, zone_size=ZONE, max_open=2, max_active=4, store=store)
    data = [b""] * 6
    for _ in range(600):
        number = chance.randrange(6)
        zone = disk.zones[number]
        block = chance.randbytes(1) * 512 * chance.randrange(1, 40)
        if zone.state == FULL and len(data[number]) == ZONE:
            disk.reset_zone(zone)
            data[number] = b""
        try:
            match chance.randrange(8):
                case 0 | 1 | 2:
                    end = len(data[number]) if chance.randrange(4) else 512
                    disk.write(zone.start + end, block)
                    data[number] += block
                case 3:
                    place = disk.append(zone.start, [memoryview(block)])
                    assert place == zone.start + len(data[number])
                    data[number] += block
                case 4:
                    disk.reset_zone(zone)
                    data[number] = b""
                case 5:
                    disk.finish_zone(zone)
                case 6:
                    disk.close_zone(zone)
                case 7:
                    disk.flush()
                    disk = ZonedDisk(below, zone_size=ZONE, max_open=2, max_active=4, store=store)
        except ZoneError:
            pass
        opened = sum(each.state in (IOPEN, EOPEN) for each in disk.zones)
        assert opened <= 2
        assert sum(each.state == CLOSED for each in disk.zones) + opened <= 4
        zone = disk.zones[chance.randrange(6)]
        assert disk.read(zone.start, ZONE) == data[zone.index].ljust(ZONE, b"\0")


@pytest.mark.parametrize("fail_at", range(4))
def test_a_store_that_could_not_be_begun_is_begun_by_the_next(fail_at):
    kept = KeptDisk(growable=True)
    store = FaultyDisk(kept, kinds=frozenset({"write", "flush"}))
    store.fail_at = fail_at
    with pytest.raises(BackendError):
        ZonedDisk(MemoryDisk(1 << 20), zone_size=1 << 16, store=store)
    with ZonedDisk(MemoryDisk(1 << 20), zone_size=1 << 16, store=kept) as disk:
        disk.write(0, bytes(512))
    assert ZonedDisk(MemoryDisk(1 << 20), zone_size=1 << 16, store=kept).zones[0].written == 512


def test_a_store_that_lost_its_header_is_not_begun_anew():
    kept = KeptDisk(growable=True)
    with ZonedDisk(MemoryDisk(1 << 20), zone_size=1 << 16, store=kept) as disk:
        disk.write(0, bytes(512))
    kept.write(0, bytes(64))
    with pytest.raises(ImageError, match="other zones"):
        ZonedDisk(MemoryDisk(1 << 20), zone_size=1 << 16, store=kept)
