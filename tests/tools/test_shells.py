"""What pyvirtio-img and pyvirtio-serve say to shells and to man: judged by bash, zsh, fish, man and
mandoc."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyvirtio.tools.img.commands import OURS, QEMU
from support.peers import requires

MAIN = "#!{}\nimport sys\nfrom pyvirtio.tools.{} import main\nsys.exit(main())\n"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The first in a folder with both, by names that nobody else completes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("serve", "img"):
        path = folder / f"my-{name}"
        path.write_text(MAIN.format(sys.executable, name))
        path.chmod(0o755)
    return path


class Shell:
    """An interactive shell that is typed to."""

    def __init__(self, folder: Path, *words: str) -> None:
        process, self._file = pty.fork()
        if not process:
            os.chdir(folder)
            os.environ.update(
                PATH=f"{folder}/bin:{os.environ['PATH']}",
                TERM="dumb",
                PS1="ready> ",
                HOME=str(folder),
                ZDOTDIR=str(folder),
            )
            os.execvp(words[0], words)
        self._process = process

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait_for(self, pattern: str, timeout: float = 30) -> str:
        """What was said until then."""
        said, end = "", time.monotonic() + timeout
        while not re.search(pattern, said):
            if not select.select([self._file], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no {pattern!r} in {said!r}")
            said += os.read(self._file, 4096).decode(errors="replace")
        return said

    def close(self) -> None:
        os.close(self._file)  # it hangs up
        os.waitpid(self._process, 0)


BASH = ("bash", "--norc", "--noprofile", "-i")


@requires("bash")
@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("my-img verify", "my-img verify-chain "),
        ("my-img convert --sal", "my-img convert --salvage "),
        ("my-img convert -O q", "my-img convert -O qcow2 "),
        ("my-img convert -t writet", "my-img convert -t writethrough "),
        ("my-img info --output=j", "my-img info --output=json "),
        ("my-img info --output=json so", "my-img info --output=json some-disk.img "),
        ("my-img completion z", "my-img completion zsh "),
        ("my-img man verify", "my-img man verify-chain "),
        ("my-serve vh", "my-serve vhost-user-blk "),
        ("my-serve nbd --read", "my-serve nbd --read-only "),
        ("my-serve nbd --format=q", "my-serve nbd --format=qcow2 "),
    ],
)
def test_bash_completes(program: Path, tmp_path: Path, typed: str, becomes: str) -> None:
    (tmp_path / "some-disk.img").touch()
    shell = Shell(tmp_path, *BASH)
    try:
        shell.type(f'eval "$({typed.split()[0]} completion bash)"; echo load""ed\n')
        shell.wait_for("loaded")
        shell.type(f"{typed}\t")
        shell.wait_for(re.escape(becomes))
    finally:
        shell.close()


@requires("zsh")
@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("my-img verify", "my-img verify-chain "),
        ("my-img convert -O q", "my-img convert -O qcow2 "),
        ("my-img convert --sal", "my-img convert --salvage "),
    ],
)
def test_zsh_completes(program: Path, tmp_path: Path, typed: str, becomes: str) -> None:
    shell = Shell(tmp_path, "zsh", "-f", "-i")
    try:
        shell.type('eval "$(my-img completion zsh)"; echo load""ed\n')
        shell.wait_for("loaded")
        shell.type(f"{typed}\t")
        shell.wait_for(re.escape(becomes))
    finally:
        shell.close()


@requires("fish")
@pytest.mark.parametrize(
    ("typed", "answers"),
    [
        ("my-img verif", {"verify-chain"}),
        ("my-img convert -O q", {"qcow2"}),
        ("my-img convert --sal", {"--salvage"}),
        ("my-img completion ", {"bash", "zsh", "fish"}),
        ("my-serve vhost-user-blk --qu", {"--queues", "--queue-size"}),
    ],
)
def test_fish_completes(program: Path, tmp_path: Path, typed: str, answers: set[str]) -> None:
    code = f"{typed.split()[0]} completion fish | source; complete -C '{typed}'"
    path = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code],
        env={**os.environ, "HOME": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} == answers


@requires("man", "mandoc")
def test_man_and_mandoc_take_every_page(program: Path, tmp_path: Path) -> None:
    pages = [("img", command) for command in ("", *QEMU, *OURS)]
    pages += [("serve", command) for command in ("", "nbd", "vhost-user-blk")]
    for name, command in pages:
        page = tmp_path / "page.1"
        words = [f"{program.parent}/my-{name}", "man", *([command] if command else [])]
        page.write_bytes(subprocess.run(words, capture_output=True, check=True).stdout)
        shown = subprocess.run(
            ["man", "--warnings=all", "-l", str(page)],
            env={**os.environ, "MANPAGER": "cat", "MANWIDTH": "80"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stderr == ""
        title = f"my-{name}{'-' + command if command else ''} - "
        assert title in re.sub(r" +", " ", shown.stdout)
        lint = subprocess.run(
            ["mandoc", "-T", "lint", "-W", "warning", str(page)], capture_output=True, text=True
        )
        assert (lint.returncode, lint.stdout) == (0, "")


def test_every_option_of_the_manual_has_a_sentence(program: Path) -> None:
    for command in (*QEMU, *OURS):
        words = [str(program), "man", command]
        page = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        options = page.partition(".SH OPTIONS\n")[2].split(".TP\n")[1:]
        assert options
        assert all(len(option.splitlines()) > 1 for option in options), command
