"""Random workloads against a plain bytearray; QEMU checks and reads every image that results."""

from __future__ import annotations

import os
import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import pyvirtio
from support.peers import find_program
from support.qemu import qemu_check, qemu_img, qemu_read
from support.workload import assert_same, create, discarded

SCALE = int(os.environ.get("PYVIRTIO_MODEL_SCALE", "1"))
JUDGED = find_program("qemu-img") is not None
LARGEST = 2 << 20
"""Bytes that a disk grows to here."""

SMALLEST_CACHES = {"l2_cache_size": 1, "refcount_cache_size": 1}
"""Of a few slices each: everything has to be written early and read again."""

anywhere = st.integers(0, (1 << 32) - 1)
lengths = st.one_of(st.integers(1, 600), st.integers(1, 70_000))
aligned_to = st.sampled_from(["byte", "byte", "sector", "cluster"])
seeds = st.integers(0, 255)


class Qcow2Machine(RuleBasedStateMachine):
    """One image of random making, and what it must hold."""

    @initialize(
        compat=st.sampled_from(["0.10", "1.1"]),
        cluster_size=st.sampled_from([512, 512, 1024, 4096, 65536]),
        refcount_bits=st.sampled_from([1, 2, 4, 16, 16, 64]),
        sectors=st.integers(1, 600),
        backing=st.sampled_from(["none", "raw", "qcow2"]),
        backing_sectors=st.integers(1, 700),
        compression=st.sampled_from(["zlib", "zstd"]),
        caches=st.sampled_from([{}, SMALLEST_CACHES]),
    )
    def make(
        self,
        compat: str,
        cluster_size: int,
        refcount_bits: int,
        sectors: int,
        backing: str,
        backing_sectors: int,
        compression: str,
        caches: dict[str, int],
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="pyvirtio-model-")
        self.path = Path(self.folder.name) / "disk.qcow2"
        self.cluster_size = cluster_size
        self.backed = backing != "none"
        self.v2 = compat == "0.10"
        self.model = bytearray(sectors * 512)
        self.snapshots: dict[str, bytes] = {}
        self.made = 0
        self.packed = False
        self.caches = caches
        options: dict[str, Any] = {"compat": compat, "cluster_size": cluster_size}
        if not self.v2:
            options |= {"refcount_bits": refcount_bits, "compression_type": compression}
        if self.backed:
            below = random.Random(sectors).randbytes(backing_sectors * 512)
            self._make_backing(backing, below)
            options |= {"backing_file": "base", "backing_fmt": backing}
            part = min(len(below), len(self.model))
            self.model[:part] = below[:part]
        create(self.path, len(self.model), **options)
        self.disk = pyvirtio.open_disk(self.path, **self.caches)

    def _make_backing(self, format: str, contents: bytes) -> None:
        path = self.path.with_name("base")
        if format == "raw":
            path.write_bytes(contents)
            return
        create(path, len(contents), cluster_size=2048)
        with pyvirtio.open_disk(path, format="qcow2") as disk:
            disk.write(0, contents)

    def _range(self, offset: int, length: int, aligned: str) -> tuple[int, int]:
        """A range inside the disk."""
        unit = {"byte": 1, "sector": 512, "cluster": self.cluster_size}[aligned]
        size = len(self.model)
        start = offset % size // unit * unit
        end = min(size, start + -(-length // unit) * unit)
        return start, end - start

    # -- requests ------------------------------------------------------------------------------

    @rule(offset=anywhere, length=lengths, aligned=aligned_to, seed=seeds)
    def write(self, offset: int, length: int, aligned: str, seed: int) -> None:
        start, length = self._range(offset, length, aligned)
        data = random.Random(seed).randbytes(length)
        self.disk.write(start, data)
        self.model[start : start + length] = data

    @rule(offset=anywhere, length=lengths, seed=seeds, words=st.booleans())
    def write_compressed(self, offset: int, length: int, seed: int, words: bool) -> None:
        start, length = self._range(offset, length, "cluster")
        chance = random.Random(seed)
        data = chance.randbytes(4 if words else length)
        data = (data * (length // len(data) + 1))[:length]
        self.packed = True
        self.disk.write_compressed(start, [data])
        self.model[start : start + length] = data

    @rule(
        offset=anywhere,
        pieces=st.lists(st.integers(0, 3000), min_size=2, max_size=6),
        seed=seeds,
        fua=st.booleans(),
    )
    def write_many_buffers(self, offset: int, pieces: list[int], seed: int, fua: bool) -> None:
        start, length = self._range(offset, max(1, sum(pieces)), "byte")
        data = random.Random(seed).randbytes(length)
        buffers = []
        at = 0
        for piece in pieces:
            buffers.append(bytearray(data[at : at + piece]))
            at += piece
        buffers.append(bytearray(data[at:]))
        self.disk.writev(start, buffers, fua=fua)
        self.model[start : start + length] = data
        assert b"".join(buffers) == data  # a write leaves its source alone

    @rule(offset=anywhere, pieces=st.lists(st.integers(0, 3000), min_size=1, max_size=6))
    def read_many_buffers(self, offset: int, pieces: list[int]) -> None:
        start = offset % len(self.model)
        buffers = []
        room = len(self.model) - start
        for piece in pieces:
            buffers.append(bytearray(b"\xa5" * min(piece, room)))
            room -= len(buffers[-1])
        self.disk.readv(start, buffers)
        found = b"".join(buffers)
        assert_same(found, self.model[start : start + len(found)])

    @rule(offset=anywhere, length=lengths, aligned=aligned_to, unmap=st.booleans())
    def write_zeroes(self, offset: int, length: int, aligned: str, unmap: bool) -> None:
        start, length = self._range(offset, length, aligned)
        self.disk.write_zeroes(start, length, unmap=unmap)
        self.model[start : start + length] = bytes(length)

    @rule(offset=anywhere, length=lengths, aligned=aligned_to)
    def discard(self, offset: int, length: int, aligned: str) -> None:
        start, length = self._range(offset, length, aligned)
        self.disk.discard(start, length)
        if self.v2 and self.backed:
            return  # version 2 cannot say "zero": QEMU ignores it, lest old data come back
        start, end = discarded(start, length, len(self.model), self.cluster_size)
        self.model[start:end] = bytes(end - start)

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    @rule()
    def extents_cover_the_disk_and_tell_the_truth(self) -> None:
        at = 0
        for extent in self.disk.extents():
            assert extent.length > 0
            if extent.zero:
                assert not any(self.model[at : at + extent.length])
            at += extent.length
        assert at == len(self.model)

    # -- snapshots and size --------------------------------------------------------------------

    @precondition(lambda self: len(self.snapshots) < 4)
    @rule()
    def create_snapshot(self) -> None:
        self.made += 1
        name = f"snap{self.made}"
        try:
            self.disk.snapshots.create(name)
        except pyvirtio.PyvirtioError:
            # Only where a refcount cannot count the snapshots: the disk goes on as if not asked.
            if self.refcount_max > self.most_references + 1:
                raise
        else:
            self.snapshots[name] = bytes(self.model)
        assert [snapshot.name for snapshot in self.disk.snapshots] == list(self.snapshots)

    @property
    def most_references(self) -> int:
        """To one host cluster; compressed ones share theirs, and may be a few bytes long."""
        return (len(self.snapshots) + 1) * 512 if self.packed else len(self.snapshots)

    @property
    def refcount_max(self) -> int:
        return int((1 << self.disk.info().specific["refcount-bits"]) - 1)

    @precondition(lambda self: self.snapshots)
    @rule(which=anywhere)
    def apply_snapshot(self, which: int) -> None:
        name = list(self.snapshots)[which % len(self.snapshots)]
        try:
            self.disk.snapshots.apply(name)
        except pyvirtio.PyvirtioError:
            # As in QEMU: the snapshot's clusters are counted once more before the disk's fall.
            if self.refcount_max > self.most_references + 1:
                raise
        else:
            self.model = bytearray(self.snapshots[name])
        assert self.disk.size == len(self.model)

    @precondition(lambda self: self.snapshots)
    @rule(which=anywhere)
    def delete_snapshot(self, which: int) -> None:
        name = list(self.snapshots)[which % len(self.snapshots)]
        self.disk.snapshots.delete(name)
        del self.snapshots[name]

    @precondition(lambda self: self.snapshots)
    @rule(which=anywhere)
    def view_snapshot(self, which: int) -> None:
        name = list(self.snapshots)[which % len(self.snapshots)]
        with self.disk.snapshots.open(name) as view:
            assert_same(view.read(0, view.size), self.snapshots[name])

    @rule(position=st.integers(0, 300_000), length=lengths, seed=seeds)
    def keep_vm_state(self, position: int, length: int, seed: int) -> None:
        data = random.Random(seed).randbytes(length)
        self.disk.vmstate.write(position, data)
        assert self.disk.vmstate.read(position, length) == data

    @precondition(lambda self: not (self.v2 and self.snapshots))
    @rule(sectors=st.integers(1, 900))
    def shrink(self, sectors: int) -> None:
        size = max(512, len(self.model) - sectors * 512)
        self.disk.truncate(size, shrink=True)
        del self.model[size:]

    @precondition(lambda self: not self.v2)
    @rule(width=st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
    def change_refcount_width(self, width: int) -> None:
        try:
            self.disk.amend(refcount_bits=width)
        except pyvirtio.ImageError:
            assert (1 << width) - 1 <= self.most_references

    @precondition(lambda self: len(self.model) < LARGEST and not (self.v2 and self.snapshots))
    @rule(
        sectors=st.integers(0, 900),
        mode=st.sampled_from(["off", "off", "metadata", "falloc", "full"]),
    )
    def grow(self, sectors: int, mode: str) -> None:
        size = len(self.model) + sectors * 512
        self.disk.truncate(size, preallocation=mode)
        self.model.extend(bytes(size - len(self.model)))
        assert self.disk.size == size

    # -- verdicts ------------------------------------------------------------------------------

    @rule()
    def reopen(self) -> None:
        self.disk.close()
        self.disk = pyvirtio.open_disk(self.path, **self.caches)
        self._compare()

    @rule()
    def reopen_read_only_and_back(self) -> None:
        self.disk.reopen(read_only=True)
        self._compare()
        self.disk.reopen(read_only=False)

    @rule()
    def read_anew(self) -> None:
        self.disk.flush_to_os()
        self.disk.invalidate()
        self._compare()

    @rule()
    def check(self) -> None:
        found = self.disk.check()
        assert (found.corruptions, found.leaks, found.check_errors) == (0, 0, 0), found

    def _compare(self) -> None:
        assert self.disk.size == len(self.model)
        assert_same(self.disk.read(0, self.disk.size), self.model)

    def teardown(self) -> None:
        if not hasattr(self, "disk"):
            return
        try:
            self._compare()
            self.check()
            self.disk.close()
            if JUDGED:
                self._have_qemu_judge()
        finally:
            with suppress(Exception):
                self.disk.close()
            self.folder.cleanup()

    def _have_qemu_judge(self) -> None:
        qemu_check(self.path)
        assert_same(qemu_read(self.path, self.path.parent), self.model)
        if self.snapshots:
            name = random.Random(self.made).choice(list(self.snapshots))
            raw = self.path.with_name("snapshot.raw")
            choice = ("-l", f"snapshot.name={name}")
            qemu_img("convert", "-f", "qcow2", "-O", "raw", *choice, self.path, raw)
            # QEMU gives a snapshot the size that the disk has now.
            common = min(raw.stat().st_size, len(self.snapshots[name]))
            assert_same(raw.read_bytes()[:common], self.snapshots[name][:common])


TestModel = Qcow2Machine.TestCase
TestModel.settings = settings(
    max_examples=30 * SCALE,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
