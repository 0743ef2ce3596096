"""LUKS1: a master key behind passphrases, in an area at the start of an encrypted volume.

Knows nothing of what lies behind the header: a format puts the area where it likes and takes the
:class:`SectorCipher`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from ..errors import ImageError, PassphraseError
from . import luks_format
from .disk import Disk
from .luks_format import KeySlot, LuksHeader
from .sector_cipher import SectorCipher

__all__ = [
    "DEFAULT_ITER_TIME",
    "Luks1",
    "LuksOptions",
    "Passphrase",
    "create_luks1",
    "passphrase_bytes",
]

Passphrase = bytes | str | Callable[[], bytes | str]
"""A passphrase (text is encoded as UTF-8), or what asks for it when it is needed."""

DEFAULT_ITER_TIME = 2000
"""Milliseconds that trying a passphrase shall take (QEMU)."""
_MIN_ITERATIONS = 1000  # QEMU
_BENCHMARK_NS = 20_000_000
"""Time that a measurement takes at least."""


def passphrase_bytes(passphrase: Passphrase) -> bytes:
    """The bytes of a passphrase; asks for it if it is a callable."""
    given = passphrase() if callable(passphrase) else passphrase
    return given.encode() if isinstance(given, str) else bytes(given)


@dataclass(frozen=True, slots=True)
class LuksOptions:
    """What kind of volume to make; names and defaults are QEMU's."""

    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str | None = None
    hash_alg: str = "sha256"
    iter_time: int = DEFAULT_ITER_TIME
    """Milliseconds that trying a passphrase shall take on this machine."""

    def header(self) -> LuksHeader:
        """A header with empty slots and no key yet. Raises UnsupportedError."""
        name, _, bits = self.cipher_alg.partition("-")
        ivgen_hash = self.ivgen_hash_alg
        if self.ivgen_alg == "essiv" and ivgen_hash is None:
            ivgen_hash = "sha256"
        mode = f"{self.cipher_mode}-{self.ivgen_alg}"
        header = LuksHeader(
            cipher=name,
            mode=mode if ivgen_hash is None else f"{mode}:{ivgen_hash}",
            hash=self.hash_alg,
            key_bytes=(int(bits) // 8 if bits.isdecimal() else 0)
            * (2 if self.cipher_mode == "xts" else 1),
            uuid=str(uuid.uuid4()),
        )
        header.check_algorithms()
        header.lay_out()
        return header


def create_luks1(options: LuksOptions, passphrase: bytes) -> bytes:
    """The area of a new volume that ``passphrase`` opens, up to where its payload starts."""
    header = options.header()
    master_key = os.urandom(header.key_bytes)
    iterations = _iterations(header, luks_format.DIGEST_SIZE, options.iter_time)
    header.digest_iterations = max(_MIN_ITERATIONS, iterations // 8)
    header.digest = header.derive(
        master_key, header.digest_salt, header.digest_iterations, luks_format.DIGEST_SIZE
    )
    slot = header.slots[0]
    material = _fill_slot(header, slot, master_key, passphrase, options.iter_time)
    slot.state = luks_format.ACTIVE
    area = bytearray(header.payload_offset * luks_format.SECTOR)
    packed = header.pack()
    area[: len(packed)] = packed
    start = slot.key_offset * luks_format.SECTOR
    area[start : start + len(material)] = material
    return bytes(area)


class Luks1:
    """The LUKS1 area of ``length`` bytes at byte ``offset`` of ``file``; locked at first.

    Raises ImageError or UnsupportedError if it is none, or not a sane one.
    """

    def __init__(self, file: Disk, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._amending = Lock()
        self._master_key: bytes | None = None
        self.header = LuksHeader.parse(self._read(0, luks_format.HEADER_SIZE))

    def _read(self, offset: int, length: int) -> bytes:
        """Zeroes past the end of the file, as in a sparse one."""
        self._check_inside(offset, length)
        start = self._offset + offset
        there = min(max(self._file.size - start, 0), length)
        data = self._file.read(start, there) if there else b""
        return data.ljust(length, b"\0")

    def _write(self, offset: int, data: bytes) -> None:
        self._check_inside(offset, len(data))
        self._file.write(self._offset + offset, data)
        self._file.flush()

    def _check_inside(self, offset: int, length: int) -> None:
        if offset + length > self._length:
            raise ImageError(
                "Request for data outside of extension header",
                field="LUKS header length",
                value=offset + length,
                limit=self._length,
            )

    # -- unlocking -------------------------------------------------------------------------------

    def unlock(self, passphrase: bytes) -> SectorCipher:
        """The volume's cipher. Raises PassphraseError if no key slot has this passphrase."""
        self.header.check_iterations()
        for slot in self.header.slots:
            key = self._open_slot(slot, passphrase) if slot.active else None
            if key is not None:
                self._master_key = key
                return self.header.sector_cipher(key)
        raise PassphraseError("Invalid password, cannot unlock any keyslot")

    def _open_slot(self, slot: KeySlot, passphrase: bytes) -> bytes | None:
        """The master key, if the passphrase is that of the slot."""
        header = self.header
        key = header.derive(passphrase, slot.salt, slot.iterations, header.key_bytes)
        material = self._read(slot.key_offset * luks_format.SECTOR, header.split_bytes)
        split = header.sector_cipher(key).decrypt(material, 0)
        master_key = _merge(split[: header.key_bytes * luks_format.STRIPES], header)
        digest = header.derive(
            master_key, header.digest_salt, header.digest_iterations, luks_format.DIGEST_SIZE
        )
        return master_key if hmac.compare_digest(digest, header.digest) else None

    # -- changing the passphrases ----------------------------------------------------------------

    def add_key(
        self,
        passphrase: bytes,
        *,
        slot: int | None = None,
        iter_time: int = DEFAULT_ITER_TIME,
        force: bool = False,
    ) -> int:
        """Have ``passphrase`` open the volume, too; returns the number of its slot.

        Without ``slot`` the first free one is taken. ``force`` allows to replace an active one: a
        cut while that is done loses it. The volume must be unlocked. Raises ValueError.
        """
        with self._amending:
            if self._master_key is None:
                raise PassphraseError("The volume has not been unlocked")
            header = self.header
            if slot is None:
                free = [i for i, one in enumerate(header.slots) if not one.active]
                if not free:
                    raise ValueError("Can't add a keyslot - all keyslots are in use")
                slot = free[0]
            else:
                self._check_number(slot)
                if header.slots[slot].active and not force:
                    raise ValueError(
                        f"Refusing to overwrite active keyslot {slot} - please erase it first"
                    )
            new = KeySlot(luks_format.INACTIVE, 0, b"", header.slots[slot].key_offset)
            material = _fill_slot(header, new, self._master_key, passphrase, iter_time)
            # The slot is a slot only once all of it is there: its flag comes last.
            self._write_slot(slot, new)
            self._write(new.key_offset * luks_format.SECTOR, material)
            new.state = luks_format.ACTIVE
            self._write_slot(slot, new)
            return slot

    def erase_key(
        self, *, slot: int | None = None, passphrase: bytes | None = None, force: bool = False
    ) -> list[int]:
        """Erase one slot, or all that ``passphrase`` opens; returns their numbers.

        ``force`` allows for erasing the last ones, with which all data is lost. Raises ValueError.
        """
        with self._amending:
            slots = self.header.slots
            if slot is not None:
                self._check_number(slot)
                if not slots[slot].active and (passphrase is not None or not force):
                    raise ValueError(f"Given keyslot {slot} is already erased (inactive)")
                if passphrase is not None and self._open_slot(slots[slot], passphrase) is None:
                    raise ValueError(
                        f"Given keyslot {slot} doesn't contain the given old password for erase "
                        "operation"
                    )
                erased = [slot]
            elif passphrase is not None:
                erased = [
                    i
                    for i, one in enumerate(slots)
                    if one.active and self._open_slot(one, passphrase) is not None
                ]
                if not erased:
                    raise ValueError("No keyslots match given (old) password for erase operation")
            else:
                raise ValueError(
                    "To erase keyslot(s), either explicit keyslot index or the password currently "
                    "contained in them must be given"
                )
            left = [i for i, one in enumerate(slots) if one.active and i not in erased]
            if not left and not force:
                _refuse_to_erase_last(slot)
            for number in erased:
                self._erase(number)
            return erased

    def _erase(self, number: int) -> None:
        old = self.header.slots[number]
        new = KeySlot(luks_format.INACTIVE, 0, bytes(luks_format.SALT_SIZE), old.key_offset)
        self._write_slot(number, new)
        size = self.header.split_sectors * luks_format.SECTOR
        self._write(old.key_offset * luks_format.SECTOR, os.urandom(size))

    def _write_slot(self, number: int, slot: KeySlot) -> None:
        place = luks_format.PARTITION.size + number * luks_format.SLOT.size
        self._write(place, slot.pack())
        self.header.slots[number] = slot

    def _check_number(self, slot: int) -> None:
        if not 0 <= slot < luks_format.SLOTS:
            raise ValueError(
                f"Invalid keyslot {slot} specified, must be between 0 and {luks_format.SLOTS - 1}"
            )

    def info(self) -> dict[str, Any]:
        """Facts under QEMU's names (``QCryptoBlockInfoLUKS``)."""
        header = self.header
        facts: dict[str, Any] = {"ivgen-alg": header.ivgen}
        if header.ivgen == "essiv":
            facts["ivgen-hash-alg"] = header.ivgen_hash
        sector = luks_format.SECTOR
        slots = []
        for slot in header.slots:
            described: dict[str, Any] = {"active": slot.active}
            if slot.active:
                described |= {"iters": slot.iterations, "stripes": slot.stripes}
            slots.append(described | {"key-offset": slot.key_offset * sector})
        return facts | {
            "hash-alg": header.hash,
            "cipher-alg": f"{header.cipher}-{header.aes_bits}",
            "uuid": header.uuid,
            "cipher-mode": header.cipher_mode,
            "slots": slots,
            "payload-offset": header.payload_offset * sector,
            "master-key-iters": header.digest_iterations,
        }


def _refuse_to_erase_last(slot: int | None) -> None:
    if slot is None:
        raise ValueError(
            "All the active keyslots match the (old) password that was given and erasing them "
            "will erase all the data in the image irreversibly - refusing operation"
        )
    raise ValueError(
        f"Attempt to erase the only active keyslot {slot} which will erase all the data in the "
        "image irreversibly - refusing operation"
    )


def _fill_slot(
    header: LuksHeader, slot: KeySlot, master_key: bytes, passphrase: bytes, iter_time: int
) -> bytes:
    """Give a slot salt and iterations; returns its key material."""
    slot.salt = os.urandom(luks_format.SALT_SIZE)
    slot.iterations = max(_MIN_ITERATIONS, _iterations(header, header.key_bytes, iter_time))
    key = header.derive(passphrase, slot.salt, slot.iterations, header.key_bytes)
    split = _split(master_key, header).ljust(header.split_bytes, b"\0")
    return header.sector_cipher(key).encrypt(split, 0)


def _iterations(header: LuksHeader, length: int, milliseconds: int) -> int:
    """How many iterations of PBKDF2 for ``length`` bytes take that time here."""
    if milliseconds < 1:
        raise ValueError("iter-time must be at least 1 millisecond")
    count, elapsed = 1 << 12, 0
    while elapsed < _BENCHMARK_NS:
        count *= 2
        start = time.thread_time_ns()
        header.derive(b"password", bytes(luks_format.SALT_SIZE), count, length)
        elapsed = time.thread_time_ns() - start
    iterations = count * milliseconds * 1_000_000 // elapsed
    limit = luks_format.MAX_ITERATIONS // (2 * luks_format.SLOTS)  # so that all slots may be used
    if iterations > limit:
        raise ValueError(f"PBKDF iterations {iterations} larger than {limit}")
    return iterations


# -- the anti-forensic splitter ------------------------------------------------------------------
# A key is spread over thousands of stripes, all of which are needed to get it back, so that wiping
# works even where some blocks of an old copy survive (LUKS On-Disk Format 1.2.3, section 2.4).


def _split(key: bytes, header: LuksHeader) -> bytes:
    stripes = os.urandom(len(key) * (luks_format.STRIPES - 1))
    block = _fold(stripes, header)
    return stripes + _xor(block, key)


def _merge(split: bytes, header: LuksHeader) -> bytes:
    last = len(split) - header.key_bytes
    return _xor(_fold(split[:last], header), split[last:])


def _fold(stripes: bytes, header: LuksHeader) -> bytes:
    size = header.key_bytes
    block = bytes(size)
    for at in range(0, len(stripes), size):
        block = _diffuse(_xor(block, stripes[at : at + size]), header.hash)
    return block


def _diffuse(block: bytes, hash_name: str) -> bytes:
    digest_size = hashlib.new(hash_name).digest_size
    parts = []
    for i, at in enumerate(range(0, len(block), digest_size)):
        part = block[at : at + digest_size]
        parts.append(hashlib.new(hash_name, i.to_bytes(4) + part).digest()[: len(part)])
    return b"".join(parts)


def _xor(one: bytes, two: bytes) -> bytes:
    return (int.from_bytes(one) ^ int.from_bytes(two)).to_bytes(len(one))
