"""Encrypted images: what is stored, what is refused, and requests of any bytes at once."""

from __future__ import annotations

import random
import re
import threading
from pathlib import Path
from struct import pack
from typing import Any

import pytest

import pyvirtio
from pyvirtio import Disk, ImageError, MemoryDisk, PassphraseError
from pyvirtio.qcow2 import Qcow2Disk
from support.crash import CrashImage, crash_images
from support.encrypted import PASSPHRASE, QUICK, blank, in_memory, open_blank
from support.filters import Filter, RecordingDisk

METHODS = ["aes", "luks"]
CLUSTER = 4096
SMALL: dict[str, Any] = {"cluster_size": CLUSTER}
MARK = b"plain text that must not be seen"
both = pytest.mark.parametrize("method", METHODS)


def reopened(disk: Disk, **options: Any) -> Disk:
    """The image again, from what is in its file now."""
    disk.flush()
    file = disk.children["file"]
    return pyvirtio.open_disk(
        in_memory(file.read(0, file.size)), **{"passphrase": PASSPHRASE, **options}
    )


# -- opening ---------------------------------------------------------------------------------------


@both
def test_without_the_passphrase_it_cannot_be_opened(method: str) -> None:
    with pytest.raises(PassphraseError, match=r"^Parameter 'encrypt.key-secret' is required"):
        pyvirtio.open_disk(in_memory(blank(method)))


def test_a_wrong_passphrase_is_refused() -> None:
    with pytest.raises(PassphraseError, match=r"^Invalid password, cannot unlock any keyslot$"):
        pyvirtio.open_disk(in_memory(blank("luks")), passphrase="wrong")


@pytest.mark.parametrize("passphrase", [PASSPHRASE.encode(), lambda: PASSPHRASE])
@both
def test_a_passphrase_is_bytes_or_what_asks_for_them(method: str, passphrase: Any) -> None:
    disk = open_blank(method)
    disk.write(0, MARK)
    assert reopened(disk, passphrase=passphrase).read(0, len(MARK)) == MARK


@both
def test_it_can_be_looked_at_without_the_passphrase(method: str) -> None:
    disk = open_blank(method, **SMALL)
    disk.write(0, MARK)
    closed = reopened(disk, passphrase=None, no_io=True)
    assert isinstance(closed, Qcow2Disk)
    assert closed.check().clean
    assert closed.info().specific["encrypt"]["format"] == method
    assert closed.block_status(0, CLUSTER).data
    assert closed.read(CLUSTER, 10) == bytes(10)  # nothing is stored there
    with pytest.raises(PassphraseError):
        closed.read(0, 10)
    with pytest.raises(PassphraseError):
        closed.write(0, bytes(512))


@pytest.mark.parametrize(
    ("made", "asked", "text"),
    [
        ("aes", "luks", "Header reported 'aes' encryption format but options specify 'luks'"),
        ("luks", "aes", "Header reported 'luks' encryption format but options specify 'aes'"),
        (None, "luks", "No encryption in image header, but options specified format 'luks'"),
    ],
)
def test_another_encryption_than_asked_for_is_refused(
    made: str | None, asked: str, text: str
) -> None:
    file = MemoryDisk(0, growable=True)
    if made is None:
        pyvirtio.create_disk(file, 1 << 20).flush()
    else:
        file.write(0, blank(made))
    with pytest.raises(ValueError, match=re.escape(text)):
        pyvirtio.open_disk(file, passphrase=PASSPHRASE, encrypt_format=asked)


def test_a_missing_luks_header_is_refused() -> None:
    contents = bytearray(blank("luks"))
    place = contents.index(pack(">II", 0x0537BE77, 16))
    contents[place : place + 4] = pack(">I", 0x12345678)
    with pytest.raises(ImageError, match=r"^Missing CRYPTO header for crypt method 2$"):
        pyvirtio.open_disk(in_memory(bytes(contents)), passphrase=PASSPHRASE)
    pyvirtio.open_disk(in_memory(bytes(contents)), no_io=True)


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (8, pack(">Q", 512), "is not a multiple of cluster size"),
        (8, pack(">Q", 1 << 40), "Volume is not in LUKS format"),
        (8, pack(">Q", 0), "Volume is not in LUKS format"),
        (8, pack(">Q", (1 << 64) - 65536), "Encryption header offset invalid"),
        (16, pack(">Q", 0), "Request for data outside of extension header"),
        (16, pack(">Q", (1 << 64) - 1), "Encryption header too large"),
        (16, pack(">Q", (64 << 20) + 1), "Encryption header too large"),
    ],
)
def test_a_wrong_place_of_the_luks_header_is_refused(at: int, value: bytes, text: str) -> None:
    contents = bytearray(blank("luks"))
    place = contents.index(pack(">II", 0x0537BE77, 16))
    contents[place + at : place + at + 8] = value
    with pytest.raises(ImageError, match=text):
        pyvirtio.open_disk(in_memory(bytes(contents)), no_io=True)


