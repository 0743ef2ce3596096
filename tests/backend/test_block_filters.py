"""The filters, quorum and LUKS volumes."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio import BackendError, FileDisk, Limits, MemoryDisk, UnsupportedError
from pyvirtio.backend.blkdebug import BlkdebugDisk
from pyvirtio.backend.blkdebug_rules import make_rule
from pyvirtio.backend.blklogwrites import BlklogwritesDisk
from pyvirtio.backend.blkverify import BlkverifyDisk
from pyvirtio.backend.compress import CompressDisk
from pyvirtio.backend.copy_on_read import CopyOnReadDisk
from pyvirtio.backend.preallocate import PreallocateDisk
from pyvirtio.backend.quorum import QuorumDisk
from pyvirtio.backend.throttle import ThrottleDisk, ThrottleGroup, ThrottleLimits
from support.filters import HoldingDisk


def memory(byte: bytes = b"\0", size: int = 1 << 16) -> MemoryDisk:
    return MemoryDisk(bytearray(byte * size))


def test_verify_finds_what_differs() -> None:
    raw, test = memory(b"a"), memory(b"a")
    disk = BlkverifyDisk(raw, test)
    disk.write(100, b"xyz")
    assert raw.read(100, 3) == test.read(100, 3) == b"xyz"
    assert disk.read(0, 1000)[100:103] == b"xyz"
    test.write(200, b"!")
    with pytest.raises(
        BackendError, match="read offset=0 bytes=512 contents mismatch at offset 200"
    ):
        disk.read(0, 512)


def test_a_log_of_writes_can_be_replayed_and_gone_on_with() -> None:
    below, log = memory(), MemoryDisk(growable=True)
    with BlklogwritesDisk(below, log) as disk:
        log.close = lambda: None  # type: ignore[method-assign]
        disk.write(512, b"a" * 512)
        disk.flush()
        disk.discard(1024, 512)
    magic, version, entries, sector = struct.unpack("<QQQI", log.read(0, 28))
    assert (magic, version, sector) == (0x6A736677736872, 1, 512)
    assert entries == 4  # closing flushes
    assert struct.unpack("<QQQ", log.read(512, 24)) == (1, 1, 0)
    assert log.read(1024, 512) == b"a" * 512
    again = BlklogwritesDisk(memory(), log, append=True)
    again.write(0, b"b" * 512)
    assert log.read(512 * 7, 512) == b"b" * 512


def test_reads_are_copied_up_but_never_over_newer_data(tmp_path: Path) -> None:
    with pyvirtio.create_disk(tmp_path / "base", 1 << 20) as base:
        base.write(0, b"b" * 200000)
    top = pyvirtio.create_disk(tmp_path / "top", 1 << 20, backing_file="base", backing_fmt="qcow2")
    with CopyOnReadDisk(top) as disk:
        disk.write(65536, b"new")
        assert disk.read(0, 100000)[:65539] == b"b" * 65536 + b"new"
        assert top.block_status(0, 131072).depth == 0
        assert top.block_status(131072, 1).depth == 1
        assert top.read(65536, 4) == b"newb"


def while_held(
    below: HoldingDisk, kind: str, held: Callable[[], object], other: Callable[[], object]
) -> None:
    """Do ``other`` while ``held``, a request that comes to ``below``, is under way."""
    below.hold = kind
    threads = [threading.Thread(target=work, daemon=True) for work in (held, other)]
    threads[0].start()
    assert below.arrived.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    below.go.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


class Zeroing(MemoryDisk):
    """Memory with zeroes and discards of its own."""

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._writev(offset, [memoryview(bytes(length))], length)

    def _discard(self, offset: int, length: int) -> None:
        self._writev(offset, [memoryview(bytes(length))], length)


@pytest.mark.parametrize("what", ["zeroes", "discard"])
def test_what_becomes_zeroes_is_not_written_back_by_a_padded_write(what: str) -> None:
    below = HoldingDisk(Zeroing(bytearray(b"o" * 8192)), smallest=4096)
    disk = BlkdebugDisk(below, limits=Limits(request_alignment=4096))
    zero = disk.write_zeroes if what == "zeroes" else disk.discard
    while_held(below, "write", lambda: disk.write(10, b"new"), lambda: zero(0, 8192))
    assert disk.read(0, 8192) in (bytes(8192), bytes(10) + b"new" + bytes(8179))


def test_a_copy_never_replaces_what_is_written_compressed(tmp_path: Path) -> None:
    base, image = tmp_path / "base", tmp_path / "disk"
    base.write_bytes(b"o" * 65536)
    pyvirtio.create_disk(image, 65536, backing_file=str(base), backing_fmt="raw").close()
    below = HoldingDisk(pyvirtio.open_disk(image), smallest=65536)
    with CopyOnReadDisk(below) as disk:
        while_held(
            below,
            "write",
            lambda: disk.read(0, 512),
            lambda: disk.write_compressed(0, [b"n" * 65536]),
        )
        assert disk.read(0, 65536) == b"n" * 65536


def test_everything_is_compressed(tmp_path: Path) -> None:
    with CompressDisk(pyvirtio.create_disk(tmp_path / "a", 1 << 20)) as disk:
        disk.write(100, b"x" * 1000)
        assert disk.below.block_status(0, 65536).compressed
        assert disk.read(99, 1002) == b"\0" + b"x" * 1000 + b"\0"
    with pytest.raises(UnsupportedError, match="not supported for underlying format: memory"):
        CompressDisk(memory())


def test_a_file_grows_in_large_steps_and_ends_as_long_as_its_data(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with PreallocateDisk(FileDisk(path, growable=True), step=1 << 20, align=4096) as disk:
        disk.write(0, b"x" * 5000)
        assert disk.size == 5000
        assert path.stat().st_size > 1 << 20
        disk.write(5000, b"y")
    assert path.read_bytes() == b"x" * 5000 + b"y"


def test_limits_of_a_throttle_group_are_checked() -> None:
    limits = ThrottleLimits.of({"x-bps-total": "1000", "limits.iops-read": "5"})
    assert (limits.bps_total, limits.iops_read) == (1000, 5)
    with pytest.raises(ValueError, match="cannot be used at the same time"):
        ThrottleLimits.of({"x-bps-total": "1", "x-bps-read": "1"})


def test_a_throttled_disk_waits_as_long_as_its_group_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    disk = ThrottleDisk(memory(), ThrottleGroup(ThrottleLimits(bps_total=1000)))
    for _ in range(5):
        disk.read(0, 1000)
    assert 103.8 <= now[0] <= 104.0  # the first goes at once


@pytest.mark.parametrize("pattern", ["quorum", "fifo"])
def test_a_quorum_reads_and_writes_all(pattern: str) -> None:
    disks = [memory(b"a"), memory(b"a"), memory(b"a")]
    disk = QuorumDisk(disks, 2, pattern=pattern)
    disk.write(10, b"xyz")
    assert all(each.read(10, 3) == b"xyz" for each in disks)
    assert disk.read(9, 5) == b"axyza"


def test_a_quorum_votes_and_puts_right_who_lost() -> None:
    disks = [memory(b"a"), memory(b"b"), memory(b"a")]
    assert QuorumDisk(disks, 2, rewrite=True).read(0, 100) == b"a" * 100
    assert disks[1].read(0, 101) == b"a" * 100 + b"b"
    with pytest.raises(BackendError):
        QuorumDisk(disks, 3).read(100, 1)


def test_a_quorum_stands_losses_up_to_its_threshold() -> None:
    rule = make_rule("inject-error", {"event": "none"})
    disk = QuorumDisk([memory(b"a"), BlkdebugDisk(memory(b"b"), [rule])], 1)
    assert disk.read(0, 1) == b"a"
    disk.write(0, b"x")
    assert disk.read(0, 1) == b"x"
    disk.threshold = 2
    for request in (lambda: disk.read(0, 1), lambda: disk.write(0, b"y")):
        with pytest.raises(BackendError):
            request()


def test_a_luks_volume_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "volume"
    with pyvirtio.create_disk(path, 1 << 20, format="luks", passphrase="x", iter_time=10) as disk:
        assert disk.size == 1 << 20
        disk.write(1000, b"secret" * 100)
    assert b"secret" not in path.read_bytes()
    with pyvirtio.open_disk(path, passphrase="x") as disk:
        assert disk.format_name == "luks"
        assert disk.read(1000, 600) == b"secret" * 100
    with pytest.raises(ValueError, match="Invalid password"):
        pyvirtio.open_disk(path, passphrase="y")
