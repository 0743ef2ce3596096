"""Debian packages without being root: downloaded and unpacked into a folder, never installed.

apt does the fetching, from the mirrors that this machine is set up for, and checks the signatures.
Where the machine has no package lists (a fresh container), private ones are made in that folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["PackageError", "Packages"]


class PackageError(Exception):
    """A package cannot be had."""


class Packages:
    """Unpacked packages below ``folder``; each is fetched once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def get(self, name: str) -> Path:
        """The folder that the package is unpacked in. Raises PackageError if it cannot be had."""
        place = self._folder / name
        if not place.is_dir():
            self._fetch(name, place)
        return place

    def _fetch(self, name: str, place: Path) -> None:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise PackageError(f"{name}: this machine has no {tool}")
        scratch = self._folder / f"{name}.{os.getpid()}.part"
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            archive = self._download(name, scratch)
            unpacked = scratch / "unpacked"
            self._run(["dpkg-deb", "--extract", str(archive), str(unpacked)], scratch)
            if not place.is_dir():
                unpacked.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _download(self, name: str, scratch: Path) -> Path:
        # First with the machine's own lists, then with fresh ones of ours.
        first = self._try(["apt-get", *_QUIET, "download", name], scratch)
        if first.returncode:
            private = self._private_options()
            updated = self._try(["apt-get", *_QUIET, *private, "update"], scratch)
            second = self._try(["apt-get", *_QUIET, *private, "download", name], scratch)
            if second.returncode:
                reasons = "".join(run.stderr for run in (first, updated, second))
                raise PackageError(f"{name}: cannot be downloaded\n{reasons}")
        archives = list(scratch.glob("*.deb"))
        if len(archives) != 1:
            raise PackageError(f"{name}: apt-get download left {len(archives)} files")
        return archives[0]

    def _private_options(self) -> Sequence[str]:
        """apt's state in our folder; its sources and keys stay the machine's."""
        apt = self._folder / "apt"
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        status = apt / "status"
        status.touch()
        return (
            *("-o", f"Dir::State={apt / 'state'}"),
            *("-o", f"Dir::State::status={status}"),
            *("-o", f"Dir::Cache={apt / 'cache'}"),
        )

    @staticmethod
    def _try(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def _run(self, command: Sequence[str], folder: Path) -> None:
        done = self._try(command, folder)
        if done.returncode:
            raise PackageError(f"{' '.join(command)}: {done.stderr}")


_QUIET = (
    *("-o", "Acquire::Languages=none"),
    *("-o", "Acquire::Retries=3"),
    # Unpacking needs no sandbox user, who could not write into our folder.
    *("-o", "APT::Sandbox::User="),
)
