"""Encrypted images (spec, "Data encryption"): only guest data is, in sectors of 512 bytes.

Legacy AES makes the IV of a sector from its guest offset, LUKS from its offset in the file.
Requests come here with both, and cut to sectors where they write (``requests.py``). Data is
copied first and then transformed: guest memory may change meanwhile. Compressed clusters are
not encrypted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend.buffers import copy_in, gather, split
from ..backend.disk import Disk
from ..backend.luks1 import (
    DEFAULT_ITER_TIME,
    Luks1,
    LuksOptions,
    Passphrase,
    create_luks1,
    passphrase_bytes,
)
from ..backend.sector_cipher import SECTOR, SectorCipher
from ..errors import ImageError, PassphraseError
from .encryption_options import EncryptionOptions
from .header import Header
from .layout import CryptMethod

__all__ = ["Encryption", "new_luks_area", "open_encryption"]

_CHUNK = 1 << 20
"""Bytes transformed at a time, so that memory is bounded."""

_AES_KEY_SIZE = 16
_NAMES = {CryptMethod.AES: "aes", CryptMethod.LUKS: "luks"}


class Encryption:
    """The encryption of one open image."""

    def __init__(
        self, method: CryptMethod, cipher: SectorCipher | None, luks: Luks1 | None = None
    ) -> None:
        self.format = _NAMES[method]
        """``aes`` or ``luks``."""
        self._cipher = cipher
        self._by_host = method is CryptMethod.LUKS
        self._luks = luks
        self._check_writable: Callable[[], None] = lambda: None

    def before_changes(self, check: Callable[[], None]) -> None:
        """Have ``check`` called before the key slots are changed."""
        self._check_writable = check

    # -- data ------------------------------------------------------------------------------------

    def readv(
        self, file: Disk, host: int, guest: int, views: list[memoryview], length: int
    ) -> None:
        """Read guest bytes from ``guest`` on, which stand at host byte ``host``, into ``views``."""
        cipher = self._usable_cipher()
        done = 0
        while done < length:
            before = host % SECTOR
            part = min(length - done, _CHUNK - before)
            data = file.read(host - before, -(-(before + part) // SECTOR) * SECTOR)
            clear = cipher.decrypt(data, (host if self._by_host else guest) // SECTOR)
            copy_in(split(views, done, part), memoryview(clear)[before : before + part])
            host, guest, done = host + part, guest + part, done + part

    def writev(
        self, file: Disk, host: int, guest: int, views: list[memoryview], length: int
    ) -> None:
        """Write whole sectors of guest bytes to host byte ``host``."""
        cipher = self._usable_cipher()
        for done in range(0, length, _CHUNK):
            copy = gather(split(views, done, min(_CHUNK, length - done)))
            sector = ((host if self._by_host else guest) + done) // SECTOR
            file.write(host + done, cipher.encrypt(copy, sector))

    def _usable_cipher(self) -> SectorCipher:
        if self._cipher is None:
            raise PassphraseError("The image was opened without its passphrase (no_io)")
        return self._cipher

    # -- keys ------------------------------------------------------------------------------------

    def add_key(
        self,
        passphrase: Passphrase,
        *,
        slot: int | None = None,
        iter_time: int = DEFAULT_ITER_TIME,
        force: bool = False,
    ) -> int:
        """Have another passphrase open a LUKS image; see :meth:`Luks1.add_key`."""
        luks = self._amendable()
        return luks.add_key(
            passphrase_bytes(passphrase), slot=slot, iter_time=iter_time, force=force
        )

    def erase_key(
        self, *, slot: int | None = None, passphrase: Passphrase | None = None, force: bool = False
    ) -> list[int]:
        """Erase passphrases of a LUKS image; see :meth:`Luks1.erase_key`."""
        luks = self._amendable()
        secret = None if passphrase is None else passphrase_bytes(passphrase)
        return luks.erase_key(slot=slot, passphrase=secret, force=force)

    def amend(
        self,
        state: str | None,
        *,
        slot: int | None = None,
        old_secret: Passphrase | None = None,
        new_secret: Passphrase | None = None,
        iter_time: int | None = None,
        force: bool = False,
    ) -> None:
        """Change key slots as ``qemu-img amend -o encrypt.*`` names them: ``state`` ``active`` adds
        ``new_secret``, ``inactive`` erases a slot, or all that ``old_secret`` opens.

        ``force`` allows what can lose the volume. Raises ValueError with QEMU's texts.
        """
        self._amendable()
        if state is None:
            raise ValueError("Parameter 'state' is missing")
        if state == "active":
            if new_secret is None:
                raise ValueError("'new-secret' is required to activate a keyslot")
            if old_secret is not None:
                raise ValueError("'old-secret' must not be given when activating keyslots")
            milliseconds = DEFAULT_ITER_TIME if iter_time is None else iter_time
            self.add_key(new_secret, slot=slot, iter_time=milliseconds, force=force)
        elif state == "inactive":
            if new_secret is not None:
                raise ValueError("'new-secret' must not be given when erasing keyslots")
            if iter_time is not None:
                raise ValueError("'iter-time' must not be given when erasing keyslots")
            self.erase_key(slot=slot, passphrase=old_secret, force=force)
        else:
            raise ValueError(f"Parameter 'state' does not accept value '{state}'")

    def _amendable(self) -> Luks1:
        self._check_writable()
        if self._luks is None:
            raise ValueError("Only LUKS encryption options can be amended")
        return self._luks

    def info(self) -> dict[str, Any]:
        """Facts under QEMU's names (``ImageInfoSpecificQCow2Encryption``)."""
        facts = {} if self._luks is None else self._luks.info()
        return {"format": self.format} | facts


