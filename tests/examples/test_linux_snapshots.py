"""Snapshots of the whole machine with Linux in it: the guest goes back together with its disk."""

from __future__ import annotations

import shutil
import subprocess

import pytest

import pyvirtio
from pyvirtio.machine.snapshots import MachineSnapshots

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.guest import LinuxGuest
from examples.emulator.linux import find_linux
from examples.emulator.packages import PackageError
from examples.emulator.rootfs import find_root, make_overlay
from examples.emulator.saving import machine_of


def test_guest_and_its_files_go_back_and_forth(tmp_path):
    try:
        find_linux()
        find_root()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    overlay = make_overlay(tmp_path / "overlay.qcow2")

    def assert_sound() -> None:
        disk.flush()
        result = disk.check()
        assert (result.check_errors, result.corruptions, result.leaks) == (0, 0, 0)
        if shutil.which("qemu-img"):
            subprocess.run(["qemu-img", "check", "-q", "-U", str(overlay)], check=True)

    with pyvirtio.open_disk(overlay) as disk:
        guest = LinuxGuest([disk])
        snapshots = MachineSnapshots(machine_of(guest.board), [disk])
        guest.run("mkdir /root/files; kept=before; uptime > /tmp/then")
        then = guest.run("cat /tmp/then")
        snapshots.savevm("empty")
        assert_sound()
        guest.run(
            "kept=between; for n in 1 2 3; do echo $n > files/$n; done; sha256sum files/* >sums"
        )
        guest.run("sync; dd if=/dev/vda of=/dev/null bs=1M count=8 2>/dev/null")
        snapshots.savevm("full")
        assert_sound()
        guest.run("kept=after; rm files/* sums; echo other > files/4; sync")

        snapshots.loadvm("empty")
        assert_sound()
        assert guest.run("echo $kept").strip() == "before"
        assert guest.run("ls files") == ""
        assert guest.run("cat /tmp/then") == then
        guest.run("echo lost > files/lost; sync")

        snapshots.loadvm("full")
        assert_sound()
        assert guest.run("echo $kept").strip() == "between"
        assert guest.run("ls files").split() == ["1", "2", "3"]
        guest.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum -c -s sums")
        assert not guest.warnings()
        guest.power_off()
        assert_sound()
