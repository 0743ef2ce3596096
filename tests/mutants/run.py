"""Put one fault after the other into a copy of the package; the tests named must notice each.

``python tests/mutants/run.py`` (or ``make mutants``) runs all; arguments choose those whose file or
description contains one of them. A fault that survives, or whose place in the code is not there
exactly once any more, fails the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutants"
PACKAGE = ("__init__.py", "errors.py", "py.typed", "backend", "machine", "qcow2", "tools", "virtio")
WORKERS = 2
TIMEOUT = 60
"""Seconds: a fault that makes a test hang is noticed, too."""
_QUICK_START = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Nothing here needs a plugin, and loading them takes longer than most of the tests."""


@dataclass(frozen=True)
class Outcome:
    """What came of one fault."""

    fault: Fault
    caught: bool
    text: str


class Copy:
    """A copy of the package that tests run with."""

    def __init__(self, number: int) -> None:
        self.folder = BUILD / str(number)
        shutil.rmtree(self.folder, ignore_errors=True)
        package = self.folder / "pyvirtio"
        package.mkdir(parents=True)
        for name in PACKAGE:
            source, target = ROOT / name, package / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        self.package = package
        self._stamp = int(time.time())

    def check(self) -> None:
        """Fail unless this copy is what is imported."""
        found = self.run("-c", "import pyvirtio; print(pyvirtio.__file__)").stdout.strip()
        if Path(found).parent != self.package:
            raise SystemExit(f"{found} is imported, not {self.package}")

    def run(self, *arguments: str, timeout: int = TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Run Python with this copy."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **_QUICK_START, "PYTHONPATH": str(self.folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def tests(self, *names: str, timeout: int = TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Run tests with this copy."""
        return self.run(
            "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names, timeout=timeout
        )

    def write(self, file: str, text: str) -> None:
        """Change a file; its time is one that no compiled form of it has."""
        path = self.package / file
        path.write_text(text)
        self._stamp += 1
        os.utime(path, (self._stamp, self._stamp))

    def attempt(self, fault: Fault) -> Outcome:
        """Put the fault in, run its tests, take it out."""
        original = (ROOT / fault.file).read_text()
        count = original.count(fault.old)
        if count != 1:
            return Outcome(fault, False, f"what it replaces is there {count} times")
        changed = original.replace(fault.old, fault.new)
        try:
            compile(changed, fault.file, "exec")
        except SyntaxError as error:
            return Outcome(fault, False, f"it does not compile: {error}")
        self.write(fault.file, changed)
        try:
            done = self.tests(*fault.tests)
        except subprocess.TimeoutExpired:
            return Outcome(fault, True, "hangs")
        finally:
            self.write(fault.file, original)
        if done.returncode == 0:
            return Outcome(fault, False, "SURVIVES")
        if done.returncode == 1 and " failed" in done.stdout:
            return Outcome(fault, True, "caught")
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
        return Outcome(fault, False, f"no verdict (exit code {done.returncode}):\n{tail}")


def run_all(faults: list[Fault]) -> Iterator[Outcome]:
    """The outcome of each, as they come."""
    waiting: SimpleQueue[Fault] = SimpleQueue()
    for fault in faults:
        waiting.put(fault)
    outcomes: SimpleQueue[Outcome | None] = SimpleQueue()

    def work(copy: Copy) -> None:
        try:
            while True:
                outcomes.put(copy.attempt(waiting.get_nowait()))
        except Empty:
            pass
        finally:
            outcomes.put(None)

    copies = [Copy(number) for number in range(WORKERS)]
    copies[0].check()
    _check_tests_pass(copies[0], faults)
    threads = [threading.Thread(target=work, args=(copy,), daemon=True) for copy in copies]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        outcome = outcomes.get()
        if outcome is None:
            running -= 1
        else:
            yield outcome


def _check_tests_pass(copy: Copy, faults: list[Fault]) -> None:
    """Without a fault all these tests pass; if they did not, they would show nothing."""
    names = sorted({name for fault in faults for name in fault.tests})
    for start in range(0, len(names), 40):
        part = names[start : start + 40]
        done = copy.tests(*part, timeout=len(part) * TIMEOUT)
        if done.returncode or " skipped" in done.stdout:
            raise SystemExit(f"without any fault:\n{done.stdout}{done.stderr}")


def main() -> int:
    """0 if all faults were caught."""
    words = sys.argv[1:]
    chosen = [
        fault
        for fault in FAULTS
        if not words or any(word in fault.file + fault.what for word in words)
    ]
    bad: list[Outcome] = []
    number = 0
    for number, outcome in enumerate(run_all(chosen), 1):
        fault = outcome.fault
        print(f"{number}/{len(chosen)} {fault.file}: {outcome.text}: {fault.what}", flush=True)
        if not outcome.caught:
            bad.append(outcome)
    if bad or number != len(chosen):
        print(f"\n{len(bad)} of {len(chosen)} faults were not caught:")
        for outcome in bad:
            print(f"  {outcome.fault.file}: {outcome.fault.old!r} -> {outcome.fault.new!r}")
            print(f"    {outcome.text}; tests: {', '.join(outcome.fault.tests)}")
        return 1
    print(f"\nall {len(chosen)} faults were caught")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
