"""One workload that our driver, qemu-io and a plain bytearray can all run."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvirtio
from pyvirtio import Disk
from pyvirtio.qcow2 import CheckResult

from .qemu import QemuIo

KINDS = ("write", "write", "write", "zero", "unmap", "discard")


@dataclass(frozen=True)
class Step:
    """One request. ``kind``: write, zero, unmap (zero with leave to free the space), discard."""

    kind: str
    offset: int
    length: int
    pattern: int


def create(path: Path, size: int, **options: Any) -> None:
    """An empty qcow2 image of our making, closed again."""
    pyvirtio.create_disk(path, size, format="qcow2", **options).close()


def mixed(
    size: int, cluster_size: int, *, seed: int, count: int = 60, kinds: tuple[str, ...] = KINDS
) -> list[Step]:
    """``count`` requests of all kinds, aligned and not, within and across clusters."""
    chance = random.Random(seed)
    return [_step(chance, size, cluster_size, kinds) for _ in range(count)]


def _step(chance: random.Random, size: int, cluster_size: int, kinds: tuple[str, ...]) -> Step:
    longest = min(size, 4 * cluster_size, 1 << 20)
    offset = chance.randrange(size)
    length = chance.randint(1, longest)
    how = chance.random()
    if how < 0.5:  # whole clusters
        offset -= offset % cluster_size
        length = -(-length // cluster_size) * cluster_size
    elif how < 0.75:  # whole sectors
        offset -= offset % 512
        length = -(-length // 512) * 512
    length = min(length, size - offset)
    return Step(chance.choice(kinds), offset, length, chance.randint(1, 255))


def discarded(offset: int, length: int, size: int, alignment: int) -> tuple[int, int]:
    """The (start, end) that a discard acts on; the end of the disk counts as aligned."""
    start = -(-offset // alignment) * alignment
    end = offset + length
    if end != size:
        end = end // alignment * alignment
    return (start, end) if start < end else (start, start)


def apply_to_model(
    model: bytearray, step: Step, cluster_size: int, *, discard_zeroes: bool = True
) -> None:
    """What ``step`` does to the guest's disk.

    ``discard_zeroes`` is False for version 2 over a backing file: there is no way to say "zero"
    there, and QEMU rather ignores a discard than have old data of the backing file come back.
    """
    start, end = step.offset, step.offset + step.length
    if step.kind == "discard":
        start, end = discarded(start, step.length, len(model), cluster_size)
        if not discard_zeroes:
            return
    value = step.pattern if step.kind == "write" else 0
    model[start:end] = bytes([value]) * (end - start)


def run_ours(disk: Disk, steps: Iterable[Step]) -> None:
    """Run the steps on a Disk."""
    for step in steps:
        if step.kind == "write":
            disk.write(step.offset, bytes([step.pattern]) * step.length)
        elif step.kind == "discard":
            disk.discard(step.offset, step.length)
        else:
            disk.write_zeroes(step.offset, step.length, unmap=step.kind == "unmap")


def run_qemu(qemu: QemuIo, steps: Iterable[Step]) -> None:
    """Run the steps in qemu-io."""
    for step in steps:
        if step.kind == "write":
            qemu.write(step.offset, step.length, step.pattern)
        elif step.kind == "discard":
            qemu.discard(step.offset, step.length)
        else:
            qemu.write_zeroes(step.offset, step.length, unmap=step.kind == "unmap")


def runs(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """(offset, length, value) of every run of one byte value, for qemu-io's ``read -P``."""
    start = 0
    while start < len(data):
        value = data[start]
        rest = data[start:].lstrip(bytes([value]))
        end = len(data) - len(rest)
        yield start, end - start, value
        start = end


def first_difference(one: bytes | bytearray, two: bytes | bytearray) -> str | None:
    """Where two disks differ, for a message; None if they do not."""
    if one == two:
        return None
    if len(one) != len(two):
        return f"{len(one)} bytes and {len(two)} bytes"
    at = next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
    return f"at {at:#x}: {one[at : at + 16].hex(' ')} and {two[at : at + 16].hex(' ')}"


def assert_same(found: bytes | bytearray, expected: bytes | bytearray) -> None:
    """Fail, saying where, unless the two are the same."""
    difference = first_difference(found, expected)
    if difference is not None:
        raise AssertionError(f"found and expected differ {difference}")


def dangerous(found: CheckResult) -> int:
    """Of the corruptions that our check found, those that can lose data.

    A COPIED flag that is clear though the refcount is 1 is none: it costs a copy (QEMU counts it
    among the corruptions, and so do we).
    """
    harmless = [m for m in found.messages if "OFLAG_COPIED" in m and m.endswith(" refcount=1")]
    return found.corruptions - len(harmless)
