"""What is decided and loaded before an image is open."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from .header import Header
from .layout import Compatible, CryptMethod
from .metadata import Metadata
from .options import RuntimeOptions
from .quarantine import DiscardKind
from .state import is_corrupt

if TYPE_CHECKING:
    from ..backend.luks1 import Passphrase
    from .encryption import Encryption

__all__ = [
    "accept_all",
    "encryption_of",
    "load_metadata",
    "refuse_corrupt",
    "runtime_options",
]


def accept_all(header: Header) -> None:
    """Any image that can be read may be open read-only."""


def refuse_corrupt(header: Header) -> None:
    """Raise ImageError for an image that is marked corrupt: it may be written by repair only."""
    if is_corrupt(header):
        raise ImageError(
            "qcow2: Image is corrupt; cannot be opened read/write",
            field="incompatible_features",
            value=header.incompatible_features,
        )


def runtime_options(file: Disk, header: Header, options: Mapping[str, Any]) -> RuntimeOptions:
    """The options of one open image; what is not given is as the image and its file have it."""
    return RuntimeOptions.parse(
        options,
        header.geometry,
        size=header.size,
        lazy_refcounts=bool(header.compatible_features & Compatible.LAZY_REFCOUNTS),
        discards=getattr(file, "discard_mode", "unmap") == "unmap",
    )


def encryption_of(
    file: Disk,
    header: Header,
    passphrase: Passphrase | None,
    encrypt_format: str | None,
    no_io: bool,
) -> Encryption | None:
    """How the image is encrypted, unlocked unless with ``no_io``; None if it is not."""
    if header.crypt_method is CryptMethod.NONE:
        if encrypt_format is not None:
            raise ValueError(
                f"No encryption in image header, but options specified format '{encrypt_format}'"
            )
        return None
    from .encryption import open_encryption  # cryptography takes long to load

    return open_encryption(file, header, passphrase, encrypt_format=encrypt_format, no_io=no_io)


def load_metadata(
    file: Disk,
    header: Header,
    options: RuntimeOptions,
    read_only: bool,
    data_file: Disk | None,
) -> Metadata:
    """The tables that the header names. Raises BackendError where they cannot be read."""
    try:
        metadata = Metadata(
            file,
            header,
            options.caches,
            read_only=read_only,
            data_file=data_file,
            overlap_check=options.overlap_check,
        )
    except BackendError as error:
        number = error.errno or errno.EIO
        raise BackendError(number, f"Could not read the tables: {error.strerror}") from error
    metadata.discards |= {
        DiscardKind.REQUEST: options.pass_discard_request,
        DiscardKind.SNAPSHOT: options.pass_discard_snapshot,
        DiscardKind.OTHER: options.pass_discard_other,
    }
    return metadata
