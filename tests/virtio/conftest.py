"""A machine for tests: guest RAM, a disk in memory, our device, and the driver of the library; and
vhost-user servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio.virtio.driver import Arena, BlockDriver, Registers
from support.vhost_user import Rig

BASE = 0x8000_0000
RAM_SIZE = 1 << 22


class BytesDisk(pyvirtio.Disk):
    """A disk in a bytearray that notes what was asked of it, and can be told to fail."""

    format_name = "bytes"

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, **options)
        self.content = bytearray(size)
        self.calls: list[tuple[Any, ...]] = []
        self.views: list[memoryview] = []
        self.error: Exception | None = None

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    def _readv(self, offset: int, views: list[memoryview], length: int) -> None:
        self._note("read", offset, length)
        self.views = list(views)
        for view in views:
            view[:] = self.content[offset : offset + len(view)]
            offset += len(view)

    def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
        self._note("write", offset, length)
        self.views = list(views)
        for view in views:
            self.content[offset : offset + len(view)] = view
            offset += len(view)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._note("zeroes", offset, length, unmap)
        self.content[offset : offset + length] = bytes(length)

    def _discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)

    def _flush(self) -> None:
        self._note("flush")

    def _truncate(self, size: int, preallocation: str) -> None:
        # In place: threads may be writing.
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))
        self._set_size(size)


class Machine:
    """Everything between a test and the device."""

    def __init__(
        self,
        *,
        memory: str = "buffer",
        disk: Any = None,
        legacy: bool = False,
        order: str = "little",
        notify: str = "inline",
        notification_data: bool = False,
        queue_size: int = 16,
        driver: dict[str, Any] | None = None,
        **device: Any,
    ) -> None:
        self.ram = bytearray(RAM_SIZE)
        self.base = BASE
        self.disk = BytesDisk(1 << 20) if disk is None else disk
        self.memory: Any
        if memory == "buffer":
            self.memory = pyvirtio.GuestMemory.from_buffer(self.ram, BASE)
        else:
            self.memory = pyvirtio.GuestMemory.from_callbacks(self._read, self._write)
        self.levels: list[bool] = []
        self.device = pyvirtio.VirtioBlk(self.disk, queue_size=queue_size, **device)
        self.mmio = pyvirtio.VirtioMmio(
            self.device,
            self.memory,
            self.levels.append,
            legacy=legacy,
            order=order,
            notify=notify,
            notification_data=notification_data,
        )
        self.registers = Registers(self.mmio.read, self.mmio.write, legacy=legacy, order=order)
        self.arena = Arena(BASE, RAM_SIZE)
        self.driver = BlockDriver(
            self.registers,
            self.memory,
            self.arena,
            queue_size=queue_size,
            wait=self.mmio.poll,
            **(driver or {}),
        )

    def _read(self, pa: int, length: int) -> bytes:
        if not BASE <= pa <= pa + length <= BASE + RAM_SIZE:
            raise IndexError("no RAM there")
        return bytes(self.ram[pa - BASE : pa - BASE + length])

    def _write(self, pa: int, data: bytes) -> None:
        if not BASE <= pa <= pa + len(data) <= BASE + RAM_SIZE:
            raise IndexError("no RAM there")
        self.ram[pa - BASE : pa - BASE + len(data)] = data


@pytest.fixture
def make_machine() -> Callable[..., Machine]:
    """``make_machine(**options)``: a machine whose driver is not started."""
    return Machine


@pytest.fixture
def make_started() -> Callable[..., Machine]:
    """The same with the driver started."""

    def make(**options: Any) -> Machine:
        machine = Machine(**options)
        machine.driver.start()
        return machine

    return make


@pytest.fixture
def make_disk() -> Callable[..., BytesDisk]:
    """``make_disk(size, **options)``."""
    return BytesDisk


@pytest.fixture(params=["buffer", "callbacks"])
def started(request: pytest.FixtureRequest) -> Machine:
    """A started machine, over either kind of guest memory."""
    machine = Machine(memory=request.param)
    machine.driver.start()
    return machine


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Makes vhost-user servers, on a disk (in memory if none is given), with a device's options."""
    rigs: list[Rig] = []

    def make(disk: Any = None, **device: Any) -> Rig:
        rigs.append(Rig(tmp_path, disk, **device).__enter__())
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.__exit__()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()
