"""A real Linux under QEMU, whose disk is an export of our NBD server: a file system's life."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

import pyvirtio
from support.nbd import Program
from support.peers import requires
from support.qemu import qemu_img
from support.vmm import Vmm
from support.x86_guest import TOOLS as T
from support.x86_guest import Guest, fio

pytestmark = [
    requires("qemu-system-x86_64", "qemu-img", "mke2fs", "apt-get"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the guest's programs are amd64"),
]
SIZE = 64 << 20


def test_a_file_system_lives_on_an_export(guest: Guest, tmp_path: Path) -> None:
    base, image = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    pyvirtio.create_disk(base, SIZE).close()
    pyvirtio.create_disk(image, SIZE, backing_file=base.name, backing_fmt="qcow2").close()
    with Program(tmp_path, "--stats", str(image)) as program:
        disk = (
            *("-drive", f"if=none,id=disk,file=nbd:unix:{program.path},format=raw,discard=unmap"),
            *("-device", "virtio-blk-pci,drive=disk,serial=disk,addr=4"),
        )
        with Vmm(guest, disk) as vmm:
            vmm.boot()
            vmm.run(f"{T}/mke2fs -q -F -t ext4 /disk && mount /disk /mnt")
            vmm.run("dd if=/dev/urandom of=/mnt/kept bs=64k count=16 && sync")
            digest = vmm.run("sha1sum < /mnt/kept")
            vmm.run(fio("checked", 4 << 20))
            vmm.run(f"rm /mnt/checked*; {T}/fstrim -v /mnt")
            vmm.run("umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount /disk /mnt")
            assert vmm.run("sha1sum < /mnt/kept") == digest
            vmm.run(f"umount /mnt && {T}/e2fsck -f -n /disk")
            vmm.power_off()
        status, said = program.end()
    assert status == 0
    assert int(said.partition("(up to ")[2].split()[0]) > 1
    for path in (base, image):
        qemu_img("check", str(path))
