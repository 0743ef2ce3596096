"""The header cluster: what is refused, what is kept, what is written."""

from __future__ import annotations

import pytest

import pyvirtio
from pyvirtio import ImageError, MemoryDisk, UnsupportedError
from pyvirtio.qcow2 import layout
from pyvirtio.qcow2.header import Header, probe, read_header
from pyvirtio.qcow2.layout import CompressionType, Incompatible
from support.images import new_image, poke


def header(**fields: object) -> Header:
    """A valid header of 64 KiB clusters, with these fields."""
    known: dict[str, object] = {
        "version": 3,
        "cluster_bits": 16,
        "size": 1 << 20,
        "l1_size": 1,
        "l1_table_offset": 3 << 16,
        "refcount_table_offset": 1 << 16,
        "refcount_table_clusters": 1,
    }
    return Header(**(known | fields))  # type: ignore[arg-type]


def read_back(packed: bytes) -> Header:
    file = MemoryDisk(growable=True)
    file.write(0, packed.ljust(1 << 16, b"\0"))
    return read_header(file)


def changed(offset: int, value: int, length: int = 4, **fields: object) -> bytes:
    packed = bytearray(header(**fields).pack())
    packed[offset : offset + length] = value.to_bytes(length)
    return bytes(packed)


def refusal(packed: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_back(packed)
    return caught.value


def test_a_header_is_read_as_it_was_written() -> None:
    written = header(backing_file="base.img", backing_format="raw", nb_snapshots=0)
    found = read_back(written.pack())
    assert (found.backing_file, found.backing_format) == ("base.img", "raw")
    assert (found.size, found.l1_size, found.l1_table_offset) == (1 << 20, 1, 3 << 16)
    assert (found.refcount_table_offset, found.refcount_table_clusters) == (1 << 16, 1)


def test_unknown_fields_are_kept() -> None:
    unknown = b"new field" + bytes(7)
    assert read_back(header(unknown_fields=unknown).pack()).unknown_fields == unknown


def test_unknown_extensions_are_kept_with_their_padding() -> None:
    extensions = [(0x12345678, b"abc"), (0x12345679, b"12345678"), (0x1234567A, b"")]
    assert read_back(header(unknown_extensions=extensions).pack()).unknown_extensions == extensions


def test_version_2_has_no_feature_names() -> None:
    packed = header(version=2).pack()
    assert b"dirty bit" not in packed
    assert len(packed) == 72 + 8
    assert b"dirty bit" in header().pack()


def test_feature_names_are_those_of_the_specification() -> None:
    packed = header().pack()
    for kind, bit, name in ((0, 0, "dirty bit"), (0, 3, "compression type"), (2, 0, "bitmaps")):
        assert bytes([kind, bit]) + name.encode().ljust(46, b"\0") in packed


def test_feature_names_give_way_to_a_long_backing_name() -> None:
    packed = header(cluster_bits=9, backing_file="x" * 300).pack()
    assert len(packed) <= 512
    assert b"dirty bit" not in packed
    assert packed.endswith(b"x" * 300)


def test_a_header_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ImageError, match="does not fit one cluster"):
        header(cluster_bits=9, backing_file="x" * 500).pack()


@pytest.mark.parametrize(("version", "sure"), [(1, 0), (2, 100), (3, 100), (4, 100)])
def test_probing_by_magic_and_version(version: int, sure: int) -> None:
    assert probe(b"QFI\xfb" + version.to_bytes(4)) == sure


