"""A real Linux under QEMU, whose disk is ours over vhost-user: a file system's whole life.

One short run belongs to the suite; with ``PYVIRTIO_GUESTS`` set (``make interop-vhost``) split and
packed queues go through everything, with a reboot and servers killed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvirtio
from support.peers import requires
from support.qemu import qemu_img, qemu_img_json
from support.vmm import Server, Vmm, vhost_user_disk
from support.x86_guest import TOOLS as T
from support.x86_guest import Guest, fio

pytestmark = [
    requires("qemu-system-x86_64", "qemu-img", "mke2fs", "apt-get"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the guest's programs are amd64"),
]
MIB = 1 << 20
SIZE = 64 * MIB
ONLY_LEAKS = 3
LONG = bool(os.environ.get("PYVIRTIO_GUESTS"))


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """An overlay on an empty image; QEMU has the last word on both: nothing but leaks, which a
    server that is killed may leave."""
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    pyvirtio.create_disk(base, SIZE).close()
    pyvirtio.create_disk(path, SIZE, backing_file=base.name, backing_fmt="qcow2").close()
    yield path
    for image in (base, path):
        assert qemu_img("check", image, check=False).returncode in (0, ONLY_LEAKS)


def test_a_file_system_lives_on_our_disk_through_a_crash_of_the_server(
    guest: Guest, overlay: Path, tmp_path: Path
) -> None:
    options = ("--packed",)
    with (
        Server(overlay, tmp_path, *options) as server,
        Vmm(guest, vhost_user_disk(server, packed=True)) as vmm,
    ):
        vmm.boot()
        vmm.run(f"{T}/mke2fs -q -F -t ext4 /disk && mount /disk /mnt")
        vmm.run("dd if=/dev/urandom of=/mnt/kept bs=64k count=16 && sync")
        digest = vmm.run("sha1sum < /mnt/kept")
        writing = vmm.start(fio("checked", 2 * MIB))
        server.kill()
        assert vmm.result(writing)[0] == 0
        server.command("block_resize", size=2 * SIZE)
        vmm.run(f"until [ $(cat /sys/block/vda/size) = {2 * SIZE // 512} ]; do sleep 0.1; done")
        vmm.run(f"rm /mnt/checked*; {T}/fstrim -v /mnt")
        vmm.run("umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount /disk /mnt")
        assert vmm.run("sha1sum < /mnt/kept") == digest
        vmm.run(f"umount /mnt && {T}/e2fsck -f -n /disk")
        vmm.power_off()
        assert server.end() == 0


if LONG:

    @pytest.mark.parametrize("cpus", [1, 2])
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_file_system_lives_through_reboots(
        guest: Guest, overlay: Path, tmp_path: Path, packed: bool, cpus: int
    ) -> None:
        options = ("--packed", "--queues", str(cpus))
        with (
            Server(overlay, tmp_path, *options) as server,
            Vmm(guest, vhost_user_disk(server, packed=packed, queues=cpus), cpus=cpus) as vmm,
        ):
            vmm.boot()
            vmm.run(f"{T}/mke2fs -q -F -t ext4 /disk && mount /disk /mnt")
            vmm.run("dd if=/dev/urandom of=/mnt/kept bs=1M count=8")
            digest = vmm.run("sha1sum < /mnt/kept")
            vmm.run(fio("checked", 16 * MIB), timeout=600)
            vmm.run(f"rm /mnt/checked* && sync && {T}/fstrim /mnt")
            server.command("block_resize", size=2 * SIZE)
            vmm.run(f"until [ $(cat /sys/block/vda/size) = {2 * SIZE // 512} ]; do sleep 1; done")
            vmm.run("sync; umount /mnt")
            for _ in range(2):
                vmm.reboot()
                vmm.run(f"{T}/e2fsck -f -n /disk && mount /disk /mnt")
                assert vmm.run("sha1sum < /mnt/kept") == digest
                vmm.run("umount /mnt")
            vmm.power_off()
            assert server.end() == 0
        assert qemu_img("check", overlay).returncode == 0
        extents = qemu_img_json("map", overlay)
        data = sum(extent["length"] for extent in extents if extent["data"])
        assert data < 20 * MIB  # what was trimmed is not kept: 16 MiB

    def test_memory_is_plugged_in_and_taken_out_while_the_disk_is_used(
        guest: Guest, overlay: Path, tmp_path: Path
    ) -> None:
        """QEMU tells of it by messages on memory slots."""
        monitor = tmp_path / "qemu.sock"
        with (
            Server(overlay, tmp_path) as server,
            Vmm(guest, vhost_user_disk(server), monitor=monitor, memory_slot=True) as vmm,
        ):
            vmm.boot()
            vmm.wait_for_monitor()
            vmm.run(f"{T}/mke2fs -q -F -t ext4 /disk && mount /disk /mnt")
            vmm.run("dd if=/dev/urandom of=/mnt/kept bs=1M count=24 && sync")
            vmm.run("sha1sum /mnt/kept > /tmp/sums")
            memory = {"qom-type": "memory-backend-memfd", "size": 128 * MIB, "share": True}
            for state in ("online_movable", "offline"):
                vmm.run(f"({fio('checked', 4 * MIB)}) & worker=$!")
                if state == "offline":
                    vmm.run(f"echo {state} > /sys/devices/system/memory/memory32/state")
                    vmm.command("device_del", id="dimm")
                    while vmm.command("query-memory-devices"):
                        vmm.run("sleep 0.2")
                    vmm.command("object-del", id="more")
                else:
                    vmm.command("object-add", id="more", **memory)
                    vmm.command("device_add", driver="pc-dimm", id="dimm", memdev="more")
                    vmm.run("until cd /sys/devices/system/memory/memory32; do sleep 0.2; done")
                    vmm.run(f"cd / && echo {state} > /sys/devices/system/memory/memory32/state")
                for _ in range(2):
                    vmm.run("echo 3 > /proc/sys/vm/drop_caches; sha1sum -c /tmp/sums")
                vmm.run("wait $worker && rm /mnt/checked*")
            vmm.run(f"umount /mnt && {T}/e2fsck -f -n /disk")
            vmm.power_off()
            assert server.end() == 0

    @pytest.mark.parametrize("packed", [False, True])
    def test_nothing_flushed_is_lost_when_the_server_is_killed_again_and_again(
        guest: Guest, overlay: Path, tmp_path: Path, packed: bool
    ) -> None:
        with (
            Server(overlay, tmp_path, "--packed", "--queues", "2") as server,
            Vmm(guest, vhost_user_disk(server, packed=packed, queues=2), cpus=2) as vmm,
        ):
            vmm.boot()
            vmm.run(f"{T}/mke2fs -q -F -t ext4 /disk && mount /disk /mnt")
            for round in range(6):
                vmm.run(f"dd if=/dev/urandom of=/mnt/kept{round} bs=64k count=8 && sync")
                vmm.run(f"sha1sum /mnt/kept{round} >> /tmp/sums")
                writing = vmm.start(fio(f"checked{round}", 4 * MIB, sync="--fsync=16"))
                server.kill()
                assert vmm.result(writing, 600)[0] == 0
            vmm.run("umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount /disk /mnt")
            vmm.run("sha1sum -c /tmp/sums")
            vmm.run(f"umount /mnt && {T}/e2fsck -f -n /disk")
            vmm.power_off()
            assert server.end() == 0
