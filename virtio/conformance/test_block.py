"""The block device: features, configuration, requests (virtio 1.4 §5.2)."""

from __future__ import annotations

from typing import Any

import pytest

from .. import layout as at
from .bench import Bench, pattern
from .device import CannotMakeError
from .plugin import Rules, shows

F_LIFETIME, F_SECURE_ERASE, F_ZONED = 15, 16, 17
T_GET_LIFETIME, T_SECURE_ERASE = 10, 14
ZONE_COMMANDS = {15: 0, 16: 128, 18: 0, 20: 0, 22: 0, 24: 0, 26: 0}
"""Zone requests and the room for data that each is given."""
RANGES = {
    at.VIRTIO_BLK_T_DISCARD: at.VIRTIO_BLK_F_DISCARD,
    at.VIRTIO_BLK_T_WRITE_ZEROES: at.VIRTIO_BLK_F_WRITE_ZEROES,
    T_SECURE_ERASE: F_SECURE_ERASE,
}


# -- features and configuration ----------------------------------------------------------------


@shows("BLK-11", "BLK-12")
def test_flush_is_offered(split: Bench, rule: Rules) -> None:
    flush = split.offers(at.VIRTIO_BLK_F_FLUSH)
    with rule("BLK-12"):
        assert flush or not split.offers(at.VIRTIO_BLK_F_CONFIG_WCE), "CONFIG_WCE without FLUSH"
    with rule("BLK-11"):
        assert flush


