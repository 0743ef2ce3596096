"""Every error that pyvirtio raises on purpose, in one small tree.

===================  ========================================================  ===============
error                meaning                                                   also is a
===================  ========================================================  ===============
``ImageError``       this image is malformed or damaged                        ``ValueError``
``UnsupportedError`` the image or request needs a feature that is not there    ``ValueError``
``BackendError``     the host refused an operation (carries its ``errno``)     ``OSError``
``InUseError``       the file is locked by another process                     ``OSError``
``PassphraseError``  the passphrase of encrypted data is missing or wrong      ``ValueError``
``GuestError``       the *driver* broke the protocol                           --
===================  ========================================================  ===============

A caller's own misuse (a negative offset, a closed disk) is a plain :class:`ValueError`.
Where QEMU has a text for an error, that text is the message; the field, its value and the limit
stand beside it as attributes.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "BackendError",
    "GuestError",
    "ImageError",
    "InUseError",
    "PassphraseError",
    "PyvirtioError",
    "UnsupportedError",
    "message_of",
    "prefixed",
]


class PyvirtioError(Exception):
    """Root of the tree; never raised itself."""


class ImageError(PyvirtioError, ValueError):
    """An image is malformed or damaged, or may not be used this way in the state it is in.

    ``field`` names the field of the format, ``value`` is what stood there, ``limit`` what was
    allowed; each is None where it does not apply.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: object = None,
        limit: object = None,
    ) -> None:
        super().__init__(message)
        self.field = field
        self.value = value
        self.limit = limit


class UnsupportedError(PyvirtioError, ValueError):
    """An image or a request needs something that is not implemented; ``feature`` names it."""

    def __init__(self, message: str, *, feature: str | None = None) -> None:
        super().__init__(message)
        self.feature = feature


class BackendError(PyvirtioError, OSError):
    """The host could not do it. ``errno``, ``strerror`` and ``filename`` are as in OSError."""

    @classmethod
    def wrap(cls, error: OSError, doing: str, filename: str | None = None) -> BackendError:
        """The BackendError for ``error``, met while ``doing`` something ("read 512 bytes at 0")."""
        number = error.errno if error.errno is not None else _errno.EIO
        reason = error.strerror or os.strerror(number)
        return cls(number, f"{doing}: {reason}", filename or error.filename)


class InUseError(PyvirtioError, OSError):
    """Another process holds a lock on the file that forbids this use of it."""

    def __init__(self, message: str, filename: str | None = None) -> None:
        super().__init__(_errno.EAGAIN, message, filename)


class PassphraseError(PyvirtioError, ValueError):
    """Encrypted data cannot be had without the right passphrase."""


class GuestError(PyvirtioError):
    """The guest's driver broke the virtio protocol.

    Never leaves the device: it becomes a status byte or DEVICE_NEEDS_RESET, unless the device was
    made with ``strict=True``.
    """


def message_of(error: BaseException) -> str:
    """The message alone: without the number and the file name that an OSError shows with it."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return str(error)


def prefixed(prefix: str, error: PyvirtioError) -> PyvirtioError:
    """The same error with words before its message."""
    message = prefix + message_of(error)
    if isinstance(error, InUseError):
        return InUseError(message, error.filename)
    if isinstance(error, OSError):
        return BackendError(error.errno or _errno.EIO, message, error.filename)
    if isinstance(error, ImageError):
        return ImageError(message, field=error.field, value=error.value, limit=error.limit)
    if isinstance(error, UnsupportedError):
        return UnsupportedError(message, feature=error.feature)
    if isinstance(error, PassphraseError):
        return PassphraseError(message)
    return error
