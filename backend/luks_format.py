"""The LUKS1 header: fields, limits, and every check that needs no key (LUKS On-Disk Format 1.2.3).

All integers are big-endian. Offsets and lengths are in sectors of 512 bytes, from the start of the
header on, as in the format itself.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from struct import Struct

from ..errors import ImageError, UnsupportedError
from .sector_cipher import SECTOR, SectorCipher

__all__ = ["SECTOR", "KeySlot", "LuksHeader"]

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
SLOTS = 8
STRIPES = 4000
"""Copies that a key is spread over (QEMU takes no other number)."""

PARTITION = Struct(">6sH32s32s32sII20s32sI40s")
"""magic, version, cipher-name, cipher-mode, hash-spec, payload-offset, key-bytes, mk-digest,
mk-digest-salt, mk-digest-iterations, uuid; the key slots follow"""
SLOT = Struct(">II32sII")
"""active, password-iterations, password-salt, key-material-offset, stripes"""
HEADER_SIZE = PARTITION.size + SLOTS * SLOT.size

ACTIVE = 0x00AC71F3
INACTIVE = 0x0000DEAD
DIGEST_SIZE = 20
SALT_SIZE = 32
HEADER_SECTORS = 8
"""Sectors before the first key material; key material areas are multiples of this, too."""

MAX_ITERATIONS = 1 << 28
"""PBKDF2 iterations that one attempt to unlock may take, over all key slots: minutes. The format
allows for 2**35, which is weeks; cryptsetup and QEMU write some millions by default."""

HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
"""Names of hashes, as far as this machine's OpenSSL has them."""


@dataclass(slots=True)
class KeySlot:
    """One of the passphrases that open a volume."""

    state: int
    iterations: int
    salt: bytes
    key_offset: int
    """Sector of the key material."""
    stripes: int = STRIPES

    @property
    def active(self) -> bool:
        """True if there is a passphrase."""
        return self.state == ACTIVE

    def pack(self) -> bytes:
        """As in the header."""
        return SLOT.pack(self.state, self.iterations, self.salt, self.key_offset, self.stripes)


