"""How a new image is to be encrypted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .layout import CryptMethod

if TYPE_CHECKING:
    from ..backend.luks1 import Passphrase

__all__ = ["EncryptionOptions"]


@dataclass(frozen=True, slots=True)
class EncryptionOptions:
    """``encryption`` and ``encrypt.*`` of ``qemu-img create -o``, with underscores."""

    encryption: bool = False
    """The same as ``encrypt_format="aes"``."""
    encrypt_format: str | None = None
    """``luks``, or ``aes``, which is weak and only for old programs' sake."""
    passphrase: Passphrase | None = field(default=None, repr=False)
    encrypt_cipher_alg: str = "aes-256"
    """For LUKS, as all that follow: ``aes-128``, ``aes-256``, or ``aes-192`` (not in XTS mode, and
    QEMU cannot open it)."""
    encrypt_cipher_mode: str = "xts"
    """``xts`` or ``cbc``."""
    encrypt_ivgen_alg: str = "plain64"
    """``plain``, ``plain64`` or ``essiv``."""
    encrypt_ivgen_hash_alg: str | None = None
    """For ``essiv``; without it SHA-256."""
    encrypt_hash_alg: str = "sha256"
    encrypt_iter_time: int = 2000
    """Milliseconds that trying a passphrase shall take."""

    @property
    def crypt_method(self) -> CryptMethod:
        """What the header shall say. Raises ValueError (QEMU's texts)."""
        if self.encryption and self.encrypt_format is not None:
            raise ValueError("Options encryption and encrypt.format are mutually exclusive")
        name = "aes" if self.encryption else self.encrypt_format
        if name is None:
            return CryptMethod.NONE
        if name not in ("aes", "luks"):
            raise ValueError(f"Parameter 'format' does not accept value '{name}'")
        return CryptMethod.AES if name == "aes" else CryptMethod.LUKS
