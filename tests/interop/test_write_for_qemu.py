"""Images that we wrote pass qemu-img's check and are read by QEMU byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyvirtio
from support.peers import requires
from support.qemu import (
    QemuIo,
    qemu_check,
    qemu_compare,
    qemu_create,
    qemu_img,
    qemu_img_json,
    qemu_read,
)
from support.workload import apply_to_model, assert_same, create, mixed, run_ours, run_qemu, runs

pytestmark = requires("qemu-img", "qemu-io")

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]


def fits(cluster_size: int) -> int:
    """A size of disk that takes several clusters, not a whole number of them, of whole sectors."""
    return max(20 * cluster_size // 3 // 512 * 512, 300 * 512)


def write_and_judge(path: Path, cluster_size: int, *, base: bytes = b"", v2: bool = False) -> None:
    """Run the mixed workload on ``path`` with our driver; QEMU has to agree with the model."""
    with pyvirtio.open_disk(path) as disk:
        size = disk.size
        model = bytearray(base[:size].ljust(size, b"\0"))
        steps = mixed(size, cluster_size, seed=size)
        for step in steps:
            run_ours(disk, [step])
            apply_to_model(model, step, cluster_size, discard_zeroes=not (v2 and base))
        found = disk.check()
        assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0)
        assert_same(disk.read(0, size), model)
    qemu_check(path)
    assert_same(qemu_read(path, path.parent), model)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_every_cluster_size(tmp_path: Path, cluster_size: int, compat: str) -> None:
    image = tmp_path / "disk.qcow2"
    create(image, fits(cluster_size), compat=compat, cluster_size=cluster_size)
    write_and_judge(image, cluster_size)


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_every_refcount_width(tmp_path: Path, refcount_bits: int) -> None:
    image = tmp_path / "disk.qcow2"
    create(image, 1 << 20, cluster_size=512, refcount_bits=refcount_bits)
    write_and_judge(image, 512)
    specific = qemu_img_json("info", image)["format-specific"]["data"]
    assert specific["refcount-bits"] == refcount_bits


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("overlay_size", [200 * 512, 400 * 512], ids=["shorter", "longer"])
def test_overlay_of_another_length_than_its_backing_file(
    tmp_path: Path, overlay_size: int, compat: str
) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes((bytes(range(1, 252)) * 612)[: 300 * 512])
    image = tmp_path / "overlay.qcow2"
    create(
        image,
        overlay_size,
        compat=compat,
        cluster_size=4096,
        backing_file=str(base),
        backing_fmt="raw",
    )
    write_and_judge(image, 4096, base=base.read_bytes(), v2=compat == "0.10")
    info = qemu_img_json("info", image)
    assert info["backing-filename"] == str(base)
    assert info["backing-filename-format"] == "raw"


def test_overlay_of_a_qemu_image(tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    qemu_create(base, 1 << 20, cluster_size=512)
    steps = mixed(1 << 20, 512, seed=5)
    model = bytearray(1 << 20)
    with QemuIo(base) as qemu:
        run_qemu(qemu, steps)
    for step in steps:
        apply_to_model(model, step, 512)
    untouched = base.read_bytes()
    image = tmp_path / "overlay.qcow2"
    create(image, 1 << 20, backing_file="base.qcow2", backing_fmt="qcow2")
    write_and_judge(image, 65536, base=bytes(model))
    assert base.read_bytes() == untouched


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"cluster_size": 512},
        {"cluster_size": 2 << 20},
        {"cluster_size": 512, "compat": "0.10"},
        {"refcount_bits": 1},
        {"refcount_bits": 64, "cluster_size": 4096},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [0, 512, 1 << 30, (5 << 30) + 512])
def test_an_empty_image_looks_as_if_qemu_had_made_it(
    tmp_path: Path, options: dict[str, object], size: int
) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    create(ours, size, **options)
    qemu_create(theirs, size, **options)
    qemu_check(ours)
    found, expected = (qemu_img_json("info", path) for path in (ours, theirs))
    for name in ("virtual-size", "cluster-size", "format", "format-specific"):
        assert found[name] == expected[name], name
    qemu_compare(ours, theirs, formats="qcow2:qcow2")


def test_turns_between_qemu_and_us_on_one_image(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    size = 1 << 20
    create(image, size, cluster_size=512)
    model = bytearray(size)
    for turn in range(8):
        steps = mixed(size, 512, seed=100 + turn, count=40)
        if turn % 2:
            with QemuIo(image) as qemu:
                run_qemu(qemu, steps)
        else:
            with pyvirtio.open_disk(image) as disk:
                run_ours(disk, steps)
        for step in steps:
            apply_to_model(model, step, 512)
        qemu_check(image)
    with pyvirtio.open_disk(image) as disk:
        assert_same(disk.read(0, size), model)
    with QemuIo(image, read_only=True) as qemu:
        for offset, length, value in runs(model):
            qemu.verify(offset, length, value)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_our_snapshots_are_listed_read_applied_and_deleted_by_qemu(
    tmp_path: Path, compat: str
) -> None:
    image = tmp_path / "disk.qcow2"
    size = 512 * 1024
    create(image, size, compat=compat, cluster_size=1024)
    model = bytearray(size)
    kept: dict[str, bytes] = {}
    with pyvirtio.open_disk(image) as disk:
        for number in range(4):
            steps = mixed(size, 1024, seed=number, count=25)
            run_ours(disk, steps)
            for step in steps:
                apply_to_model(model, step, 1024)
            name = f"snap-{number} ü"
            disk.snapshots.create(name)
            kept[name] = bytes(model)
        disk.write(0, b"\xee" * 5000)
        model[:5000] = b"\xee" * 5000
    qemu_check(image)
    listed = qemu_img_json("info", image)["snapshots"]
    assert [entry["name"] for entry in listed] == list(kept)
    assert_same(qemu_read(image, tmp_path), model)
    for name, expected in kept.items():
        raw = tmp_path / "snapshot.raw"
        qemu_img(
            *("convert", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={name}", image, raw)
        )
        assert_same(raw.read_bytes(), expected)
    qemu_img("snapshot", "-a", "snap-1 ü", image)
    assert_same(qemu_read(image, tmp_path), kept["snap-1 ü"])
    for name in kept:
        qemu_img("snapshot", "-d", name, image)
    qemu_check(image)
    assert_same(qemu_read(image, tmp_path), kept["snap-1 ü"])


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "over a longer backing file"])
def test_a_grown_disk_reads_as_zeroes_in_its_new_part(
    tmp_path: Path, compat: str, backed: bool
) -> None:
    image = tmp_path / "disk.qcow2"
    base = b"b" * 300_032 if backed else b""
    options: dict[str, object] = {}
    if backed:
        (tmp_path / "base.raw").write_bytes(base)
        options = {"backing_file": "base.raw", "backing_fmt": "raw"}
    size = 50_176
    create(image, size, compat=compat, cluster_size=512, **options)
    with pyvirtio.open_disk(image) as disk:
        disk.write(1000, b"x" * 2000)
        disk.truncate(1 << 20)
        assert disk.size == 1 << 20
        disk.write(900_000, b"y" * 1000)
        model = bytearray(base[:size].ljust(1 << 20, b"\0"))
        model[1000:3000] = b"x" * 2000
        model[900_000:901_000] = b"y" * 1000
        assert_same(disk.read(0, disk.size), model)
    qemu_check(image)
    assert_same(qemu_read(image, tmp_path), model)
