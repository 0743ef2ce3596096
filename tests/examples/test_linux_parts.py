"""What the Linux guest is put together from: kernels' wrappings, stripped modules."""

from __future__ import annotations

import gzip
import lzma
import struct

import pytest

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.image import ImageFileError
from examples.emulator.kernel import is_linux, load_linux
from examples.emulator.linux import find_linux, guest_packages
from examples.emulator.packages import PackageError, Packages
from examples.emulator.strip import StripError, strip

RAM_BASE = 0x8000_0000
OFFSET = 2 << 20


def kernel(offset: int = OFFSET, size: int = 0, payload: bytes = b"code") -> bytes:
    return struct.pack("<8xQQQIIQQ4s4s", offset, size, 0, 2, 0, 0, 0, b"RSC\x05", b"") + payload


def zboot(kind: bytes, data: bytes) -> bytes:
    return struct.pack("<4s4sII8x32s", b"MZ\0\0", b"zimg", 64, len(data), kind).ljust(64) + data


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(kernel(), id="plain"),
        pytest.param(gzip.compress(kernel()), id="gzip"),
        pytest.param(zboot(b"gzip", gzip.compress(kernel())), id="EFI, gzip"),
        pytest.param(zboot(b"xzkern", lzma.compress(kernel())), id="EFI, xz"),
    ],
)
def test_kernel_goes_where_its_header_says(tmp_path, data):
    path = tmp_path / "Image"
    path.write_bytes(data)
    ram = bytearray(4 << 20)
    assert is_linux(path)
    assert load_linux(path, memoryview(ram), RAM_BASE) == RAM_BASE + OFFSET
    assert ram[OFFSET:].startswith(kernel())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"\x7fELF", "not a Linux kernel", id="something else"),
        pytest.param(b"", "not a Linux kernel", id="nothing"),
        pytest.param(kernel()[:60], "not a Linux kernel", id="cut short"),
        pytest.param(kernel(offset=4096), "no multiple of 2 MiB", id="crooked"),
        pytest.param(kernel(size=3 << 20), "needs 5242880 bytes", id="too big"),
        pytest.param(kernel(offset=1 << 63), "needs", id="far away"),
        pytest.param(b"\x1f\x8b" + bytes(70), "cannot be unpacked", id="damaged gzip"),
        pytest.param(gzip.compress(kernel())[:-10], "cannot be unpacked", id="half a gzip"),
        pytest.param(zboot(b"zstd22", b""), "compressed by zstd22", id="unknown compression"),
        pytest.param(zboot(b"xzkern", b"xz"), "cannot be unpacked", id="damaged xz"),
    ],
)
def test_other_files_are_refused(tmp_path, data, reason):
    path = tmp_path / "Image"
    path.write_bytes(data)
    with pytest.raises(ImageFileError, match=reason):
        load_linux(path, memoryview(bytearray(4 << 20)), RAM_BASE)


@pytest.fixture(scope="module")
def module() -> bytes:
    try:
        find_linux()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")
    (path,) = guest_packages().folder.glob("linux-image-*/**/virtio_blk.ko.xz")
    return lzma.decompress(path.read_bytes())


def test_stripped_module_is_smaller_and_stays_so(module):
    small = strip(module)
    assert len(small) < len(module) // 2
    assert len(strip(small)) == len(small)


@pytest.mark.parametrize("cut", [0, 16, 63, 64, 5000])
def test_strip_refuses_what_is_no_whole_module(module, cut):
    with pytest.raises(StripError):
        strip(module[:cut])


def test_strip_refuses_other_processors():
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01", 1, 62, *[0] * 8, 64, 0, 0)
    with pytest.raises(StripError, match="not an object file for RISC-V"):
        strip(header)


def test_packages_for_another_machine_need_a_release(tmp_path):
    with pytest.raises(ValueError, match="together"):
        Packages(tmp_path, architecture="riscv64")
