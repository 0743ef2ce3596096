"""Locks: QEMU and this library, and two opens of this library, respect each other."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest

from pyvirtio import FileDisk, InUseError
from pyvirtio.backend.locks import FileLocks, Permission

needs_qemu_io = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")

WRITE_REFUSED = 'Failed to get "write" lock'
SHARED_REFUSED = 'Failed to get shared "write" lock'


@pytest.fixture
def image(tmp_path):
    """A qcow2 image (so that QEMU does not share writing, as it does for a raw one)."""
    path = str(tmp_path / "image.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    return path


@contextmanager
def held_by_qemu(path, *options):
    """A qemu-io that has the image open until the block ends."""
    process = subprocess.Popen(
        ["qemu-io", *options, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    )
    try:
        # Its first answer shows that the image is open.
        process.stdin.write(b"length\n")
        answer = b""
        while b"MiB" not in answer:
            part = process.stdout.read(64)
            assert part, answer
            answer += part
        yield
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def qemu_io(path, *options):
    """What qemu-io says when it opens the image; empty if it can."""
    command = ["qemu-io", *options, "-c", "quit", path]
    return subprocess.run(command, capture_output=True, text=True).stderr


@needs_qemu_img
@needs_qemu_io
def test_qemu_refuses_an_image_that_is_open_for_writing(image):
    with FileDisk(image):
        assert WRITE_REFUSED in qemu_io(image)
        assert SHARED_REFUSED in qemu_io(image, "-r")
    assert qemu_io(image) == ""


@needs_qemu_img
@needs_qemu_io
def test_qemu_may_read_what_is_open_for_reading(image):
    with FileDisk(image, read_only=True):
        assert qemu_io(image, "-r") == ""
        assert WRITE_REFUSED in qemu_io(image)


@needs_qemu_img
@needs_qemu_io
def test_an_image_that_qemu_writes_is_refused_with_qemus_words(image):
    with held_by_qemu(image):
        with pytest.raises(InUseError) as caught:
            FileDisk(image)
        hint = f"Is another process using the image [{image}]?"
        assert caught.value.strerror == f"{WRITE_REFUSED}\n{hint}"
        with pytest.raises(InUseError) as caught:
            FileDisk(image, read_only=True)
        assert caught.value.strerror == f"{SHARED_REFUSED}\n{hint}"
        FileDisk(image, locking=False).close()
    FileDisk(image).close()


@needs_qemu_img
@needs_qemu_io
def test_an_image_that_qemu_reads_can_be_read(image):
    with held_by_qemu(image, "-r"):
        FileDisk(image, read_only=True).close()
        with pytest.raises(InUseError, match=WRITE_REFUSED):
            FileDisk(image)


@needs_qemu_img
@needs_qemu_io
def test_reopening_changes_the_locks(image):
    with FileDisk(image) as disk:
        disk.reopen(read_only=True)
        assert qemu_io(image, "-r") == ""
        assert WRITE_REFUSED in qemu_io(image)
        disk.reopen(read_only=False)
        assert SHARED_REFUSED in qemu_io(image, "-r")


@needs_qemu_img
@needs_qemu_io
def test_a_refused_reopen_keeps_the_old_locks_and_flags(image):
    with FileDisk(image, read_only=True) as disk, held_by_qemu(image, "-r"):
        with pytest.raises(InUseError, match=WRITE_REFUSED):
            disk.reopen(read_only=False)
        assert disk.read_only
        assert disk.read(0, 4) == b"QFI\xfb"
        assert qemu_io(image, "-r") == ""


@needs_qemu_img
@needs_qemu_io
def test_create_does_not_empty_a_file_that_is_in_use(image):
    with held_by_qemu(image), pytest.raises(InUseError):
        FileDisk.create(image, 0)
    with open(image, "rb") as file:
        assert file.read(4) == b"QFI\xfb"


def test_two_opens_in_one_process(tmp_path):
    path = tmp_path / "disk"
    with FileDisk.create(path, 4096):
        for read_only in (False, True):
            with pytest.raises(InUseError):
                FileDisk(path, read_only=read_only)
    with FileDisk(path, read_only=True), FileDisk(path, read_only=True):  # noqa: SIM117
        with pytest.raises(InUseError):
            FileDisk(path)


def test_qemus_bytes_are_the_ones_locked(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(512))
    with FileDisk(tmp_path / "disk") as disk:
        assert disk._locks._held == {100, 101, 103, 201, 203}
        disk.reopen(read_only=True)
        assert disk._locks._held == {100, 201, 203}


def test_a_refused_change_gives_back_what_it_took(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    with open(path, "rb") as one, open(path, "rb") as two:
        first = FileLocks(one.fileno(), str(path))
        second = FileLocks(two.fileno(), str(path))
        first.acquire(Permission.CONSISTENT_READ, Permission.WRITE)
        with pytest.raises(InUseError, match=WRITE_REFUSED):
            second.acquire(Permission.WRITE, Permission.WRITE)
        first.acquire(Permission.WRITE, Permission.WRITE)  # nothing of the second is in the way


def test_where_nothing_can_be_locked_nothing_is(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    FileDisk.create(tmp_path / "disk", 4096).close()
