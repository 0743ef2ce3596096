"""Check and repair of damaged images, beside qemu-img on a copy of each."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.errors import BackendError, ImageError

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="qemu-img and qemu-io are not installed",
)
pytestmark = needs_qemu

COPIED = 1 << 63


def run(*arguments: object) -> str:
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


class Image:
    """A qcow2 image to be damaged byte by byte."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, offset: int, form: str = ">Q") -> int:
        with self.path.open("rb") as file:
            file.seek(offset)
            value: int = struct.unpack(form, file.read(struct.calcsize(form)))[0]
            return value

    def put(self, offset: int, value: int, form: str = ">Q") -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack(form, value))

    @property
    def cluster_size(self) -> int:
        return 1 << self.get(20, ">I")

    @property
    def l1(self) -> int:
        return self.get(40)

    @property
    def table(self) -> int:
        return self.get(48)

    def block(self, index: int = 0) -> int:
        return self.get(self.table + 8 * index)

    def l2(self, index: int = 0) -> int:
        return self.get(self.l1 + 8 * index) & 0x00FF_FFFF_FFFF_FE00

    def entry(self, index: int) -> int:
        """Where the L2 entry of a guest cluster stands (in the first L2 table)."""
        return self.l2() + 8 * index

    def refcount(self, offset: int) -> int:
        """Where the 16-bit refcount of the cluster at a host offset stands."""
        return self.block() + 2 * (offset // self.cluster_size)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """64 KiB clusters; five stored, one zero cluster with storage, one without."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    commands = ["write -P 1 0 192k", "write -P 2 1M 128k", "write -z 128k 64k", "write -z 5M 64k"]
    run("qemu-io", *[a for c in commands for a in ("-c", c)], path)
    return Image(path)


NUMBERS = {
    "corruptions": "corruptions",
    "leaks": "leaks",
    "check_errors": "check-errors",
    "corruptions_fixed": "corruptions-fixed",
    "leaks_fixed": "leaks-fixed",
    "allocated_clusters": "allocated-clusters",
    "compressed_clusters": "compressed-clusters",
    "fragmented_clusters": "fragmented-clusters",
    "total_clusters": "total-clusters",
    "image_end_offset": "image-end-offset",
}


def qemu_check(path: Path, fix: str | None = None) -> dict[str, int] | None:
    """qemu-img's numbers; None where it gives none."""
    options = [] if fix is None else ["-r", fix]
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", *options, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout.strip():
        return None
    found = json.loads(done.stdout)
    return {ours: found.get(theirs, 0) for ours, theirs in NUMBERS.items()}


def our_check(path: Path, fix: str | None = None) -> dict[str, int]:
    with pyvirtio.open_disk(path, format="qcow2", read_only=fix is None, for_check=True) as disk:
        result = disk.check(fix)
        return {name: getattr(result, name) for name in NUMBERS}


def contents(path: Path) -> bytes:
    copy = path.with_suffix(".raw")
    run("qemu-img", "convert", "-O", "raw", path, copy)
    return copy.read_bytes()


def compare_with_qemu(
    path: Path, *, fixes: tuple[str | None, ...] = (None, "leaks", "all")
) -> None:
    """Each kind of check on a copy by us and by qemu-img: the same numbers."""
    for fix in fixes:
        theirs, ours = path.with_suffix(".theirs"), path.with_suffix(".ours")
        shutil.copy(path, theirs)
        shutil.copy(path, ours)
        expected, found = qemu_check(theirs, fix), our_check(ours, fix)
        if expected is None:
            # Ours may go on where theirs gives up, but then to the end.
            assert found["check_errors"] or not (found["corruptions"] or found["leaks"]), fix
        else:
            if fix == "all":  # new tables may be elsewhere
                expected["image_end_offset"] = found["image_end_offset"]
            assert found == expected, fix
            after = qemu_check(ours)
            assert after is not None
            for name in ("corruptions", "leaks", "check_errors", "image_end_offset"):
                assert after[name] == found[name], (fix, name)


def leak(image: Image) -> None:
    image.put(image.refcount(image.l2() + 7 * image.cluster_size), 3, ">H")


def refcount_too_high(image: Image) -> None:
    image.put(image.refcount(image.get(image.entry(0)) & ~COPIED), 2, ">H")


def refcount_too_low(image: Image) -> None:
    """Two entries for one cluster that is counted once."""
    image.put(image.entry(40), image.get(image.entry(0)))


def refcount_zero(image: Image) -> None:
    image.put(image.refcount(image.get(image.entry(0)) & ~COPIED), 0, ">H")


def header_refcount_zero(image: Image) -> None:
    image.put(image.block(), 0, ">H")


def copied_missing(image: Image) -> None:
    image.put(image.entry(0), image.get(image.entry(0)) & ~COPIED)


def copied_missing_in_l1(image: Image) -> None:
    image.put(image.l1, image.l2())


def copied_where_shared(image: Image) -> None:
    run("qemu-img", "snapshot", "-c", "one", image.path)
    image.put(image.entry(1), image.get(image.entry(1)) | COPIED)
    image.put(image.l1, image.l2() | COPIED)


def l2_entry_unaligned(image: Image) -> None:
    image.put(image.entry(1), image.get(image.entry(1)) + 0x200)


def zero_cluster_unaligned(image: Image) -> None:
    image.put(image.entry(2), image.get(image.entry(2)) + 0x200)


def l2_entry_beyond_end(image: Image) -> None:
    image.put(image.entry(9), (1 << 40) | COPIED)


def l2_entry_just_beyond_end(image: Image) -> None:
    end = -(-image.path.stat().st_size // image.cluster_size) * image.cluster_size
    image.put(image.entry(9), end | COPIED)


def l2_entry_reserved_bits(image: Image) -> None:
    image.put(image.entry(1), image.get(image.entry(1)) | 0x10)


def l2_entry_into_l1(image: Image) -> None:
    image.put(image.entry(9), image.l1 | COPIED)


def l2_entry_into_header(image: Image) -> None:
    image.put(image.entry(9), 1 << 62)


def l2_entry_into_block(image: Image) -> None:
    image.put(image.entry(9), image.block() | COPIED)


def compressed_with_copied(image: Image) -> None:
    image.put(image.entry(9), 1 << 62 | COPIED | image.get(image.entry(0)))


def compressed_past_end(image: Image) -> None:
    image.put(image.entry(9), 1 << 62 | image.path.stat().st_size)


def l1_entry_unaligned(image: Image) -> None:
    image.put(image.l1, image.get(image.l1) + 0x200)


def l1_entry_beyond_end(image: Image) -> None:
    image.put(image.l1, (1 << 40) | COPIED)


def l1_entry_reserved_bits(image: Image) -> None:
    image.put(image.l1, image.get(image.l1) | 1)


def block_reserved_bits(image: Image) -> None:
    image.put(image.table, image.block() | 1)


def block_outside(image: Image) -> None:
    image.put(image.table + 8, 1 << 30)


def block_far_outside(image: Image) -> None:
    image.put(image.table + 8, 1 << 62)


def first_block_outside(image: Image) -> None:
    image.put(image.table, 1 << 30)


def block_missing(image: Image) -> None:
    image.put(image.table, 0)


def block_twice(image: Image) -> None:
    image.put(image.table + 8, image.block())


def block_is_data(image: Image) -> None:
    image.put(image.table, image.get(image.entry(0)) & ~COPIED)


def no_table(image: Image) -> None:
    image.put(56, 0, ">I")


def table_elsewhere(image: Image) -> None:
    image.put(48, 1 << 35)


def table_is_header(image: Image) -> None:
    image.put(48, 0)


def garbage_in_block(image: Image) -> None:
    with image.path.open("r+b") as file:
        file.seek(image.block())
        file.write(random.Random(5).randbytes(image.cluster_size))


DAMAGES: list[Callable[[Image], None]] = [
    leak,
    refcount_too_high,
    refcount_too_low,
    refcount_zero,
    header_refcount_zero,
    copied_missing,
    copied_missing_in_l1,
    copied_where_shared,
    l2_entry_unaligned,
    zero_cluster_unaligned,
    l2_entry_beyond_end,
    l2_entry_just_beyond_end,
    l2_entry_reserved_bits,
    l2_entry_into_l1,
    l2_entry_into_header,
    l2_entry_into_block,
    compressed_with_copied,
    compressed_past_end,
    l1_entry_unaligned,
    l1_entry_beyond_end,
    l1_entry_reserved_bits,
    block_reserved_bits,
    block_outside,
    block_far_outside,
    first_block_outside,
    block_missing,
    block_twice,
    block_is_data,
    no_table,
    table_elsewhere,
    table_is_header,
    garbage_in_block,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_check_and_repair_count_as_qemu_img_does(
    image: Image, damage: Callable[[Image], None]
) -> None:
    damage(image)
    compare_with_qemu(image.path)


INTACT = [
    leak,
    refcount_too_high,
    refcount_zero,
    header_refcount_zero,
    copied_missing,
    copied_missing_in_l1,
    copied_where_shared,
    zero_cluster_unaligned,
    block_reserved_bits,
    block_outside,
    block_far_outside,
    first_block_outside,
    block_missing,
    block_twice,
    no_table,
    table_elsewhere,
    garbage_in_block,
]


@pytest.mark.parametrize("damage", INTACT, ids=lambda damage: damage.__name__)
def test_repair_leaves_a_clean_image_with_its_contents(
    image: Image, damage: Callable[[Image], None]
) -> None:
    before = contents(image.path)
    damage(image)
    found = our_check(image.path, "all")
    assert (found["corruptions"], found["leaks"], found["check_errors"]) == (0, 0, 0)
    run("qemu-img", "check", image.path)
    assert contents(image.path) == before


def test_repaired_image_can_be_written_at_once(image: Image) -> None:
    block_missing(image)
    with pyvirtio.open_disk(image.path, format="qcow2", for_check=True) as disk:
        disk.check("all")
    with pyvirtio.open_disk(image.path, format="qcow2") as disk:
        disk.write(20 << 20, b"x" * 100000)
        disk.snapshots.create("after")
        disk.write(20 << 20, b"y" * 100000)
        assert disk.check().clean
    run("qemu-img", "check", image.path)


def test_repair_of_a_disk_in_use_goes_on_with_what_it_repaired(image: Image) -> None:
    with pyvirtio.open_disk(image.path, format="qcow2") as disk:
        disk.write(30 << 20, b"z" * 65536)
        disk.flush()
        refcount_too_high(image)
        leaks_before = disk.check().leaks
        result = disk.check("all")
        assert (leaks_before, result.leaks_fixed, result.leaks) == (1, 1, 0)
        disk.write(31 << 20, b"w" * 65536)
        assert disk.check().clean
        assert disk.read(30 << 20, 65536) == b"z" * 65536
    run("qemu-img", "check", image.path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32, 64])
def test_every_refcount_width_is_rebuilt(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "image.qcow2"
    options = f"cluster_size=512,refcount_bits={bits}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "2M")
    run("qemu-io", "-c", "write -P 7 0 300k", "-c", "write -P 8 1M 99k", path)
    before = contents(path)
    image = Image(path)
    image.put(image.table, 0)
    compare_with_qemu(path)
    our_check(path, "all")
    run("qemu-img", "check", path)
    assert contents(path) == before


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32, 64])
def test_leaks_and_corruptions_of_every_refcount_width(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "image.qcow2"
    options = f"cluster_size=512,refcount_bits={bits}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "2M")
    run("qemu-io", "-c", "write -P 7 0 300k", "-c", "write -P 8 1M 99k", path)
    image = Image(path)
    with path.open("r+b") as file:  # counts of clusters past those in use
        file.seek(image.block() + 100 * bits // 8)
        file.write(b"\xff" * 40)
    compare_with_qemu(path)


def test_more_references_than_a_narrow_refcount_holds(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    options = "cluster_size=4k,refcount_bits=2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "2M")
    run("qemu-io", "-c", "write -P 7 0 40k", path)
    image = Image(path)
    for index in range(20, 30):
        image.put(image.entry(index), image.get(image.entry(0)))
    compare_with_qemu(path, fixes=(None,))


def test_a_cluster_referred_to_three_hundred_times(image: Image) -> None:
    for index in range(100, 400):
        image.put(image.entry(index), image.get(image.entry(0)))
    compare_with_qemu(image.path)


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k,compat=0.10"])
def test_compressed_clusters_are_counted(tmp_path: Path, options: str) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image.qcow2"
    raw.write_bytes(
        b"".join(bytes([i]) * 3000 for i in range(200)) + random.Random(1).randbytes(99999)
    )
    run("qemu-img", "convert", "-f", "raw", "-c", "-O", "qcow2", "-o", options, raw, path)
    image = Image(path)
    compare_with_qemu(path)
    image.put(image.entry(0), image.get(image.entry(1)))
    compare_with_qemu(path)


@pytest.mark.parametrize(
    "damage", ["none", "entry", "subclusters", "no host", "unaligned", "block"]
)
def test_extended_l2_entries(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path, "16M")
    run("qemu-io", "-c", "write 0 130k", "-c", "write 1M 2k", "-c", "write -z 3M 64k", path)
    image = Image(path)
    if damage == "entry":
        image.put(image.l2() + 16, image.get(image.l2()))
    elif damage == "subclusters":
        image.put(image.l2() + 8, (1 << 64) - 1)
    elif damage == "no host":
        image.put(image.l2() + 16 * 40 + 8, 1)
    elif damage == "unaligned":
        image.put(image.l2() + 16, (image.get(image.l2() + 16) + 512) & ~1)
        image.put(image.l2() + 24, 0)
    elif damage == "block":
        image.put(image.table, 0)
    compare_with_qemu(path)


def test_snapshots_that_share_a_damaged_table(image: Image) -> None:
    for name in ("one", "two", "three"):
        run("qemu-img", "snapshot", "-c", name, image.path)
    image.put(image.entry(1), image.get(image.entry(1)) | 0x10)
    image.put(image.entry(60), image.get(image.entry(0)))
    compare_with_qemu(image.path)


# -- the header's bits ---------------------------------------------------------------------------


def test_repair_clears_the_dirty_and_corrupt_bits(image: Image) -> None:
    image.put(72, 3)
    leak(image)
    our_check(image.path, "all")
    assert image.get(72) == 0


def test_check_without_repair_leaves_the_bits(image: Image) -> None:
    image.put(72, 3)
    our_check(image.path)
    assert image.get(72) == 3


def test_corrupt_bit_stays_while_something_is_corrupt(image: Image) -> None:
    image.put(72, 2)
    l2_entry_unaligned(image)
    assert our_check(image.path, "all")["corruptions"]
    assert image.get(72) == 2


def test_corrupt_image_is_opened_read_only_or_for_check(image: Image) -> None:
    image.put(72, 2)
    with pytest.raises(ImageError, match="Image is corrupt; cannot be opened read/write"):
        pyvirtio.open_disk(image.path, format="qcow2")
    with pyvirtio.open_disk(image.path, format="qcow2", read_only=True) as disk:
        assert disk.read(0, 4) == b"\1\1\1\1"
    with (
        pyvirtio.open_disk(image.path, format="qcow2", for_check=True) as disk,
        pytest.raises(BackendError),
    ):
        disk.write(0, b"no")


def test_disk_open_for_check_changes_nothing_but_by_repair(image: Image) -> None:
    run("qemu-img", "snapshot", "-c", "kept", image.path)
    before = image.path.read_bytes()
    with pyvirtio.open_disk(image.path, format="qcow2", for_check=True) as disk:
        for change in (
            lambda: disk.snapshots.create("new"),
            lambda: disk.truncate(1 << 30),
            lambda: disk.discard(0, 65536),
            lambda: disk.write_zeroes(0, 65536),
        ):
            with pytest.raises(BackendError):
                change()
    assert image.path.read_bytes() == before


def test_dirty_image_is_repaired_when_it_is_opened_to_be_written(image: Image) -> None:
    image.put(72, 1)
    refcount_zero(image)
    leak(image)
    with pyvirtio.open_disk(image.path, format="qcow2") as disk:
        assert image.get(72) == 0
        disk.write(0, b"a" * 70000)
    run("qemu-img", "check", image.path)


def test_dirty_image_is_left_alone_when_it_is_opened_read_only(image: Image) -> None:
    image.put(72, 1)
    leak(image)
    before = image.path.read_bytes()
    with pyvirtio.open_disk(image.path, format="qcow2", read_only=True) as disk:
        assert disk.read(0, 1) == b"\1"
    assert image.path.read_bytes() == before


def test_image_without_refcount_table_is_opened_for_check_only(image: Image) -> None:
    no_table(image)
    with pytest.raises(ImageError, match="does not contain a reference count table"):
        pyvirtio.open_disk(image.path, format="qcow2")


def test_read_only_disk_is_not_repaired(image: Image) -> None:
    leak(image)
    with (
        pyvirtio.open_disk(image.path, format="qcow2", read_only=True) as disk,
        pytest.raises(BackendError, match="read-only"),
    ):
        disk.check("leaks")


def test_unknown_kind_of_repair_is_refused(image: Image) -> None:
    with (
        pyvirtio.open_disk(image.path, format="qcow2") as disk,
        pytest.raises(ValueError, match="leaks"),
    ):
        disk.check("everything")


# -- snapshot tables -----------------------------------------------------------------------------


def snapshot_table(image: Image, entries: list[bytes]) -> None:
    """Put a snapshot table behind the image, uncounted."""
    size = image.cluster_size
    place = -(-image.path.stat().st_size // size) * size
    with image.path.open("r+b") as file:
        file.seek(place)
        table = b"".join(entry + bytes(-len(entry) % 8) for entry in entries)
        file.write(table.ljust(size, b"\0"))
    image.put(64, place)
    image.put(60, len(entries), ">I")


def snapshot_entry(image: Image, extra: bytes, name: bytes = b"n", l1: int = 0) -> bytes:
    header = struct.pack(">QIHHIIQII", l1, 0, 1, len(name), 0, 0, 0, 0, len(extra))
    return header + extra + b"1" + name


@pytest.mark.parametrize("extra", [0, 8, 16, 24, 40, 1024, 2000])
def test_snapshot_entry_with_that_much_extra_data(image: Image, extra: int) -> None:
    entries = [snapshot_entry(image, bytes(min(extra, 24)) + b"u" * (extra - 24)), b""]
    snapshot_table(image, entries[:1])
    compare_with_qemu(image.path)


def test_repaired_snapshot_keeps_its_name_and_some_extra_data(image: Image) -> None:
    snapshot_table(image, [snapshot_entry(image, bytes(24) + b"u" * 3000, b"kept")])
    our_check(image.path, "all")
    with pyvirtio.open_disk(image.path, format="qcow2") as disk:
        (snapshot,) = disk.snapshots
        assert (snapshot.name, len(snapshot.unknown_extra_data)) == ("kept", 1000)
    run("qemu-img", "check", image.path)


def test_too_many_snapshots_are_cut_off(image: Image) -> None:
    size = image.cluster_size
    place = -(-image.path.stat().st_size // size) * size
    entry = snapshot_entry(image, bytes(24), b"n" * 7)
    assert len(entry) == 72
    with image.path.open("r+b") as file:
        file.seek(place)
        file.write((entry * 65539).ljust(-(-72 * 65539 // size) * size, b"\0"))
    image.put(64, place)
    image.put(60, 65539, ">I")
    found = our_check(image.path, "all")  # what qemu-img takes seconds for
    # three entries, and the 72 clusters of the table, which nobody had counted
    assert (found["corruptions_fixed"], found["corruptions"]) == (75, 0)
    assert image.get(60, ">I") == 65536


def test_snapshot_with_an_unaligned_l1_table(image: Image) -> None:
    snapshot_table(image, [snapshot_entry(image, bytes(24), l1=0x10200)])
    compare_with_qemu(image.path)


def test_unaligned_snapshot_table_is_refused(image: Image) -> None:
    image.put(60, 1, ">I")
    image.put(64, 0x10200)
    compare_with_qemu(image.path)