def open_encryption(
    file: Disk,
    header: Header,
    passphrase: Passphrase | None,
    *,
    encrypt_format: str | None = None,
    no_io: bool = False,
) -> Encryption:
    """The encryption of an encrypted image. ``no_io``: its data is not wanted, only the rest.

    Raises PassphraseError, or ImageError for what is wrong in the image.
    """
    method = header.crypt_method
    name = _NAMES[method]
    if encrypt_format not in (None, name):
        raise ValueError(
            f"Header reported '{name}' encryption format but options specify '{encrypt_format}'"
        )
    luks = None
    if method is CryptMethod.LUKS:
        if header.crypto_header is not None:
            luks = Luks1(file, *header.crypto_header)
        elif not no_io:
            raise ImageError(
                f"Missing CRYPTO header for crypt method {int(method)}",
                field="encryption header",
            )
    if no_io:
        return Encryption(method, None, luks)
    if passphrase is None:
        raise PassphraseError("Parameter 'encrypt.key-secret' is required for cipher")
    secret = passphrase_bytes(passphrase)
    cipher = _legacy_cipher(secret) if luks is None else luks.unlock(secret)
    return Encryption(method, cipher, luks)


def _legacy_cipher(secret: bytes) -> SectorCipher:
    """The passphrase itself is the key."""
    key = secret[:_AES_KEY_SIZE].ljust(_AES_KEY_SIZE, b"\0")
    return SectorCipher(key, "cbc", "plain64")


def new_luks_area(options: EncryptionOptions) -> bytes:
    """What a new image's encryption header consists of; empty where there is none."""
    if options.passphrase is None:
        raise PassphraseError("Parameter 'encrypt.key-secret' is required for cipher")
    if options.crypt_method is not CryptMethod.LUKS:
        return b""
    luks = LuksOptions(
        cipher_alg=options.encrypt_cipher_alg,
        cipher_mode=options.encrypt_cipher_mode,
        ivgen_alg=options.encrypt_ivgen_alg,
        ivgen_hash_alg=options.encrypt_ivgen_hash_alg,
        hash_alg=options.encrypt_hash_alg,
        iter_time=options.encrypt_iter_time,
    )
    return create_luks1(luks, passphrase_bytes(options.passphrase))
