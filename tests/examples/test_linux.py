"""Debian's Linux as the guest: one boot, in which the tests take their turns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pyvirtio

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.board import Board
from examples.emulator.guest import LinuxGuest
from examples.emulator.linux import RAM, find_linux
from examples.emulator.packages import PackageError
from examples.emulator.rootfs import find_root, make_overlay
from examples.emulator.script import ScriptError
from support.filters import BadSectorsDisk, CappedDisk, RecordingDisk
from support.peers import requires
from support.qemu import qemu_img_json

MIB = 1 << 20


@dataclass
class Rig:
    """A guest and the disks that it has."""

    guest: LinuxGuest
    overlay: Path
    root: pyvirtio.Disk
    still: pyvirtio.MemoryDisk
    big_blocks: RecordingDisk
    growing: pyvirtio.Disk
    growing_path: Path
    faulty: BadSectorsDisk
    small_host: pyvirtio.Disk


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    try:
        find_linux()
        find_root()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    folder = tmp_path_factory.mktemp("linux")
    overlay = make_overlay(folder / "root.qcow2")
    root = pyvirtio.open_disk(overlay)
    still = pyvirtio.MemoryDisk(bytearray(bytes(range(256)) * 4096), read_only=True)
    big_blocks = RecordingDisk(pyvirtio.create_disk(folder / "big.qcow2", 64 * MIB))
    growing_path = folder / "growing.qcow2"
    growing = pyvirtio.create_disk(growing_path, 8 * MIB)
    faulty = BadSectorsDisk(pyvirtio.MemoryDisk(16 * MIB))
    host = pyvirtio.MemoryDisk(0, growable=True)
    small_host = pyvirtio.create_disk(CappedDisk(host, 4 * MIB), 32 * MIB)
    guest = LinuxGuest(
        [
            pyvirtio.VirtioBlk(root, serial="root", queue_size=1024),
            still,
            pyvirtio.VirtioBlk(big_blocks, logical_block_size=4096),
            growing,
            faulty,
            small_host,
        ]
    )
    yield Rig(guest, overlay, root, still, big_blocks, growing, growing_path, faulty, small_host)
    for disk in (root, big_blocks, growing):
        disk.close()


def test_two_boots_are_the_same_to_the_byte_and_the_tick():
    try:
        linux = find_linux()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    ends = set()
    for _ in range(2):
        sent = bytearray()
        board = Board(sent.append, ram=RAM, disks=[pyvirtio.MemoryDisk(MIB)])
        board.start_supervisor(board.load_linux(linux.kernel), "earlycon=sbi", linux.initramfs)
        for _ in range(150):
            if board.step():
                board.sleep()
        board.cpu.state.load()
        memory = hashlib.sha256(board.ram).hexdigest()
        ends.add((memory, bytes(board.cpu.state.words), board.clock.now(), bytes(sent)))
    assert len(ends) == 1
    assert b"Linux version" in ends.pop()[3]


def test_kernel_has_nothing_to_say_against_the_disks_at_boot(rig):
    complaints = [line for line in rig.guest.warnings() if "vd" in line or "virtio_blk" in line]
    assert not complaints


def test_guest_sees_what_the_devices_promise(rig):
    run = rig.guest.run
    assert run("cat /sys/block/vda/serial").strip() == "root"
    assert run("cat /sys/block/vdb/ro").strip() == "1"
    assert run("cat /sys/block/vdc/queue/logical_block_size").strip() == "4096"
    # As many requests as the queue has entries: the driver uses indirect descriptors, or else
    # thirds of the ring.
    assert int(run("cat /sys/block/vda/mq/0/nr_tags")) >= 256
    assert int(run("cat /sys/block/vda/queue/discard_max_bytes")) > 0
    assert run("cat /sys/block/vda/queue/write_cache").strip() == "write back"


def test_work_on_the_root_disk_is_verified(rig):
    rig.guest.run("workload first 2")
    assert "first is verified: 2 commits" in rig.guest.run("verify first 2")


def test_read_only_disk_is_read_and_not_written(rig):
    wanted = hashlib.sha256(bytes(range(256)) * 4096).hexdigest()
    assert wanted in rig.guest.run("sha256sum /dev/vdb")
    rig.guest.run("dd if=/dev/zero of=/dev/vdb count=1 2>/dev/null", fails=True)
    assert rig.still.read(0, 256) == bytes(range(256))


def test_file_system_on_blocks_of_4096_bytes(rig):
    run = rig.guest.run
    run("mkfs.ext4 -q /dev/vdc && mount /dev/vdc /mnt")
    run("dd if=/dev/urandom of=/mnt/file bs=64k count=40 2>/dev/null")
    before = run("sha256sum /mnt/file")
    run("umount /mnt && mount /dev/vdc /mnt")
    assert run("sha256sum /mnt/file") == before
    log = [event for event in rig.big_blocks.log if event.kind != "flush"]
    assert all(event.offset % 4096 == 0 and event.length % 4096 == 0 for event in log)
    assert {"write", "zero", "discard"} <= {event.kind for event in log}


def test_fsync_reaches_the_disk_as_a_flush_after_the_data(rig):
    secret = b"stable from here on"
    rig.guest.run(f"echo {secret.decode()} >/mnt/note && sync /mnt/note")
    log = rig.big_blocks.log
    (written,) = [
        n for n, event in enumerate(log) if event.kind == "write" and secret in event.data
    ]
    assert "flush" in {event.kind for event in log[written:]}


def test_discarded_blocks_are_given_back(rig):
    run = rig.guest.run
    run("dd if=/dev/urandom of=/dev/vdd bs=1M count=4 conv=fsync 2>/dev/null")
    assert _data(rig.growing) >= 4 * MIB
    run("blkdiscard -o 1048576 -l 2097152 /dev/vdd")
    assert 2 * MIB <= _data(rig.growing) <= 2 * MIB + 65536
    assert rig.growing.read(MIB, 2 * MIB) == bytes(2 * MIB)


@requires("qemu-img")
def test_what_is_zeroed_or_discarded_holds_no_data_in_the_image(rig):
    run, path = rig.guest.run, rig.growing_path
    run("dd if=/dev/urandom of=/dev/vdd bs=1M count=4 conv=fsync 2>/dev/null")
    # By its path, for busybox has one of its own, which cannot write zeroes.
    run(f"/usr/sbin/blkdiscard -z -o {MIB} -l {MIB} /dev/vdd")
    run(f"blkdiscard -o {2 * MIB} -l {MIB} /dev/vdd")
    rig.growing.flush()
    extents = qemu_img_json("map", "-U", "-f", "qcow2", path)

    def kinds(start: int, end: int) -> set[tuple[bool, bool]]:
        return {
            (extent["data"], extent["zero"])
            for extent in extents
            if extent["start"] < end and extent["start"] + extent["length"] > start
        }

    assert kinds(0, MIB) == kinds(3 * MIB, 4 * MIB) == {(True, False)}
    assert kinds(MIB, 3 * MIB) == {(False, True)}
    assert rig.growing.read(MIB, 2 * MIB) == bytes(2 * MIB)
    run(f"dd if=/dev/vdd bs=1M skip=1 count=2 2>/dev/null | cmp -n {2 * MIB} - /dev/zero")


def test_disk_grows_while_the_guest_runs(rig):
    rig.growing.truncate(24 * MIB)
    rig.guest.run("sleep 1")
    assert rig.guest.run("cat /sys/block/vdd/size").strip() == str(24 * MIB // 512)
    rig.guest.run("echo beyond | dd of=/dev/vdd bs=1M seek=20 conv=fsync 2>/dev/null")
    assert rig.growing.read(20 * MIB, 6) == b"beyond"


@requires("qemu-img")
def test_fstrim_takes_the_data_out_of_the_overlay(rig):
    def mapped() -> int:
        rig.root.flush()
        extents = qemu_img_json("map", "-U", "-f", "qcow2", rig.overlay)
        return sum(e["length"] for e in extents if e["data"] and e["depth"] == 0)

    run = rig.guest.run
    run("dd if=/dev/urandom of=litter bs=1M count=8 conv=fsync 2>/dev/null")
    full = mapped()
    run("rm litter && sync && fstrim /")
    # Not to the byte: the clusters at the edges hold other things, too.
    assert full - mapped() >= 7 * MIB


def test_kernel_has_nothing_to_say_against_the_disks_at_work(rig):
    assert not rig.guest.warnings()


def test_bad_sectors_are_reported_to_the_guest_which_goes_on(rig):
    rig.faulty.bad = range(5 * MIB, 5 * MIB + 512)
    said = rig.guest.run("dd if=/dev/vde of=/dev/null bs=64k 2>&1", fails=True)
    assert "I/O error" in said
    assert any("I/O error, dev vde" in line for line in rig.guest.warnings())
    rig.faulty.bad = range(0)
    rig.guest.run("dd if=/dev/vde of=/dev/null bs=64k 2>/dev/null")


def test_file_system_whose_journal_cannot_be_written_becomes_read_only(rig):
    run = rig.guest.run
    run("mkdir -p /bad && mkfs.ext4 -q /dev/vde && mount -o errors=remount-ro /dev/vde /bad")
    run("echo before >/bad/before && sync")
    rig.faulty.bad = range(16 * MIB)
    run("echo after >/bad/after; sync /bad/after; sync; echo again >/bad/again", fails=True)
    assert rig.faulty.failed > 1
    assert any("vde" in line for line in rig.guest.warnings())
    rig.faulty.bad = range(0)
    run("umount /bad && mount /dev/vde /bad")
    assert run("cat /bad/before").strip() == "before"
    run("umount /bad")
    rig.guest.warnings()


def test_host_without_room_is_an_error_of_the_write_and_no_more(rig):
    run = rig.guest.run
    # Direct, for else the kernel complains of every page, on the slow serial port.
    run("dd if=/dev/urandom of=/dev/vdf bs=64k count=256 oflag=direct 2>/dev/null", fails=True)
    assert any("dev vdf" in line for line in rig.guest.warnings())
    # What has its place already can still be written and read.
    run("echo there is room | dd of=/dev/vdf conv=fsync 2>/dev/null")
    assert rig.small_host.read(0, 13) == b"there is room"


def test_guest_that_was_hurt_shuts_down_and_leaves_a_sound_image(rig):
    rig.guest.run("umount /mnt")
    rig.guest.power_off()
    rig.root.close()
    with pyvirtio.open_disk(rig.overlay, read_only=True) as disk:
        found = disk.check()
    assert (found.check_errors, found.corruptions, found.leaks) == (0, 0, 0)


def test_command_that_fails_is_an_error(rig):
    with pytest.raises(ScriptError):
        rig.guest.run("true")  # the guest is off


def _data(disk: pyvirtio.Disk) -> int:
    return sum(extent.length for extent in disk.extents() if extent.data)
