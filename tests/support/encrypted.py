"""Encrypted images for tests: QEMU's tools with a passphrase, and quick images of our own."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
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
    done = subprocess.run(
        [*first, *objects, *map(str, rest)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
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
