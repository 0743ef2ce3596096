"""FileDisk: transfers, space, flush, resizing, and what may be opened."""

import errno
import gc
import os
import socket
import threading

import pytest

from pyvirtio import BackendError, FileDisk, UnsupportedError
from pyvirtio.backend import file as file_module
from pyvirtio.backend import space as space_module
from pyvirtio.backend import transfer


@pytest.fixture
def disk(tmp_path):
    with FileDisk.create(tmp_path / "disk", 1 << 20) as disk:
        yield disk


def pattern(length, seed=1):
    return bytes((i * 7 + i // 251 + seed) & 255 for i in range(length))


# -- transfers -------------------------------------------------------------------------------------


def test_one_view_is_filled_in_place(disk):
    disk.write(5000, pattern(4096))
    memory = bytearray(8192)
    disk.readv(5000, [memoryview(memory)[100:4196]])
    assert memory[100:4196] == pattern(4096)
    assert not any(memory[:100])
    assert not any(memory[4196:])


def test_more_buffers_than_one_system_call_takes(disk):
    count = 3 * transfer._IOV_MAX + 17
    data = pattern(count * 3)
    disk.writev(11, [data[i : i + 3] for i in range(0, len(data), 3)])
    buffers = [bytearray(3) for _ in range(count)]
    disk.readv(11, buffers)
    assert b"".join(buffers) == data


def test_many_empty_buffers_do_not_look_like_the_end_of_the_file(disk):
    empty = [b""] * (2 * transfer._IOV_MAX)
    disk.writev(0, [*empty, b"abc"])
    buffer = bytearray(3)
    disk.readv(0, [*[bytearray() for _ in empty], buffer])
    assert buffer == b"abc"


def test_more_views_than_one_system_call_takes(disk):
    count = transfer._IOV_MAX + 1
    data = pattern(count * 2)
    disk.writev(11, [memoryview(data)[i : i + 2] for i in range(0, len(data), 2)])
    memory = bytearray(len(data))
    disk.readv(11, [memoryview(memory)[i : i + 2] for i in range(0, len(data), 2)])
    assert memory == data


def test_views_of_other_types_and_any_iterable(disk):
    from array import array

    disk.writev(0, (part for part in (array("I", [1, 2]), b"xyz")))
    numbers = array("I", [0, 0])
    disk.readv(0, (numbers,))
    assert numbers.tolist() == [1, 2]
    assert disk.read(8, 3) == b"xyz"


def test_short_transfers_are_continued(disk, monkeypatch):
    real_read, real_write = os.preadv, os.pwritev

    def clipped(views):
        left = 1000
        for view in views:
            yield memoryview(view)[:left]
            left -= min(left, len(view))

    monkeypatch.setattr(os, "preadv", lambda fd, v, at: real_read(fd, list(clipped(v)), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, v, at: real_write(fd, list(clipped(v)), at))
    data = pattern(10000)
    disk.writev(1, [data[:1], data[1:7000], data[7000:]])
    assert disk.read(1, 10000) == data
    disk.writev(1, [memoryview(data[::-1])])
    buffer = memoryview(bytearray(10000))
    disk.readv(1, [buffer])
    assert buffer == data[::-1]


def test_a_write_that_makes_no_progress_is_enospc(disk, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: 0)
    with pytest.raises(BackendError) as caught:
        disk.write(0, b"abc")
    assert caught.value.errno == errno.ENOSPC


def test_a_read_past_the_end_of_a_file_cut_by_others_is_zeroes(disk):
    disk.write(0, pattern(8192))
    os.truncate(disk.filename, 5000)
    assert disk.read(4096, 4096) == pattern(8192)[4096:5000] + bytes(4096 - 904)


def test_errors_say_what_was_done_and_keep_errno(disk, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(BackendError, match="Could not read 512 bytes at 1024") as caught:
        disk.readv(1024, [memoryview(bytearray(512))])
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == disk.filename
    with pytest.raises(BackendError, match="Could not write 512 bytes at 1024"):
        disk.writev(1024, [memoryview(bytes(512))])


def test_the_straight_way_checks_as_the_long_one(disk):
    view = memoryview(bytearray(512))
    for offset in (-1, -512, disk.size - 511, disk.size):
        with pytest.raises(ValueError, match="not inside the disk"):
            disk.readv(offset, [view])
        with pytest.raises(ValueError, match="not inside the disk"):
            disk.writev(offset, [view])
    with pytest.raises((TypeError, BufferError)):
        disk.readv(0, [memoryview(bytearray(1024))[::2]])
    with pytest.raises((TypeError, BufferError)):
        disk.readv(0, [memoryview(b"read-only")])


def test_the_straight_way_is_shut_when_closed_or_read_only(tmp_path):
    disk = FileDisk.create(tmp_path / "disk", 4096)
    view = memoryview(bytearray(512))
    disk.reopen(read_only=True)
    with pytest.raises(BackendError) as caught:
        disk.writev(0, [view])
    assert caught.value.errno == errno.EPERM
    disk.close()
    with pytest.raises(ValueError, match="closed"):
        disk.readv(0, [view])
    with pytest.raises(ValueError, match="closed"):
        disk.writev(0, [view])


def test_size_is_exact_in_bytes(tmp_path):
    (tmp_path / "odd").write_bytes(b"x" * 777)
    with FileDisk(tmp_path / "odd", read_only=True) as disk:
        assert disk.size == 777
        assert disk.read(770, 7) == b"x" * 7


# -- growing ---------------------------------------------------------------------------------------


def test_a_growable_file_grows_by_writes_and_zeroes(tmp_path):
    with FileDisk.create(tmp_path / "disk", growable=True) as disk:
        disk.writev(1000, [memoryview(b"abc")])
        assert disk.size == os.path.getsize(disk.filename) == 1003
        disk.write_zeroes(900, 9000)
        assert disk.size == os.path.getsize(disk.filename) == 9900
        assert disk.read(900, 10000) == bytes(10000)


def test_a_file_that_is_not_growable_does_not_grow(disk):
    with pytest.raises(ValueError, match="not inside"):
        disk.write(disk.size, b"x")


def test_concurrent_appends_all_stay(tmp_path):
    with FileDisk.create(tmp_path / "disk", growable=True) as disk:

        def append(number):
            for i in range(50):
                start = (number + 4 * i) * 100
                if i % 3:
                    disk.write(start, bytes([number + 1]) * 100)
                else:
                    disk.write_zeroes(start, 100, unmap=bool(i % 2))

        threads = [threading.Thread(target=append, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert disk.size == os.path.getsize(disk.filename) == 200 * 100
        for i in range(50):
            for n in range(4):
                expected = bytes([n + 1 if i % 3 else 0]) * 100
                assert disk.read((n + 4 * i) * 100, 100) == expected


# -- space -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unmap", [False, True])
def test_write_zeroes_zeroes_exactly_the_range(disk, unmap):
    disk.write(0, b"x" * 20000)
    disk.write_zeroes(4097, 8000, unmap=unmap)
    assert disk.read(0, 20000) == b"x" * 4097 + bytes(8000) + b"x" * (20000 - 12097)


def test_what_the_file_system_refuses_is_not_tried_again(disk, monkeypatch):
    calls = []

    def refuse(fd, mode, offset, length):
        calls.append(mode)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(space_module, "fallocate", refuse)
    disk.write(0, b"x" * 8192)
    disk.write_zeroes(0, 4096, unmap=True)
    tried = len(calls)
    disk.write_zeroes(4096, 4096, unmap=True)
    disk.discard(0, 4096)
    assert len(calls) == tried == 2
    assert disk.read(0, 8192) == bytes(8192)


def test_write_zeroes_without_fallback_is_refused_where_it_would_write(disk, monkeypatch):
    def refuse(fd, mode, offset, length):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(space_module, "fallocate", refuse)
    with pytest.raises(UnsupportedError):
        disk.write_zeroes(0, 4096, fallback=False)


def test_write_zeroes_that_fails_is_an_error(disk, monkeypatch):
    def full(fd, mode, offset, length):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(space_module, "fallocate", full)
    with pytest.raises(BackendError) as caught:
        disk.write_zeroes(0, 4096)
    assert caught.value.errno == errno.ENOSPC


def test_discard_gives_space_back_unless_ignored(tmp_path):
    for mode, kept in (("ignore", True), ("unmap", False)):
        with FileDisk.create(tmp_path / mode, 1 << 20, discard=mode) as disk:
            disk.write(0, b"x" * (1 << 20))
            disk.flush()
            before = disk.info().actual_size
            disk.discard(0, 1 << 20)
            assert (disk.info().actual_size == before) is kept
            assert disk.read(0, 1) == (b"x" if kept else b"\0")


def test_block_status_tells_holes_from_data(disk):
    disk.write(65536, b"x" * 65536)
    disk.flush()
    extents = [(e.length, e.data, e.zero, e.host_offset) for e in disk.extents()]
    if len(extents) == 1:
        pytest.skip("this file system does not tell its holes")
    assert extents == [
        (4096, True, False, 0),  # the first block is always there
        (65536 - 4096, False, True, 4096),
        (65536, True, False, 65536),
        ((1 << 20) - 131072, False, True, 131072),
    ]
    assert disk.block_status(65536, 100).file is disk


def test_block_status_is_all_data_where_the_host_does_not_tell(disk, monkeypatch):
    def refuse(fd, offset, whence):
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "lseek", refuse)
    (extent,) = disk.extents()
    assert (extent.data, extent.zero, extent.length) == (True, False, disk.size)


# -- flushing --------------------------------------------------------------------------------------


def test_fua_and_flush_reach_fdatasync(disk, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    disk.writev(0, [memoryview(b"abc")], fua=True)
    disk.writev(0, [memoryview(b"abc")])
    disk.flush()
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["write", "grow", "write_zeroes", "discard", "truncate"])
def test_after_every_change_a_flush_reaches_fdatasync_and_only_then(disk, monkeypatch, change):
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    disk.flush()
    disk.flush()
    assert len(calls) == 1  # what was written before it was opened
    if change == "write":
        disk.write(0, b"abc")
    elif change == "grow":
        disk.growable = True
        disk.write(disk.size, b"abc")
    elif change == "truncate":
        disk.truncate(disk.size + 4096)
    else:
        getattr(disk, change)(0, 4096)
    disk.flush()
    disk.flush()
    assert len(calls) == 2


def test_a_flush_waits_for_one_under_way_even_with_nothing_to_do(disk, monkeypatch):
    entered, go, order = threading.Event(), threading.Event(), []

    def slow(fd):
        entered.set()
        go.wait(10)
        order.append("stable")

    monkeypatch.setattr(os, "fdatasync", slow)
    disk.write(0, b"abc")
    first = threading.Thread(target=disk.flush)
    first.start()
    assert entered.wait(10)
    second = threading.Thread(target=lambda: (disk.flush(), order.append("told")))
    second.start()
    second.join(0.1)
    go.set()
    first.join(10)
    second.join(10)
    assert order == ["stable", "told"]


def test_cache_unsafe_does_not_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("flushed"))
    with FileDisk.create(tmp_path / "disk", 4096, cache="unsafe") as disk:
        disk.write(0, b"abc", fua=True)
        disk.flush()


def test_after_a_failed_flush_all_flushes_fail_until_reopened(disk, monkeypatch):
    real = os.fdatasync

    def broken(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(BackendError, match="Could not flush"):
        disk.flush()
    monkeypatch.setattr(os, "fdatasync", real)
    with pytest.raises(BackendError) as caught:
        disk.flush()
    assert caught.value.errno == errno.EIO
    disk.reopen(read_only=False)
    disk.flush()


# -- size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_truncate_with_preallocation(tmp_path, preallocation):
    with FileDisk.create(tmp_path / "disk", 4096) as disk:
        disk.write(0, b"x" * 4096)
        disk.truncate(1 << 20, preallocation=preallocation)
        assert disk.size == os.path.getsize(disk.filename) == 1 << 20
        assert disk.read(0, 1 << 20) == b"x" * 4096 + bytes((1 << 20) - 4096)
        allocated = disk.info().actual_size >= 1 << 20
        assert allocated is (preallocation != "off")


def test_preallocation_metadata_is_refused_in_qemus_words(disk):
    with pytest.raises(UnsupportedError, match="Unsupported preallocation mode: metadata"):
        disk.truncate(2 << 20, preallocation="metadata")
    assert disk.size == 1 << 20


def test_preallocation_when_shrinking_is_refused(disk):
    with pytest.raises(UnsupportedError, match="Cannot use preallocation for shrinking files"):
        disk.truncate(0, preallocation="full", shrink=True)


def test_failed_preallocation_leaves_the_old_size(disk, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BackendError) as caught:
        disk.truncate(2 << 20, preallocation="falloc")
    assert caught.value.errno == errno.ENOSPC
    assert disk.size == os.path.getsize(disk.filename) == 1 << 20


def test_a_flush_that_fails_while_space_is_filled_is_remembered(disk, monkeypatch):
    """What was written before may be lost with it."""

    def broken(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.write(0, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(BackendError):
            disk.truncate(disk.size + 4096, preallocation="full")
    with pytest.raises(BackendError, match="Could not flush"):
        disk.flush()
    disk.reopen(read_only=True)


def test_create_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(UnsupportedError):
        FileDisk.create(tmp_path / "disk", 4096, preallocation="metadata")
    assert not (tmp_path / "disk").exists()


def test_create_follows_a_link_to_a_file_that_is_not_there_yet(tmp_path):
    os.symlink("target", tmp_path / "link")
    FileDisk.create(tmp_path / "link", 4096).close()
    assert os.path.getsize(tmp_path / "target") == 4096


def test_create_exclusive_needs_a_new_name(tmp_path):
    (tmp_path / "disk").write_bytes(b"precious")
    with pytest.raises(BackendError) as caught:
        FileDisk.create(tmp_path / "disk", 0, exclusive=True)
    assert caught.value.errno == errno.EEXIST
    assert (tmp_path / "disk").read_bytes() == b"precious"


# -- opening ---------------------------------------------------------------------------------------


def test_a_missing_file_is_reported_as_qemu_does(tmp_path):
    name = str(tmp_path / "none")
    with pytest.raises(BackendError) as caught:
        FileDisk(name)
    assert caught.value.strerror == f"Could not open '{name}': No such file or directory"
    assert caught.value.errno == errno.ENOENT


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(BackendError, match="Is a directory") as caught:
        FileDisk(tmp_path)
    assert caught.value.errno == errno.EISDIR
    with pytest.raises(BackendError, match="to be a regular file"):
        FileDisk(tmp_path, read_only=True)


@pytest.mark.parametrize("read_only", [False, True])
def test_pipes_and_sockets_are_refused(tmp_path, read_only):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket"):
            with pytest.raises(BackendError, match="to be a regular file"):
                FileDisk(path, read_only=read_only)


def test_a_character_device_is_a_disk_of_no_bytes():
    with FileDisk("/dev/null", read_only=True, locking=False) as disk:
        assert (disk.size, disk.info().format) == (0, "host_device")


def test_a_name_with_a_nul_is_refused():
    with pytest.raises(BackendError) as caught:
        FileDisk("a\0b")
    assert caught.value.errno == errno.EINVAL


def test_unknown_modes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Invalid cache option"):
        FileDisk(tmp_path / "x", cache="often")
    with pytest.raises(ValueError, match="Invalid discard option"):
        FileDisk(tmp_path / "x", discard="maybe")


def test_a_descriptor_is_not_inherited_and_is_closed(disk):
    fd = disk._fd
    assert not os.get_inheritable(fd)
    disk.reopen(read_only=True)
    assert disk._fd == fd
    assert not os.get_inheritable(fd)
    disk.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_failed_open_leaves_no_descriptor(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(512))
    before = len(os.listdir("/proc/self/fd"))
    with FileDisk(tmp_path / "disk"):
        for _ in range(3):
            with pytest.raises(OSError, match="lock"):
                FileDisk(tmp_path / "disk")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forgotten_disk_gives_up_its_lock(tmp_path):
    disk = FileDisk.create(tmp_path / "disk", 4096)
    gc.collect()
    with pytest.warns(ResourceWarning, match="unclosed disk"):
        del disk
    FileDisk(tmp_path / "disk").close()


def test_create_with_an_unknown_preallocation_leaves_an_old_file_alone(tmp_path):
    (tmp_path / "disk").write_bytes(b"precious")
    with pytest.raises(UnsupportedError):
        FileDisk.create(tmp_path / "disk", 4096, preallocation="metadata")
    assert (tmp_path / "disk").read_bytes() == b"precious"


def test_reopen_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with FileDisk.create("disk", 4096) as disk:
        disk.write(0, b"abc")
        (tmp_path / "sub").mkdir()
        monkeypatch.chdir(tmp_path / "sub")
        disk.reopen(read_only=True)
        assert disk.read(0, 3) == b"abc"
        disk.reopen(read_only=False)
        disk.write(0, b"xyz")
    assert (tmp_path / "disk").read_bytes()[:3] == b"xyz"


def test_reopen_that_fails_changes_nothing(disk, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EACCES, "no")

    disk.reopen(read_only=True)
    monkeypatch.setattr(file_module, "_reopen", refuse)
    with pytest.raises(BackendError, match="Could not reopen"):
        disk.reopen(read_only=False)
    assert disk.read_only
    assert disk.read(0, 3) == bytes(3)


def test_invalidate_sees_a_size_that_others_changed(disk):
    os.truncate(disk.filename, 2 << 20)
    disk.invalidate()
    assert disk.size == 2 << 20
    assert disk.read((2 << 20) - 1, 1) == b"\0"


@pytest.mark.parametrize("old", [True, False])
def test_a_creation_that_fails_leaves_what_was_there(tmp_path, monkeypatch, old):
    path = tmp_path / "disk"
    if old:
        path.write_bytes(b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(BackendError):
        FileDisk.create(path, 4096)
    assert path.exists() is old


def test_a_file_made_longer_from_nothing_has_its_first_block(tmp_path) -> None:
    """Who probes what alignment direct access needs reads no hole, then (as in QEMU)."""
    path = tmp_path / "a.raw"
    with FileDisk.create(path, 1 << 20) as disk:
        assert disk.block_status(0, 1 << 20).data
    assert 0 < path.stat().st_blocks * 512 < 1 << 20


def test_zeroes_past_the_end_reserve_space_unless_it_may_be_given_back(tmp_path) -> None:
    used = {}
    for unmap in (False, True):
        path = tmp_path / f"{unmap}"
        path.touch()
        with FileDisk(path, growable=True) as disk:
            disk.discards = True
            disk.write_zeroes(0, 1 << 20, unmap=unmap)
            assert disk.size == 1 << 20
        assert path.stat().st_size == 1 << 20
        used[unmap] = path.stat().st_blocks * 512
    assert used[False] >= 1 << 20
    assert used[True] < 1 << 20
