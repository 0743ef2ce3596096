"""Images that qemu-img and qemu-io wrote are read by us byte for byte as QEMU reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyvirtio
from support.peers import requires
from support.qemu import QemuIo, qemu_check, qemu_create, qemu_img
from support.workload import apply_to_model, assert_same, mixed, run_qemu

pytestmark = requires("qemu-img", "qemu-io")

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]
REFCOUNT_BITS = [1, 2, 4, 8, 16, 32, 64]


def fits(cluster_size: int) -> int:
    """A size of disk that takes several clusters, not a whole number of them, of whole sectors."""
    return max(20 * cluster_size // 3 // 512 * 512, 300 * 512)


def written_by_qemu(
    path: Path, size: int, cluster_size: int, *, seed: int = 1, base: bytes = b"", **options: object
) -> bytearray:
    """An image made by QEMU alone; returns what the guest's disk holds."""
    qemu_create(path, size, cluster_size=cluster_size, **options)
    model = bytearray(base[:size].ljust(size, b"\0"))
    zeroes = not (base and options.get("compat") == "0.10")
    steps = mixed(size, cluster_size, seed=seed)
    with QemuIo(path) as qemu:
        run_qemu(qemu, steps)
    for step in steps:
        apply_to_model(model, step, cluster_size, discard_zeroes=zeroes)
    return model


def read_by_us(path: Path) -> bytes:
    with pyvirtio.open_disk(path, read_only=True) as disk:
        return disk.read(0, disk.size)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_every_cluster_size(tmp_path: Path, cluster_size: int, compat: str) -> None:
    image = tmp_path / "disk.qcow2"
    model = written_by_qemu(image, fits(cluster_size), cluster_size, compat=compat)
    assert_same(read_by_us(image), model)


@pytest.mark.parametrize("refcount_bits", REFCOUNT_BITS)
def test_every_refcount_width_can_be_read_written_and_checked(
    tmp_path: Path, refcount_bits: int
) -> None:
    image = tmp_path / "disk.qcow2"
    model = written_by_qemu(image, 1 << 20, 512, refcount_bits=refcount_bits)
    with pyvirtio.open_disk(image) as disk:
        assert_same(disk.read(0, disk.size), model)
        disk.write(12345, b"x" * 70000)
        model[12345:82345] = b"x" * 70000
        assert_same(disk.read(0, disk.size), model)
        found = disk.check()
        assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0)
    qemu_check(image)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("overlay_size", [200 * 512, 400 * 512], ids=["shorter", "longer"])
def test_backing_file_of_another_length(tmp_path: Path, overlay_size: int, compat: str) -> None:
    base = tmp_path / "base.raw"
    below = bytes(range(1, 252)) * 612  # 300 sectors, none of them zero
    base.write_bytes(below[: 300 * 512])
    image = tmp_path / "overlay.qcow2"
    model = written_by_qemu(
        image,
        overlay_size,
        4096,
        base=base.read_bytes(),
        compat=compat,
        backing_file=base,
        backing_fmt="raw",
    )
    assert_same(read_by_us(image), model)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_backing_chain(tmp_path: Path, depth: int) -> None:
    model = bytearray()
    backing: dict[str, object] = {}
    image = tmp_path / "none"
    for level in range(depth + 1):
        image = tmp_path / f"level{level}.qcow2"
        model = written_by_qemu(
            image,
            (256 + (level * 37) % 64) * 1024,
            (65536, 512, 4096)[level % 3],
            seed=level,
            base=bytes(model),
            compat="0.10" if level % 2 else "1.1",
            **backing,
        )
        backing = {"backing_file": image.name, "backing_fmt": "qcow2"}
    assert_same(read_by_us(image), model)


def test_backing_name_relative_to_the_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "base.raw").write_bytes(b"b" * 65536)
    overlay = tmp_path / "images" / "overlay.qcow2"
    qemu_create(overlay, backing_file="base.raw", backing_fmt="raw")
    monkeypatch.chdir(tmp_path)
    assert read_by_us(Path("images/overlay.qcow2")) == b"b" * 65536


