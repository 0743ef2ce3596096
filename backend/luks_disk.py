"""The format ``luks``: a LUKS1 volume, as cryptsetup and QEMU make them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import BackendError, ImageError, PassphraseError
from .buffers import copy_in, gather
from .disk import Disk, DiskInfo, Extent
from .filter import AlignedFilter
from .luks1 import Luks1, LuksOptions, Passphrase, create_luks1, passphrase_bytes
from .registry import Measurement
from .sector_cipher import SECTOR, SectorCipher

__all__ = ["LuksDisk", "create_luks", "measure_luks", "open_luks"]


class LuksDisk(AlignedFilter):
    """The decrypted contents of a LUKS volume in ``file``, which it owns."""

    format_name = "luks"

    def __init__(
        self, file: Disk, luks: Luks1, cipher: SectorCipher | None, *, read_only: bool
    ) -> None:
        self._start = luks.header.payload_offset * SECTOR
        if self._start > file.size:
            raise ImageError(
                "LUKS payload offset is past the end of the file",
                field="payload-offset",
                value=self._start,
                limit=file.size,
            )
        align = max(SECTOR, file.limits.request_alignment)
        super().__init__(file, limits=replace(file.limits, request_alignment=align))
        self.growable = False
        self.size = (file.size - self._start) // SECTOR * SECTOR
        self.read_only = read_only or file.read_only
        self.luks = luks
        self._cipher = cipher

    def _follow(self) -> None:
        self._set_size((self.below.size - self._start) // SECTOR * SECTOR)

    def _unlocked(self) -> SectorCipher:
        if self._cipher is None:
            raise PassphraseError("Parameter 'key-secret' is required for cipher")
        return self._cipher

    def _read_aligned(self, offset: int, views: list[memoryview], length: int) -> None:
        stored = self.below.read(self._start + offset, length)
        copy_in(views, self._unlocked().decrypt(stored, offset // SECTOR))

    def _write_aligned(self, offset: int, views: list[memoryview], length: int) -> None:
        data = self._unlocked().encrypt(gather(views), offset // SECTOR)
        self.below.write(self._start + offset, data)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._write_zero_bytes(offset, length)  # zeroes below would be no zeroes here

    def _discard(self, offset: int, length: int) -> None:
        """Ignored: what is read afterwards would be noise."""

    def _block_status(self, offset: int, length: int) -> Extent:
        return Extent(length, data=True, zero=False, allocated=True)

    @property
    def has_zero_init(self) -> bool:
        """False: what was never written decrypts to noise."""
        return False

    def _truncate(self, size: int, preallocation: str) -> None:
        if size > (1 << 63) - 1 - self._start:
            raise BackendError(27, "The requested file size is too large")
        self.below.truncate(self._start + size, preallocation=preallocation, shrink=True)
        self._follow()

    def info(self) -> DiskInfo:
        """Facts about the disk and its key slots."""
        return DiskInfo(
            self.format_name,
            self.size,
            self.below.info().actual_size,
            self.filename,
            specific=self.luks.info(),
            encrypted=True,
        )


def open_luks(
    file: Disk,
    *,
    read_only: bool = False,
    policy: object = None,
    passphrase: Passphrase | None = None,
    no_io: bool = False,
    for_check: bool = False,
    **options: Any,
) -> Disk:
    """Open the volume in ``file``; with ``no_io`` only for asking what it is."""
    for name in options:
        raise ValueError(f"Block format 'luks' does not support the option '{name}'")
    if passphrase is None and not no_io:
        raise PassphraseError("Parameter 'key-secret' is required for cipher")
    luks = Luks1(file, 0, file.size)
    cipher = None
    if not no_io and passphrase is not None:
        cipher = luks.unlock(passphrase_bytes(passphrase))
    return LuksDisk(file, luks, cipher, read_only=read_only)


def create_luks(
    file: Disk,
    size: int,
    *,
    passphrase: Passphrase | None = None,
    preallocation: str = "off",
    **options: Any,
) -> None:
    """Make a volume of ``size`` bytes; ``options`` are those of LuksOptions."""
    if passphrase is None:
        raise PassphraseError("Parameter 'key-secret' is required for cipher")
    try:
        chosen = LuksOptions(**options)
    except TypeError as error:
        raise ValueError(f"luks: {error}") from None
    area = create_luks1(chosen, passphrase_bytes(passphrase))
    file.truncate(0, shrink=True)
    rounded = -(-size // SECTOR) * SECTOR
    file.truncate(len(area) + rounded, preallocation=preallocation)
    file.write(0, area)
    file.flush()


def measure_luks(size: int, source: Disk | None, **options: Any) -> Measurement:
    """How large the file of such a volume is."""
    header = LuksOptions(**options).header()
    header.lay_out()
    total = header.payload_offset * SECTOR + -(-size // SECTOR) * SECTOR
    return Measurement(total, total)
