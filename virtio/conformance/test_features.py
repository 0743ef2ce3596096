"""Feature negotiation and the reserved feature bits (virtio 1.4 §2.2, §6)."""

from __future__ import annotations

from random import Random

import pytest

from .. import layout as at
from .bench import Bench
from .plugin import Rules, shows

_BLOCK = (1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16, 17)
_RING = (28, 29, 32, 33, 34, 35, 36, 38, 40, 43)
_PCI = (37, 39, 41)
_LEGACY = (0, 7, 24, 27, 30)
"""Bits that mean something on a legacy interface alone. A transitional device may well show the
last three on its modern interface, where they mean nothing."""

DEPENDENCIES = (
    (at.VIRTIO_BLK_F_CONFIG_WCE, at.VIRTIO_BLK_F_FLUSH),
    (17, at.VIRTIO_F_VERSION_1),  # ZONED
    (at.VIRTIO_F_RING_PACKED, at.VIRTIO_F_VERSION_1),
    (at.VIRTIO_F_IN_ORDER, at.VIRTIO_F_VERSION_1),
    (at.VIRTIO_F_NOTIFICATION_DATA, at.VIRTIO_F_VERSION_1),
    (at.VIRTIO_F_RING_RESET, at.VIRTIO_F_VERSION_1),
)


def offered(bench: Bench) -> int:
    """What the device offers, after a reset."""
    bench.driver().identify()
    return int(bench.registers.offered_features())


def accepts(bench: Bench, features: int) -> bool:
    """The device keeps FEATURES_OK for these."""
    bench.driver().identify()
    bench.registers.accept_features(features)
    bench.registers.status |= at.STATUS_FEATURES_OK
    return bool(bench.registers.status & at.STATUS_FEATURES_OK)


@shows("BF-17")
def test_features_come_with_those_they_depend_on(split: Bench) -> None:
    features = offered(split)
    for bit, needed in DEPENDENCIES:
        if split.legacy and needed == at.VIRTIO_F_VERSION_1:
            continue
        assert not features >> bit & 1 or features >> needed & 1, f"{bit} without {needed}"


@shows("BF-18")
def test_any_valid_subset_is_accepted(split: Bench) -> None:
    split.need_status()
    features = offered(split)
    # These may be insisted on where they are offered (BF-89, BF-91, BF-93).
    may_need = (at.VIRTIO_F_VERSION_1, at.VIRTIO_F_ACCESS_PLATFORM, at.VIRTIO_F_ORDER_PLATFORM)
    required = features & sum(1 << bit for bit in may_need)
    bits = [bit for bit in range(64) if features >> bit & 1 and not required >> bit & 1]
    random = Random(1)
    subsets = [features & ~(1 << bit) for bit in bits]
    subsets += [sum(1 << bit for bit in random.sample(bits, len(bits) // 2)) for _ in range(16)]
    for subset in (features, required, *subsets):
        valid = subset | required
        if valid >> at.VIRTIO_BLK_F_ZONED & 1:
            valid &= ~(1 << at.VIRTIO_BLK_F_DISCARD)  # BLK-06
        for bit, needed in DEPENDENCIES:
            if valid >> bit & 1 and not valid >> needed & 1:
                valid &= ~(1 << bit)
        assert accepts(split, valid), f"features {valid:#x} are refused, {features:#x} are offered"


@shows("BF-19")
def test_features_that_were_not_offered_are_refused(split: Bench) -> None:
    split.need_status()
    features = offered(split)
    for bit in (3, 8, 50, 63):  # unassigned or reserved
        if not features >> bit & 1:
            assert not accepts(split, features | 1 << bit), f"feature {bit} is taken"


@shows("BF-20")
def test_only_features_that_a_block_device_may_have(split: Bench) -> None:
    allowed = {*_BLOCK, *_RING, *_LEGACY[2:]}
    if split.legacy:
        allowed = {*_BLOCK, 28, 29, *_LEGACY}
    elif split.device.transport == "pci":
        allowed |= set(_PCI)
    features = offered(split)
    unknown = [bit for bit in range(64) if features >> bit & 1 and bit not in allowed]
    assert not unknown, f"offers features {unknown}"


@shows("BF-21")
def test_what_was_accepted_is_accepted_again(split: Bench) -> None:
    split.need_status()
    features = offered(split)
    again = [accepts(split, features) for _ in range(4)]
    assert all(again), again


@shows("BF-88")
def test_version_1_is_offered(split: Bench) -> None:
    split.need_modern()
    assert offered(split) >> at.VIRTIO_F_VERSION_1 & 1


@shows("BF-92")
def test_in_order_buffers_come_back_in_their_order(bench: Bench) -> None:
    bench.need_modern()
    bench.need(at.VIRTIO_F_IN_ORDER, "IN_ORDER")
    driver = bench.start(want=[at.VIRTIO_F_IN_ORDER], queue_size=64)
    order = []
    count = bench.requests_that_fit(driver, 4)
    if count < 2:
        pytest.skip("a queue that has one request at a time")
    long = max(min(32768, driver.segment_bytes) // bench.unit, 1) * bench.unit
    for _ in range(6):
        heads = []
        for number in range(count):
            incoming = long if number % 2 == 0 else bench.unit  # slow ones and quick ones
            heads.append(driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=incoming))
        driver.kick()
        done = bench.finish(driver, count)
        order.append(list(done) == heads)
        assert all(each.status == 0 for each in done.values())
    assert all(order), "buffers came back out of their order"


@shows("BF-97", "BF-98")
def test_sr_iov_is_offered_with_its_capability_alone(split: Bench, rule: Rules) -> None:
    split.need_modern()
    sr_iov = False
    if split.device.function is not None:
        header = split.device.function.bus.config_read(0x100, 4)
        position = 0x100
        for _ in range(64):
            if header in (0, 0xFFFF_FFFF):
                break
            sr_iov |= header & 0xFFFF == 0x10
            position = header >> 20
            if not position:
                break
            header = split.device.function.bus.config_read(position, 4)
    with rule("BF-97" if sr_iov else "BF-98"):
        assert bool(offered(split) >> 37 & 1) == sr_iov


@shows("BF-100")
def test_notify_on_empty_interrupts_in_spite_of_suppression(split: Bench) -> None:
    split.need_legacy()
    split.need(at.VIRTIO_F_NOTIFY_ON_EMPTY, "NOTIFY_ON_EMPTY")
    driver = split.driver()
    driver.features |= 1 << at.VIRTIO_F_NOTIFY_ON_EMPTY
    driver.start()
    driver.ring.want_interrupts(False)
    split.interrupts()
    driver.submit(at.VIRTIO_BLK_T_IN, 0, incoming=split.unit)
    driver.kick()
    assert split.interrupted(1)


@shows("BF-101")
def test_any_layout_is_offered(split: Bench) -> None:
    split.need_legacy()
    assert offered(split) >> at.VIRTIO_F_ANY_LAYOUT & 1


@shows("BF-102")
def test_bit_30_is_not_offered(split: Bench) -> None:
    assert not offered(split) >> 30 & 1
