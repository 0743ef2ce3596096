"""Snapshots that share what has not changed: how it is known, what is written, when all is."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import ImageError, MachineSnapshots, MemoryDisk
from pyvirtio.machine.dirty import PAGE, ByComparison, ByHash, DirtyPages
from pyvirtio.machine.fork import open_fork
from pyvirtio.machine.lineage import MAX_ANCESTORS, Lineage, parse_lineage, read_lineage
from pyvirtio.machine.state import Machine
from pyvirtio.machine.stream import StreamReader, StreamWriter
from support.peers import requires
from support.qemu import QemuIo, qemu_check, qemu_img, qemu_img_json

RAM = 100 * PAGE + 1000


class Guest:
    """A machine with one RAM, on a disk or two."""

    def __init__(self, *disks: Any, size: int = RAM, **how: Any) -> None:
        self.disks = disks or (new_disk(),)
        self.chance = random.Random(1)
        self.ram = bytearray(self.chance.randbytes(size))
        self.machine = Machine({}, {"main": self.ram})
        self.snapshots = MachineSnapshots(self.machine, self.disks, **how)

    def touch(self, *pages: int) -> None:
        for page in pages:
            start = page * PAGE
            length = min(PAGE, len(self.ram) - start)
            self.ram[start : start + length] = self.chance.randbytes(length)

    def save(self, name: str) -> Any:
        self.snapshots.savevm(name)
        return self.snapshots.last_save


def new_disk(size: int = 1 << 20, **options: Any) -> Any:
    options.setdefault("cluster_size", PAGE)
    return pyvirtio.create_disk(MemoryDisk(growable=True), size, **options)


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


# -- who came from whom ----------------------------------------------------------------------------


def parents(guest: Guest) -> dict[str, str | None]:
    return {
        node.snapshot.name: node.parent.name if node.parent else None
        for node in guest.snapshots.tree()
    }


def test_snapshots_form_a_tree() -> None:
    guest = Guest()
    for name in ("root", "left", "left leaf"):
        guest.save(name)
    guest.snapshots.loadvm("root")
    guest.save("right")
    tree = {"root": None, "left": "root", "left leaf": "left", "right": "root"}
    assert parents(guest) == tree
    assert parents(Guest(*guest.disks)) == tree


def test_a_deleted_parent_leaves_the_one_before_it() -> None:
    guest = Guest()
    for name in ("1", "2", "3", "4"):
        guest.save(name)
    guest.snapshots.delvm("2")
    guest.snapshots.delvm("3")
    assert parents(guest) == {"1": None, "4": "1"}


def test_a_snapshot_that_shares_nothing_has_its_parent_still() -> None:
    guest = Guest()
    guest.save("one")
    guest.disks[0].truncate(64 << 20)
    assert guest.save("two").whole
    assert parents(guest) == {"one": None, "two": "one"}


def test_another_programs_state_is_a_root() -> None:
    guest = Guest()
    guest.save("one")
    guest.disks[0].vmstate.write(0, b"QEVM" + bytes(100))
    guest.disks[0].snapshots.create("theirs", vm_state_size=104)
    assert parents(guest) == {"one": None, "theirs": None}


def test_a_lineage_comes_back_and_stays_short() -> None:
    lineage = Lineage.root()
    for _ in range(2 * MAX_ANCESTORS):
        child = lineage.child()
        assert child.ancestors[0] == lineage.uuid
        lineage = child
    assert len(lineage.ancestors) == MAX_ANCESTORS
    assert parse_lineage(lineage.pack()) == lineage


@pytest.mark.parametrize("cut", [0, 5, 16, -1])
def test_a_lineage_of_another_length_is_refused(cut: int) -> None:
    data = Lineage.root().child().pack()
    with pytest.raises(ImageError, match="lineage"):
        parse_lineage(data[:cut])


def test_a_stream_without_lineage_has_none(make_toy: Any) -> None:
    disk = MemoryDisk(growable=True)
    make_toy().machine.save(disk)
    assert read_lineage(disk) is None


# -- beside the running machine --------------------------------------------------------------------


def test_disks_of_a_snapshot_are_read_beside_the_running_ones() -> None:
    guest = Guest(new_disk(), new_disk())
    for number, disk in enumerate(guest.disks):
        disk.write(0, bytes([number + 1]) * 5000)
    guest.save("one")
    for disk in guest.disks:
        disk.write(0, b"later" * 1000)
    views = guest.snapshots.open("one")
    assert [view.read(0, 5000) for view in views] == [b"\1" * 5000, b"\2" * 5000]
    for view in views:
        view.close()
    guest.snapshots.delvm("one")


def test_clones_go_their_own_ways(tmp_path: Path) -> None:
    disks = [
        pyvirtio.create_disk(tmp_path / "disk", 1 << 20),
        pyvirtio.create_disk(tmp_path / "ram", 1 << 16, cluster_size=PAGE),
    ]
    guest = Guest(*disks, state_disk=disks[1])
    disks[0].write(0, b"shared" * 1000)
    guest.save("one")
    then = bytes(guest.ram)
    guest.touch(1)
    disks[0].write(0, b"parent")
    machines = []
    for number in range(3):
        ram = bytearray(RAM)
        paths = [tmp_path / f"{name} {number}" for name in ("disk", "ram")]
        clone = guest.snapshots.fork("one", Machine({}, {"main": ram}), paths)
        assert ram == then
        clone.disks[0].write(0, b"clone%d" % number)
        ram[0] ^= number + 1
        clone.savevm("own")
        machines.append((clone, ram, paths))
    assert disks[0].read(0, 12) == b"parentshared"
    for number, (clone, ram, paths) in enumerate(machines):
        now = bytes(ram)
        ram[:] = bytes(RAM)
        clone.loadvm("own")
        assert ram == now
        assert clone.disks[0].read(0, 12) == b"clone%dshared" % number
        assert paths[0].stat().st_size < 1 << 20
        for disk in clone.disks:
            assert disk.check().clean
            disk.close()
    for disk in disks:
        disk.close()
    with open_fork(tmp_path / "disk 1") as fork:
        assert fork.read(0, 12) == b"clone1shared"


def test_a_fork_is_not_opened_as_something_else(tmp_path: Path) -> None:
    disk: Any = pyvirtio.create_disk(tmp_path / "disk", 1 << 20)
    disk.write(0, b"then")
    guest = Guest(disk)
    guest.save("machine")
    disk.write(0, b"now!")
    clone = Machine({}, {"main": bytearray(RAM)})
    guest.snapshots.fork("machine", clone, [tmp_path / "fork"]).disks[0].close()
    with pytest.raises(ValueError, match="Unknown driver 'pyvirtio-snapshot'"):
        pyvirtio.open_disk(tmp_path / "fork", read_only=True)
    disk.close()
    with open_fork(tmp_path / "fork", read_only=True) as fork:
        assert fork.read(0, 4) == b"then"
    with pyvirtio.open_disk(tmp_path / "disk") as disk:
        disk.snapshots.create("another")
        disk.snapshots.delete("machine")
    with pytest.raises(ImageError, match="is gone"):
        open_fork(tmp_path / "fork", read_only=True)


# -- large -----------------------------------------------------------------------------------------


@requires("qemu-img", "qemu-io")
def test_a_state_beyond_4_gib_on_a_disk_of_a_tebibyte(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    disk: Any = pyvirtio.create_disk(path, 1 << 40)
    disk.write((1 << 40) - 5000, b"end" * 1000)
    last = 5 << 30
    page = random.Random(1).randbytes(65536)
    with disk.snapshots.draft() as draft:
        draft.write([(0, memoryview(b"start" * 100)), (last, memoryview(page))])
        one = disk.snapshots.create("one", vm_state_size=last + 65536, draft=draft)
    with disk.snapshots.draft(one) as draft:
        draft.write([(last - 65536, memoryview(page))])
        disk.snapshots.create("two", vm_state_size=last + 65536, draft=draft)
    disk.close()
    qemu_check(path)
    for name in ("one", "two"):
        qemu_img("snapshot", "-a", name, path)
        qemu_check(path)
        facts = qemu_img_json("info", path)["snapshots"]
        assert {fact["vm-state-size"] for fact in facts} == {last + 65536}
        with QemuIo(path) as io:
            shown = io.command(f"read -b -v {last} 512").replace(" ", "")
            assert page[:16].hex() in shown
            shown = io.command(f"read -b -v {last - 65536} 512").replace(" ", "")
            assert (page[:16].hex() in shown) == (name == "two")
    with pyvirtio.open_disk(path) as disk:
        assert disk.vmstate.read(last, 65536) == page
        assert disk.read((1 << 40) - 5000, 3000) == b"end" * 1000
    assert path.stat().st_blocks * 512 < 4 << 20
