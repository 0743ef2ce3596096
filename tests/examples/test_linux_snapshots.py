"""Snapshots of the whole machine with Linux in it: the guest goes back together with its disk."""

from __future__ import annotations

import pytest

import pyvirtio
from pyvirtio.machine.dirty import PAGE
from pyvirtio.machine.increment import SaveFigures

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.guest import LinuxGuest
from examples.emulator.linux import RAM, find_linux
from examples.emulator.packages import PackageError
from examples.emulator.rootfs import find_root, make_overlay
from examples.emulator.saving import machine_of
from support.peers import find_program
from support.qemu import qemu_img


def test_guest_and_its_files_go_back_and_forth(tmp_path):
    try:
        find_linux()
        find_root()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    overlay, ram_image = make_overlay(tmp_path / "overlay.qcow2"), tmp_path / "ram.qcow2"

    def assert_sound() -> None:
        for opened, path in ((disk, overlay), (ram, ram_image)):
            opened.flush()
            result = opened.check()
            assert (result.check_errors, result.corruptions, result.leaks) == (0, 0, 0)
            if find_program("qemu-img"):
                qemu_img("check", "-q", "-U", path)

    def save(name: str) -> SaveFigures:
        snapshots.savevm(name, vm_clock=100 * guest.board.clock.now())
        assert_sound()
        assert snapshots.last_save is not None
        return snapshots.last_save

    with (
        pyvirtio.open_disk(overlay) as disk,
        pyvirtio.create_disk(ram_image, 512, cluster_size=PAGE) as ram,
    ):
        guest = LinuxGuest([disk])
        snapshots = pyvirtio.MachineSnapshots(machine_of(guest.board), [disk, ram], state_disk=ram)
        guest.run("mkdir /root/files; kept=before; uptime > /tmp/then")
        then = guest.run("cat /tmp/then")
        assert save("empty").whole
        guest.run(
            "kept=between; for n in 1 2 3; do echo $n > files/$n; done; sha256sum files/* >sums"
        )
        guest.run("sync; dd if=/dev/vda of=/dev/null bs=1M count=8 2>/dev/null")
        figures = save("full")
        assert not figures.whole
        # What a few commands touch, of 256 MiB.
        assert 0 < figures.pages * PAGE < RAM // 4
        assert figures.ram_bytes <= figures.pages * PAGE
        guest.run("kept=after; rm files/* sums; echo other > files/4; sync")

        snapshots.loadvm("empty")
        assert_sound()
        assert guest.run("echo $kept").strip() == "before"
        assert guest.run("ls files") == ""
        assert guest.run("cat /tmp/then") == then
        guest.run("echo lost > files/lost; sync")
        assert not save("another way").whole

        snapshots.loadvm("full")
        assert_sound()
        assert guest.run("echo $kept").strip() == "between"
        assert guest.run("ls files").split() == ["1", "2", "3"]
        guest.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum -c -s sums")
        assert not guest.warnings()
        snapshots.delvm("another way")
        parents = {
            node.snapshot.name: node.parent and node.parent.name for node in snapshots.tree()
        }
        assert parents == {"empty": None, "full": "empty"}
        guest.power_off()
        assert_sound()
