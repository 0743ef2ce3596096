"""The raw format: windows, rounding, and the guard of a disk that is raw only by guess."""

import errno
import threading
from contextlib import suppress

import pytest

from pyvirtio import (
    BackendError,
    FileDisk,
    ImageError,
    MemoryDisk,
    RawDisk,
    UnsupportedError,
)

HEADER = b"TOY!" + bytes(508)


def test_a_window_shows_only_its_part():
    memory = bytearray(b"a" * 1000 + b"b" * 1024 + b"c" * 1000)
    disk = RawDisk(MemoryDisk(memory), offset=1000, size=1024)
    assert disk.read(0, 1024) == b"b" * 1024
    disk.write(1023, b"x")
    assert memory[2022:2025] == b"bxc"
    with pytest.raises(ValueError, match="not inside"):
        disk.write(1023, b"xy")


@pytest.mark.parametrize(
    ("window", "text"),
    [
        ({"offset": 2000}, "Offset (2000) cannot be greater than size of the containing file (1"),
        ({"offset": 512, "size": 1024}, "The sum of offset (512) and size (1024) has to be smalle"),
        ({"size": 1000}, "Specified size is not multiple of 512"),
    ],
)
def test_windows_that_are_none_are_refused_in_qemus_words(window, text):
    with pytest.raises(ImageError) as caught:
        RawDisk(MemoryDisk(1024), **window)
    assert str(caught.value).startswith(text)


def test_a_file_that_ends_inside_a_sector_is_rounded_up(tmp_path):
    (tmp_path / "odd").write_bytes(b"x" * 700)
    with RawDisk(FileDisk(tmp_path / "odd", growable=True)) as disk:
        assert disk.size == 1024
        assert disk.read(512, 512) == b"x" * 188 + bytes(324)
        assert sum(extent.length for extent in disk.extents()) == 1024
        disk.write(1000, b"abc")
        assert disk.size == 1024
    assert (tmp_path / "odd").read_bytes() == b"x" * 700 + bytes(300) + b"abc"


def test_a_file_that_cannot_grow_reads_zeroes_in_its_last_sector():
    disk = RawDisk(MemoryDisk(bytearray(b"x" * 700)))
    view = memoryview(bytearray(b"?" * 512))
    disk.readv(512, [view])
    assert view == b"x" * 188 + bytes(324)
    with pytest.raises(BackendError) as caught:
        disk.write(600, bytes(200))
    assert caught.value.errno == errno.ENOSPC


def test_truncate_keeps_what_lies_before_the_window(tmp_path):
    file = FileDisk.create(tmp_path / "disk", 1000, growable=True)
    with RawDisk(file, offset=1000) as disk:
        disk.truncate(2048)
        assert (disk.size, file.size) == (2048, 3048)
        disk.truncate(512, shrink=True)
        assert (disk.size, file.size) == (512, 1512)


def test_a_fixed_window_cannot_be_resized():
    disk = RawDisk(MemoryDisk(1024), size=512)
    with pytest.raises(UnsupportedError, match="Cannot resize fixed-size raw disks"):
        disk.truncate(1024)


def test_everything_is_passed_on(tmp_path):
    file = FileDisk.create(tmp_path / "disk", 1 << 20)
    with RawDisk(file, offset=65536) as disk:
        disk.write(0, b"x" * 65536)
        status = disk.block_status(0, 1)
        assert (status.host_offset, status.file) == (65536, file)
        disk.write_zeroes(0, 65536, unmap=True)
        assert disk.read(0, 65536) == bytes(65536)
        assert disk.has_zero_init
        assert disk.filename == str(tmp_path / "disk")
        assert disk.children == {"file": file}
        disk.reopen(read_only=True)
        assert file.read_only
    assert file.closed


# -- the guard -------------------------------------------------------------------------------------


@pytest.fixture
def guarded(toy):
    return RawDisk(MemoryDisk(4096), guarded=True)


def assert_refused(call):
    with pytest.raises(BackendError) as caught:
        call()
    assert caught.value.errno == errno.EPERM


def test_a_header_cannot_be_written(guarded):
    assert_refused(lambda: guarded.write(0, HEADER))
    assert_refused(lambda: guarded.writev(0, [b"T", b"OY", b"!" + bytes(4000)]))
    assert guarded.read(0, 4096) == bytes(4096)


def test_a_header_cannot_be_written_in_parts(guarded):
    guarded.write(0, b"TO")
    guarded.write(3, b"!")
    assert_refused(lambda: guarded.write(2, b"Y"))
    assert guarded.read(0, 4) == b"TO\0!"


def test_a_header_cannot_be_written_by_two_at_once(toy):
    for _ in range(20):
        disk = RawDisk(MemoryDisk(4096), guarded=True)

        def write(offset, data, disk=disk):
            with suppress(BackendError):
                disk.write(offset, data)

        threads = [threading.Thread(target=write, args=a) for a in ((0, b"TO"), (2, b"Y!"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert disk.read(0, 4) in (b"TO\0\0", b"\0\0Y!")


def test_zeroing_and_discarding_cannot_uncover_a_header(toy, monkeypatch):
    from pyvirtio.backend import registry

    picky = registry.Format("picky", lambda s: 100 if s[:6] == b"HEAD\0\0" else 0, toy.open)
    monkeypatch.setitem(registry._loaders, "picky", lambda: picky)
    disk = RawDisk(MemoryDisk(4096), guarded=True)
    disk.write(0, b"HEADxx")
    assert_refused(lambda: disk.write_zeroes(4, 2))
    assert_refused(lambda: disk.discard(4, 2))
    assert disk.read(0, 6) == b"HEADxx"


def test_other_writes_pass_the_guard(guarded):
    guarded.write(0, b"boot sector")
    guarded.write_zeroes(3, 5)
    guarded.write(2000, b"x" * 96)
    guarded.write(3000, HEADER)
    assert guarded.read(0, 11) == b"boo\0\0\0\0\0tor"
    assert guarded.read(3000, 4) == b"TOY!"


def test_what_is_checked_is_what_is_written(toy):
    """A guest that changes its memory between the check and the write gains nothing."""
    memory = bytearray(512)

    class Sly(MemoryDisk):
        def _readv(self, offset, views, length):
            memory[:4] = b"TOY!"  # while the guard looks at the old header
            super()._readv(offset, views, length)

    file = Sly(4096)
    RawDisk(file, guarded=True).writev(0, [memoryview(memory)])
    assert file.getvalue()[:4] == bytes(4)


def test_raw_by_choice_is_not_guarded(toy):
    disk = RawDisk(MemoryDisk(4096))
    disk.write(0, HEADER)
    assert disk.read(0, 4) == b"TOY!"


@pytest.mark.parametrize("window", [{"offset": -512}, {"size": -512}])
def test_windows_before_the_file_are_refused(window):
    with pytest.raises(ValueError, match="cannot be negative"):
        RawDisk(MemoryDisk(4096), **window)
