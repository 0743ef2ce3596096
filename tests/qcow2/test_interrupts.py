"""A KeyboardInterrupt can be thrown between any two bytecodes of the main thread."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

import pyvirtio
from pyvirtio.backend.filter import FilterDisk
from pyvirtio.qcow2 import layout, refcount_width, state

CLUSTER = 4096
SIZE = 64 * CLUSTER
OLD = b"\1" * (10 * CLUSTER)


class Interrupt(KeyboardInterrupt):
    """What the timer throws."""


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    def throw(number: int, frame: FrameType | None) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, throw)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


AES = {"encryption": True, "passphrase": "secret"}


def make_image(**options: Any) -> tuple[pyvirtio.MemoryDisk, pyvirtio.Disk]:
    file = pyvirtio.MemoryDisk(0, growable=True)
    disk = pyvirtio.create_disk(file, SIZE, cluster_size=CLUSTER, **options)
    disk.write(0, OLD)
    disk.flush()
    return file, disk


def work(disk: pyvirtio.Disk) -> None:
    disk.write(20 * CLUSTER + 100, b"a" * 5000)
    disk.write_zeroes(21 * CLUSTER, 2 * CLUSTER)
    disk.discard(20 * CLUSTER, CLUSTER)
    store = disk.write_compressed if disk.encryption is None else disk.writev
    store(50 * CLUSTER, [b"c" * 3 * CLUSTER])
    disk.snapshots.create("s")
    store(51 * CLUSTER, [b"d" * CLUSTER])
    disk.write(20 * CLUSTER + 5, b"q" * CLUSTER)
    disk.flush()
    disk.snapshots.delete("s")
    disk.write(40 * CLUSTER, b"z" * CLUSTER)


@pytest.mark.parametrize(("options", "times"), [({}, 400), (AES, 200)], ids=["plain", "encrypted"])
def test_an_interrupt_at_any_moment_neither_hangs_nor_corrupts(
    options: dict[str, Any], times: int
) -> None:
    choose = random.Random(20)
    _, disk = make_image(**options)
    start = time.monotonic()
    work(disk)
    duration = time.monotonic() - start
    disk.close()
    interrupted = 0
    for _ in range(times):
        file, disk = make_image(**options)
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-6 + choose.random() * duration)
            work(disk)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            interrupted += 1
            go_on_in_another_thread(disk)
        check_as_it_is(file)
    assert interrupted > 20


def go_on_in_another_thread(disk: pyvirtio.Disk) -> None:
    """Every later request works, or is refused because the image is not written any more."""
    problems: list[BaseException] = []

    def use() -> None:
        try:
            assert disk.read(0, len(OLD)) == OLD
            disk.write(30 * CLUSTER, b"k" * CLUSTER)
            disk.flush()
        except pyvirtio.BackendError as error:
            if "until it is reopened" not in str(error):
                problems.append(error)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "a request waits for one that was interrupted"
    assert not problems


def check_as_it_is(file: pyvirtio.MemoryDisk) -> None:
    """What is in the file now, as after a power failure, is a good image but for leaks."""
    copy = pyvirtio.MemoryDisk(0, growable=True)
    copy.write(0, file.read(0, file.size))
    with pyvirtio.open_disk(copy, read_only=True, passphrase="secret") as disk:
        result = disk.check()
        harmless = sum("OFLAG_COPIED" in line and "refcount=1" in line for line in result.messages)
        assert result.corruptions == harmless, result.messages
        assert disk.read(0, len(OLD)) == OLD


def test_an_interrupt_just_before_a_flush_writes_does_not_lose_what_it_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, disk = make_image()
    disk.write(30 * CLUSTER, b"k" * CLUSTER)
    health = disk._metadata.health  # type: ignore[attr-defined]
    step = type(health).step

    class Interrupted:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            raise Interrupt

    def interrupted(self: object, what: str) -> Any:
        return Interrupted() if what == "Gathering what to flush" else step(health, what)

    with monkeypatch.context() as patch:
        patch.setattr(type(health), "step", interrupted)
        with pytest.raises(Interrupt):
            disk.flush()
    disk.flush()
    copy = pyvirtio.MemoryDisk(0, growable=True)
    copy.write(0, file.read(0, file.size))
    with pyvirtio.open_disk(copy, read_only=True) as again:
        assert again.read(30 * CLUSTER, CLUSTER) == b"k" * CLUSTER


def test_refcounts_in_use_are_those_in_the_header_after_an_interrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, disk = make_image()
    real = refcount_width.update_header

    def interrupted(*arguments: Any, **changes: Any) -> None:
        real(*arguments, **changes)
        raise Interrupt

    monkeypatch.setattr(refcount_width, "update_header", interrupted)
    with pytest.raises(Interrupt):
        disk.amend(refcount_bits=32)  # type: ignore[attr-defined]
    disk.write(30 * CLUSTER, b"k" * 20 * CLUSTER)
    disk.flush()
    check_as_it_is(file)


@pytest.mark.parametrize("interrupted", ["write", "flush"])
def test_a_dirty_bit_that_was_cleared_is_set_again_after_an_interrupt(interrupted: str) -> None:
    file, disk = make_image(lazy_refcounts=True)
    metadata = disk._metadata  # type: ignore[attr-defined]
    assert state.is_dirty(metadata.header)
    metadata.settle()

    class Interrupting(FilterDisk):
        def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
            super()._writev(offset, views, length)
            if interrupted == "write":
                raise Interrupt

        def _flush(self) -> None:
            raise Interrupt

    with pytest.raises(Interrupt):
        state.mark_clean(Interrupting(file), metadata.header)
    disk.write(30 * CLUSTER, b"k" * CLUSTER)
    disk.flush()
    assert file.read(layout.INCOMPATIBLE_FEATURES_OFFSET, 8)[7] & layout.Incompatible.DIRTY