@pytest.mark.parametrize(("number", "text"), [(1, "only expected with LUKS"), (3, "method 3")])
def test_a_wrong_method_is_refused(number: int, text: str) -> None:
    contents = bytearray(blank("luks"))
    contents[32:36] = pack(">I", number)
    with pytest.raises(ImageError, match=text):
        pyvirtio.open_disk(in_memory(bytes(contents)), no_io=True)


def test_an_extension_of_another_length_is_refused() -> None:
    contents = bytearray(blank("luks"))
    place = contents.index(pack(">II", 0x0537BE77, 16))
    contents[place + 4 : place + 8] = pack(">I", 24)
    contents[place + 32 :] = contents[place + 24 : -8]
    with pytest.raises(ImageError, match="size 24, but expected size 16"):
        pyvirtio.open_disk(in_memory(bytes(contents)), no_io=True)


# -- creating --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"encryption": True}, {"encrypt_format": "luks"}])
def test_no_encryption_without_a_passphrase(options: dict[str, Any]) -> None:
    with pytest.raises(PassphraseError, match=r"^Parameter 'encrypt.key-secret' is required"):
        pyvirtio.create_disk(MemoryDisk(0, growable=True), 1 << 20, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"encryption": True, "encrypt_format": "luks"}, "mutually exclusive"),
        ({"encrypt_format": "rot13"}, "Parameter 'format' does not accept value 'rot13'"),
        ({"encrypt_format": "luks", "encrypt_cipher_alg": "aes-192"}, "not supported"),
    ],
)
def test_encryption_that_is_not_there_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pyvirtio.create_disk(MemoryDisk(0, growable=True), 1 << 20, **QUICK, **options)


def test_encryption_on_is_legacy_aes() -> None:
    file = MemoryDisk(0, growable=True)
    disk = pyvirtio.create_disk(file, 1 << 20, encryption=True, passphrase=PASSPHRASE)
    assert disk.info().specific["encrypt"] == {"format": "aes"}


@pytest.mark.parametrize("cluster_size", [512, 65536, 1 << 21])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_the_luks_header_is_counted(compat: str, cluster_size: int) -> None:
    disk = open_blank("luks", compat=compat, cluster_size=cluster_size)
    assert isinstance(disk, Qcow2Disk)
    assert disk.check().clean


def test_a_cut_while_it_is_created_leaves_no_image_or_all_of_it() -> None:
    file = RecordingDisk(MemoryDisk(0, growable=True))
    from pyvirtio.qcow2 import FORMAT

    assert FORMAT.create is not None
    FORMAT.create(file, 1 << 20, encrypt_format="luks", **QUICK, cluster_size=65536)
    seen = set()
    for _, image in crash_images(file.log, b"", seed=1, random_each=1, systematic=False):
        assert isinstance(image, CrashImage)
        if not any(image.data[:512]):
            seen.add("none")
            continue
        disk = pyvirtio.open_disk(in_memory(image.data), passphrase=PASSPHRASE)
        assert isinstance(disk, Qcow2Disk)
        assert disk.check().clean
        seen.add("whole")
    assert seen == {"none", "whole"}


# -- data ------------------------------------------------------------------------------------------


@both
def test_what_is_written_is_not_seen_in_the_file(method: str) -> None:
    disk = open_blank(method, **SMALL)
    for offset in (0, 700, 3 * CLUSTER - 5):  # new, in place, across clusters
        disk.write(offset, MARK)
        assert disk.read(offset, len(MARK)) == MARK
    disk.flush()
    file = disk.children["file"]
    assert MARK[:16] not in file.read(0, file.size)


@both
def test_one_whole_buffer_takes_the_way_through_the_cipher(method: str) -> None:
    disk = open_blank(method, **SMALL)
    disk.write(0, bytes(CLUSTER))
    disk.writev(0, [memoryview(MARK * 128)])
    found = bytearray(CLUSTER)
    disk.readv(0, [memoryview(found)])
    assert found == MARK * 128
    assert reopened(disk).read(0, CLUSTER) == found
    file = disk.children["file"]
    assert MARK[:16] not in file.read(0, file.size)


