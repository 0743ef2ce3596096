"""Features and configuration that a device is given: limits, geometry, lifetime, erasure."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from pyvirtio import VirtioBlk, create_disk
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.blk_config import Geometry, Lifetime


def offers(machine: Any, feature: int) -> bool:
    return bool(machine.device.offered_features >> feature & 1)


def test_size_max(make_machine: Any) -> None:
    assert not offers(make_machine(), at.VIRTIO_BLK_F_SIZE_MAX)
    machine = make_machine(size_max=65536)
    assert offers(machine, at.VIRTIO_BLK_F_SIZE_MAX)
    assert machine.registers.config(8, 4) == 65536


def test_geometry(make_machine: Any, make_disk: Any) -> None:
    machine = make_machine(geometry=Geometry(100, 4, 17))
    assert offers(machine, at.VIRTIO_BLK_F_GEOMETRY)
    config = machine.registers.config
    assert (config(16, 2), config(18, 1), config(19, 1)) == (100, 4, 17)
    assert Geometry.guess(16 * 63 * 5 + 3) == Geometry(5, 16, 63)
    assert Geometry.guess(1 << 40) == Geometry(16383, 16, 63)
    assert Geometry.guess(1) == Geometry(2, 16, 63)


def test_lifetime_blk_78_blk_109(make_started: Any) -> None:
    machine = make_started(lifetime=lambda: Lifetime(2, 5, 11))
    done = machine.driver.request(at.VIRTIO_BLK_T_GET_LIFETIME, incoming=6)
    assert (done.status, done.used_length) == (0, 7)
    assert struct.unpack("<HHH", done.data) == (2, 5, 11)
    done = machine.driver.request(at.VIRTIO_BLK_T_GET_LIFETIME, incoming=5)
    assert (done.status, done.used_length) == (1, 1)


def test_no_lifetime_is_not_offered_blk_79(make_started: Any) -> None:
    machine = make_started()
    assert not offers(machine, at.VIRTIO_BLK_F_LIFETIME)
    assert machine.driver.request(at.VIRTIO_BLK_T_GET_LIFETIME, incoming=6).status == 2


@pytest.mark.parametrize("values", [(4, 0, 0), (0, 12, 0), (0, 0, 12), (-1, 0, 0)])
def test_reserved_lifetimes_cannot_be_said_blk_80(values: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="reserved"):
        Lifetime(*values)


def test_secure_erase_overwrites_and_flushes(make_started: Any) -> None:
    machine = make_started(secure_erase=True)
    assert struct.unpack("<III", machine.device.read_config(60, 12)) == (0x3FFFFF, 1, 1)
    machine.disk.content[:] = b"s" * len(machine.disk.content)
    machine.driver.secure_erase(3, 2)
    assert machine.disk.content[2 * 512 : 6 * 512] == b"s" * 512 + bytes(1024) + b"s" * 512
    assert machine.disk.calls == [("write", 3 * 512, 1024), ("flush",)]


@pytest.mark.parametrize("flags", [1, 2, 1 << 31])
def test_secure_erase_has_no_flags_blk_68(make_started: Any, flags: int) -> None:
    machine = make_started(secure_erase=True)
    segment = machine.driver.segment(0, 1, flags)
    assert machine.driver.request(at.VIRTIO_BLK_T_SECURE_ERASE, 0, segment).status == 2
    assert machine.disk.calls == []


def test_secure_erase_has_limits_blk_45(make_started: Any) -> None:
    machine = make_started(secure_erase=True)
    segment = machine.driver.segment
    for data in (segment(0, 1) * 2, segment(0, 1)[:15], segment(2047, 2), segment(0, 0x400000)):
        assert machine.driver.request(at.VIRTIO_BLK_T_SECURE_ERASE, 0, data).status == 1
    assert machine.disk.calls == []


def test_secure_erase_that_was_not_offered(make_started: Any) -> None:
    machine = make_started()
    data = machine.driver.segment(0, 1)
    assert machine.driver.request(at.VIRTIO_BLK_T_SECURE_ERASE, 0, data).status == 2


@pytest.mark.parametrize("kind", [2, 3, 6, 7, 9, 12, 17, 0x8000_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize("legacy", [False, True])
def test_scsi_and_what_else_is_unknown_is_refused_blk_107(
    make_started: Any, kind: int, legacy: bool
) -> None:
    machine = make_started(legacy=legacy)
    done = machine.driver.request(kind, 0, bytes(32), 112)
    assert (done.status, done.used_length) == (2, 1)
    assert machine.disk.calls == []


def test_a_qcow2_images_cluster_is_the_discard_alignment(tmp_path: Any) -> None:
    with create_disk(tmp_path / "a.qcow2", 1 << 20, cluster_size=131072) as disk:
        device = VirtioBlk(disk)
        assert struct.unpack("<I", device.read_config(44, 4)) == (256,)
        device.detach()


@pytest.mark.parametrize("options", [{"size_max": 100}, {"size_max": 1 << 32}])
def test_limits_that_cannot_be(make_disk: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="size_max"):
        VirtioBlk(make_disk(512), **options)
