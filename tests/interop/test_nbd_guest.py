"""A real Linux under QEMU, whose disk is an export of our NBD server: a file system's life."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

import pyvirtio
from examples.emulator.packages import PackageError
from support.nbd import Program
from support.peers import requires
from support.qemu import qemu_img
from support.vmm import Vmm
from support.x86_guest import Guest, find_guest

pytestmark = [
    requires("qemu-system-x86_64", "qemu-img", "mke2fs", "apt-get"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the guest's programs are amd64"),
]
SIZE = 64 << 20
T = "/tools/bin"
FIO = (
    f"{T}/fio --name=checked --directory=/mnt --size=4M --bs=4k --rw=randwrite --verify=crc32c "
    "--verify_fatal=1 --ioengine=libaio --iodepth=16 --direct=1 --end_fsync=1 --output=/tmp/fio "
    "&& ! grep -v 'err= 0' /tmp/fio | grep err="
)


@pytest.fixture(scope="module")
def guest() -> Guest:
    try:
        return find_guest()
    except PackageError as error:
        pytest.skip(str(error))


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
            vmm.run(FIO)
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
