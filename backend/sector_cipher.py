"""Encryption of a disk's sectors, each on its own: AES in XTS or CBC mode with an IV made from the
sector's number (dm-crypt's ``aes-xts-plain64``, ``aes-cbc-essiv:sha256``, …).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from ..errors import ImageError, UnsupportedError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["SECTOR", "SectorCipher"]

SECTOR = 512
"""Bytes that are encrypted with one IV."""

_MODES: dict[str, Callable[[bytes], modes.CBC | modes.XTS]] = {"cbc": modes.CBC, "xts": modes.XTS}
_AES_KEYS = (16, 24, 32)
_XTS_KEYS = (32, 64)


class SectorCipher:
    """AES with one key. ``mode`` is ``cbc`` or ``xts``; an XTS key is two keys in a row.

    ``ivgen`` is ``plain`` (the sector's number in 32 bits), ``plain64``, or ``essiv`` (the number
    encrypted with ``ivgen_hash`` of the key as the key). Raises UnsupportedError for others, and
    ImageError for a key that the mode cannot have.
    """

    def __init__(self, key: bytes, mode: str, ivgen: str, ivgen_hash: str | None = None) -> None:
        if mode not in _MODES:
            raise UnsupportedError(f"Cipher mode '{mode}' not supported", feature=mode)
        if len(key) not in (_XTS_KEYS if mode == "xts" else _AES_KEYS):
            raise UnsupportedError(
                f"AES in {mode} mode with a key of {len(key)} bytes not supported", feature=mode
            )
        if ivgen not in ("plain", "plain64", "essiv"):
            raise UnsupportedError(f"IV generator '{ivgen}' not supported", feature=ivgen)
        self._mode = _MODES[mode]
        self._algorithm = algorithms.AES(key)
        self._number_mask = (1 << 32) - 1 if ivgen == "plain" else (1 << 64) - 1
        self._essiv = _essiv_cipher(key, ivgen_hash) if ivgen == "essiv" else None
        try:
            self._encryptor(bytes(16))
        except ValueError as error:  # an XTS key of two halves alike
            raise ImageError(f"Unusable encryption key: {error}", field="key") from error

    def encrypt(self, data: ReadableBuffer, sector: int) -> bytes:
        """Whole sectors, the first of which has number ``sector``, encrypted."""
        return self._each(self._encryptor, memoryview(data), sector)

    def decrypt(self, data: ReadableBuffer, sector: int) -> bytes:
        """The reverse of :meth:`encrypt`."""
        return self._each(self._decryptor, memoryview(data), sector)

    def _encryptor(self, iv: bytes) -> CipherContext:
        return Cipher(self._algorithm, self._mode(iv)).encryptor()

    def _decryptor(self, iv: bytes) -> CipherContext:
        return Cipher(self._algorithm, self._mode(iv)).decryptor()

    def _each(
        self, context: Callable[[bytes], CipherContext], data: memoryview, sector: int
    ) -> bytes:
        if len(data) % SECTOR:
            raise ValueError(f"{len(data)} bytes are not whole sectors")
        mask = self._number_mask
        numbers = range(sector, sector + len(data) // SECTOR)
        ivs = b"".join([(number & mask).to_bytes(16, "little") for number in numbers])
        if self._essiv is not None:
            ivs = self._essiv.encryptor().update(ivs)
        at = 0
        parts = []
        for i in range(0, len(ivs), 16):
            parts.append(context(ivs[i : i + 16]).update(data[at : at + SECTOR]))
            at += SECTOR
        return b"".join(parts)


def _essiv_cipher(key: bytes, hash_name: str | None) -> Cipher[modes.ECB]:
    """The cipher of sector numbers: AES with the hash of the key, where that is a key's length."""
    if hash_name is None:
        raise ImageError("Missing IV generator hash specification", field="cipher_mode")
    try:
        salt = hashlib.new(hash_name, key).digest()
    except ValueError:
        raise UnsupportedError(
            f"Hash algorithm '{hash_name}' not supported", feature=hash_name
        ) from None
    if len(salt) not in _AES_KEYS:
        raise UnsupportedError(
            f"No AES cipher with key size {len(salt)} available", feature=f"essiv:{hash_name}"
        )
    return Cipher(algorithms.AES(salt), modes.ECB())