@both
def test_around_a_small_write_are_zeroes(method: str) -> None:
    disk = open_blank(method, **SMALL)
    disk.write(CLUSTER + 1000, MARK)
    expected = bytearray(4 * CLUSTER)
    expected[CLUSTER + 1000 : CLUSTER + 1000 + len(MARK)] = MARK
    assert disk.read(0, 4 * CLUSTER) == expected
    assert reopened(disk).read(0, 4 * CLUSTER) == expected


@both
def test_the_same_data_is_stored_differently_in_each_sector(method: str) -> None:
    disk = open_blank(method, **SMALL)
    disk.write(0, b"\7" * CLUSTER)
    disk.flush()
    extent = disk.block_status(0, CLUSTER)
    assert extent.data
    assert extent.host_offset is None  # it does not stand there as it is read
    file = disk.children["file"]
    end = file.size
    sectors = [file.read(end - CLUSTER + i, 512) for i in range(0, CLUSTER, 512)]
    assert len(set(sectors)) == 8


@both
def test_longer_than_one_piece(method: str) -> None:
    disk = open_blank(method, 8 << 20)
    data = random.Random(3).randbytes(3 << 20)
    disk.writev(513, [data[:100], data[100:]])
    halves = bytearray(1 << 20), bytearray(2 << 20)
    disk.readv(513, halves)
    assert halves[0] + halves[1] == data


@both
def test_the_source_of_a_write_is_left_alone(method: str) -> None:
    disk = open_blank(method)
    source = bytearray(b"\5" * 5000)
    disk.write(100, source)
    assert source == b"\5" * 5000


@both
def test_a_snapshot_reads_as_it_was(method: str) -> None:
    disk = open_blank(method, **SMALL)
    assert isinstance(disk, Qcow2Disk)
    disk.write(0, b"1" * (4 * CLUSTER))
    disk.snapshots.create("one")
    disk.write(100, b"2" * (2 * CLUSTER))
    disk.snapshots.apply("one")
    assert disk.read(0, 4 * CLUSTER) == b"1" * (4 * CLUSTER)
    disk.write(1, b"3")
    assert disk.read(0, 3) == b"131"
    assert disk.check().clean


