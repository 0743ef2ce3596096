"""Disks of bytes against a bytearray: any requests in any order."""

import os
import tempfile

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pyvirtio import FileDisk, MemoryDisk, RawDisk

SIZE = 40000
LIMIT = 60000

offsets = st.integers(0, SIZE) | st.sampled_from([0, 511, 512, 4095, 4096, 8192, SIZE])
lengths = st.integers(0, 9000) | st.sampled_from([0, 1, 512, 4096, 8192])


class DiskMachine(RuleBasedStateMachine):
    """One disk and the bytearray it should be."""

    growable = False

    def make(self, folder):
        raise NotImplementedError

    def outside(self):
        """The whole contents as something else than the disk sees them; None if nothing can."""
        return None

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.disk = self.make(self.folder.name)
        self.model = bytearray(self.disk.size)

    def teardown(self):
        if hasattr(self, "disk"):
            self.disk.close()
            self.folder.cleanup()

    def clip(self, offset, length):
        if self.growable:
            return offset, length
        offset = min(offset, len(self.model))
        return offset, min(length, len(self.model) - offset)

    def store(self, offset, data):
        if data and offset + len(data) > len(self.model):
            self.model.extend(bytes(offset + len(data) - len(self.model)))
        self.model[offset : offset + len(data)] = data

    @rule(offset=offsets, length=lengths, seed=st.integers(1, 255), cuts=st.integers(1, 5))
    def write(self, offset, length, seed, cuts):
        offset, length = self.clip(offset, length)
        data = bytes((seed + i // 7) & 255 for i in range(length))
        step = length // cuts + 1
        self.disk.writev(offset, [data[i : i + step] for i in range(0, length, step)])
        self.store(offset, data)

    @rule(offset=offsets, length=lengths, cuts=st.integers(1, 5))
    def read(self, offset, length, cuts):
        offset, length = self.clip(offset, length)
        step = length // cuts + 1
        buffers = [bytearray(b"?" * min(step, length - i)) for i in range(0, length, step)]
        self.disk.readv(offset, [memoryview(buffer) for buffer in buffers])
        expected = self.model[offset : offset + length].ljust(length, b"\0")
        assert b"".join(buffers) == expected

    @rule(offset=offsets, length=lengths, unmap=st.booleans())
    def write_zeroes(self, offset, length, unmap):
        offset, length = self.clip(offset, length)
        self.disk.write_zeroes(offset, length, unmap=unmap)
        self.store(offset, bytes(length))

    @rule(offset=offsets, length=lengths)
    def discard(self, offset, length):
        offset, length = self.clip(offset, length)
        self.disk.discard(offset, length)
        inside = max(0, min(length, len(self.model) - offset))
        found = self.disk.read(offset, inside)
        for old, new in zip(self.model[offset : offset + inside], found, strict=True):
            assert new in (0, old)
        self.model[offset : offset + inside] = found

    @rule(size=st.integers(0, LIMIT))
    def truncate(self, size):
        self.disk.truncate(size, shrink=True)
        del self.model[size:]
        self.model.extend(bytes(self.disk.size - len(self.model)))  # raw rounds up to a sector

    @rule()
    def flush(self):
        self.disk.flush()

    @rule()
    def block_status_is_true(self):
        position = 0
        for extent in self.disk.extents():
            if extent.zero:
                assert not any(self.model[position : position + extent.length])
            position += extent.length
        assert position == len(self.model)

    @invariant()
    def same(self):
        if hasattr(self, "disk"):
            assert self.disk.size == len(self.model)
            outside = self.outside()
            if outside is not None:
                assert outside == self.model


class FileMachine(DiskMachine):
    cache = "writeback"

    def make(self, folder):
        self.path = os.path.join(folder, "disk")
        return FileDisk.create(self.path, SIZE, growable=self.growable, cache=self.cache)

    def outside(self):
        with open(self.path, "rb") as file:
            return file.read()

    @rule(read_only=st.booleans())
    def reopen(self, read_only):
        self.disk.reopen(read_only=read_only)
        self.disk.reopen(read_only=False)


class GrowableFileMachine(FileMachine):
    growable = True


class DirectFileMachine(FileMachine):
    growable = True
    cache = "none"


class MemoryMachine(DiskMachine):
    def make(self, folder):
        return MemoryDisk(SIZE, growable=self.growable)

    def outside(self):
        return self.disk.getvalue()


class GrowableMemoryMachine(MemoryMachine):
    growable = True


class RawMachine(DiskMachine):
    def make(self, folder):
        file = FileDisk.create(os.path.join(folder, "disk"), SIZE + 700, growable=True)
        return RawDisk(file, offset=700)


def cases():
    for machine in (
        FileMachine,
        GrowableFileMachine,
        DirectFileMachine,
        MemoryMachine,
        GrowableMemoryMachine,
        RawMachine,
    ):
        case = machine.TestCase
        case.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
        yield pytest.param(case, id=machine.__name__)


def has_o_direct():
    with tempfile.TemporaryDirectory() as folder:
        try:
            FileDisk.create(os.path.join(folder, "disk"), cache="none").close()
        except OSError:
            return False
    return True


@pytest.mark.parametrize("case", list(cases()))
def test_a_disk_is_a_bytearray(case):
    if "Direct" in case.__qualname__ and not has_o_direct():
        pytest.skip("this file system has no O_DIRECT")
    case().runTest()
