"""Block devices, on a loop device of the test's own."""

import errno
import os
import shutil
import subprocess

import pytest

from pyvirtio import BackendError, FileDisk, InUseError, UnsupportedError, open_disk


@pytest.fixture
def device(tmp_path):
    if shutil.which("losetup") is None:
        pytest.skip("needs losetup")
    (tmp_path / "file").write_bytes(b"x" * (1 << 20))
    command = ["losetup", "--find", "--show", str(tmp_path / "file")]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"loop devices are not permitted here: {made.stderr.strip()}")
    path = made.stdout.strip()
    try:
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            pytest.skip(f"loop devices cannot be opened here: {error}")
        yield path
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_block_device_is_a_disk(device, cache):
    with FileDisk(device, cache=cache, growable=True) as disk:
        assert (disk.format_name, disk.size) == ("host_device", 1 << 20)
        assert not disk.growable
        assert not disk.has_zero_init
        assert disk.limits.write_zeroes_alignment == 512
        disk.write(1000, b"abc", fua=True)
        assert disk.read(999, 5) == b"xabcx"
        disk.write_zeroes(500, 10000, unmap=True)
        assert disk.read(499, 10002) == b"x" + bytes(10000) + b"x"
        disk.discard(65536, 65536)
        assert disk.read(0, 1) == b"x"
        (extent,) = disk.extents()
        assert (extent.data, extent.length) == (True, 1 << 20)


def test_a_device_keeps_its_size(device):
    with FileDisk(device) as disk:
        with pytest.raises(BackendError, match="Cannot grow device files") as caught:
            disk.truncate(2 << 20)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(UnsupportedError, match="unsupported for this non-regular file"):
            disk.truncate(1 << 20, preallocation="full")
        disk.truncate(4096, shrink=True)
        assert disk.size == 1 << 20
        with pytest.raises(ValueError, match="not inside"):
            disk.write(1 << 20, b"x")


def test_a_device_can_be_created_on_and_is_checked_for_size(device):
    with FileDisk.create(device, 4096) as disk:
        assert disk.size == 1 << 20
    with pytest.raises(BackendError) as caught:
        FileDisk.create(device, 2 << 20)
    assert caught.value.errno == errno.EINVAL
    assert os.path.exists(device)


def test_devices_are_locked_and_reopened(device):
    with FileDisk(device) as disk:
        with pytest.raises(InUseError):
            FileDisk(device, read_only=True)
        disk.reopen(read_only=True)
        with open_disk(device, format="raw", read_only=True) as other:
            assert other.read(0, 1) == b"x"
