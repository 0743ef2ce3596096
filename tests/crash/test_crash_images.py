"""The simulator of power failures itself: it must allow what disks do, and no more."""

from __future__ import annotations

import random

from support.crash import SECTOR, CrashImage, GuestHistory, crash_images
from support.filters import Event


def sectors(*values: int) -> bytes:
    return b"".join(bytes([value]) * SECTOR for value in values)


def write(sector: int, *values: int) -> Event:
    data = sectors(*values)
    return Event("write", sector * SECTOR, data, len(data))


def outcomes(log: list[Event], start: bytes) -> set[bytes]:
    """All images, by the first byte of each sector."""
    found = set()
    for _, image in crash_images(log, start, seed=1, random_each=200):
        assert isinstance(image, CrashImage)
        assert all(len(set(image.data[s : s + SECTOR])) == 1 for s in range(0, len(start), SECTOR))
        found.add(image.data[::SECTOR])
    return found


def test_writes_without_a_flush_come_in_any_order_and_torn() -> None:
    found = outcomes([write(0, 1, 1), write(2, 2)], sectors(0, 0, 0))
    assert found == {bytes([a, b, c]) for a in (0, 1) for b in (0, 1) for c in (0, 2)}


def test_what_was_flushed_is_never_lost() -> None:
    found = outcomes([write(0, 1), Event("flush"), write(1, 2)], sectors(0, 0))
    assert found == {b"\0\0", b"\1\0", b"\1\2"}


def test_a_write_after_the_flush_is_never_seen_before_it() -> None:
    log = [write(0, 1), Event("flush"), write(1, 2), Event("flush")]
    assert b"\0\2" not in outcomes(log, sectors(0, 0))


def test_a_sector_holds_any_of_its_versions_since_the_flush() -> None:
    assert outcomes([write(0, 1), write(0, 2)], sectors(9)) == {b"\x09", b"\1", b"\2"}


def test_part_of_a_sector_keeps_the_rest_of_it() -> None:
    log = [Event("write", 100, b"a", 1), Event("write", 200, b"b", 1)]
    for _, image in crash_images(log, sectors(0), seed=1, random_each=20):
        assert isinstance(image, CrashImage)
        if image.data[200]:
            assert image.data[100]  # the cache held both when it wrote the sector


def test_the_length_of_the_file_may_lag_behind() -> None:
    log = [Event("truncate", length=4 * SECTOR), write(3, 7)]
    lengths = set()
    for _, image in crash_images(log, sectors(0), seed=1, random_each=200):
        assert isinstance(image, CrashImage)
        lengths.add(len(image.data) // SECTOR)
    assert lengths == {1, 4}


def test_the_guest_may_find_old_or_new_but_nothing_else() -> None:
    history = GuestHistory(sectors(1, 1))
    history.change(sectors(2, 1))
    history.change(sectors(3, 1))
    for value in (1, 2, 3):
        assert history.problem(sectors(value, 1)) is None
    assert history.problem(sectors(4, 1)) is not None
    assert history.problem(sectors(3, 2)) is not None
    assert history.problem(sectors(1, 1, 0)) is not None  # another size
    history.flushed()
    assert history.problem(sectors(3, 1)) is None
    assert history.problem(sectors(2, 1)) is not None


def test_an_honest_cache_passes_the_guests_judgement() -> None:
    """A raw disk, where the guest's sectors are the file's, never breaks the guest's rules."""
    chance = random.Random(5)
    contents = bytearray(sectors(*range(16)))
    history = GuestHistory(bytes(contents))
    log: list[Event] = []
    for _ in range(40):
        if chance.random() < 0.2:
            log += [Event("flush"), Event("mark", mark="flushed")]
            continue
        sector, value = chance.randrange(15), chance.randrange(256)
        event = write(sector, value, value)
        contents[event.offset : event.offset + event.length] = event.data
        log += [Event("mark", mark=bytes(contents)), event]
    for _, thing in crash_images(log, sectors(*range(16)), seed=3, random_each=5):
        if isinstance(thing, CrashImage):
            assert history.problem(thing.data) is None
        elif thing.mark == "flushed":
            history.flushed()
        else:
            assert isinstance(thing.mark, bytes)
            history.change(thing.mark)
