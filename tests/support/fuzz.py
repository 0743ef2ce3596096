"""Twin images without end: ``python -m support.fuzz`` (in ``tests``), or ``make fuzz-qcow2``.

Goes on until it is interrupted, or for ``--sequences`` or ``--minutes``; a mismatch is printed with
its seed, which ``--seed`` runs again. At the end it prints which pairs of features and operations
met.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import tempfile
from math import inf
from pathlib import Path
from time import monotonic

from .features import Meetings
from .twins import Mismatch, run_sequence


def main() -> int:
    """The number of sequences in which we and QEMU did not agree, 1 at most."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the first sequence (default: random)")
    parser.add_argument("--sequences", type=int, help="how many (default: without end)")
    parser.add_argument("--minutes", type=float, help="how long (default: without end)")
    parser.add_argument("--steps", type=int, default=250, help="operations in a sequence")
    parser.add_argument("--every", type=int, default=40, help="steps from one comparison of all")
    chosen = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if chosen.seed is None else chosen.seed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    deadline = inf if chosen.minutes is None else monotonic() + 60 * chosen.minutes
    meetings = Meetings()
    done = failures = 0
    try:
        while (chosen.sequences is None or done < chosen.sequences) and monotonic() < deadline:
            with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
                try:
                    run_sequence(
                        Path(folder),
                        seed=seed,
                        steps=chosen.steps,
                        every=chosen.every,
                        meetings=meetings,
                    )
                except Mismatch as mismatch:
                    failures += 1
                    print(f"\nseed {seed}: {mismatch}", flush=True)
            done += 1
            seed += 1
            print(
                f"\r{done} sequences, {meetings.operations} operations, {failures} mismatches, "
                f"next seed {seed} ",
                end="",
                flush=True,
            )
    except KeyboardInterrupt:
        pass
    print(f"\n{meetings.table()}")
    return min(failures, 1)


if __name__ == "__main__":
    raise SystemExit(main())
