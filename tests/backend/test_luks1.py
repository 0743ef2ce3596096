"""LUKS1 headers: made, unlocked, amended; every field wrong once."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest

from pyvirtio import ImageError, MemoryDisk, PassphraseError, PyvirtioError, UnsupportedError
from pyvirtio.backend import luks_format
from pyvirtio.backend.luks1 import Luks1, LuksOptions, create_luks1, passphrase_bytes
from pyvirtio.backend.luks_format import LuksHeader
from support.encrypted import BAD_LUKS_HEADERS, slot_at, u32
from support.filters import Filter

QUICK = LuksOptions(iter_time=1)


@cache
def area(options: LuksOptions = QUICK) -> bytes:
    return create_luks1(options, b"first")


def disk_with(contents: bytes) -> MemoryDisk:
    file = MemoryDisk(0, growable=True)
    file.write(4096, contents)
    return file


def volume(contents: bytes | None = None) -> Luks1:
    contents = area() if contents is None else contents
    return Luks1(disk_with(contents), 4096, len(contents))


def again(luks: Luks1) -> Luks1:
    """The same volume read anew."""
    return Luks1(luks._file, 4096, len(area()))


# -- unlocking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        replace(QUICK, cipher_alg="aes-128"),
        replace(QUICK, cipher_alg="aes-128", cipher_mode="cbc", ivgen_alg="essiv"),
        replace(QUICK, cipher_alg="aes-192", cipher_mode="cbc", ivgen_alg="plain"),
        replace(QUICK, cipher_mode="cbc", hash_alg="sha512"),
        replace(QUICK, hash_alg="sha1"),
    ],
    ids=lambda o: f"{o.cipher_alg}-{o.cipher_mode}-{o.ivgen_alg}-{o.hash_alg}",
)
def test_a_new_volume_opens_with_its_passphrase(options: LuksOptions) -> None:
    one, other = volume(area(options)), volume(area(options))
    data = bytes(range(256)) * 2
    assert other.unlock(b"first").decrypt(one.unlock(b"first").encrypt(data, 7), 7) == data


def test_two_volumes_have_different_keys() -> None:
    data = bytes(512)
    other = create_luks1(QUICK, b"first")
    assert volume().unlock(b"first").encrypt(data, 0) != volume(other).unlock(b"first").encrypt(
        data, 0
    )


def test_a_wrong_passphrase_is_refused() -> None:
    with pytest.raises(PassphraseError, match=r"^Invalid password, cannot unlock any keyslot$"):
        volume().unlock(b"First")


def test_a_passphrase_may_be_asked_for() -> None:
    assert passphrase_bytes(lambda: "geh\u00e4im") == "geh\u00e4im".encode()
    assert passphrase_bytes(b"\xff") == b"\xff"


def test_damaged_key_material_does_not_unlock() -> None:
    damaged = bytearray(area())
    damaged[8 * 512 + 100_000] ^= 1
    with pytest.raises(PassphraseError):
        volume(bytes(damaged)).unlock(b"first")


# -- key slots -------------------------------------------------------------------------------------


def test_an_added_key_opens_the_same_volume() -> None:
    luks = volume()
    cipher = luks.unlock(b"first")
    assert luks.add_key(b"second", iter_time=1) == 1
    assert again(luks).unlock(b"second").encrypt(bytes(512), 5) == cipher.encrypt(bytes(512), 5)
    again(luks).unlock(b"first")


def test_a_key_can_be_added_only_when_unlocked() -> None:
    with pytest.raises(PassphraseError):
        volume().add_key(b"second", iter_time=1)


def test_adding_takes_the_slot_asked_for_and_then_the_first_free_one() -> None:
    luks = volume()
    luks.unlock(b"first")
    assert [luks.add_key(b"k", slot=s, iter_time=1) for s in (1, None, 4, None)] == [1, 2, 4, 3]


def test_an_active_slot_is_replaced_only_by_force() -> None:
    luks = volume()
    luks.unlock(b"first")
    with pytest.raises(ValueError, match="Refusing to overwrite active keyslot 0"):
        luks.add_key(b"second", slot=0, iter_time=1)
    assert luks.add_key(b"second", slot=0, iter_time=1, force=True) == 0
    again(luks).unlock(b"second")
    with pytest.raises(PassphraseError):
        again(luks).unlock(b"first")


def test_the_ninth_key_is_refused() -> None:
    luks = volume()
    luks.unlock(b"first")
    for slot in luks.header.slots:
        slot.state = luks_format.ACTIVE
    with pytest.raises(ValueError, match="all keyslots are in use"):
        luks.add_key(b"ninth", iter_time=1)


@pytest.mark.parametrize("slot", [-1, 8])
def test_a_slot_that_does_not_exist_is_refused(slot: int) -> None:
    luks = volume()
    luks.unlock(b"first")
    with pytest.raises(ValueError, match="must be between 0 and 7"):
        luks.add_key(b"second", slot=slot)
    with pytest.raises(ValueError, match="must be between 0 and 7"):
        luks.erase_key(slot=slot)


def test_an_erased_key_opens_nothing_and_its_material_is_gone() -> None:
    luks = volume()
    luks.unlock(b"first")
    luks.add_key(b"second", iter_time=1)
    assert luks.erase_key(slot=0) == [0]
    with pytest.raises(PassphraseError):
        again(luks).unlock(b"first")
    again(luks).unlock(b"second")
    start, size = 8 * 512, luks.header.split_bytes
    found = luks._file.read(4096 + start, size)
    same = sum(a == b for a, b in zip(found, area()[start : start + size], strict=True))
    assert same < size // 64


def test_all_slots_with_a_passphrase_are_erased() -> None:
    luks = volume()
    luks.unlock(b"first")
    luks.add_key(b"twice", iter_time=1)
    luks.add_key(b"twice", slot=5, iter_time=1)
    assert luks.erase_key(passphrase=b"twice") == [1, 5]
    assert [slot.active for slot in luks.header.slots] == [True] + 7 * [False]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"slot": 0}, "Attempt to erase the only active keyslot 0 "),
        ({"passphrase": b"first"}, "All the active keyslots match the (old) password "),
        ({"slot": 3}, "Given keyslot 3 is already erased (inactive)"),
        ({"slot": 0, "passphrase": b"x"}, "Given keyslot 0 doesn't contain the given old password"),
        ({"passphrase": b"x"}, "No keyslots match given (old) password"),
        ({}, "To erase keyslot(s), either explicit keyslot index or the password"),
    ],
)
def test_what_must_not_be_erased_is_refused(how: dict[str, object], text: str) -> None:
    luks = volume()
    before = luks._file.read(4096, len(area()))
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        luks.erase_key(**how)  # type: ignore[arg-type]
    assert luks._file.read(4096, len(area())) == before


def test_the_last_key_is_erased_by_force() -> None:
    luks = volume()
    assert luks.erase_key(slot=0, force=True) == [0]
    with pytest.raises(PassphraseError):
        again(luks).unlock(b"first")


class CutDisk(Filter):
    """Writes nothing any more after so many writes."""

    def __init__(self, file: MemoryDisk, writes: int) -> None:
        super().__init__(file)
        self.left = writes

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self.left -= 1
        if self.left >= 0:
            super()._writev(offset, views, length)


@pytest.mark.parametrize("writes", range(4))
def test_a_cut_while_a_key_is_added_leaves_no_slot_that_is_half_there(writes: int) -> None:
    file = disk_with(area())
    luks = Luks1(CutDisk(file, writes), 4096, len(area()))
    luks.unlock(b"first")
    luks.add_key(b"second", iter_time=1)
    left = Luks1(file, 4096, len(area()))
    assert left.header.slots[1].active is (writes == 3)
    left.unlock(b"first")


# -- headers that are wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "value", "text"), BAD_LUKS_HEADERS)
def test_a_wrong_field_is_refused_by_name(at: int, value: bytes, text: str) -> None:
    contents = bytearray(area())
    contents[at : at + len(value)] = value
    with pytest.raises((ImageError, UnsupportedError), match="^" + re.escape(text)):
        volume(bytes(contents))


@pytest.mark.parametrize("at", [164, slot_at(0) + 4])
def test_an_endless_key_derivation_is_refused(at: int) -> None:
    contents = bytearray(area())
    contents[at : at + 4] = u32(2**32 - 1)
    luks = volume(bytes(contents))  # it can be looked at
    with pytest.raises(ImageError, match="iterations of PBKDF2") as caught:
        luks.unlock(b"first")
    assert caught.value.limit == luks_format.MAX_ITERATIONS


@pytest.mark.parametrize("at", range(0, 592, 4))
def test_any_word_at_an_extreme_is_refused_or_harmless(at: int) -> None:
    for word in (0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF):
        contents = bytearray(area()[:592])
        contents[at : at + 4] = u32(word)
        try:
            header = LuksHeader.parse(bytes(contents))
        except PyvirtioError:
            continue
        for slot in header.slots:
            end = slot.key_offset + header.split_sectors
            assert 8 <= slot.key_offset < end <= header.payload_offset


@pytest.mark.parametrize("length", [0, 591])
def test_a_header_that_leaves_its_area_is_refused(length: int) -> None:
    with pytest.raises(ImageError, match="Request for data outside of extension header"):
        Luks1(disk_with(area()), 4096, length)


def test_key_material_that_leaves_the_area_is_refused() -> None:
    luks = Luks1(disk_with(area()), 4096, 100_000)
    with pytest.raises(ImageError, match="Request for data outside of extension header"):
        luks.unlock(b"first")


@pytest.mark.parametrize(
    "options",
    [
        replace(QUICK, cipher_alg="aes-192"),
        replace(QUICK, cipher_alg="aes"),
        replace(QUICK, cipher_alg="serpent-256"),
        replace(QUICK, cipher_mode="ecb"),
        replace(QUICK, ivgen_alg="essiv", ivgen_hash_alg="sha1"),
        replace(QUICK, ivgen_hash_alg="x" * 40),
        replace(QUICK, hash_alg="sha3"),
        replace(QUICK, iter_time=0),
        replace(QUICK, iter_time=1 << 40),
    ],
)
def test_a_volume_that_could_not_be_opened_is_not_made(options: LuksOptions) -> None:
    with pytest.raises(ValueError, match=r"not supported|iter|No AES cipher"):
        create_luks1(options, b"first")
