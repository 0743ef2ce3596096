"""Break one rule for devices after the other in a copy of the package; the conformance suite must
say which.

``python tests/mutants/device.py`` (or ``make mutants-device``) does all; arguments choose rules.
A fault that the tests that cite its rule do not find fails the run, and so does one whose place in
the code is not there exactly once any more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

from device_faults import DEVICE
from run import ROOT, Copy

PACKAGE = "pyvirtio.virtio.conformance"
WORKERS = 2

Fault = tuple[str, str, str, str, str]


def suite(copy: Copy, rule: str, maker: str) -> str:
    """The result of a rule for the device in a copy."""
    prefix = copy.folder / "matrix"
    report = Path(f"{prefix}.json")
    report.unlink(missing_ok=True)
    done = copy.run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", f"{PACKAGE}.plugin"),
        *("--pyargs", PACKAGE, "--device", f"{PACKAGE}.ours:{maker}"),
        *("--requirement", rule, "--matrix", str(prefix)),
    )
    if not report.exists():
        return "no report:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-5:])
    rows = json.loads(report.read_text())["requirements"]
    return next(str(row["result"]) for row in rows if row["id"] == rule)


def attempt(copy: Copy, fault: Fault) -> str:
    """Put a fault in, run the tests that cite its rule, take it out; what is wrong, or nothing."""
    rule, maker, file, old, new = fault
    path = str(Path("virtio", file)) if not file.startswith("../") else file[3:]
    original = (ROOT / path).read_text()
    if (count := original.count(old)) != 1:
        return f"what it replaces is there {count} times"
    changed = original.replace(old, new)
    try:
        compile(changed, path, "exec")
    except SyntaxError as error:
        return f"it does not compile: {error}"
    copy.write(path, changed)
    try:
        result = suite(copy, rule, maker)
    except subprocess.TimeoutExpired:
        return ""  # it hangs, which is noticed
    finally:
        copy.write(path, original)
    return "" if result == "fail" else result


def run_all(faults: list[Fault]) -> Iterator[tuple[Fault, str]]:
    """The outcome of each, as they come."""
    waiting: SimpleQueue[Fault] = SimpleQueue()
    for fault in faults:
        waiting.put(fault)
    outcomes: SimpleQueue[tuple[Fault, str] | None] = SimpleQueue()

    def work(copy: Copy) -> None:
        try:
            while True:
                fault = waiting.get_nowait()
                outcomes.put((fault, attempt(copy, fault)))
        except Empty:
            pass
        finally:
            outcomes.put(None)

    copies = [Copy(number) for number in range(WORKERS)]
    copies[0].check()
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


def main() -> int:
    """0 if every fault was found by the tests that cite its rule."""
    chosen = [fault for fault in DEVICE if not sys.argv[1:] or fault[0] in sys.argv[1:]]
    bad = []
    number = 0
    for number, (fault, problem) in enumerate(run_all(chosen), 1):
        print(f"{number}/{len(chosen)} {fault[0]}: {problem or 'found'}", flush=True)
        if problem:
            bad.append((fault, problem))
    for fault, problem in bad:
        print(f"  {fault[0]} in {fault[2]}: {problem}: {fault[3]!r} -> {fault[4]!r}")
    print(f"{number - len(bad)} of {len(chosen)} faults were found")
    return 0 if chosen and not bad and number == len(chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
