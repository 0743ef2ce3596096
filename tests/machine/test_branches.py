"""Who a snapshot came from, views of it, clones that go their own ways; states that are large."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import ImageError, MemoryDisk
from pyvirtio.machine.dirty import PAGE
from pyvirtio.machine.fork import open_fork
from pyvirtio.machine.lineage import MAX_ANCESTORS, Lineage, parse_lineage, read_lineage
from pyvirtio.machine.state import Machine
from support.guests import RAM, Guest, new_disk, parents
from support.peers import requires
from support.qemu import QemuIo, qemu_check, qemu_img, qemu_img_json

# -- who came from whom ----------------------------------------------------------------------------


def test_snapshots_form_a_tree() -> None:
    guest = Guest()
    for name in ("root", "left", "left leaf"):
        guest.save(name)
    guest.snapshots.loadvm("root")
    guest.save("right")
    tree = {"root": None, "left": "root", "left leaf": "left", "right": "root"}
    assert parents(guest) == tree
    assert parents(Guest(*guest.disks)) == tree


def test_a_deleted_parent_leaves_the_one_before_it() -> None:
    guest = Guest()
    for name in ("1", "2", "3", "4"):
        guest.save(name)
    guest.snapshots.delvm("2")
    guest.snapshots.delvm("3")
    assert parents(guest) == {"1": None, "4": "1"}


def test_a_snapshot_that_shares_nothing_has_its_parent_still() -> None:
    guest = Guest()
    guest.save("one")
    guest.disks[0].truncate(64 << 20)
    assert guest.save("two").whole
    assert parents(guest) == {"one": None, "two": "one"}


def test_another_programs_state_is_a_root() -> None:
    guest = Guest()
    guest.save("one")
    guest.disks[0].vmstate.write(0, b"QEVM" + bytes(100))
    guest.disks[0].snapshots.create("theirs", vm_state_size=104)
    assert parents(guest) == {"one": None, "theirs": None}


def test_a_lineage_comes_back_and_stays_short() -> None:
    lineage = Lineage.root()
    for _ in range(2 * MAX_ANCESTORS):
        child = lineage.child()
        assert child.ancestors[0] == lineage.uuid
        lineage = child
    assert len(lineage.ancestors) == MAX_ANCESTORS
    assert parse_lineage(lineage.pack()) == lineage


@pytest.mark.parametrize("cut", [0, 5, 16, -1])
def test_a_lineage_of_another_length_is_refused(cut: int) -> None:
    data = Lineage.root().child().pack()
    with pytest.raises(ImageError, match="lineage"):
        parse_lineage(data[:cut])


def test_a_stream_without_lineage_has_none(make_toy: Any) -> None:
    disk = MemoryDisk(growable=True)
    make_toy().machine.save(disk)
    assert read_lineage(disk) is None


# -- beside the running machine --------------------------------------------------------------------


def test_disks_of_a_snapshot_are_read_beside_the_running_ones() -> None:
    guest = Guest(new_disk(), new_disk())
    for number, disk in enumerate(guest.disks):
        disk.write(0, bytes([number + 1]) * 5000)
    guest.save("one")
    for disk in guest.disks:
        disk.write(0, b"later" * 1000)
    views = guest.snapshots.open("one")
    assert [view.read(0, 5000) for view in views] == [b"\1" * 5000, b"\2" * 5000]
    for view in views:
        view.close()
    guest.snapshots.delvm("one")


def test_clones_go_their_own_ways(tmp_path: Path) -> None:
    disks = [
        pyvirtio.create_disk(tmp_path / "disk", 1 << 20),
        pyvirtio.create_disk(tmp_path / "ram", 1 << 16, cluster_size=PAGE),
    ]
    guest = Guest(*disks, state_disk=disks[1])
    disks[0].write(0, b"shared" * 1000)
    guest.save("one")
    then = bytes(guest.ram)
    guest.touch(1)
    disks[0].write(0, b"parent")
    machines = []
    for number in range(3):
        ram = bytearray(RAM)
        paths = [tmp_path / f"{name} {number}" for name in ("disk", "ram")]
        clone = guest.snapshots.fork("one", Machine({}, {"main": ram}), paths)
        assert ram == then
        clone.disks[0].write(0, b"clone%d" % number)
        ram[0] ^= number + 1
        clone.savevm("own")
        machines.append((clone, ram, paths))
    assert disks[0].read(0, 12) == b"parentshared"
    for number, (clone, ram, paths) in enumerate(machines):
        now = bytes(ram)
        ram[:] = bytes(RAM)
        clone.loadvm("own")
        assert ram == now
        assert clone.disks[0].read(0, 12) == b"clone%dshared" % number
        assert paths[0].stat().st_size < 1 << 20
        for disk in clone.disks:
            assert disk.check().clean
            disk.close()
    for disk in disks:
        disk.close()
    with open_fork(tmp_path / "disk 1") as fork:
        assert fork.read(0, 12) == b"clone1shared"


def test_a_fork_is_not_opened_as_something_else(tmp_path: Path) -> None:
    disk: Any = pyvirtio.create_disk(tmp_path / "disk", 1 << 20)
    disk.write(0, b"then")
    guest = Guest(disk)
    guest.save("machine")
    disk.write(0, b"now!")
    clone = Machine({}, {"main": bytearray(RAM)})
    guest.snapshots.fork("machine", clone, [tmp_path / "fork"]).disks[0].close()
    with pytest.raises(ValueError, match="Unknown driver 'pyvirtio-snapshot'"):
        pyvirtio.open_disk(tmp_path / "fork", read_only=True)
    disk.close()
    with open_fork(tmp_path / "fork", read_only=True) as fork:
        assert fork.read(0, 4) == b"then"
    with pyvirtio.open_disk(tmp_path / "disk") as disk:
        disk.snapshots.create("another")
        disk.snapshots.delete("machine")
    with pytest.raises(ImageError, match="is gone"):
        open_fork(tmp_path / "fork", read_only=True)


# -- large -----------------------------------------------------------------------------------------


@requires("qemu-img", "qemu-io")
def test_a_state_beyond_4_gib_on_a_disk_of_a_tebibyte(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    disk: Any = pyvirtio.create_disk(path, 1 << 40)
    disk.write((1 << 40) - 5000, b"end" * 1000)
    last = 5 << 30
    page = random.Random(1).randbytes(65536)
    with disk.snapshots.draft() as draft:
        draft.write([(0, memoryview(b"start" * 100)), (last, memoryview(page))])
        one = disk.snapshots.create("one", vm_state_size=last + 65536, draft=draft)
    with disk.snapshots.draft(one) as draft:
        draft.write([(last - 65536, memoryview(page))])
        disk.snapshots.create("two", vm_state_size=last + 65536, draft=draft)
    disk.close()
    qemu_check(path)
    for name in ("one", "two"):
        qemu_img("snapshot", "-a", name, path)
        qemu_check(path)
        facts = qemu_img_json("info", path)["snapshots"]
        assert {fact["vm-state-size"] for fact in facts} == {last + 65536}
        with QemuIo(path) as io:
            shown = io.command(f"read -b -v {last} 512").replace(" ", "")
            assert page[:16].hex() in shown
            shown = io.command(f"read -b -v {last - 65536} 512").replace(" ", "")
            assert (page[:16].hex() in shown) == (name == "two")
    with pyvirtio.open_disk(path) as disk:
        assert disk.vmstate.read(last, 65536) == page
        assert disk.read((1 << 40) - 5000, 3000) == b"end" * 1000
    assert path.stat().st_blocks * 512 < 4 << 20