def test_zero_clusters_hide_the_backing_file(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * (1 << 20))
    image = tmp_path / "overlay.qcow2"
    qemu_create(image, backing_file=base, backing_fmt="raw")
    with QemuIo(image) as qemu:
        qemu.write_zeroes(0, 65536, unmap=True)  # plain
        qemu.write(65536, 65536, 0x22)
        qemu.write_zeroes(65536, 65536)  # with its old cluster kept
    model = bytes(131072) + b"b" * (14 * 65536)
    assert_same(read_by_us(image), model)
    with pyvirtio.open_disk(image) as disk:
        disk.write(70000, b"new")
        disk.write(10, b"new")
        assert_same(disk.read(0, 131072), _patched(model[:131072], {70000: b"new", 10: b"new"}))
    qemu_check(image)


def _patched(data: bytes, changes: dict[int, bytes]) -> bytes:
    patched = bytearray(data)
    for offset, new in changes.items():
        patched[offset : offset + len(new)] = new
    return bytes(patched)


def test_active_disk_of_an_image_with_internal_snapshots(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_create(image, 1 << 20, cluster_size=4096)
    with QemuIo(image) as qemu:
        qemu.write(0, 1 << 20, 0x11)
    qemu_img("snapshot", "-c", "first", image)
    with QemuIo(image) as qemu:
        qemu.write(8192, 100000, 0x22)
    qemu_img("snapshot", "-c", "second", image)
    with QemuIo(image) as qemu:
        qemu.discard(0, 65536)
    model = bytearray(b"\x11" * (1 << 20))
    model[8192:108192] = b"\x22" * 100000
    with pyvirtio.open_disk(image) as disk:
        assert [snapshot.name for snapshot in disk.snapshots] == ["first", "second"]
        assert_same(disk.read(0, disk.size), bytes(65536) + model[65536:])
        disk.snapshots.apply("second")
        assert_same(disk.read(0, disk.size), model)
        disk.snapshots.apply("first")
        assert_same(disk.read(0, disk.size), b"\x11" * (1 << 20))
        disk.snapshots.delete("first")
        disk.snapshots.delete("second")
        assert_same(disk.read(0, disk.size), b"\x11" * (1 << 20))
    qemu_check(image)
    assert "snapshots" not in qemu_img("snapshot", "-l", image).stdout


def compressed_by_qemu(folder: Path, compression: str) -> tuple[Path, bytearray]:
    """An image of compressed clusters, and its contents."""
    data = bytearray(b"".join(bytes([i % 251]) * 777 for i in range(1500))[: 1 << 20])
    raw = folder / "data.raw"
    raw.write_bytes(data)
    image = folder / "compressed.qcow2"
    qemu_img(
        *("convert", "-f", "raw", "-O", "qcow2", "-c"),
        *("-o", f"compression_type={compression}", raw, image),
    )
    return image, data


def test_compressed_clusters(tmp_path: Path) -> None:
    image, data = compressed_by_qemu(tmp_path, "zlib")
    assert_same(read_by_us(image), data)


def test_an_image_of_another_compression_is_read_or_refused_by_name(tmp_path: Path) -> None:
    image, data = compressed_by_qemu(tmp_path, "zstd")
    try:
        found = read_by_us(image)
    except pyvirtio.UnsupportedError as refusal:
        assert "compression" in str(refusal)
    else:
        assert_same(found, data)


def test_a_write_over_compressed_clusters_keeps_the_rest(tmp_path: Path) -> None:
    image, data = compressed_by_qemu(tmp_path, "zlib")
    with pyvirtio.open_disk(image) as disk:
        disk.write(100_000, b"new" * 100)
        disk.write_zeroes(200_000, 100_000, unmap=True)
        disk.discard(655_360, 65_536)
        found = disk.read(0, disk.size)
    data[100_000:100_300] = b"new" * 100
    data[200_000:300_000] = bytes(100_000)
    data[655_360:720_896] = bytes(65_536)
    assert_same(found, data)
    qemu_check(image)


def test_snapshots_of_compressed_clusters(tmp_path: Path) -> None:
    image, data = compressed_by_qemu(tmp_path, "zlib")
    with pyvirtio.open_disk(image) as disk:
        disk.snapshots.create("one")
        disk.write(0, b"n" * 300_000)
        disk.snapshots.create("two")
        disk.snapshots.apply("one")
        assert_same(disk.read(0, disk.size), data)
        disk.snapshots.delete("one")
        disk.snapshots.apply("two")
        assert_same(disk.read(0, disk.size), b"n" * 300_000 + data[300_000:])
    qemu_check(image)
