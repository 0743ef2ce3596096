"""The interrupt line that MMIO and PCI share: what raises it, and who is told, by which thread."""

from __future__ import annotations

import threading

import pytest

from pyvirtio.virtio.line import InterruptLine


def test_only_changes_of_the_level_are_told() -> None:
    levels: list[bool] = []
    line = InterruptLine(levels.append)
    line.add(1)
    line.add(2)
    assert (line.remove(1), line.causes, line.level, levels) == (3, 2, True, [True])
    line.remove(2)
    line.remove(2)
    assert (line.level, levels) == (False, [True, False])


def test_a_masked_line_is_low_and_keeps_its_causes() -> None:
    levels: list[bool] = []
    line = InterruptLine(levels.append)
    line.add(1)
    for masked in (True, False):
        line.masked = masked
        line.update()
    assert (line.causes, levels) == (1, [True, False, True])


def test_without_a_callback_the_level_can_be_asked() -> None:
    line = InterruptLine(None)
    line.add(1)
    assert line.level
    assert line.remove(-1) == 1
    assert not line.level


def test_a_guest_served_inside_the_callback_sees_the_line_fall() -> None:
    seen: list[tuple[str, bool]] = []

    def interrupt(level: bool) -> None:
        seen.append(("told", level))
        if level:  # its handler runs here, and acknowledges
            line.remove(1)
        seen.append(("done", level))

    line = InterruptLine(interrupt)
    line.add(1)
    assert seen == [("told", True), ("told", False), ("done", False), ("done", True)]


def test_what_another_thread_changes_meanwhile_is_told_by_the_first() -> None:
    told: list[tuple[bool, int]] = []

    def interrupt(level: bool) -> None:
        told.append((level, threading.get_ident()))
        if level:
            other = threading.Thread(target=line.remove, args=(1,))
            other.start()
            other.join()
            assert len(told) == 1

    line = InterruptLine(interrupt)
    line.add(1)
    assert told == [(True, threading.get_ident()), (False, threading.get_ident())]


def test_a_callback_that_raises_is_told_the_next_change() -> None:
    told: list[bool] = []

    def interrupt(level: bool) -> None:
        told.append(level)
        if level:
            raise OSError("stop")

    line = InterruptLine(interrupt)
    with pytest.raises(OSError, match="stop"):
        line.add(1)
    line.remove(1)
    assert told == [True, False]
