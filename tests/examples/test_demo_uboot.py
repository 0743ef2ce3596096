"""What the demo shows, with U-Boot as the guest; and the reader it falls back to."""

from __future__ import annotations

import shutil

import pytest

import pyvirtio

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator import second_reader
from examples.emulator.demo_uboot import Demo
from examples.emulator.firmware import find_u_boot, packages
from examples.emulator.packages import PackageError, Packages
from examples.emulator.steps import DemoError


@pytest.fixture(scope="module")
def tools():
    """U-Boot and mtools are to be had."""
    try:
        find_u_boot()
        if shutil.which("mtools") is None:
            packages().get("mtools")
    except PackageError as error:
        pytest.skip(f"no U-Boot or no mtools: {error}")


@pytest.mark.usefixtures("tools")
def test_demo_succeeds(tmp_path, capsys):
    demo = Demo(tmp_path)
    demo.run()
    printed = capsys.readouterr().out
    assert f"ok: nonce.txt holds {demo.nonce}" in printed
    assert "ok: nonce.txt is gone" in printed


@pytest.mark.usefixtures("tools")
def test_demo_notices_that_the_guest_has_not_written(tmp_path):
    demo = Demo(tmp_path, quiet=True)
    demo.find_tools()
    demo.make_images()
    with pytest.raises(DemoError, match=r"nonce\.txt holds"):
        demo.witness(written=True)


@pytest.mark.usefixtures("tools")
def test_demo_notices_a_changed_base(tmp_path):
    demo = Demo(tmp_path, quiet=True)
    demo.find_tools()
    demo.make_images()
    with pyvirtio.open_disk(demo.base, format="qcow2") as disk:
        disk.write(0, b"x")
    with pytest.raises(DemoError, match="the base is untouched"):
        demo.check_images()


@pytest.mark.usefixtures("tools")
def test_u_boot_sees_a_legacy_device_and_a_second_disk(tmp_path):
    from examples.emulator.board import Board
    from examples.emulator.script import Session

    session = Session()
    disks = [pyvirtio.MemoryDisk(1 << 20), pyvirtio.MemoryDisk(3 << 20)]
    board = Board(session.send_out, disks=disks, legacy_virtio=True)
    session.connect(board)
    board.start(board.load(find_u_boot()))
    session.expect("stop autoboot")
    session.send("\r")
    session.expect("\n=> ")
    session.command("virtio scan", "\n=> ")
    said = session.command("virtio info", "\n=> ")
    assert "Device 0:" in said
    assert "Device 1:" in said
    assert "3.0 MB" in said


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_second_reader_agrees_with_the_library(tmp_path, cluster_size):
    size = 200_192
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    with pyvirtio.create_disk(base, size, format="qcow2", cluster_size=cluster_size) as disk:
        disk.write(1000, b"base" * 20_000)
    with pyvirtio.create_disk(
        overlay,
        size,
        format="qcow2",
        cluster_size=cluster_size,
        backing_file=base.name,
        backing_fmt="qcow2",
    ) as disk:
        disk.write(70_000, b"overlay" * 1000)
        disk.write_zeroes(0, 65536)
        disk.write(size - 10, b"at the end")
        wanted = disk.read(0, size)
    raw = tmp_path / "seen.raw"
    second_reader.convert(overlay, raw)
    assert raw.read_bytes() == wanted


def test_second_reader_refuses_what_it_does_not_know(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"not qcow2")
    with pytest.raises(second_reader.UnreadableError, match="not a plain qcow2 image"):
        second_reader.clusters(path)


def test_package_that_was_unpacked_once_is_not_fetched_again(tmp_path, monkeypatch):
    (tmp_path / "hello").mkdir()
    monkeypatch.setenv("PATH", "")
    assert Packages(tmp_path).get("hello") == tmp_path / "hello"


def test_package_needs_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PackageError, match="hello: this machine has no apt-get"):
        Packages(tmp_path).get("hello")
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}