@shows("BLK-13")
def test_without_flush_the_cache_begins_as_writethrough(split: Bench) -> None:
    split.need_modern()
    split.need(at.VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE")
    driver = split.driver(without=[at.VIRTIO_BLK_F_FLUSH])
    driver.start()
    assert split.registers.read_config(at.BLK_CONFIG_WRITEBACK, 1) == 0


@shows("BLK-14")
def test_unused_fields_are_0(split: Bench) -> None:
    split.start()
    read = split.registers.read_config
    assert [read(offset, 1) for offset in (33, 57, 58, 59)] == [0, 0, 0, 0]


@shows("BLK-15")
def test_a_device_without_zones_does_not_offer_them(split: Bench) -> None:
    split.need_modern()
    if not split.offers(F_ZONED):
        return
    driver = split.driver()
    driver.features |= 1 << F_ZONED
    driver.start()
    assert split.registers.read_config(92, 1) != 0, "ZONED is offered, and there are no zones"


@shows("BLK-16")
def test_a_legacy_device_has_no_zones(split: Bench) -> None:
    split.need_legacy()
    assert not split.offers(F_ZONED)


@shows("BLK-31", "BLK-117")
def test_legacy_fields_are_in_guest_order(split: Bench, rule: Rules) -> None:
    split.need_legacy()
    driver = split.start()
    capacity = driver.capacity
    with rule("BLK-31"):
        assert 0 < capacity < 1 << 40, f"a capacity of {capacity} sectors"
    with rule("BLK-117"):
        driver.read(split.unit // 512, split.unit // 512)
        done = driver.request(at.VIRTIO_BLK_T_IN, capacity, incoming=split.unit)
        assert done.status == at.VIRTIO_BLK_S_IOERR


@shows("BLK-32")
def test_legacy_negotiation_has_no_features_ok(split: Bench) -> None:
    split.need_legacy()
    split.start()
    assert not split.registers.status & at.STATUS_FEATURES_OK


@shows("BLK-33", "BLK-34")
def test_legacy_cache_mode_stays_as_written(split: Bench, rule: Rules) -> None:
    split.need_legacy()
    split.need(at.VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE")
    registers = split.registers
    driver = split.driver()

    def mode() -> int:
        return int(registers.read_config(at.BLK_CONFIG_WRITEBACK, 1))

    for value in (0, 1):
        driver.identify()
        registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, value)
        offered = registers.offered_features()
        with rule("BLK-34"):
            for features in (1 << at.VIRTIO_BLK_F_CONFIG_WCE, 0, offered):
                registers.accept_features(features & offered)
                assert mode() == value, f"features {features:#x} have changed the cache mode"
        registers.accept_features(driver.features & offered)
        with rule("BLK-33"):
            registers.status |= at.STATUS_DRIVER
            assert mode() == value
            registers.status |= at.STATUS_DRIVER_OK
            assert mode() == value


@shows("BLK-65")
def test_a_change_of_capacity_is_told(bench: Bench) -> None:
    driver = bench.start()
    capacity = driver.capacity
    bench.interrupts()
    bench.resize(capacity + 8)
    assert bench.interrupted(2)
    assert driver.capacity == capacity + 8


# -- requests --------------------------------------------------------------------------------


@shows("BLK-66", "BLK-67")
def test_a_read_only_device_refuses_writes(make_bench: Any, rule: Rules) -> None:
    for without in ((), (at.VIRTIO_BLK_F_RO,)):
        bench = make_bench(read_only=True)
        bench.need(at.VIRTIO_BLK_F_RO, "RO")
        driver = bench.start(without=without)
        before = driver.read(0, bench.unit // 512)
        other = bytes(each ^ 0xFF for each in before)
        done = driver.request(at.VIRTIO_BLK_T_OUT, 0, other)
        with rule("BLK-66"):
            assert done.status == at.VIRTIO_BLK_S_IOERR
        with rule("BLK-67"):
            assert driver.read(0, bench.unit // 512) == before, "data was written"


def start_with(bench: Bench, kind: int) -> Any:
    """A driver that has negotiated requests of a kind."""
    bench.need(RANGES[kind], f"requests of type {kind}")
    bench.need_writable()
    driver = bench.driver()
    driver.features |= 1 << RANGES[kind]
    driver.start()
    return driver


@shows("BLK-68")
@pytest.mark.parametrize("kind", sorted(RANGES))
def test_unknown_flags_are_unsupported(split: Bench, kind: int) -> None:
    driver = start_with(split, kind)
    for bit in (1, 2, 7, 16, 31):
        done = driver.request(kind, 0, driver.segment(0, 8, 1 << bit))
        assert done.status == at.VIRTIO_BLK_S_UNSUPP, f"flag {bit}"


@shows("BLK-69")
def test_a_discard_that_unmaps_is_unsupported(split: Bench) -> None:
    driver = start_with(split, at.VIRTIO_BLK_T_DISCARD)
    done = driver.request(at.VIRTIO_BLK_T_DISCARD, 0, driver.segment(0, 8, 1))
    assert done.status == at.VIRTIO_BLK_S_UNSUPP


@shows("BLK-72")
@pytest.mark.parametrize("unmap", [0, 1])
def test_zeroes_are_zeroes(bench: Bench, unmap: int) -> None:
    driver = start_with(bench, at.VIRTIO_BLK_T_WRITE_ZEROES)
    block, unit = bench.unit // 512, bench.unit
    driver.write(0, b"z" * 64 * unit)
    most = bench.registers.config(48, 4) // block
    zeroed: set[int] = set()
    for first, count in ((3, 1), (8, 16), (33, 30)):
        for start in range(first, first + count, min(most, count)):
            length = min(most, first + count - start)
            driver.write_zeroes(start * block, length * block, unmap=bool(unmap))
        zeroed.update(range(first, first + count))
        assert driver.read(first * block, count * block) == bytes(unit * count)
    expected = [bytes(unit) if each in zeroed else b"z" * unit for each in range(64)]
    assert driver.read(0, 64 * block) == b"".join(expected)


@shows("BLK-72")
def test_zeroes_in_several_ranges(split: Bench) -> None:
    driver = start_with(split, at.VIRTIO_BLK_T_WRITE_ZEROES)
    if split.registers.config(52, 4) < 2 or split.registers.config(48, 4) < split.unit // 512:
        pytest.skip("write zeroes has one range for each request")
    block, unit = split.unit // 512, split.unit
    driver.write(0, b"z" * 12 * unit)
    ranges = b"".join(driver.segment(place * block, block) for place in (1, 9))
    assert driver.request(at.VIRTIO_BLK_T_WRITE_ZEROES, 0, ranges).status == 0
    expected = [bytes(unit) if place in (1, 9) else b"z" * unit for place in range(12)]
    assert driver.read(0, 12 * block) == b"".join(expected)


@shows("BLK-73")
def test_may_unmap_is_a_flag(split: Bench) -> None:
    start_with(split, at.VIRTIO_BLK_T_WRITE_ZEROES)
    assert split.registers.read_config(56, 1) in (0, 1)


@shows("BLK-80", "BLK-109")
def test_lifetime(split: Bench, rule: Rules) -> None:
    split.need_modern()
    split.need(F_LIFETIME, "LIFETIME")
    driver = split.driver()
    driver.features |= 1 << F_LIFETIME
    driver.start()
    done = driver.request(T_GET_LIFETIME, 0, incoming=6)
    with rule("BLK-109"):
        assert done.status == 0
    with rule("BLK-80"):
        pre_eol, first, second = (
            int.from_bytes(done.data[place : place + 2], "little") for place in (0, 2, 4)
        )
        assert pre_eol <= 3
        assert max(first, second) <= 11


@shows("BLK-81")
@pytest.mark.parametrize("kind", sorted(ZONE_COMMANDS))
def test_zone_requests_without_zones_are_unsupported(split: Bench, kind: int) -> None:
    split.need_modern()
    driver = split.driver(without=[F_ZONED])
    driver.start()
    outgoing = pattern(split.unit) if kind == 15 else b""
    incoming = 8 if kind == 15 else ZONE_COMMANDS[kind]
    done = driver.request(kind, 0, outgoing, incoming)
    assert done.status == at.VIRTIO_BLK_S_UNSUPP


@shows("BLK-106")
def test_every_request_has_its_status(bench: Bench) -> None:
    driver = bench.start()
    requests = [
        (at.VIRTIO_BLK_T_IN, 0, bench.unit, {0}),
        (at.VIRTIO_BLK_T_GET_ID, 0, 20, {0, 2}),
        (at.VIRTIO_BLK_T_IN, driver.capacity, bench.unit, {1}),
        (0x77, 0, 0, {2}),
    ]
    if driver.features >> at.VIRTIO_BLK_F_FLUSH & 1:
        requests.append((at.VIRTIO_BLK_T_FLUSH, 0, 0, {0}))
    for kind, sector, incoming, expected in requests:
        done = driver.request(kind, sector, incoming=incoming)
        assert done.status in expected, f"request {kind} at {sector}: status {done.status}"


@shows("BLK-106")
def test_what_is_written_is_read(bench: Bench) -> None:
    driver = bench.start_read_write()
    block = bench.unit // 512
    last = driver.capacity // block - 1
    for place, count in ((0, 1), (7, 8), (200, 24), (last, 1)):
        data = pattern(bench.unit * count, place)
        driver.write(place * block, data)
        assert driver.read(place * block, count * block) == data


@shows("BLK-107")
def test_unknown_requests_are_unsupported(bench: Bench) -> None:
    driver = bench.start()
    for kind in (6, 7, 9, 12, 17, 0x100, 0x7FFF_FFFF):
        done = driver.request(kind)
        assert done.status == at.VIRTIO_BLK_S_UNSUPP, f"type {kind}: status {done.status}"


@shows("BLK-108")
def test_id(bench: Bench) -> None:
    driver = bench.start()
    done = driver.request(at.VIRTIO_BLK_T_GET_ID, incoming=20)
    if done.status == at.VIRTIO_BLK_S_UNSUPP:
        pytest.skip("the device has no id")
    assert done.status == 0
    text, _, rest = done.data.partition(b"\0")
    assert text.isascii()
    assert not rest.strip(b"\0"), f"{done.data!r} goes on after its end"
    assert 0xFF not in done.data, "not all of it was written"


@shows("BLK-78", "BLK-79")
@pytest.mark.parametrize("known", [False, True])
def test_lifetime_is_offered_where_it_is_known(make_bench: Any, known: bool, rule: Rules) -> None:
    bench = make_bench(lifetime=known)
    bench.need_modern()
    with rule("BLK-78" if known else "BLK-79"):
        assert bench.offers(F_LIFETIME) == known


WAYS = {
    "it cannot flush": ((at.VIRTIO_BLK_F_FLUSH, at.VIRTIO_BLK_F_CONFIG_WCE), None, False),
    "writethrough was chosen": ((), 0, False),
    "it was flushed": ((), 1, True),
}
"""How a write becomes stable (§5.2.6.2): features left out, the cache mode, whether to flush."""


@shows("BLK-76")
@pytest.mark.parametrize("zeroes", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_stable_outlives_the_power(make_bench: Any, way: str, zeroes: bool) -> None:
    without, mode, flushed = WAYS[way]
    bench = make_bench(volatile=True)
    bench.need(at.VIRTIO_BLK_F_FLUSH, "FLUSH")
    bench.need_writable()
    driver = bench.driver(without=without)
    if mode is not None:
        bench.need(at.VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE")
    unit, block = bench.unit, bench.unit // 512
    old, new = pattern(2 * unit), bytes(unit) if zeroes else pattern(unit, 2)
    with_flush = bench.start()
    with_flush.write(0, old)
    with_flush.flush()
    driver.start()
    if mode is not None:
        bench.registers.write_config(at.BLK_CONFIG_WRITEBACK, 1, mode)
    if zeroes:
        bench.need(at.VIRTIO_BLK_F_WRITE_ZEROES, "WRITE_ZEROES")
        driver.write_zeroes(block, block)
    else:
        driver.write(block, new)
    if flushed:
        driver.flush()
    try:
        bench.device.cut_power()
    except CannotMakeError as error:
        pytest.skip(str(error))
    assert bench.start().read(0, 2 * block) == old[:unit] + new


@shows("BLK-118")
def test_flush_out_is_flush(split: Bench) -> None:
    split.need_legacy()
    driver = split.start()
    assert driver.request(at.VIRTIO_BLK_T_FLUSH_OUT).status == 0
