"""Debian packages without being root: downloaded and unpacked into a folder, never installed.

apt does the fetching, from the mirrors that this machine is set up for, and checks the signatures.
Where the machine has no package lists (a fresh container), or the packages are another
architecture's or release's, private lists are made in that folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

__all__ = ["PackageError", "Packages"]


class PackageError(Exception):
    """A package cannot be had."""


class Packages:
    """Unpacked packages below ``folder``; each is fetched once.

    ``architecture`` and ``release`` (of Debian, by its code name) are this machine's if not given.
    Both or neither have to be: packages for another machine come with lists of their own.
    """

    def __init__(self, folder: Path, *, architecture: str = "", release: str = "") -> None:
        if bool(architecture) != bool(release):
            raise ValueError("architecture and release are to be given together")
        self.folder = folder.resolve()
        self._architecture = architecture
        self._release = release
        self._private: Sequence[str] | None = None

    def get(self, name: str, only: Sequence[str] = ()) -> Path:
        """The folder that the package is unpacked in. Raises PackageError if it cannot be had.

        ``only``: patterns of the files to be unpacked (``boot/vmlinux-*``), where a package is big;
        they count when it is unpacked for the first time.
        """
        return self.get_all({name: only})[name]

    def get_all(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, Path]:
        """The same for several packages at once, which is quicker."""
        if not all((self.folder / name).is_dir() for name in wanted):
            with self._alone():  # and look again: another process may just have fetched them
                self._fetch({n: o for n, o in wanted.items() if not (self.folder / n).is_dir()})
        return {name: self.folder / name for name in wanted}

    def depends(self, name: str) -> list[str]:
        """The packages that a package needs, alternatives and versions left out."""
        _need_tools(name)
        with self._alone():
            done = self._with_lists(["apt-cache"], ["depends", "--no-recommends", name])
        lines = (line.strip() for line in done.stdout.splitlines())
        return [line.split()[1] for line in lines if line.startswith("Depends: ")]

    def closure(self, name: str) -> list[str]:
        """The packages that a package needs, and those that they need, and so on."""
        _need_tools(name)
        ways = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
        options = [f"--no-{way}" for way in ways]
        with self._alone():
            done = self._with_lists(["apt-cache"], ["depends", "--recurse", *options, name])
        return [line for line in done.stdout.splitlines() if line and line[0] not in " |<"]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time: apt does not share its folders."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fetch(self, wanted: Mapping[str, Sequence[str]]) -> None:
        if not wanted:
            return
        _need_tools(", ".join(wanted))
        scratch = self.folder / f"{os.getpid()}.part"
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            self._with_lists(["apt-get", *_QUIET], ["download", *wanted], scratch)
            for name, only in wanted.items():
                archives = list(scratch.glob(f"{name}_*.deb"))
                if len(archives) != 1:
                    raise PackageError(f"{name}: apt-get download left {len(archives)} files")
                unpacked = scratch / name
                if only:
                    _extract(archives[0], unpacked, only)
                else:
                    self._run(["dpkg-deb", "--extract", str(archives[0]), str(unpacked)], scratch)
                unpacked.rename(self.folder / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _with_lists(
        self, command: Sequence[str], arguments: Sequence[str], folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run apt on what it knows about packages; if it knows too little, fetch new lists."""
        folder = folder or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        reasons = []
        if not self._architecture:
            # First with the machine's own lists.
            first = self._try([*command, *arguments], folder)
            if first.returncode == 0:
                return first
            reasons.append(first.stderr)
        if self._private is None:
            self._private = self._private_options()
        second = self._try([*command, *self._private, *arguments], folder)
        if second.returncode:
            updated = self._try(["apt-get", *_QUIET, *self._private, "update"], folder)
            second = self._try([*command, *self._private, *arguments], folder)
            reasons += [updated.stderr, second.stderr]
        if second.returncode:
            raise PackageError(f"{', '.join(arguments[1:])}: cannot be had\n{''.join(reasons)}")
        return second

    def _private_options(self) -> Sequence[str]:
        """apt's state in our folder; its mirrors and keys stay the machine's."""
        apt = self.folder / "apt"
        for folder in ("state/lists/partial", "cache/archives/partial", "parts"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        status = apt / "status"
        status.touch()
        options = [
            *("-o", f"Dir::State={apt / 'state'}"),
            *("-o", f"Dir::State::status={status}"),
            *("-o", f"Dir::Cache={apt / 'cache'}"),
        ]
        if self._architecture:
            sources = apt / "sources.list"
            key = f"[signed-by={_KEYS}] " if _KEYS.is_file() else ""
            sources.write_text(f"deb {key}{self._mirror()} {self._release} main\n")
            options += [
                *("-o", f"APT::Architecture={self._architecture}"),
                *("-o", f"APT::Architectures={self._architecture}"),
                *("-o", f"Dir::Etc::sourcelist={sources}"),
                *("-o", f"Dir::Etc::sourceparts={apt / 'parts'}"),
            ]
        return options

    def _mirror(self) -> str:
        """Where this machine gets Debian from."""
        # apt reads its own sources, in whichever of their formats they are.
        command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
        done = self._try(command, self.folder)
        for uri in done.stdout.split():
            if uri.rstrip("/").endswith("/debian"):
                return uri
        raise PackageError(f"this machine's apt knows no mirror of Debian{done.stderr}")

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


def _need_tools(name: str) -> None:
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise PackageError(f"{name}: this machine has no {tool}")


def _extract(archive: Path, target: Path, only: Sequence[str]) -> None:
    """Unpack some files, reading the archive once."""
    with (
        subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE
        ) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            name = member.name.removeprefix("./")
            if any(fnmatch(name, pattern) for pattern in only):
                tar.extract(member, target, filter="data")
    if process.returncode or not target.is_dir():
        raise PackageError(f"{archive.name}: cannot be unpacked, or has none of {', '.join(only)}")


_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_QUIET = (
    *("-o", "Acquire::Languages=none"),
    *("-o", "Acquire::Retries=3"),
    # Unpacking needs no sandbox user, who could not write into our folder.
    *("-o", "APT::Sandbox::User="),
)
