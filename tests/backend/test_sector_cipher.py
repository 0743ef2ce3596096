"""Sector ciphers against published vectors and dm-crypt's rules for IVs."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from pyvirtio import ImageError, UnsupportedError
from pyvirtio.backend.sector_cipher import SectorCipher

KEY = bytes(range(32))
DATA = bytes(range(256)) * 4


def aes_cbc(key: bytes, iv: bytes, data: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor().update(data)


def test_xts_plain64_is_ieee_1619() -> None:
    # IEEE 1619-2007, XTS-AES-128 vector 4: data unit 0, a sector of 00 01 … ff 00 01 …
    key = bytes.fromhex("27182818284590452353602874713526") + bytes.fromhex(
        "31415926535897932384626433832795"
    )
    found = SectorCipher(key, "xts", "plain64").encrypt(bytes(range(256)) * 2, 0)
    assert found.startswith(bytes.fromhex("27a7479befa1d476489f308cd4cfa6e2"))
    assert found.endswith(bytes.fromhex("0a282df920147beabe421ee5319d0568"))


@pytest.mark.parametrize(
    ("ivgen", "iv"),
    [
        ("plain", (5).to_bytes(16, "little")),
        ("plain64", (5 + (1 << 32)).to_bytes(16, "little")),
    ],
)
def test_iv_is_the_sector_number_in_so_many_bits(ivgen: str, iv: bytes) -> None:
    found = SectorCipher(KEY, "cbc", ivgen).encrypt(DATA[:512], 5 + (1 << 32))
    assert found == aes_cbc(KEY, iv, DATA[:512])


def test_essiv_encrypts_the_sector_number_with_the_hash_of_the_key() -> None:
    salt = Cipher(algorithms.AES(hashlib.sha256(KEY).digest()), modes.ECB())
    iv = salt.encryptor().update((77).to_bytes(16, "little"))
    found = SectorCipher(KEY, "cbc", "essiv", "sha256").encrypt(DATA[:512], 77)
    assert found == aes_cbc(KEY, iv, DATA[:512])


def test_each_sector_has_an_iv_of_its_own() -> None:
    cipher = SectorCipher(KEY, "cbc", "plain64")
    assert cipher.encrypt(DATA, 9) == cipher.encrypt(DATA[:512], 9) + cipher.encrypt(DATA[512:], 10)


@pytest.mark.parametrize("mode", ["cbc", "xts"])
@pytest.mark.parametrize("ivgen", ["plain", "plain64", "essiv"])
def test_decrypting_undoes_encrypting(mode: str, ivgen: str) -> None:
    cipher = SectorCipher(KEY, mode, ivgen, "sha256")
    assert cipher.decrypt(cipher.encrypt(DATA, 3), 3) == DATA


def test_a_part_of_a_sector_is_refused() -> None:
    with pytest.raises(ValueError, match="not whole sectors"):
        SectorCipher(KEY, "cbc", "plain64").encrypt(DATA[:100], 0)


@pytest.mark.parametrize(
    ("key", "mode", "ivgen", "hash_name"),
    [
        (KEY, "ecb", "plain64", None),
        (KEY, "cbc", "benbi", None),
        (KEY, "cbc", "essiv", "sha1"),  # 20 bytes: no AES key
        (KEY, "cbc", "essiv", "nohash"),
        (bytes(48), "xts", "plain64", None),  # AES-192: OpenSSL has no XTS with it
        (bytes(20), "cbc", "plain64", None),
    ],
)
def test_what_is_not_there_is_refused(
    key: bytes, mode: str, ivgen: str, hash_name: str | None
) -> None:
    with pytest.raises(UnsupportedError):
        SectorCipher(key, mode, ivgen, hash_name)


def test_an_xts_key_of_equal_halves_is_refused() -> None:
    with pytest.raises(ImageError, match="key"):
        SectorCipher(bytes(64), "xts", "plain64")