@pytest.mark.parametrize(
    ("offset", "value", "length", "field"),
    [
        (20, 8, 4, "cluster_bits"),
        (20, 22, 4, "cluster_bits"),
        (32, 3, 4, "crypt_method"),
        (36, 0, 4, "l1_size"),
        (36, (32 << 20) // 8 + 1, 4, "l1_size"),
        (40, (3 << 16) + 512, 8, "l1_table_offset"),
        (40, 1 << 63, 8, "l1_table_offset"),
        (48, (1 << 16) + 8, 8, "refcount_table_offset"),
        (56, 0, 4, "refcount_table_clusters"),
        (56, 129, 4, "refcount_table_clusters"),
        (60, 65537, 4, "nb_snapshots"),
        (64, 512, 8, "snapshots_offset"),
        (96, 7, 4, "refcount_order"),
        (100, 103, 4, "header_length"),
        (100, (1 << 16) + 8, 4, "header_length"),
        (104, 2, 1, "compression_type"),
        (104, 1, 1, "compression_type"),
        (8, (1 << 16) + 1, 8, "backing_file_offset"),
    ],
)
def test_a_field_out_of_its_range_is_named(
    offset: int, value: int, length: int, field: str
) -> None:
    assert refusal(changed(offset, value, length)).field == field


def test_the_largest_values_are_taken() -> None:
    assert read_back(changed(36, (32 << 20) // 8)).l1_size == (32 << 20) // 8
    assert read_back(changed(56, 128)).refcount_table_clusters == 128
    assert read_back(changed(60, 65536)).nb_snapshots == 65536
    assert read_back(changed(96, 6)).refcount_order == 6


def test_compression_type_and_its_feature_bit_go_together() -> None:
    flagged = header(incompatible_features=int(Incompatible.COMPRESSION))
    assert refusal(flagged.pack()).field == "compression_type"
    flagged.compression_type = CompressionType.ZSTD
    assert read_back(flagged.pack()).compression_type is CompressionType.ZSTD


def test_subclusters_are_not_smaller_than_sectors() -> None:
    packed = header(incompatible_features=int(Incompatible.EXTENDED_L2), cluster_bits=13).pack()
    assert refusal(packed).field == "cluster_bits"


def test_a_backing_name_may_have_1023_bytes() -> None:
    assert read_back(header(backing_file="x" * 1023).pack()).backing_file == "x" * 1023
    assert refusal(changed(16, 1024, backing_file="x" * 1024)).field == "backing_file_size"


def test_a_backing_format_may_have_15_bytes() -> None:
    name = "x" * 15
    assert read_back(header(backing_file="b", backing_format=name).pack()).backing_format == name
    packed = header(backing_file="b", backing_format=name + "x").pack()
    assert refusal(packed).field == "backing format length"


def test_an_extension_that_leaves_the_header_is_refused() -> None:
    packed = bytearray(header(backing_file="base").pack())
    packed[116:120] = (0x10000 - 112 - 8 + 1).to_bytes(4)  # of the first extension
    assert "Header extension too large" in str(refusal(bytes(packed)))


def test_a_feature_we_do_not_know_is_called_by_its_name() -> None:
    packed = bytearray(header(incompatible_features=1 << 40).pack())
    names = packed.index(b"dirty bit") - 2
    packed[names : names + 48] = layout.FEATURE_NAME.pack(0, 40, b"time travel")
    with pytest.raises(UnsupportedError, match="time travel"):
        read_back(bytes(packed))


def test_a_feature_without_a_name_is_told_by_its_bit() -> None:
    with pytest.raises(UnsupportedError, match="Unknown incompatible feature: 10000000000"):
        read_back(header(incompatible_features=1 << 40).pack())


def test_a_small_l1_table_is_refused() -> None:
    file, disk = new_image(1 << 20)
    disk.close()
    poke(file, 36, 31, 4)  # 32 entries of 32 KiB are needed
    with pytest.raises(ImageError, match="L1 table is too small"):
        pyvirtio.open_disk(file, format="qcow2")


def test_an_image_marked_dirty_is_not_simply_written() -> None:
    file, disk = new_image()
    disk.close()
    poke(file, 72, 1)
    with pyvirtio.open_disk(MemoryDisk(bytearray(file.getvalue())), read_only=True) as found:
        assert found.read(0, 512) == bytes(512)
