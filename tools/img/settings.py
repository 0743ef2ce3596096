"""What images can be made with: the options of ``create -o`` and ``amend -o``, by format."""

from __future__ import annotations

from ..messages import Failure
from ..optlist import Setting, help_lines

__all__ = ["amend_settings", "create_settings", "print_amend_help", "print_create_help"]

_SIZE = Setting("size", "size", "Virtual disk size")

_LUKS = (
    Setting("cipher-alg", "str", "Name of encryption cipher algorithm"),
    Setting("cipher-mode", "str", "Name of encryption cipher mode"),
    Setting("ivgen-alg", "str", "Name of IV generator algorithm"),
    Setting("ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
    Setting("hash-alg", "str", "Name of encryption hash algorithm"),
    Setting("iter-time", "num", "Time to spend in PBKDF in milliseconds"),
)

_LUKS_SLOTS = (
    Setting("state", "str", "Select new state of affected keyslots (active/inactive)"),
    Setting("keyslot", "num", "Select a single keyslot to modify explicitly"),
    Setting("old-secret", "str", "Select all keyslots that match this password"),
    Setting(
        "new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"
    ),
    Setting("iter-time", "num", "Time to spend in PBKDF in milliseconds"),
)


def _under(prefix: str, settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    return tuple(Setting(prefix + s.name, s.kind, s.help, s.default) for s in settings)


_COMMON = (
    _SIZE,
    Setting("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Setting("backing_file", "str", "File name of a base image"),
    Setting("backing_fmt", "str", "Image format of the base image"),
    Setting("data_file", "str", "File name of an external data file"),
    Setting("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    Setting("lazy_refcounts", "bool", "Postpone refcount updates", "off"),
    Setting("refcount_bits", "num", "Width of a reference count entry in bits", "16"),
)

_QCOW2 = (
    Setting(
        "encryption",
        "bool",
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    Setting("encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'"),
    Setting("encrypt.key-secret", "str", "ID of secret providing qcow AES key or LUKS passphrase"),
    *_under("encrypt.", _LUKS),
    Setting("cluster_size", "size", "qcow2 cluster size", "65536"),
    Setting("extended_l2", "bool", "Extended L2 tables", "off"),
    Setting(
        "preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)"
    ),
    Setting(
        "compression_type", "str", "Compression method used for image cluster compression", "zlib"
    ),
    *_COMMON,
)

_FILE = (
    _SIZE,
    Setting("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Setting("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"),
    Setting("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
)

_CREATE: dict[str, tuple[Setting, ...]] = {
    "qcow2": _QCOW2,
    "raw": (_SIZE,),
    "luks": (
        _SIZE,
        Setting("key-secret", "str", "ID of the secret that provides the keyslot passphrase"),
        *_LUKS,
    ),
    "file": _FILE,
}

_AMEND: dict[str, tuple[Setting, ...]] = {
    "qcow2": (
        *_under("encrypt.", _LUKS_SLOTS),
        *(Setting(s.name, s.kind, s.help) for s in _COMMON),
    ),
    "luks": _LUKS_SLOTS,
}


def create_settings(format: str, *, protocol: bool = True) -> tuple[Setting, ...]:
    """The options for creating an image of a format, with those of the file that it is in.

    Raises Failure if the format is unknown or images of it cannot be made.
    """
    settings = _CREATE.get(format)
    if settings is None:
        from ...backend.registry import format_names
        from .formats import DRIVERS, NOT_HERE

        if format in (*DRIVERS, *NOT_HERE) or format in format_names():
            raise Failure(f"Format driver '{format}' does not support image creation")
        raise Failure(f"Unknown file format '{format}'")
    if protocol:
        names = {setting.name for setting in settings}
        settings += tuple(setting for setting in _FILE if setting.name not in names)
    return settings


def amend_settings(format: str) -> tuple[Setting, ...]:
    """The options that can be changed. Raises Failure if the format is unknown or has none."""
    settings = _AMEND.get(format)
    if settings is None:
        from .formats import NOT_HERE, is_driver

        if format not in NOT_HERE and not is_driver(format):
            raise Failure(f"Unknown file format '{format}'")
        raise Failure(f"Format driver '{format}' does not support option amendment")
    return settings


def print_create_help(filename: str | None, format: str) -> None:
    """``create -o help``. With a file name the options of its protocol are told, too."""
    from .formats import check_protocol

    create_settings(format)
    if filename is not None:
        check_protocol(filename)
    settings = create_settings(format, protocol=filename is not None)
    print("Supported options:" if filename is not None else f"Supported {format} options:")
    print(*help_lines(settings), sep="\n")
    if filename is None:
        print(
            "\nThe protocol level may support further options.\n"
            "Specify the target filename to include those options."
        )


def print_amend_help(format: str) -> None:
    """``amend -o help``."""
    settings = amend_settings(format)
    print(f"Amend options for '{format}':")
    print(*help_lines(settings), sep="\n")
