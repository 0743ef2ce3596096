"""Random workloads on encrypted images against a plain bytearray; QEMU decrypts what results."""

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
from pyvirtio.qcow2 import Qcow2Disk
from support.encrypted import PASSPHRASE, blank, peer_check, peer_read
from support.peers import find_program
from support.workload import assert_same, discarded

SCALE = int(os.environ.get("PYVIRTIO_MODEL_SCALE", "1"))
JUDGED = find_program("qemu-img") is not None
SIZE = 300 * 512

anywhere = st.integers(0, SIZE - 1)
lengths = st.one_of(st.integers(1, 1100), st.integers(1, 40_000))
units = st.sampled_from([1, 1, 512, 4096])
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("luks", {"cluster_size": 512}),
    ("luks", {"cluster_size": 4096}),
    ("luks", {"cluster_size": 16384, "extended_l2": True}),
    ("luks", {"cluster_size": 4096, "encrypt_cipher_mode": "cbc", "encrypt_ivgen_alg": "essiv"}),
    ("aes", {"cluster_size": 4096}),
    ("aes", {"cluster_size": 16384, "extended_l2": True}),
    ("aes", {"cluster_size": 1024, "compat": "0.10"}),
]


class EncryptedMachine(RuleBasedStateMachine):
    """One encrypted image, and what it must hold."""

    @initialize(kind=st.sampled_from(KINDS))
    def make(self, kind: tuple[str, dict[str, Any]]) -> None:
        self.method, options = kind
        self.folder = tempfile.TemporaryDirectory(prefix="pyvirtio-model-")
        self.path = Path(self.folder.name) / "disk.qcow2"
        self.path.write_bytes(blank(self.method, SIZE, **options))
        self.model = bytearray(SIZE)
        self.snapshots: dict[str, bytes] = {}
        self.made = 0
        self.disk = self._open()

    def _open(self) -> Qcow2Disk:
        disk = pyvirtio.open_disk(self.path, passphrase=PASSPHRASE)
        assert isinstance(disk, Qcow2Disk)
        return disk

    def _range(self, offset: int, length: int, unit: int) -> tuple[int, int]:
        start = offset // unit * unit
        return start, min(SIZE, start + -(-length // unit) * unit) - start

    @rule(offset=anywhere, length=lengths, unit=units, seed=st.integers(0, 255))
    def write(self, offset: int, length: int, unit: int, seed: int) -> None:
        start, length = self._range(offset, length, unit)
        data = random.Random(seed).randbytes(length)
        self.disk.writev(start, [data[: length // 3], data[length // 3 :]])
        self.model[start : start + length] = data

    @rule(offset=anywhere, length=lengths)
    def read(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        one, two = bytearray(length // 2), bytearray(length - length // 2)
        self.disk.readv(offset, [one, two])
        assert_same(one + two, self.model[offset : offset + length])

    @rule(offset=anywhere, length=lengths, unit=units, unmap=st.booleans())
    def write_zeroes(self, offset: int, length: int, unit: int, unmap: bool) -> None:
        start, length = self._range(offset, length, unit)
        self.disk.write_zeroes(start, length, unmap=unmap)
        self.model[start : start + length] = bytes(length)

    @rule(offset=anywhere, length=lengths)
    def discard(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        self.disk.discard(offset, length)
        start, end = discarded(offset, length, SIZE, self.disk.limits.discard_alignment)
        self.model[start:end] = bytes(end - start)

    @precondition(lambda self: len(self.snapshots) < 3)
    @rule()
    def create_snapshot(self) -> None:
        self.made += 1
        name = f"snap{self.made}"
        self.disk.snapshots.create(name)
        self.snapshots[name] = bytes(self.model)

    @precondition(lambda self: self.snapshots)
    @rule(which=anywhere)
    def apply_snapshot(self, which: int) -> None:
        name = list(self.snapshots)[which % len(self.snapshots)]
        self.disk.snapshots.apply(name)
        self.model = bytearray(self.snapshots[name])

    @precondition(lambda self: self.snapshots)
    @rule(which=anywhere)
    def delete_snapshot(self, which: int) -> None:
        name = list(self.snapshots)[which % len(self.snapshots)]
        self.disk.snapshots.delete(name)
        del self.snapshots[name]

    @rule()
    def reopen(self) -> None:
        self.disk.close()
        self.disk = self._open()
        assert_same(self.disk.read(0, SIZE), self.model)

    def teardown(self) -> None:
        if not hasattr(self, "disk"):
            return
        try:
            assert_same(self.disk.read(0, SIZE), self.model)
            assert self.disk.check().clean
            self.disk.close()
            if JUDGED:
                assert_same(peer_read(self.path, self.method), self.model)
                peer_check(self.path, self.method)
        finally:
            with suppress(Exception):
                self.disk.close()
            self.folder.cleanup()


TestEncryptedModel = EncryptedMachine.TestCase
TestEncryptedModel.settings = settings(
    max_examples=25 * SCALE,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
