"""cache="none": O_DIRECT, whatever the alignment of a request."""

import errno
import mmap
import os
import random
import threading

import pytest

from pyvirtio import BackendError, FileDisk
from pyvirtio.backend.direct import SharedLock


@pytest.fixture
def disk(tmp_path):
    try:
        disk = FileDisk.create(tmp_path / "disk", 1 << 20, cache="none", growable=True)
    except BackendError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system has no O_DIRECT")
    with disk:
        yield disk


def test_aligned_requests_go_straight(disk, monkeypatch):
    block = disk.limits.request_alignment
    memory = memoryview(mmap.mmap(-1, 2 * block))
    memory[:] = os.urandom(2 * block)
    seen = []
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, v, at: seen.append(v) or real(fd, v, at))
    disk.writev(block, [memory[:block], memory[block:]])
    assert [len(view) for view in seen[0]] == [block, block]
    monkeypatch.undo()
    assert disk.read(block, 2 * block) == memory


def test_unaligned_requests_of_all_kinds(disk):
    model = bytearray(1 << 20)
    rng = random.Random(1)
    for _ in range(150):
        offset = rng.randrange(200000)
        length = rng.choice([1, 511, 512, 4096, 5000, 70000])
        cut = rng.randrange(length)
        if rng.random() < 0.6:
            data = rng.randbytes(length)
            disk.writev(offset, [data[:cut], data[cut:]])
            model[offset : offset + length] = data
        elif rng.random() < 0.3:
            disk.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        first, second = bytearray(cut), bytearray(length - cut)
        disk.readv(offset, [first, second])
        assert first + second == model[offset : offset + length]
    with open(disk.filename, "rb") as file:
        assert file.read() == model


def test_requests_larger_than_the_bounce_buffer(disk):
    data = os.urandom((3 << 20) + 77)
    disk.write(13, data)
    assert disk.size == os.path.getsize(disk.filename) == 13 + len(data)
    assert disk.read(13, len(data)) == data


def test_the_file_ends_exactly_where_it_was_written_to(tmp_path, disk):
    with FileDisk.create(tmp_path / "odd", cache="none", growable=True) as odd:
        odd.write(0, b"abc")
        assert odd.size == os.path.getsize(odd.filename) == 3
        odd.write(1000, b"xyz")
        assert odd.size == os.path.getsize(odd.filename) == 1003
        odd.write(998, b"..")
        assert odd.size == os.path.getsize(odd.filename) == 1003
        assert odd.read(0, 1010) == b"abc" + bytes(995) + b"..xyz" + bytes(7)


def test_neighbours_in_one_block_do_not_undo_each_other(disk):
    def fill(number):
        for round_ in range(20):
            disk.write(4096 + number * 100, bytes([number + round_]) * 100)

    threads = [threading.Thread(target=fill, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        assert disk.read(4096 + n * 100, 100) == bytes([n + 19]) * 100


def test_a_failed_flush_is_not_held_against_later_ones(disk, monkeypatch):
    def broken(fd):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(BackendError):
        disk.flush()
    monkeypatch.undo()
    disk.flush()  # nothing lies in the page cache that could have been lost


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_preallocation(disk, preallocation):
    disk.truncate(2 << 20, preallocation=preallocation)
    assert disk.info().actual_size >= 1 << 20
    assert disk.read(1 << 20, 1 << 20) == bytes(1 << 20)


def test_reopen_keeps_o_direct(disk):
    disk.write(3, b"abc")
    disk.reopen(read_only=True)
    assert disk.read(3, 3) == b"abc"
    disk.reopen(read_only=False)
    disk.write(5, b"xyz")
    assert disk.read(3, 5) == b"abxyz"


def test_a_shared_lock_is_shared_and_exclusive():
    lock = SharedLock()
    inside = threading.Event()

    def alone():
        with lock.alone():
            inside.set()

    with lock.shared():
        with lock.shared():
            pass
        thread = threading.Thread(target=alone)
        thread.start()
        assert not inside.wait(0.05)
    thread.join()
    assert inside.is_set()


def test_buffers_that_lie_unaligned_go_by_the_bounce_buffer(disk, monkeypatch):
    block = disk.limits.request_alignment
    memory = memoryview(mmap.mmap(-1, 3 * block))
    monkeypatch.setattr(disk._direct, "memory_alignment", block)
    seen = []
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, v, at: seen.extend(v) or real(fd, v, at))
    disk.write(0, memory[1 : 1 + block])
    monkeypatch.undo()
    assert all(view.obj is not memory.obj for view in seen)


@pytest.mark.parametrize("how", ["shared", "alone"])
def test_a_lock_is_given_back_if_an_interrupt_comes_just_when_it_is_taken(how):
    lock = SharedLock()

    class Interrupting(threading.Condition):
        def __exit__(self, *error):
            super().__exit__(*error)
            lock._changed = changed
            raise KeyboardInterrupt

    changed = lock._changed
    lock._changed = Interrupting(changed._lock)
    with pytest.raises(KeyboardInterrupt), getattr(lock, how)():
        pytest.fail("taken")

    def take():
        with lock.alone():
            pass

    other = threading.Thread(target=take, daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive()
