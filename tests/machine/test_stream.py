"""The stream: what was written comes back whole, or nothing does."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyvirtio
from pyvirtio import ImageError, MemoryDisk, UnsupportedError
from pyvirtio.backend.state import StateReader, StateWriter
from pyvirtio.machine.state import Machine
from pyvirtio.machine.stream import Known, StreamReader, StreamWriter


def memory(data: bytes = b"") -> MemoryDisk:
    disk = MemoryDisk(growable=True)
    if data:
        disk.write(0, data)
    return disk


def saved(machine: Machine) -> bytes:
    disk = memory()
    return disk.read(0, machine.save(disk))


def stream(*sections: tuple[str, int, bytes]) -> bytes:
    disk = memory()
    writer = StreamWriter(disk)
    for name, version, payload in sections:
        writer.section(name, version, len(payload), [payload])
    return disk.read(0, writer.finish())


def checked(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data))


KNOWN = {"a": Known(3, 1 << 30), "b": Known(1, 10)}


# -- layout ----------------------------------------------------------------------------------------


def test_the_layout_is_the_documented_one() -> None:
    end = struct.pack("<4sIQ", b"ENDS", 1, 16 + 23 + 9 + 20)
    assert stream(("a", 3, b"hello")) == (
        checked(b"\x93pyvmst\n" + struct.pack("<I", 1))
        + checked(b"SECT" + struct.pack("<HIQ", 1, 3, 5) + b"a")
        + checked(b"hello")
        + checked(end)
    )


def test_sections_come_back_with_name_version_and_payload() -> None:
    reader = StreamReader(memory(stream(("a", 2, b"x" * 99), ("b", 0, b""))), KNOWN)
    assert [(s.name, s.version, s.length) for s in reader.sections.values()] == [
        ("a", 2, 99),
        ("b", 0, 0),
    ]
    assert (reader.read("a"), reader.read("b")) == (b"x" * 99, b"")
    assert reader.read("a", 90, 5) == b"xxxxx"


def test_a_long_payload_is_written_in_aligned_pieces() -> None:
    class Noting(MemoryDisk):
        def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
            calls.append((offset, length))
            super()._writev(offset, views, length)

    calls: list[tuple[int, int]] = []
    disk = Noting(growable=True)
    payload = bytes(range(256)) * 10_000
    writer = StreamWriter(disk)
    writer.section("a", 1, 2 * len(payload), [payload, memoryview(payload).cast("I")])
    size = writer.finish()
    assert not any(offset % (1 << 20) for offset, _ in calls)
    assert sum(length for _, length in calls) == size
    assert StreamReader(disk, KNOWN).read("a") == 2 * payload


def test_what_comes_after_the_end_does_not_matter() -> None:
    StreamReader(memory(stream(("a", 1, b"x")) + b"rest"), KNOWN)


# -- refusals --------------------------------------------------------------------------------------


def test_an_unknown_section_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="unknown section 'gpu'") as caught:
        StreamReader(memory(stream(("a", 1, b""), ("gpu", 1, b""))), KNOWN)
    assert caught.value.feature == "gpu"


def test_a_newer_section_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'a' of the VM state is of version 4") as caught:
        StreamReader(memory(stream(("a", 4, b""))), KNOWN)
    assert caught.value.feature == "a"


def test_a_newer_stream_is_refused() -> None:
    data = checked(b"\x93pyvmst\n" + struct.pack("<I", 2)) + b"anything"
    with pytest.raises(UnsupportedError, match="version 2"):
        StreamReader(memory(data), KNOWN)


def test_a_payload_longer_than_there_is_use_for_is_not_read() -> None:
    class Endless:
        size = 1 << 62

        def readv(self, position: int, buffers: Any) -> None:
            memory(data).readv(position, buffers)

    data = stream()[:16] + checked(b"SECT" + struct.pack("<HIQ", 1, 1, 1 << 60) + b"b") + bytes(99)
    with pytest.raises(ImageError) as caught:
        StreamReader(Endless(), KNOWN)
    assert (caught.value.value, caught.value.limit) == (1 << 60, 10)


def test_a_section_twice_is_refused() -> None:
    one = stream(("a", 1, b"x"))
    section = one[16:-20]
    two = one[:-20] + section
    two += checked(struct.pack("<4sIQ", b"ENDS", 2, len(two) + 20))
    with pytest.raises(ImageError, match="two sections 'a'"):
        StreamReader(memory(two), KNOWN)


def test_a_section_taken_out_is_noticed() -> None:
    one = stream(("a", 1, b"x"))
    with pytest.raises(ImageError, match="not its own"):
        StreamReader(memory(one[:16] + one[-20:]), KNOWN)


def test_something_else_is_refused() -> None:
    with pytest.raises(ImageError):
        StreamReader(memory(b"QEVM" + bytes(1000)), KNOWN)
    with pytest.raises(ImageError, match="ends too soon"):
        StreamReader(memory(), KNOWN)


def test_a_payload_of_another_length_than_announced_is_not_written() -> None:
    with pytest.raises(ValueError, match="was to have"):
        StreamWriter(memory()).section("a", 1, 5, [b"four"])


@pytest.mark.parametrize("name", ["", "n" * 256])
def test_a_name_that_cannot_be_kept_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        StreamWriter(memory()).section(name, 1, 0, [])


# -- values ----------------------------------------------------------------------------------------


def test_values_come_back() -> None:
    writer = StateWriter()
    writer.u8(255)
    writer.u16(65535)
    writer.u32((1 << 32) - 1)
    writer.u64((1 << 64) - 1)
    writer.flag(True)
    writer.data(b"bytes")
    writer.text("täxt")
    reader = StateReader(bytes(writer), name="x", version=1)
    assert [reader.u8(), reader.u16(), reader.u32(), reader.u64()] == [
        (1 << bits) - 1 for bits in (8, 16, 32, 64)
    ]
    assert (reader.flag(), reader.data(), reader.text()) == (True, b"bytes", "täxt")
    reader.end()


@pytest.mark.parametrize(
    ("data", "method"),
    [
        (b"\1", "u16"),
        (b"\2", "flag"),
        (b"\x05\0\0\0four", "data"),
        (b"\1\0\0\0\xff", "text"),
        (b"left", "end"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(data: bytes, method: str) -> None:
    with pytest.raises(ImageError, match="'cpu'"):
        getattr(StateReader(data, name="cpu", version=1), method)()


def test_a_value_out_of_range_is_not_saved() -> None:
    with pytest.raises(OverflowError):
        StateWriter().u8(256)


# -- a machine -------------------------------------------------------------------------------------


def test_a_machine_becomes_what_was_saved(make_toy: Any) -> None:
    one, other = make_toy(), make_toy()
    one.run(1)
    other.run(2)
    other.machine.load(memory(saved(one.machine)))
    assert other.everything == one.everything


def test_pages_of_zeroes_are_not_stored(make_toy: Any) -> None:
    toy = make_toy(64 << 20)
    toy.ram[5_000_000:5_000_010] = b"not zeroes"
    assert len(saved(toy.machine)) < 3 * 4096


def test_an_older_component_is_loaded_by_its_version(make_toy: Any) -> None:
    toy = make_toy()
    toy.run(1)
    toy.cpu.user_mode = True
    old = struct.pack("<Q8I", 12, *range(8))
    data = saved(toy.machine)
    reader = StreamReader(memory(data), {name: Known(9, 1 << 30) for name in _names(toy.machine)})
    parts = [(s.name, s.version, reader.read(s.name)) for s in reader.sections.values()]
    parts[0] = ("component/cpu", 1, old)
    toy.machine.load(memory(stream(*parts)))
    assert (toy.cpu.pc, toy.cpu.registers, toy.cpu.user_mode) == (12, list(range(8)), False)


def _names(machine: Machine) -> list[str]:
    return ["component/cpu", "component/console", "ram/main", "ram/shadow"]


def test_every_flipped_byte_is_noticed_and_nothing_is_loaded(make_toy: Any) -> None:
    one, other = make_toy(300), make_toy(300)
    one.cpu.pc, one.console.waiting = 400, b"abc"
    one.ram[:] = bytes(range(100)) * 3
    other.console.name = "mine"
    before = other.everything
    data = saved(one.machine)
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 1 << index % 8
        with pytest.raises((ImageError, UnsupportedError)):
            other.machine.load(memory(bytes(damaged)))
        assert other.everything == before


def test_every_truncation_is_noticed_and_nothing_is_loaded(make_toy: Any) -> None:
    one, other = make_toy(300), make_toy(300)
    before = other.everything
    one.cpu.pc = 400
    data = saved(one.machine)
    for length in range(len(data)):
        with pytest.raises(ImageError):
            other.machine.load(memory(data[:length]))
    assert other.everything == before


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("component/cpu", struct.pack("<Q8I?", 3, *range(8), True)),  # its own check
        ("component/cpu", b"short"),
        ("component/cpu", struct.pack("<Q8I?", 4, *range(8), True) + b"more"),
        ("component/console", struct.pack("<I3sI1sHB", 3, b"tty", 1, b"x", 2, 7)),
        ("ram/main", b""),
        ("ram/main", struct.pack("<QIB", 300, 4096, 2)),  # a page that is none
        ("ram/main", struct.pack("<QIB", 300, 4096, 1) + bytes(299)),
        ("ram/main", struct.pack("<QIB", 299, 4096, 1) + bytes(299)),
        ("ram/main", struct.pack("<QIB", 300, 512, 1) + bytes(300)),
    ],
)
def test_a_section_that_makes_no_sense_loads_nothing(
    make_toy: Any, name: str, payload: bytes
) -> None:
    one, other = make_toy(300), make_toy(300)
    one.cpu.pc, one.ram[0] = 400, 1
    before = other.everything
    reader = StreamReader(
        memory(saved(one.machine)), {n: Known(9, 1 << 30) for n in _names(one.machine)}
    )
    parts = {s.name: (s.version, reader.read(s.name)) for s in reader.sections.values()}
    parts[name] = (parts[name][0], payload)
    data = stream(*((n, version, part) for n, (version, part) in parts.items()))
    with pytest.raises(ImageError):
        other.machine.load(memory(data))
    assert other.everything == before


Parts = list[tuple[str, int, bytes]]
"""Name, version and payload of each section."""


def parts_of(machine: Machine, data: bytes) -> Parts:
    names = ["lineage", *_names(machine)]
    reader = StreamReader(memory(data), {n: Known(9, 1 << 30) for n in names})
    return [(s.name, s.version, reader.read(s.name)) for s in reader.sections.values()]


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_damage_of_any_kind_is_refused_or_changes_nothing(make_toy: Any, data: Any) -> None:
    """Bytes that are others, that lack, come twice, or stand elsewhere."""
    one, other = make_toy(300), make_toy(300)
    one.run(1)
    before, wanted = other.everything, one.everything
    stream = bytearray(saved(one.machine))
    for _ in range(data.draw(st.integers(1, 4))):
        start, end, to = (data.draw(st.integers(0, len(stream))) for _ in range(3))
        start, end = sorted((start, end))
        part = bytes(stream[start:end])
        match data.draw(st.sampled_from(["flip", "cut", "drop", "double", "move", "noise"])):
            case "flip" if part:
                stream[start] ^= data.draw(st.integers(1, 255))
            case "cut":
                del stream[start:]
            case "drop":
                del stream[start:end]
            case "double":
                stream[to:to] = part
            case "move":
                del stream[start:end]
                stream[to:to] = part
            case "noise":
                stream[start : start + 8] = data.draw(st.binary(max_size=12))
    try:
        other.machine.load(memory(bytes(stream)))
    except (ImageError, UnsupportedError):
        assert other.everything == before
    else:
        assert other.everything == wanted


def kept(machine: Machine) -> bytes:
    """The VM state of a snapshot: RAM lies behind the stream."""
    disk: Any = pyvirtio.create_disk(MemoryDisk(growable=True), 1 << 20, cluster_size=4096)
    pyvirtio.MachineSnapshots(machine, [disk]).savevm("one")
    with disk.snapshots.open("one") as view:
        return bytes(view.vmstate.reader().read())


@pytest.mark.parametrize("placed", [False, True])
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_an_enemys_stream_is_loaded_whole_or_refused(
    make_toy: Any, placed: bool, data: Any
) -> None:
    """Sections of any version, contents and order, all with the right checksums."""
    one, other = make_toy(300), make_toy(300)
    one.run(1)
    before = other.everything
    whole = kept(one.machine) if placed else saved(one.machine)
    parts = parts_of(one.machine, whole)
    names = [*_names(one.machine), "lineage", "gpu"]
    for _ in range(data.draw(st.integers(1, 4))):
        number = data.draw(st.integers(0, len(parts) - 1))
        name, version, payload = parts[number]
        match data.draw(st.sampled_from(["version", "name", "drop", "swap", "patch", "payload"])):
            case "version":
                version = data.draw(st.integers(0, 3))
            case "name":
                name = data.draw(st.sampled_from(names))
            case "drop" if len(parts) > 1:
                del parts[number]
                continue
            case "swap":
                parts.reverse()
                continue
            case "patch":
                at = data.draw(st.integers(0, len(payload)))
                patch = data.draw(st.binary(max_size=8))
                payload = payload[:at] + patch + payload[at + len(patch) :]
            case "payload":
                payload = data.draw(st.binary(max_size=60))
        if name not in [n for i, (n, *_) in enumerate(parts) if i != number]:
            parts[number] = name, version, payload
    changed = stream(*parts)
    try:
        other.machine.load(memory(changed + whole[len(changed) :]))
    except (ImageError, UnsupportedError):
        assert other.everything == before
    else:
        assert set(_names(one.machine)) <= {name for name, *_ in parts}


def test_a_missing_section_is_named(make_toy: Any) -> None:
    toy = make_toy(300)
    with pytest.raises(ImageError, match="no section 'component/cpu'"):
        toy.machine.load(memory(stream()))


def test_a_machine_with_other_parts_is_refused_by_name(make_toy: Any) -> None:
    toy = make_toy(300)
    with pytest.raises(UnsupportedError, match="'component/console'"):
        Machine({"cpu": toy.cpu}, {}).load(memory(saved(toy.machine)))


def test_ram_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        Machine({}, {"rom": b"bytes"})


def test_the_machine_holds_no_view_of_its_ram(make_toy: Any) -> None:
    toy = make_toy(300)
    toy.machine.load(memory(saved(toy.machine)))
    toy.ram.append(0)  # a view would forbid it
