"""Tables of more clusters than one refcount block counts."""

import pyvirtio
from support.peers import requires
from support.qemu import qemu_check


def test_a_snapshot_whose_l1_table_is_longer_than_a_refcount_block_counts(tmp_path):
    with pyvirtio.create_disk(tmp_path / "a", 1 << 30, cluster_size=512) as disk:
        disk.write(0, b"x" * 5000)
        disk.snapshots.create("one")
        disk.snapshots.create("two")
        assert disk.check().clean
        end = disk.check().image_end_offset
        disk.snapshots.delete("one")
        disk.snapshots.create("three")  # where the first one was
        assert disk.check().image_end_offset <= end
        disk.snapshots.delete("two")
        disk.write(0, b"y" * 100000)
        assert disk.check().clean


@requires("qemu-img")
def test_qemu_finds_such_an_image_sound(tmp_path):
    with pyvirtio.create_disk(tmp_path / "a", 1 << 30, cluster_size=512, refcount_bits=64) as disk:
        disk.write(0, b"x" * 5000)
        disk.snapshots.create("one")
        disk.truncate(3 << 30)
        assert disk.check().clean
    qemu_check(tmp_path / "a")
