"""What QEMU's own tests look at: the same words, steps and places as its programs', on copies of
the same images."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.qcow2 import layout
from support.peers import requires

pytestmark = requires("qemu-img", "qemu-io")

OURS = "import sys; from pyvirtio.tools.{} import main; sys.argv[0] = 'qemu-{}'; sys.exit(main())"


def run(folder: Path, ours: bool, tool: str, *words: object) -> tuple[int, str, str]:
    program = [sys.executable, "-c", OURS.format(tool, tool)] if ours else [f"qemu-{tool}"]
    done = subprocess.run(
        [*program, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def both(folder: Path, tool: str, *words: object) -> tuple[Path, Path]:
    """Run a command by QEMU and by us, each in a copy of the folder; it says the same."""
    copies = []
    said = []
    for ours in (False, True):
        copy = folder.with_name(f"{folder.name}-{'ours' if ours else 'theirs'}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        said.append(run(copy, ours, tool, *words))
        copies.append(copy)
    assert said[1] == said[0]
    return copies[0], copies[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def make(path: Path, size: int = 1 << 20, **options: object) -> Path:
    pyvirtio.create_disk(path, size, **options).close()  # type: ignore[arg-type]
    return path


def spoil(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# -- checks ----------------------------------------------------------------------------------------


def test_rebuilt_refcounts_lie_where_qemus_do_and_release_the_old_ones(folder: Path) -> None:
    image = make(folder / "image")
    with pyvirtio.open_disk(image) as disk:
        disk.write(0, b"x" * 200_000)
    spoil(image, 2 << 16, bytes(64))  # the refcount block counts nothing any more
    theirs, ours = both(folder, "img", "check", "-r", "all", "image")
    assert (ours / "image").read_bytes() == (theirs / "image").read_bytes()


def test_a_dirty_image_is_repaired_aloud_when_it_is_opened(folder: Path) -> None:
    image = make(folder / "image", lazy_refcounts=True)
    with pyvirtio.open_disk(image) as disk:
        disk.write(0, b"x" * 200_000)
    spoil(image, layout.INCOMPATIBLE_FEATURES_OFFSET + 7, b"\1")
    spoil(image, (2 << 16) + 10, bytes(4))
    both(folder, "io", "-c", "close", "image")


@pytest.mark.parametrize("words", [["check"], ["check", "-r", "all"], ["info"]])
def test_a_snapshot_with_too_much_extra_data_is_told_of(folder: Path, words: list[str]) -> None:
    image = make(folder / "image")
    with pyvirtio.open_disk(image) as disk:
        disk.snapshots.create("one")  # type: ignore[attr-defined]
        place = disk._header.snapshots_offset  # type: ignore[attr-defined]
    spoil(image, place + 36, (5000).to_bytes(4))
    both(folder, "img", *words, "image")


def test_references_that_a_narrow_refcount_cannot_count_are_told_one_by_one(folder: Path) -> None:
    image = make(folder / "image", refcount_bits=1)
    with pyvirtio.open_disk(image) as disk:
        disk.write(0, b"x" * 131072)
    entry = (5 << 16 | layout.COPIED).to_bytes(8)
    spoil(image, (4 << 16) + 8, entry)
    both(folder, "img", "check", "image")


def test_an_unknown_feature_has_the_name_that_a_short_table_gives_it(folder: Path) -> None:
    image = make(folder / "image")
    spoil(image, layout.INCOMPATIBLE_FEATURES_OFFSET, b"\xc0")
    start = 112
    spoil(image, start, bytes.fromhex("6803f857") + (14).to_bytes(4) + b"\0\x3fTest feature\0\0")
    spoil(image, start + 24, bytes(8))
    both(folder, "img", "info", "image")


# -- amend, commit, bitmaps ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", ["compat=0.10", "refcount_bits=64", "refcount_bits=1", "compat=0.10,size=2M"]
)
def test_amend_shows_the_steps_that_qemu_shows(folder: Path, change: str) -> None:
    make(folder / "base", 32 << 20, cluster_size=4096)
    backing = {"backing_file": "base", "backing_fmt": "qcow2"}
    image = make(folder / "image", 32 << 20, cluster_size=4096, **backing)
    with pyvirtio.open_disk(image) as disk:
        for part in range(4):
            disk.write_zeroes(part << 23, 65536)
    theirs, ours = both(folder, "img", "amend", "-p", "-o", change, "image")
    sizes = [os.path.getsize(copy / "image") for copy in (theirs, ours)]
    assert sizes[1] == sizes[0]


def test_a_committed_overlay_is_what_qemu_makes_of_it(folder: Path) -> None:
    make(folder / "base")
    image = make(folder / "image", backing_file="base", backing_fmt="qcow2")
    with pyvirtio.open_disk(image) as disk:
        disk.write(0, b"x" * 500_000)
    theirs, ours = both(folder, "img", "commit", "image")
    assert (ours / "image").read_bytes() == (theirs / "image").read_bytes()
    with pyvirtio.open_disk(ours / "image") as disk:
        assert disk.read(0, 500_000) == b"x" * 500_000
        disk.write(0, b"y")  # it can be written as any other


def test_bitmaps_lie_where_qemu_puts_them(folder: Path) -> None:
    make(folder / "image", 1 << 30)
    for number in range(2):
        theirs, ours = both(folder, "img", "bitmap", "--add", "image", f"b{number}")
        heads = [(copy / "image").read_bytes()[: 1 << 16] for copy in (theirs, ours)]
        assert heads[1] == heads[0]  # where the directory is, for one
        shutil.copyfile(theirs / "image", folder / "image")


# -- places ----------------------------------------------------------------------------------------


def test_a_file_ends_where_its_last_table_ends(folder: Path) -> None:
    for copy in both(folder, "img", "create", "-f", "qcow2", "image", "64M"):
        assert os.path.getsize(copy / "image") == (3 << 16) + 8


def test_a_refcount_table_grows_as_qemus_does(folder: Path) -> None:
    make(folder / "image", 1 << 30, cluster_size=512)
    sizes = []
    for ours, name in ((False, "theirs"), (True, "ours")):
        image = folder / name
        shutil.copyfile(folder / "image", image)
        run(folder, ours, "io", "-t", "writeback", "-c", "write 0 20M", name)
        checked = run(folder, False, "img", "check", name)[1]
        header = image.read_bytes()[48:60]
        sizes.append((header, checked))
    assert sizes[1] == sizes[0]


# -- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["file", "host_device", "host_cdrom"])
@pytest.mark.parametrize("mode", ["-r", ""])
def test_what_is_no_file_or_device_is_told(folder: Path, driver: str, mode: str) -> None:
    (folder / "folder").mkdir()
    for name in ("folder", "/dev/null"):
        both(folder, "io", "-c", f"open {mode} -o driver={driver},filename={name},locking=off")


@pytest.mark.parametrize(
    "options", ["driver=raw,file.filename=x,size=512", "driver=raw,file.filename=x,offset=512"]
)
def test_options_that_decide_what_is_read_are_in_the_name(folder: Path, options: str) -> None:
    (folder / "x").write_bytes(bytes(4096))
    status, out, _ = run(folder, True, "img", "info", "--image-opts", options)
    assert (status, out.splitlines()[0]) == (
        0,
        run(folder, False, "img", "info", "--image-opts", options)[1].splitlines()[0],
    )


@pytest.mark.parametrize(
    "command",
    [
        *("reopen -o file.driver=file", "reopen -o file.driver=raw", "reopen -o driver=qcow2"),
        *("reopen -o file.node-name=x", "reopen -o read-only=x", "reopen -o file.filename=image"),
    ],
)
def test_reopening_refuses_what_cannot_change(folder: Path, command: str) -> None:
    make(folder / "image")
    both(folder, "io", "-c", command, "image")


@pytest.mark.parametrize("words", [["-l", "0"], ["-s", "1M"], ["-s", "9M"], []])
def test_a_map_of_nothing_has_one_entry(folder: Path, words: list[str]) -> None:
    make(folder / "image")
    both(folder, "img", "map", "--output=json", *words, "image")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "command"),
    [
        *(
            ("l2_alloc_write", "write 0 64k"),
            ("l2_load", "write 0 64k"),
            ("cluster_alloc", "write 0 64k"),
        ),
        *(
            ("refblock_load", "write 0 64k"),
            ("l2_update", "write -z 0 64k"),
            ("l2_update", "read 0 64k"),
        ),
        *(("l1_grow_write_table", "write -b 0 64k"), ("l1_grow_activate_table", "write -b 0 64k")),
        ("l1_update", "write -b 0 64k"),
    ],
)
@pytest.mark.parametrize("once", ["on", "off"])
def test_an_error_at_a_point_of_the_driver_is_told_as_by_qemu(
    folder: Path, event: str, command: str, once: str
) -> None:
    make(folder / "image", 1 << 30, cluster_size=1024)
    rules = f'[inject-error]\nevent = "{event}"\nerrno = "28"\nonce = "{once}"\n'
    (folder / "rules").write_text(rules)
    words = ["-t", "writethrough", "-c", command, "blkdebug:rules:image"]
    said = []
    for ours in (False, True):
        shutil.copyfile(folder / "image", folder / "copy")
        status, out, errors = run(folder, ours, "io", *words[:-1], "blkdebug:rules:copy")
        said.append((status, out.splitlines()[:1], errors))
    assert said[1] == said[0]
