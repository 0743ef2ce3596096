"""Bitmaps of twin images: the same ones on both, and the same bits set in them.

qemu-img changes QEMU's, and qemu-storage-daemon tells what is in those that qemu-io kept while it
wrote; at the end it reads ours as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyvirtio import Disk

from .daemon import StorageDaemon, bits_digest
from .qemu import qemu_img

if TYPE_CHECKING:
    from .twins import Twins

__all__ = ["TwinBitmaps"]

MAX_BITMAPS = 3
Contents = dict[str, tuple[int, bool, str]]
"""Granularity, whether it records, digest of its bits; by name."""


class TwinBitmaps:
    """What is done with bitmaps of one pair of twins."""

    def __init__(self, twins: Twins) -> None:
        self.twins = twins
        self.names: list[str] = []

    def step(self) -> None:
        """One operation on a bitmap that is there, or (refused by both) on one that is not."""
        chance = self.twins.chance
        actions = ["add", "remove", "enable", "disable", "clear", "merge"]
        action = chance.choices(actions, [6, 1, 2, 2, 2, 3])[0]
        if not self.names:
            action = "add"
        elif action == "add" and len(self.names) == MAX_BITMAPS:
            action = "merge"
        name = chance.choice(self.names) if self.names else ""
        if chance.random() < 0.05:
            name = "none"
        getattr(self, f"_{action}")(name)

    def _both(self, action: str, name: str, us: Callable[[], object], *arguments: object) -> bool:
        twins = self.twins

        def by_qemu() -> None:
            twins.qemu.close()
            try:
                qemu_img("bitmap", f"--{action}", *arguments, "-f", "qcow2", twins.theirs, name)
            finally:
                twins.qemu = twins.qemu_io()

        twins.done[f"{action} b"] += 1
        return twins.both("bitmap", " ".join(map(str, (action, *arguments, name))), us, by_qemu)

    def _add(self, name: str) -> None:
        chance = self.twins.chance
        granularity = chance.choice([None, 512, 512, 4096, 1 << 16, 1 << 20, 256, 1000])
        enabled = chance.random() < 0.8
        name = chance.choice("abcd")
        options = [*([] if enabled else ["--disable"])]
        options += [] if granularity is None else ["-g", str(granularity)]
        if self._both(
            "add",
            name,
            lambda: self.twins.disk.bitmaps.add(name, granularity=granularity, enabled=enabled),
            *options,
        ):
            self.names.append(name)

    def _remove(self, name: str) -> None:
        if self._both("remove", name, lambda: self.twins.disk.bitmaps.remove(name)):
            self.names.remove(name)

    def remove_all(self) -> None:
        """Leave none: with one a snapshot is not applied."""
        for name in list(self.names):
            self._remove(name)

    def _enable(self, name: str) -> None:
        self._both("enable", name, lambda: self.twins.disk.bitmaps.enable(name))

    def _disable(self, name: str) -> None:
        self._both("disable", name, lambda: self.twins.disk.bitmaps.disable(name))

    def _clear(self, name: str) -> None:
        self._both("clear", name, lambda: self.twins.disk.bitmaps.clear(name))

    def _merge(self, name: str) -> None:
        source = self.twins.chance.choice(self.names)
        self._both("merge", name, lambda: self.twins.disk.bitmaps.merge(name, [source]), source)

    def compare(self) -> Contents:
        """What is in ours, which is what QEMU's daemon finds in QEMU's."""
        mine = ours(self.twins.disk)
        if not mine and not self.names:
            return mine
        self.twins.qemu.close()
        try:
            self._same(mine, as_qemu_reads(self.twins.theirs), "in QEMU's image")
        finally:
            self.twins.qemu = self.twins.qemu_io()
        return mine

    def compare_stored(self, mine: Contents) -> None:
        """QEMU finds in our image, which is closed, what we had in it."""
        if mine:
            self._same(mine, as_qemu_reads(self.twins.ours), "by QEMU in our image")

    def _same(self, mine: Contents, its: Contents, where: str) -> None:
        if mine != its:
            self.twins.fail(f"bitmaps are {mine}, {where} {its}")


def ours(disk: Disk) -> Contents:
    """The bitmaps of an open image of ours."""
    return {
        bitmap.name: (
            bitmap.granularity,
            bitmap.enabled,
            bits_digest(bitmap.dirty(), bitmap.granularity, disk.size),
        )
        for bitmap in disk.bitmaps
    }


def as_qemu_reads(path: Path) -> Contents:
    """The bitmaps of an image that nobody has open for writing."""
    with StorageDaemon(path, read_only=True) as daemon:
        return {
            name: (found["granularity"], found["recording"], daemon.digest(name))
            for name, found in daemon.bitmaps().items()
        }