@both
def test_a_plain_backing_file_is_copied_up_encrypted(method: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(MARK * 400)
    disk = pyvirtio.create_disk(
        tmp_path / "top",
        1 << 20,
        backing_file="base",
        backing_fmt="raw",
        encrypt_format=method,
        **QUICK,
        **SMALL,
    )
    with disk:
        disk.write(5000, b"x")
        expected = bytearray((MARK * 400).ljust(1 << 20, b"\0"))
        expected[5000:5001] = b"x"
        assert disk.read(0, 1 << 20) == expected
        disk.flush()
        assert MARK not in (tmp_path / "top").read_bytes()


@both
def test_an_encrypted_backing_file_is_opened_by_the_policy(method: str, tmp_path: Path) -> None:
    with pyvirtio.create_disk(tmp_path / "base", 1 << 20, encrypt_format=method, **QUICK) as base:
        base.write(0, MARK)
    pyvirtio.create_disk(
        tmp_path / "top",
        1 << 20,
        backing_file="base",
        backing_fmt="qcow2",
        backing=lambda _: None,
    ).close()
    with pytest.raises(PassphraseError, match="Could not open backing file: Parameter"):
        pyvirtio.open_disk(tmp_path / "top")

    def policy(reference: pyvirtio.FileReference) -> Disk:
        return pyvirtio.open_disk(tmp_path / "base", read_only=True, passphrase=PASSPHRASE)

    with pyvirtio.open_disk(tmp_path / "top", backing=policy) as top:
        top.write(100, b"x")
        assert top.read(0, 101) == MARK.ljust(100, b"\0") + b"x"


@pytest.mark.parametrize("kind", ["extended_l2", "plain"])
@both
def test_subclusters_of_a_new_cluster(method: str, kind: str) -> None:
    disk = open_blank(method, extended_l2=kind == "extended_l2", cluster_size=16384)
    model = bytearray(1 << 20)
    chance = random.Random(7)
    for _ in range(150):
        offset = chance.randrange(60_000)
        data = chance.randbytes(chance.randint(1, 1500))
        disk.write(offset, data)
        model[offset : offset + len(data)] = data
        if chance.random() < 0.2:
            at = chance.randrange(60_000) // 512 * 512
            disk.write_zeroes(at, 1024)
            model[at : at + 1024] = bytes(1024)
    assert disk.read(0, 1 << 20) == model


# -- many at once ----------------------------------------------------------------------------------


@both
def test_writers_of_neighbouring_bytes_lose_nothing(method: str) -> None:
    """Every thread owns every fourth byte of one sector, and writes it alone."""
    disk = open_blank(method, **SMALL)
    threads = [
        threading.Thread(
            target=lambda me=me: [disk.write(i, bytes([me + 1])) for i in range(me, 256, 4)]
        )
        for me in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert disk.read(0, 256) == bytes([1, 2, 3, 4]) * 64


@both
def test_a_part_of_a_sector_beside_whole_sectors_and_zeroes(method: str) -> None:
    """Old bytes never come back with a sector that was read before they were replaced."""
    disk = open_blank(method, **SMALL)
    failures: list[str] = []

    def nibble() -> None:
        for i in range(200):
            disk.write(CLUSTER + 511, bytes([i + 1]))

    def replace() -> None:
        for i in range(100):
            value = i % 255 + 1
            disk.write(CLUSTER, bytes([value]) * 511)
            found = disk.read(CLUSTER, 511)
            if found != bytes([value]) * 511:
                failures.append(f"{found[:1]!r} instead of {value}")
            disk.write_zeroes(0, 2 * CLUSTER)
            if any(disk.read(CLUSTER, 511)):
                failures.append("zeroes were undone")

    threads = [threading.Thread(target=nibble), threading.Thread(target=replace)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


class SlowReader(Filter):
    """Its next read waits until it may go on."""

    def __init__(self, below: Disk) -> None:
        super().__init__(below)
        self.reading, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        super()._readv(offset, views, length)
        self.reading.set()
        assert self.go_on.wait(60)


@pytest.mark.parametrize(
    "change",
    [
        lambda disk: disk.write_zeroes(CLUSTER, CLUSTER),
        lambda disk: disk.discard(CLUSTER, CLUSTER),
        lambda disk: disk.write(CLUSTER, bytes(CLUSTER)),
        lambda disk: disk.write(CLUSTER, bytes(CLUSTER - 1)),
    ],
    ids=["zeroes", "discard", "whole sectors", "parts"],
)
def test_nothing_comes_between_reading_a_sector_and_writing_it_back(change: Any) -> None:
    file = SlowReader(in_memory(blank("aes", **SMALL)))
    disk = pyvirtio.open_disk(file, passphrase=PASSPHRASE)
    disk.write(CLUSTER, b"\1" * (CLUSTER - 1) + b"\0")
    file.reading.clear()
    file.go_on.clear()
    first = threading.Thread(target=lambda: disk.write(CLUSTER + 5, b"\2"))
    first.start()
    assert file.reading.wait(60)  # it has read the sector
    second = threading.Thread(target=lambda: change(disk))
    second.start()
    second.join(0.2)  # time to do the wrong thing
    file.go_on.set()
    first.join(60)
    second.join(60)
    assert disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)


# -- keys ------------------------------------------------------------------------------------------


def test_keys_are_added_and_erased_while_it_is_in_use() -> None:
    disk = open_blank("luks")
    assert isinstance(disk, Qcow2Disk)
    assert disk.encryption is not None
    disk.write(0, MARK)
    assert disk.encryption.add_key(lambda: "second", iter_time=1) == 1
    assert disk.encryption.erase_key(passphrase=PASSPHRASE) == [0]
    disk.write(100, MARK)
    with pytest.raises(PassphraseError):
        reopened(disk)
    other = reopened(disk, passphrase="second")
    assert other.read(0, 132) == MARK.ljust(100, b"\0") + MARK


def test_keys_of_a_read_only_image_stay() -> None:
    disk = pyvirtio.open_disk(in_memory(blank("luks")), passphrase=PASSPHRASE, read_only=True)
    assert isinstance(disk, Qcow2Disk)
    assert disk.encryption is not None
    with pytest.raises(pyvirtio.BackendError, match="read-only"):
        disk.encryption.add_key("second", iter_time=1)


def test_legacy_aes_has_no_keys_to_change() -> None:
    disk = open_blank("aes")
    assert isinstance(disk, Qcow2Disk)
    assert disk.encryption is not None
    with pytest.raises(ValueError, match="Only LUKS encryption options can be amended"):
        disk.encryption.add_key("second")


def test_a_plain_image_has_no_encryption_and_loads_no_cryptography(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, pyvirtio; d = pyvirtio.create_disk(sys.argv[1], 1 << 20); d.write(0, b'x');"
        "assert d.encryption is None; print('cryptography' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "plain"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
