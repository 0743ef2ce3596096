"""The checks and conveniences that every Disk inherits."""

import copy
import errno
import mmap
import pickle

import pytest

from pyvirtio import BackendError, FileDisk, MemoryDisk, NullDisk, UnsupportedError


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 101), (100, 1), (1 << 64, 1)])
def test_requests_outside_the_disk_are_refused(offset, length):
    disk = MemoryDisk(100)
    with pytest.raises(ValueError, match="not inside the disk"):
        disk.readv(offset, [bytearray(length)])
    with pytest.raises(ValueError, match="not inside the disk"):
        disk.writev(offset, [bytes(length)])
    with pytest.raises(ValueError, match="not inside the disk"):
        disk.write_zeroes(offset, length)
    with pytest.raises(ValueError, match="not inside the disk"):
        disk.discard(offset, length)
    with pytest.raises(ValueError, match="not inside the disk"):
        disk.block_status(offset, length)


def test_writing_to_a_read_only_disk_is_eperm():
    disk = MemoryDisk(100, read_only=True)
    with pytest.raises(BackendError) as caught:
        disk.write(0, b"x")
    assert caught.value.errno == errno.EPERM


def test_a_closed_disk_refuses_everything():
    disk = MemoryDisk(100)
    disk.close()
    disk.close()
    for call in (lambda: disk.read(0, 1), lambda: disk.write(0, b"x"), disk.flush):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_growable_disk_grows_by_writing():
    disk = MemoryDisk(growable=True)
    disk.write(1000, b"abc")
    assert disk.size == 1003
    assert disk.read(998, 5) == b"\0\0abc"


def test_growable_disk_reads_zeroes_past_its_end():
    disk = MemoryDisk(growable=True)
    disk.write(0, b"abc")
    assert disk.read(1, 5) == b"bc\0\0\0"
    first, second = bytearray(b"--"), bytearray(b"----")
    disk.readv(2, [first, second])
    assert (first, second) == (b"c\0", b"\0\0\0\0")
    assert disk.read(1 << 40, 3) == b"\0\0\0"
    assert disk.size == 3


def test_growable_disk_still_refuses_negative_and_absurd_offsets():
    disk = MemoryDisk(10, growable=True)
    for offset in (-1, (1 << 63) - 1):
        with pytest.raises(ValueError, match="not inside the disk"):
            disk.read(offset, 2)


def test_block_status_past_the_end_of_a_growable_disk_is_zero():
    disk = MemoryDisk(10, growable=True)
    assert disk.block_status(5, 100).length == 5
    assert disk.block_status(10, 100).zero


def test_growth_without_memory_is_a_backend_error():
    disk = MemoryDisk(growable=True)
    with pytest.raises(BackendError) as caught:
        disk.write(1 << 62, b"x")
    assert caught.value.errno == errno.ENOSPC


def test_resize_listeners_are_told_until_they_stop():
    disk = MemoryDisk(10)
    sizes = []
    stop = disk.on_resize(sizes.append)
    disk.truncate(20)
    stop()
    disk.truncate(30)
    assert sizes == [20]


def test_shrinking_must_be_asked_for():
    disk = MemoryDisk(10)
    with pytest.raises(ValueError, match="shrink"):
        disk.truncate(5)
    disk.truncate(5, shrink=True)
    disk.truncate(10)
    assert disk.size == 10


def test_what_a_memory_disk_lost_by_shrinking_does_not_come_back():
    disk = MemoryDisk(10)
    disk.write(0, b"0123456789")
    disk.truncate(5, shrink=True)
    disk.truncate(10)
    assert disk.read(0, 10) == b"01234\0\0\0\0\0"


def test_a_memory_disk_is_the_callers_buffer():
    memory = bytearray(16)
    disk = MemoryDisk(memory)
    disk.write(4, b"abc")
    assert memory[4:7] == b"abc"
    with pytest.raises(UnsupportedError):
        disk.truncate(32)


def test_a_closed_memory_disk_lets_the_callers_memory_go():
    with mmap.mmap(-1, 4096) as memory:
        disk = MemoryDisk(memory)
        disk.write(0, b"abc")
        disk.close()
        assert memory[:3] == b"abc"


def test_a_memory_disk_needs_a_writable_buffer_unless_read_only():
    with pytest.raises(ValueError, match="not writable"):
        MemoryDisk(b"abc")
    assert MemoryDisk(b"abc", read_only=True).read(0, 3) == b"abc"


def test_null_disk_reads_zeroes_only_if_asked():
    buffer = bytearray(b"old")
    NullDisk(10).readv(0, [buffer])
    assert buffer == b"old"
    NullDisk(10, read_zeroes=True).readv(0, [buffer])
    assert buffer == b"\0\0\0"


def test_null_disk_forgets_what_is_written():
    disk = NullDisk(10, read_zeroes=True)
    disk.write(0, b"abc")
    disk.write_zeroes(0, 10)
    assert disk.read(0, 10) == bytes(10)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_disk_is_not_copied(tmp_path, duplicate):
    """The copy would close the original's file."""
    (tmp_path / "file").write_bytes(bytes(512))
    with FileDisk(tmp_path / "file") as disk, pytest.raises(TypeError, match="cannot be copied"):
        duplicate(disk)
