"""What twin images are like, what is done to them, and which of these met."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

__all__ = ["DELIBERATE", "WEIGHTS", "Features", "Meetings"]

DELIBERATE = {
    "zeroes for some subclusters of a compressed cluster": (
        "They are written. QEMU then writes all zeroes of the request, we only those. The twins "
        "zero such a cluster whole."
    ),
    "growing over a longer backing file in version 2": (
        "QEMU refuses, for the backing file's data would show and there are no zero clusters to "
        "hide it; we write zeroes. The twins do not try it."
    ),
    "compressed writes after a compressed cluster was freed": (
        "QEMU 7.2 may go on writing into its host cluster though it was handed out again, and so "
        "into somebody else's data. The twins open QEMU's image anew before compressed writes."
    ),
    "shrinking to the inside of a cluster": (
        "QEMU leaves the rest of that cluster as it is, and growing again shows it; with us what "
        "was cut off reads as zeroes. The twins shrink to whole clusters."
    ),
    "bitmaps and discards of parts of clusters": (
        "QEMU records all of the request, we what is discarded: the whole clusters. With bitmaps "
        "the twins discard whole clusters."
    ),
    "snapshots that refcounts of 1, 2 or 4 bits cannot count": (
        "Where a limit is met depends on which compressed clusters share a host cluster, and QEMU "
        "may leave the disk resized by a refused apply; with us it is as before. After a refusal "
        "by either the twins go on from the state before."
    ),
}
"""Where we differ from QEMU on purpose, and why."""

WEIGHTS = {
    "write": 92,
    "zeroes": 24,
    "unmap": 24,
    "discard": 28,
    "compressed": 4,
    "grow": 3,
    "shrink": 2,
    "snapshot": 3,
    "apply": 2,
    "delete": 2,
    "reopen": 2,
    "bitmap": 6,
}


@dataclass(frozen=True)
class Features:
    """What an image is like: one value of each axis."""

    compat: str = "1.1"
    cluster_size: int = 65536
    refcount_bits: int = 16
    extended_l2: bool = False
    lazy_refcounts: bool = False
    backing: str = "none"
    """``none``, ``shorter`` or ``longer`` than the overlay, or ``chain`` (a qcow2 on a raw one)."""

    @classmethod
    def choose(cls, chance: random.Random) -> Features:
        """Any combination that QEMU can make."""
        cluster_size = 1 << chance.choice((9, 9, 10, 12, 12, 14, 15, 16, 16, 18, 21))
        compat = chance.choice(("0.10", "1.1", "1.1"))
        modern = compat == "1.1"
        return cls(
            compat=compat,
            cluster_size=cluster_size,
            refcount_bits=1 << chance.randrange(7) if modern else 16,
            extended_l2=modern and cluster_size >= 1 << 14 and chance.random() < 0.6,
            lazy_refcounts=modern and chance.random() < 0.3,
            backing=chance.choice(("none", "none", "shorter", "longer", "chain")),
        )

    @property
    def labels(self) -> list[str]:
        """The values, for the matrix of what met what."""
        size = self.cluster_size
        return [
            "v2" if self.compat == "0.10" else "v3",
            f"{size // 1024}k" if size >= 1024 else f"{size}b",
            f"rc{self.refcount_bits}",
            *(["subcl"] if self.extended_l2 else []),
            *(["lazy"] if self.lazy_refcounts else []),
            f"b:{self.backing}",
        ]

    def options(self) -> dict[str, Any]:
        """As our create and qemu-img both take them."""
        chosen: dict[str, Any] = {
            "compat": self.compat,
            "cluster_size": self.cluster_size,
            "refcount_bits": self.refcount_bits,
        }
        return chosen


class Meetings:
    """Which pairs of features and operations were there in one sequence."""

    def __init__(self) -> None:
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.operations = 0

    def add(self, labels: set[str]) -> None:
        """One sequence had all of these."""
        for one in labels:
            for other in labels:
                self.pairs[one, other] += 1

    def table(self) -> str:
        """The matrix, as text: in how many sequences the two met."""
        names = sorted({name for name, _ in self.pairs}, key=_order)
        width = max([4, *(len(name) for name in names)])
        lines = [f"{'':{width}} " + " ".join(f"{i:>3}" for i in range(len(names)))]
        for i, name in enumerate(names):
            cells = [f"{self.pairs[name, other] or '.':>3}" for other in names[: i + 1]]
            lines.append(f"{name:{width}} {' '.join(cells)}  {i}")
        return "\n".join(lines)

    def missing(self, labels: list[str]) -> list[tuple[str, str]]:
        """Pairs of ``labels`` that never met."""
        return [
            (one, other)
            for i, one in enumerate(labels)
            for other in labels[:i]
            if not self.pairs[one, other]
        ]


def _order(name: str) -> tuple[int, str]:
    return (list(WEIGHTS).index(name) if name in WEIGHTS else -1, name)