@dataclass(slots=True)
class LuksHeader:
    """A LUKS1 partition header."""

    cipher: str
    """``aes``"""
    mode: str
    """Mode and IV generator: ``xts-plain64``, ``cbc-essiv:sha256``, …"""
    hash: str
    """For PBKDF2 and for spreading keys."""
    key_bytes: int
    """Bytes of the master key (of both keys, for XTS)."""
    uuid: str
    payload_offset: int = 0
    """Sector where the data of a LUKS partition would start."""
    digest: bytes = b""
    digest_salt: bytes = field(default_factory=lambda: os.urandom(SALT_SIZE))
    digest_iterations: int = 0
    slots: list[KeySlot] = field(default_factory=list)

    @classmethod
    def parse(cls, data: bytes) -> LuksHeader:
        """Decode and check. Raises ImageError naming the field, or UnsupportedError."""
        if len(data) < HEADER_SIZE or not data.startswith(MAGIC):
            raise ImageError(
                "Volume is not in LUKS format", field="LUKS magic", value=data[: len(MAGIC)]
            )
        _, version, *names, payload, key_bytes, digest, salt, iterations, uuid = PARTITION.unpack(
            data[: PARTITION.size]
        )
        if version != VERSION:
            raise ImageError(
                f"LUKS version {version} is not supported", field="LUKS version", value=version
            )
        labels = ("cipher name", "cipher mode", "hash spec")
        cipher, mode, hash_name = (
            _name(name, label) for name, label in zip(names, labels, strict=True)
        )
        header = cls(
            cipher=cipher,
            mode=mode,
            hash=hash_name,
            key_bytes=key_bytes,
            uuid=uuid.split(b"\0")[0].decode(errors="replace"),
            payload_offset=payload,
            digest=digest,
            digest_salt=salt,
            digest_iterations=iterations,
        )
        header._check_partition()
        header.slots = [
            KeySlot(*fields) for fields in SLOT.iter_unpack(data[PARTITION.size : HEADER_SIZE])
        ]
        header._check_slots()
        header.check_algorithms()
        return header

    def pack(self) -> bytes:
        """The header's bytes."""
        return PARTITION.pack(
            MAGIC,
            VERSION,
            self.cipher.encode(),
            self.mode.encode(),
            self.hash.encode(),
            self.payload_offset,
            self.key_bytes,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode(),
        ) + b"".join(slot.pack() for slot in self.slots)

    @property
    def split_sectors(self) -> int:
        """Sectors of the key material of one slot."""
        return _round_up(-(-self.key_bytes * STRIPES // SECTOR), HEADER_SECTORS)

    @property
    def split_bytes(self) -> int:
        """Bytes of key material of one slot that are used, in whole sectors."""
        return _round_up(self.key_bytes * STRIPES, SECTOR)

    def lay_out(self) -> None:
        """Place empty key slots and the payload one after the other."""
        first, size = HEADER_SECTORS, self.split_sectors
        self.slots = [
            KeySlot(INACTIVE, 0, bytes(SALT_SIZE), first + i * size) for i in range(SLOTS)
        ]
        self.payload_offset = first + SLOTS * size

    # -- algorithms ------------------------------------------------------------------------------

    @property
    def cipher_mode(self) -> str:
        """The mode alone: ``xts``, ``cbc``."""
        return self.mode.partition("-")[0]

    @property
    def ivgen(self) -> str:
        """The IV generator alone: ``plain``, ``plain64``, ``essiv``."""
        return self.mode.partition("-")[2].partition(":")[0]

    @property
    def ivgen_hash(self) -> str | None:
        """The hash of the IV generator, if one is named."""
        return self.mode.partition(":")[2] or None

    @property
    def aes_bits(self) -> int:
        """Bits of the AES key."""
        return self.key_bytes * 8 // (2 if self.cipher_mode == "xts" else 1)

    def sector_cipher(self, key: bytes) -> SectorCipher:
        """The volume's cipher with a key."""
        return SectorCipher(key, self.cipher_mode, self.ivgen, self.ivgen_hash)

    def derive(self, passphrase: bytes, salt: bytes, iterations: int, length: int) -> bytes:
        """PBKDF2 with the volume's hash."""
        return hashlib.pbkdf2_hmac(self.hash, passphrase, salt, iterations, length)

    # -- checks, with QEMU's texts ---------------------------------------------------------------

    def _check_partition(self) -> None:
        if self.payload_offset < HEADER_SECTORS:
            raise ImageError(
                "LUKS payload is overlapping with the header",
                field="payload-offset",
                value=self.payload_offset,
                limit=HEADER_SECTORS,
            )
        if not self.digest_iterations:
            raise ImageError(
                "LUKS key iteration count is zero", field="mk-digest-iterations", value=0
            )

    def _check_slot(self, number: int, slot: KeySlot) -> None:
        if slot.stripes != STRIPES:
            raise ImageError(
                f"Keyslot {number} is corrupted (stripes {slot.stripes} != {STRIPES})",
                field="stripes",
                value=slot.stripes,
                limit=STRIPES,
            )
        if slot.key_offset < HEADER_SECTORS:
            raise ImageError(
                f"Keyslot {number} is overlapping with the LUKS header",
                field="key-material-offset",
                value=slot.key_offset,
                limit=HEADER_SECTORS,
            )
        if slot.state not in (ACTIVE, INACTIVE):
            raise ImageError(
                f"Keyslot {number} state (active/disable) is corrupted",
                field="active",
                value=slot.state,
            )
        if slot.active and not slot.iterations:
            raise ImageError(
                f"Keyslot {number} iteration count is zero", field="password-iterations", value=0
            )

    def _check_slots(self) -> None:
        size = self.split_sectors
        for number, slot in enumerate(self.slots):
            self._check_slot(number, slot)
            if slot.key_offset + size > self.payload_offset:
                raise ImageError(
                    f"Keyslot {number} is overlapping with the encrypted payload",
                    field="key-material-offset",
                    value=slot.key_offset,
                    limit=self.payload_offset - size,
                )
            for other in range(number + 1, SLOTS):
                if abs(self.slots[other].key_offset - slot.key_offset) < size:
                    raise ImageError(
                        f"Keyslots {number} and {other} are overlapping in the header",
                        field="key-material-offset",
                        value=slot.key_offset,
                    )

    def check_iterations(self) -> None:
        """Raise ImageError if an attempt to unlock could take for ever."""
        total = self.digest_iterations * (1 + sum(slot.active for slot in self.slots))
        total += sum(slot.iterations for slot in self.slots if slot.active)
        if total > MAX_ITERATIONS:
            raise ImageError(
                f"Unlocking would take {total} iterations of PBKDF2; the limit is {MAX_ITERATIONS}",
                field="password-iterations",
                value=total,
                limit=MAX_ITERATIONS,
            )

    def check_algorithms(self) -> None:
        """Raise unless cipher, mode, IV generator and hash are there."""
        if "-" not in self.mode:
            raise ImageError(
                f"Unexpected cipher mode string format '{self.mode}'",
                field="cipher_mode",
                value=self.mode,
            )
        if self.cipher_mode not in ("cbc", "xts"):
            raise UnsupportedError(
                f"Cipher mode '{self.cipher_mode}' not supported", feature=self.cipher_mode
            )
        if self.cipher_mode == "xts" and self.key_bytes % 2:
            raise ImageError(
                "XTS cipher key length should be a multiple of 2",
                field="key-bytes",
                value=self.key_bytes,
            )
        sizes = f"with key size {self.aes_bits // 8} bytes not supported"
        if self.cipher != "aes":
            raise UnsupportedError(f"Algorithm '{self.cipher}' {sizes}", feature=self.cipher)
        if self.aes_bits not in (128, 192, 256):
            raise ImageError(
                f"Algorithm '{self.cipher}' {sizes}",
                field="key-bytes",
                value=self.key_bytes,
                limit=64,
            )
        for name in (self.hash, self.ivgen_hash):
            if name is not None and not _is_hash(name):
                raise UnsupportedError(f"Hash algorithm '{name}' not supported", feature=name)
        self.sector_cipher(bytes(self.key_bytes - 1) + b"\1")


def _name(field_bytes: bytes, label: str) -> str:
    name, end, _ = field_bytes.partition(b"\0")
    if not end:
        raise ImageError(
            f"LUKS header {label} is not NUL terminated",
            field=label.replace(" ", "_"),
            value=field_bytes,
        )
    return name.decode(errors="replace")


def _is_hash(name: str) -> bool:
    if name not in HASHES:
        return False
    try:
        hashlib.new(name)
    except ValueError:
        return False
    return True


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
