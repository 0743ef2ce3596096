"""What a driver did to one device is done to another, and comes out the same, or says where not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pyvirtio import GuestMemory, ImageError, VirtioBlk, VirtioMmio, create_disk
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import Arena, BlockDriver, Registers
from pyvirtio.virtio.recording import Recorder, Replayer

BASE = 0x8000_0000
SIZE = 1 << 20


def record(path: Path, disk: Any, *, transport: dict[str, Any], **options: Any) -> None:
    """A driver's run, of requests of many kinds."""
    ram = bytearray(SIZE)
    memory = GuestMemory.from_buffer(ram, BASE)
    recorder = Recorder(path, memory)
    device = VirtioBlk(disk, serial="record", queue_size=16, **options)
    mmio = recorder.attach(VirtioMmio(device, recorder.memory, **transport))
    assert mmio.size == at.MMIO_SIZE
    driver = BlockDriver(
        Registers(mmio.read, mmio.write),
        memory,
        Arena(BASE, SIZE),
        queue_size=16,
        wait=mmio.poll,
        legacy=transport.get("legacy", False),
    )
    driver.start()
    chance = random.Random(5)
    for _ in range(60):
        sector = chance.randrange(0, 2040)
        match chance.randrange(5):
            case 0:
                driver.write(sector, chance.randbytes(512 * chance.randrange(1, 5)))
            case 1:
                driver.read(sector, chance.randrange(1, 5))
            case 2:
                driver.request(at.VIRTIO_BLK_T_IN, 5000, incoming=512)
            case 3:
                driver.request(at.VIRTIO_BLK_T_IN, sector, incoming=1024, indirect=0)
            case 4:
                driver.flush()
    assert driver.serial() == "record"
    recorder.close()


def replayed(path: Path, disk: Any, *, transport: dict[str, Any], **options: Any) -> Any:
    replayer = Replayer(path)
    device = VirtioBlk(disk, **{"serial": "record", "queue_size": 16, **options})
    return replayer.run(VirtioMmio(device, replayer.memory, **transport))


@pytest.mark.parametrize(
    ("transport", "options"),
    [
        ({}, {}),
        ({}, {"packed": True, "in_order": True}),
        ({"legacy": True}, {}),
        ({"notify": "deferred"}, {}),
    ],
    ids=str,
)
def test_another_device_does_the_same(
    tmp_path: Path, make_disk: Any, transport: dict[str, Any], options: dict[str, Any]
) -> None:
    path = tmp_path / "run.jsonl"
    first, second = make_disk(SIZE), make_disk(SIZE)
    record(path, first, transport=transport, **options)
    assert replayed(path, second, transport=transport, **options) == []
    assert second.content == first.content
    assert any(first.content)


def test_another_kind_of_disk_does_the_same(tmp_path: Path, make_disk: Any) -> None:
    path = tmp_path / "run.jsonl"
    first = make_disk(SIZE)
    record(path, first, transport={}, geometry=None)
    with create_disk(tmp_path / "a.qcow2", SIZE) as disk:
        differences = replayed(path, disk, transport={})
        # Its clusters are the unit of discards, which the driver does not look at.
        assert differences == []
        assert disk.read(0, SIZE) == first.content


def test_other_data_is_told(tmp_path: Path, make_disk: Any) -> None:
    path = tmp_path / "run.jsonl"
    record(path, make_disk(SIZE), transport={})
    other = make_disk(SIZE)
    other.content[:] = b"o" * SIZE
    differences = replayed(path, other, transport={})
    assert differences
    assert all("writes" in each.what for each in differences)
    assert differences[0].action > 1


def test_other_statuses_and_registers_are_told(tmp_path: Path, make_disk: Any) -> None:
    path = tmp_path / "run.jsonl"
    record(path, make_disk(SIZE), transport={})
    differences = replayed(path, make_disk(SIZE, read_only=True), transport={})
    assert any(" gives " in each.what for each in differences)
    assert any(" writes " in each.what for each in differences)


@pytest.mark.parametrize(
    "line", ["", "{}", "[]", '{"do": "detach"}', '{"do": "__init__"}', "nonsense", "5"]
)
def test_what_is_no_record_is_refused(tmp_path: Path, make_disk: Any, line: str) -> None:
    path = tmp_path / "run.jsonl"
    record(path, make_disk(SIZE), transport={})
    head = path.read_text().splitlines()[0]
    path.write_text(f"{head}\n{line}\n")
    with pytest.raises(ImageError, match="Line 2"):
        replayed(path, make_disk(SIZE), transport={})
    path.write_text(json.dumps({"format": "something else"}) + "\n")
    with pytest.raises(ImageError, match="Line 1"):
        replayed(path, make_disk(SIZE), transport={})


def test_a_device_with_threads_is_not_recorded(tmp_path: Path, make_disk: Any) -> None:
    recorder = Recorder(tmp_path / "run.jsonl", GuestMemory.from_buffer(bytearray(4096)))
    mmio = VirtioMmio(VirtioBlk(make_disk(512), io_threads=1), recorder.memory)
    with pytest.raises(ValueError, match="threads"):
        recorder.attach(mmio)
    recorder.close()
