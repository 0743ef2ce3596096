"""Encrypted images for tests: QEMU's tools with a passphrase, and quick images of our own."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from struct import pack
from typing import Any

import pyvirtio

from .qemu import PeerError

PASSPHRASE = "correct horse"
QUICK = {"passphrase": PASSPHRASE, "encrypt_iter_time": 1}
"""Options of ours for an image that is unlocked at once."""


def run_peer(program: str, *arguments: object, **secrets: str) -> str:
    """Run qemu-img or qemu-io with secrets (``sec0`` is PASSPHRASE); returns what it prints.

    Raises PeerError with its standard error if it fails.
    """
    objects = []
    for name, secret in {"sec0": PASSPHRASE, **secrets}.items():
        objects += ["--object", f"secret,id={name},data={secret}"]
    first = [program] if program == "qemu-io" else [program, str(arguments[0])]
    rest = arguments if program == "qemu-io" else arguments[1:]
    for _ in range(10):
        done = subprocess.run(
            [*first, *objects, *map(str, rest)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        # QEMU's benchmark of PBKDF2 gives up where the clock is too coarse for a quick hash.
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    if done.returncode or "Pattern verification failed" in done.stdout:
        raise PeerError(f"{program}: {done.stderr.strip()} {done.stdout.strip()}")
    return done.stdout


def described(path: Path, method: str) -> str:
    """What ``--image-opts`` takes for an encrypted image."""
    return f"driver=qcow2,file.filename={path},encrypt.format={method},encrypt.key-secret=sec0"


def peer_io(path: Path, method: str, *commands: str, **secrets: str) -> str:
    """Run qemu-io commands on an encrypted image."""
    arguments: list[object] = ["--image-opts", described(path, method)]
    for command in commands:
        arguments += ["-c", command]
    return run_peer("qemu-io", *arguments, **secrets)


def peer_create(path: Path, size: int, method: str, **options: Any) -> None:
    """Have qemu-img make an encrypted image."""
    named = {"encrypt.format": method, "encrypt.key-secret": "sec0"}
    if method == "luks":
        named["encrypt.iter-time"] = "10"
    named |= {name: str(value) for name, value in options.items()}
    text = ",".join(f"{name}={value}" for name, value in named.items())
    run_peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", text, path, size)


def peer_check(path: Path, method: str) -> None:
    """Fail unless ``qemu-img check`` finds nothing at all."""
    run_peer("qemu-img", "check", "--image-opts", described(path, method))


def peer_read(path: Path, method: str) -> bytes:
    """The whole disk as QEMU decrypts it."""
    raw = path.with_name(path.name + ".as-raw")
    run_peer("qemu-img", "convert", "-O", "raw", "--image-opts", described(path, method), raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


@cache
def blank(method: str, size: int = 1 << 20, **options: Any) -> bytes:
    """The file of an empty encrypted image of ours; each kind is made once."""
    file = pyvirtio.MemoryDisk(0, growable=True)
    from pyvirtio.qcow2 import FORMAT

    assert FORMAT.create is not None
    FORMAT.create(file, size, encrypt_format=method, **QUICK, **options)
    return file.read(0, file.size)


def in_memory(contents: bytes) -> pyvirtio.MemoryDisk:
    """A file in memory."""
    file = pyvirtio.MemoryDisk(0, growable=True)
    file.write(0, contents)
    return file


def open_blank(method: str, size: int = 1 << 20, **options: Any) -> pyvirtio.Disk:
    """A new empty encrypted image, open."""
    return pyvirtio.open_disk(in_memory(blank(method, size, **options)), passphrase=PASSPHRASE)


def u32(value: int) -> bytes:
    """A field of a LUKS header."""
    return pack(">I", value)


def slot_at(number: int) -> int:
    """Where a key slot stands in a LUKS header."""
    return 208 + 48 * number


BAD_LUKS_HEADERS = [
    (0, b"SKUL", "Volume is not in LUKS format"),
    (6, b"\0\0", "LUKS version 0 is not supported"),
    (6, b"\0\2", "LUKS version 2 is not supported"),
    (8, b"a" * 32, "LUKS header cipher name is not NUL terminated"),
    (40, b"a" * 32, "LUKS header cipher mode is not NUL terminated"),
    (72, b"a" * 32, "LUKS header hash spec is not NUL terminated"),
    (8, b"aex\0", "Algorithm 'aex' with key size 32 bytes not supported"),
    (40, b"xts\0", "Unexpected cipher mode string format 'xts'"),
    (40, b"xxx-plain64\0", "Cipher mode 'xxx' not supported"),
    (40, b"xts-foo\0", "IV generator 'foo' not supported"),
    (40, b"xts-essiv\0", "Missing IV generator hash specification"),
    (40, b"xts-essiv:foo\0", "Hash algorithm 'foo' not supported"),
    (40, b"xts-plain64:foo\0", "Hash algorithm 'foo' not supported"),
    (40, b"xts-essiv:sha1\0", "No AES cipher with key size 20 available"),
    (72, b"foo\0", "Hash algorithm 'foo' not supported"),
    (104, u32(0), "LUKS payload is overlapping with the header"),
    (104, u32(7), "LUKS payload is overlapping with the header"),
    (104, u32(8), "Keyslot 0 is overlapping with the encrypted payload"),
    (108, u32(0), "Algorithm 'aes' with key size 0 bytes not supported"),
    (108, u32(16), "Algorithm 'aes' with key size 8 bytes not supported"),
    (108, u32(128), "Keyslots 0 and 1 are overlapping in the header"),
    (108, u32(2**32 - 1), "Keyslot 0 is overlapping with the encrypted payload"),
    (164, u32(0), "LUKS key iteration count is zero"),
    (slot_at(0), u32(1), "Keyslot 0 state (active/disable) is corrupted"),
    (slot_at(7), u32(0), "Keyslot 7 state (active/disable) is corrupted"),
    (slot_at(0) + 4, u32(0), "Keyslot 0 iteration count is zero"),
    (slot_at(0) + 40, u32(0), "Keyslot 0 is overlapping with the LUKS header"),
    (slot_at(0) + 40, u32(7), "Keyslot 0 is overlapping with the LUKS header"),
    (slot_at(3) + 40, u32(9), "Keyslots 0 and 3 are overlapping in the header"),
    (slot_at(0) + 44, u32(0), "Keyslot 0 is corrupted (stripes 0 != 4000)"),
    (slot_at(7) + 44, u32(4001), "Keyslot 7 is corrupted (stripes 4001 != 4000)"),
]
"""Byte in the header, what is put there, and QEMU's words for it."""
