"""Snapshots that share what has not changed: how it is known, what is written, when all is."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from pyvirtio import ImageError, MachineSnapshots, MemoryDisk
from pyvirtio.machine.dirty import PAGE, ByComparison, ByHash, DirtyPages
from pyvirtio.machine.state import Machine
from pyvirtio.machine.stream import StreamReader, StreamWriter
from support.guests import RAM, Guest, new_disk, parents

# -- finding what changed --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PAGE, 16 * PAGE, 37 * PAGE + 5])
@pytest.mark.parametrize("tracker", [ByComparison, ByHash])
def test_every_page_that_changed_is_found_and_no_other(tracker: Any, size: int) -> None:
    chance, ram, one = random.Random(size), bytearray(size), tracker()
    assert one.changed(memoryview(ram)) == b"\1" * -(-size // PAGE)
    one.settle(memoryview(ram), None)
    for _ in range(5):
        pages = {chance.randrange(-(-size // PAGE)) for _ in range(4)}
        for page in pages:
            at = chance.randrange(page * PAGE, min(size, (page + 1) * PAGE))
            ram[at] ^= 1
        changed = one.changed(memoryview(ram))
        assert {page for page, flag in enumerate(changed) if flag} == pages
        one.settle(memoryview(ram), bytes(changed))
        assert not any(one.changed(memoryview(ram)))


def test_the_emulator_marks_what_it_writes() -> None:
    dirty = DirtyPages(10 * PAGE + 1)
    ram = memoryview(bytearray(10 * PAGE + 1))
    assert bytes(dirty.changed(ram)) == b"\1" * 11
    dirty.settle(ram, None)
    dirty.mark(PAGE - 1, 2)
    dirty.mark(10 * PAGE, 1)
    dirty.pages[5] = 1
    assert [page for page, flag in enumerate(dirty.changed(ram)) if flag] == [0, 1, 5, 10]


def test_dirty_pages_of_another_size_are_refused() -> None:
    guest = Guest(dirty={"main": DirtyPages(RAM + PAGE)})
    with pytest.raises(ValueError, match="dirty pages"):
        guest.snapshots.savevm("one")
    with pytest.raises(ValueError, match="no RAM 'other'"):
        Guest(dirty={"other": DirtyPages(RAM)})


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["compare", "hash", "marks"])
def test_only_dirty_pages_are_written(how: Any) -> None:
    dirty = DirtyPages(RAM)
    guest = Guest(dirty={"main": dirty}) if how == "marks" else Guest(find_dirty=how)
    whole = guest.save("whole")
    assert (whole.whole, whole.pages, whole.ram_bytes) == (True, 101, 101 * PAGE)
    guest.touch(3, 4, 50, 100)
    for page in (3, 4, 50, 100):
        dirty.pages[page] = 1
    part = guest.save("part")
    assert (part.whole, part.pages, part.ram_bytes) == (False, 4, 4 * PAGE)
    assert (guest.save("same").pages, guest.save("again").ram_bytes) == (0, 0)
    now = bytes(guest.ram)
    for name in ("whole", "part"):
        guest.snapshots.loadvm(name)
        assert (bytes(guest.ram) == now) == (name == "part")
    assert guest.disks[0].check().clean


@pytest.mark.parametrize("cluster_size", [512, PAGE, 65536, 2 << 20])
def test_any_cluster_size_and_several_rams(cluster_size: int) -> None:
    chance, disk = random.Random(1), new_disk(cluster_size=cluster_size)
    rams = {
        "large": bytearray(chance.randbytes((5 << 20) + 77)),
        "small": bytearray(b"x" * 5000),
        "empty": bytearray(),
    }
    snapshots = MachineSnapshots(Machine({}, rams), [disk])
    states = []
    for number in range(4):
        for page in chance.sample(range(1280), 1100):  # more than a write's list can be long
            rams["large"][page * PAGE] = chance.randrange(256)
        rams["small"][chance.randrange(5000)] ^= 1
        snapshots.savevm(f"s{number}")
        states.append({name: bytes(ram) for name, ram in rams.items()})
    for number in (2, 0, 3, 1):
        snapshots.loadvm(f"s{number}")
        assert {name: bytes(ram) for name, ram in rams.items()} == states[number]
    assert disk.check().clean


def test_pages_of_zeroes_are_zero_clusters() -> None:
    guest = Guest()
    guest.ram[:] = bytes(RAM)
    assert guest.save("one").ram_bytes == 0
    guest.ram[5] = 1
    assert guest.save("two").ram_bytes == PAGE
    guest.ram[5] = 0
    assert guest.save("three").ram_bytes == 0
    guest.snapshots.loadvm("two")
    assert guest.ram == bytes(5) + b"\1" + bytes(RAM - 6)
    guest.snapshots.loadvm("three")
    assert guest.ram == bytes(RAM)


def test_what_was_loaded_is_what_the_next_one_shares_with() -> None:
    guest = Guest()
    guest.save("one")
    guest.touch(*range(50))
    guest.save("two")
    guest.snapshots.loadvm("one")
    guest.touch(7)
    assert (guest.save("three").pages, guest.snapshots.last_save.whole) == (1, False)


def test_a_fresh_process_goes_on_from_what_it_loads() -> None:
    guest = Guest()
    guest.save("one")
    other = Guest(*guest.disks)
    assert other.save("not loaded").whole
    other = Guest(*guest.disks)
    other.snapshots.loadvm("one")
    other.touch(7)
    assert (other.save("loaded").pages, other.snapshots.last_save.whole) == (1, False)


def test_ram_inside_the_stream_is_loaded_and_not_shared_with() -> None:
    guest = Guest()
    size = guest.machine.save(guest.disks[0].vmstate)
    guest.disks[0].snapshots.create("packed", vm_state_size=size)
    then = bytes(guest.ram)
    guest.touch(5)
    guest.snapshots.loadvm("packed")
    assert guest.ram == then
    assert guest.save("placed").whole
    guest.touch(5)
    guest.snapshots.loadvm("placed")
    assert guest.ram == then


@pytest.mark.parametrize("why", ["deleted", "resized", "forgotten", "taken by another"])
def test_all_is_written_if_there_is_nothing_to_share_with(why: str) -> None:
    guest = Guest()
    guest.save("one")
    guest.touch(1)
    if why == "deleted":
        guest.snapshots.delvm("one")
    elif why == "resized":
        guest.disks[0].truncate(64 << 20)
    elif why == "forgotten":
        guest.snapshots.forget()
    else:  # the same id, perhaps in the same place
        guest.snapshots.delvm("one")
        guest.disks[0].snapshots.create("one")
    assert guest.save("two").whole
    now = bytes(guest.ram)
    guest.touch(*range(9))
    guest.snapshots.loadvm("two")
    assert guest.ram == now
    assert guest.disks[0].check().clean


def test_a_renamed_base_is_found_by_its_uuid() -> None:
    guest = Guest()
    guest.save("one")
    guest.disks[0].snapshots.rename("one", "first")
    guest.touch(1)
    assert (guest.save("two").whole, guest.snapshots.last_save.pages) == (False, 1)
    guest.disks[0].invalidate()
    guest.touch(2)
    assert not guest.save("three").whole
    now = bytes(guest.ram)
    guest.touch(5)
    guest.snapshots.loadvm("three")
    assert guest.ram == now
    assert parents(guest) == {"first": None, "two": "first", "three": "two"}


def test_another_machines_snapshot_is_not_shared_with() -> None:
    guest = Guest()
    guest.save("one")
    base = guest.disks[0].snapshots.find("one")
    guest.snapshots.delvm("one")
    other = Guest(*guest.disks)
    other.ram[:] = bytes(RAM)
    other.save("one")
    # It may come to lie where the base was.
    base.l1_table_offset = guest.disks[0].snapshots.find("one").l1_table_offset
    guest.touch(1)
    assert guest.save("two").whole
    now = bytes(guest.ram)
    guest.touch(5)
    guest.snapshots.loadvm("two")
    assert guest.ram == now


def test_a_save_that_failed_loses_no_dirty_page(monkeypatch: pytest.MonkeyPatch) -> None:
    dirty = DirtyPages(RAM)
    guest = Guest(dirty={"main": dirty})
    guest.save("one")
    guest.touch(9)
    dirty.mark(9 * PAGE, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the test's")

    with monkeypatch.context() as patch:
        patch.setattr(guest.disks[0].snapshots, "create", fail)
        with pytest.raises(OSError, match="the test's"):
            guest.save("two")
    assert guest.save("two").pages == 1
    now = bytes(guest.ram)
    guest.touch(9, 10)
    guest.snapshots.loadvm("two")
    assert guest.ram == now
    assert guest.disks[0].check().clean


@pytest.mark.parametrize("how", ["save", "load"])
def test_a_tracker_that_was_interrupted_is_not_believed(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compares with what was saved before that: a page that is so again would be passed over."""
    guest = Guest()
    guest.save("one")
    one = bytes(guest.ram)
    guest.touch(9)
    if how == "load":
        guest.save("two")
        guest.snapshots.loadvm("one")

    def interrupted(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(ByComparison, "settle", interrupted)
        with pytest.raises(MemoryError):
            guest.save("two") if how == "save" else guest.snapshots.loadvm("two")
    guest.ram[:] = one
    guest.save("three")
    guest.touch(9)
    guest.snapshots.loadvm("three")
    assert guest.ram == one
    assert guest.disks[0].check().clean


def test_compressed_pages_come_back() -> None:
    guest = Guest(new_disk(compression_type="zstd"), compress=True)
    guest.ram[: 50 * PAGE] = b"compressible" * (50 * PAGE // 12) + b"1234567890"[: 50 * PAGE % 12]
    assert guest.save("one").ram_bytes < 60 * PAGE
    now = bytes(guest.ram)
    guest.touch(3)
    guest.save("two")
    guest.snapshots.loadvm("one")
    assert guest.ram == now
    assert guest.disks[0].check().clean


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_all_is_written_where_a_refcount_has_reached_its_limit(bits: int, compress: bool) -> None:
    disk = new_disk(refcount_bits=bits, compression_type="zstd")
    guest = Guest(disk, compress=compress, size=20 * PAGE)
    guest.ram[: 10 * PAGE] = b"compressible" * (10 * PAGE // 12) + b"1234"
    states, whole = [], 0
    for number in range(40):
        guest.touch(10 + number % 10)
        whole += guest.save(f"s{number}").whole
        states.append(bytes(guest.ram))
    for number in range(40):
        guest.snapshots.loadvm(f"s{number}")
        assert guest.ram == states[number]
    assert disk.check().clean
    limit = (1 << bits) - 1
    assert whole >= 40 // limit
    if bits < 8:
        assert (whole == 40) == (bits == 1)
    else:  # eight pages in one cluster are 248 references after 31 saves
        assert whole == (2 if compress else 1)


def test_a_refcount_of_the_disks_at_its_limit_refuses_the_save() -> None:
    disk = new_disk(refcount_bits=2)
    disk.write(0, b"x" * 9000)
    guest = Guest(disk)
    for name in "ab":
        guest.save(name)
    then = bytes(guest.ram)
    guest.touch(1)
    with pytest.raises(ImageError, match="Reference count limit"):
        guest.save("c")
    assert [snapshot.name for snapshot in disk.snapshots] == ["a", "b"]
    assert disk.check().clean
    disk.write(0, b"y" * 9000)  # those that count once
    guest.snapshots.delvm("a")
    guest.save("c")
    now = bytes(guest.ram)
    for name, ram in (("b", then), ("c", now)):
        guest.snapshots.loadvm(name)
        assert guest.ram == ram
    assert disk.check().clean


def test_a_component_that_grows_gets_more_room() -> None:
    class Console:
        state_version = 1
        text = b""

        def save_state(self, stream: Any) -> None:
            stream.data(self.text)

        def load_state(self, stream: Any) -> Any:
            text = stream.data()
            return lambda: setattr(self, "text", text)

    disk, console, ram = new_disk(), Console(), bytearray(random.Random(1).randbytes(RAM))
    snapshots = MachineSnapshots(Machine({"console": console}, {"main": ram}), [disk])
    snapshots.savevm("small")
    console.text = b"x" * 200_000
    snapshots.savevm("large")
    console.text = b"y" * 1000
    snapshots.savevm("small again")
    for name, text in (
        ("large", b"x" * 200_000),
        ("small", b""),
        ("small again", b"y" * 1000),
    ):
        snapshots.loadvm(name)
        assert console.text == text
    assert disk.check().clean


def test_a_page_that_is_damaged_loads_nothing() -> None:
    guest = Guest()
    snapshot = guest.snapshots.savevm("one")
    disk = guest.disks[0]
    with disk.snapshots.open(snapshot) as view:
        size = snapshot.vm_state_size
        stream = bytearray(view.vmstate.read(0, size))
    stream[-1] ^= 1
    guest.snapshots.delvm("one")
    disk.vmstate.write(0, stream)
    disk.snapshots.create("one", vm_state_size=size)
    guest.touch(1)
    before = bytes(guest.ram)
    with pytest.raises(ImageError, match="checksum in page 100"):
        guest.snapshots.loadvm("one")
    assert guest.ram == before


def rewritten(guest: Guest, change: Any) -> None:
    """Replace the snapshot "one" by one whose section ``ram/main`` is what ``change`` makes of its
    fields (size, page, position, checksums)."""
    disk = guest.disks[0]
    snapshot = disk.snapshots.find("one")
    size = snapshot.vm_state_size
    with disk.snapshots.open(snapshot) as view:
        reader = StreamReader(view.vmstate, guest.machine.known_sections())
        state = bytearray(view.vmstate.read(0, size))
        parts = {s.name: (s.version, reader.read(s.name)) for s in reader.sections.values()}
    payload = parts["ram/main"][1]
    fields = change(*struct.unpack_from("<QIQ", payload), payload[20:])
    memory = MemoryDisk(growable=True)
    writer = StreamWriter(memory)
    for name, (version, data) in parts.items():
        if name == "ram/main":
            data = struct.pack("<QIQ", *fields[:3]) + fields[3]
        writer.section(name, version, len(data), [data])
    length = writer.finish()
    state[:length] = memory.read(0, length)
    disk.snapshots.delete(snapshot)
    disk.vmstate.write(0, state)
    disk.snapshots.create("one", vm_state_size=size)


@pytest.mark.parametrize(
    "change",
    [
        lambda size, page, position, sums: (size - 1, page, position, sums),
        lambda size, page, position, sums: (size, 2 * page, position, sums),
        lambda size, page, position, sums: (size, page, position, sums[:-4]),
        lambda size, page, position, sums: (size, page, 1 << 62, sums),
    ],
)
def test_a_placed_section_that_makes_no_sense_loads_nothing(change: Any) -> None:
    guest = Guest()
    guest.save("one")
    rewritten(guest, change)
    guest.touch(1)
    before = bytes(guest.ram)
    with pytest.raises(ImageError, match="ram/main"):
        guest.snapshots.loadvm("one")
    assert guest.ram == before


def test_pages_past_the_end_are_none_even_where_all_is_zeroes() -> None:
    guest = Guest()
    guest.ram[:] = bytes(RAM)
    guest.save("one")
    rewritten(guest, lambda size, page, position, sums: (size, page, position + 1, sums))
    with pytest.raises(ImageError, match="past its end"):
        guest.snapshots.loadvm("one")


def test_places_that_overlap_are_not_shared_with() -> None:
    guest = Guest()
    guest.ram[:] = bytes(RAM)  # the same wherever it is
    guest.save("one")
    rewritten(guest, lambda size, page, position, sums: (size, page, position - 100, sums))
    guest.snapshots.loadvm("one")
    guest.touch(1)
    assert guest.save("two").whole
    now = bytes(guest.ram)
    guest.touch(2)
    guest.snapshots.loadvm("two")
    assert guest.ram == now


def test_a_save_that_failed_changes_no_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest()
    guest.save("one")
    then = bytes(guest.ram)
    guest.touch(9)
    with monkeypatch.context() as patch:
        patch.setattr(guest.disks[0].snapshots, "create", None)
        with pytest.raises(TypeError):
            guest.save("two")
    guest.ram[:] = then
    guest.save("three")
    guest.snapshots.loadvm("three")
    assert guest.ram == then


def test_a_stream_in_the_active_region_is_dropped() -> None:
    guest = Guest()
    guest.disks[0].vmstate.write(0, b"left by another program")
    guest.save("one")
    assert guest.disks[0].vmstate.size == 0
    assert guest.disks[0].check().clean
