"""Our vhost-user front-end drives QEMU's own back-end: qemu-storage-daemon's export."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.virtio import layout as at
from pyvirtio.virtio.driver import BlockDriver, SharedRam, VhostUserFrontEnd
from pyvirtio.virtio.driver.blk import UNDERSTOOD
from support.peers import requires
from support.qemu import qemu_create

pytestmark = requires("qemu-storage-daemon", "qemu-img")
SIZE = 8 << 20


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[Path]:
    """The socket of an export of ``disk.qcow2`` with two queues."""
    image, path = tmp_path / "disk.qcow2", tmp_path / "qemu.sock"
    qemu_create(image, SIZE)
    export = f"vhost-user-blk,id=e,node-name=q,addr.type=unix,addr.path={path}"
    process = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image}"),
            *("--blockdev", "driver=qcow2,node-name=q,file=f"),
            *("--export", f"{export},writable=on,num-queues=2"),
        ]
    )
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield path
    process.terminate()
    assert process.wait(60) == 0


@pytest.mark.parametrize("queue", [0, 1])
@pytest.mark.parametrize("event_idx", [False, True])
def test_our_driver_uses_qemus_device(exported: Path, event_idx: bool, queue: int) -> None:
    ram = SharedRam(1 << 20)
    features = UNDERSTOOD if event_idx else UNDERSTOOD & ~(1 << at.VIRTIO_F_EVENT_IDX)
    with VhostUserFrontEnd.connect(exported, ram) as front:
        driver = BlockDriver(
            front, ram.memory, ram.arena(), wait=front.wait, features=features, queue_index=queue
        )
        driver.start()
        assert driver.capacity == SIZE // 512
        assert bool(driver.features >> at.VIRTIO_F_EVENT_IDX & 1) == event_idx
        for sector in range(0, 400, 8):
            driver.write(sector, bytes([sector & 0xFF]) * 4096)
        driver.write_zeroes(8, 8)
        driver.discard(64, 128)
        driver.flush()
        heads = {driver.submit(at.VIRTIO_BLK_T_IN, 8 * n, incoming=512): n for n in range(5)}
        driver.kick()
        done = driver.collect()
        while len(done) < len(heads):
            assert front.wait()
            done |= driver.collect()
        for head, n in heads.items():
            assert done[head].data == bytes([0 if n == 1 else 8 * n]) * 512
        driver.registers.status = 0  # and once more, from the start
        driver.start()
        assert driver.read(400 - 8, 8) == bytes([(400 - 8) & 0xFF]) * 4096
    ram.close()
    with pyvirtio.open_disk(exported.with_name("disk.qcow2"), locking=False) as disk:
        assert disk.read(16 * 512, 512) == bytes([16]) * 512
