"""qemu-img and qemu-io as judges: run them, read their verdicts."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PATTERN_LIMIT = 1 << 30
"""Bytes that one qemu-io command may touch here (it allocates them all)."""


class PeerError(Exception):
    """A program of QEMU's refused; the text is what it said."""


def qemu_img(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run qemu-img. Raises PeerError with its standard error if it fails (and ``check``)."""
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if check and done.returncode:
        raise PeerError(f"qemu-img {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done


def qemu_img_json(*arguments: object) -> Any:
    """What qemu-img prints with ``--output=json``."""
    return json.loads(qemu_img(*arguments, "--output=json").stdout)


def qemu_create(
    path: Path, size: int | None = None, *, format: str = "qcow2", **options: Any
) -> None:
    """An image made by qemu-img; ``backing_file`` and ``backing_fmt`` are options like any."""
    named = ",".join(f"{name}={value}" for name, value in options.items() if value is not None)
    qemu_img(
        *("create", "-q", "-f", format),
        *(("-o", named) if named else ()),
        path,
        *(() if size is None else (size,)),
    )


@dataclass(frozen=True)
class Verdict:
    """What ``qemu-img check`` found."""

    corruptions: int
    """Errors of every kind, harmless clear COPIED flags among them."""
    leaks: int
    check_errors: int
    clear_copied: int
    """Of the corruptions, those where COPIED is clear though the refcount is 1: costs a copy."""
    messages: str

    @property
    def dangerous(self) -> int:
        """Corruptions that can lose data."""
        return self.corruptions - self.clear_copied

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.leaks or self.check_errors)


_COPIED = re.compile(r"^ERROR OFLAG_COPIED .* refcount=(\d+)$", re.MULTILINE)


def qemu_verdict(path: Path | str, *, repair: str | None = None) -> Verdict:
    """Have qemu-img check an image; with ``repair`` ("leaks" or "all") also mend it."""
    mending = () if repair is None else ("-r", repair)
    done = qemu_img("check", "-f", "qcow2", "--output=json", *mending, path, check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise PeerError(f"qemu-img check {path}: {done.stderr.strip()}") from None
    clear = sum(refcount == "1" for refcount in _COPIED.findall(done.stderr))
    return Verdict(
        corruptions=found.get("corruptions", 0),
        leaks=found.get("leaks", 0),
        check_errors=found.get("check-errors", 0),
        clear_copied=clear,
        messages=done.stderr,
    )


def qemu_check(path: Path | str) -> None:
    """Fail unless ``qemu-img check`` finds nothing at all."""
    verdict = qemu_verdict(path)
    if not verdict.clean:
        raise AssertionError(f"qemu-img check {path}: {verdict}")


def qemu_compare(left: Path | str, right: Path | str, *, formats: str = "qcow2:raw") -> None:
    """Fail unless the two read identically to QEMU (``qemu-img compare``)."""
    one, two = formats.split(":")
    done = qemu_img("compare", "-f", one, "-F", two, left, right, check=False)
    if done.returncode:
        raise AssertionError(f"{left}, {right}: {done.stdout.strip()} {done.stderr.strip()}")


def qemu_read(path: Path | str, scratch: Path) -> bytes:
    """The whole guest's disk as QEMU reads it; ``scratch`` is a folder for the raw copy."""
    raw = scratch / (Path(path).name + ".as-raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


_FAILURES = ("fail", "not found", "invalid", "error", "can't ", "cannot ")
"""Words of which one is in whatever qemu-io says when it could not do it."""


class QemuIo:
    """One long-lived qemu-io with an image open; commands go to its standard input.

    A context manager. ``options`` are runtime options (``cache-size``, ``discard``, …).
    """

    PROMPT = b"qemu-io> "

    def __init__(
        self, path: Path | str, *, format: str = "qcow2", read_only: bool = False, **options: Any
    ) -> None:
        described = [f"driver={format}", f"file.filename={path}"]
        described += [f"{name}={value}" for name, value in options.items()]
        arguments = ["qemu-io", *(("-r",) if read_only else ()), "-d", "unmap"]
        self._process = subprocess.Popen(
            [*arguments, "--image-opts", ",".join(described)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        opening = self._answer()
        if self._process.poll() is not None:
            raise PeerError(opening)

    def _answer(self) -> str:
        """Everything up to the next prompt, or to the end."""
        assert self._process.stdout is not None
        heard = b""
        while not heard.endswith(self.PROMPT):
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                self._process.wait()
                break
            heard += part
        return heard.removesuffix(self.PROMPT).decode()

    def command(self, line: str) -> str:
        """Run one command; returns what it printed. Raises PeerError if it failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        said = self._answer()
        if any(word in said.lower() for word in _FAILURES):
            raise PeerError(f"{line}: {said.strip()}")
        return said

    def write(self, offset: int, length: int, pattern: int) -> None:
        """Write ``length`` bytes of the value ``pattern``."""
        self.command(f"write -P {pattern} {offset} {length}")

    def verify(self, offset: int, length: int, pattern: int) -> None:
        """Read, and raise PeerError unless every byte is ``pattern``."""
        self.command(f"read -P {pattern} {offset} {length}")

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        self.command(f"write -z {'-u ' if unmap else ''}{offset} {length}")

    def write_compressed(self, offset: int, length: int, pattern: int) -> None:
        self.command(f"write -c -P {pattern} {offset} {length}")

    def discard(self, offset: int, length: int) -> None:
        self.command(f"discard {offset} {length}")

    def flush(self) -> None:
        self.command("flush")

    def close(self) -> None:
        """Quit; QEMU writes its caches back."""
        if self._process.poll() is None:
            self._process.communicate(b"quit\n", timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
