"""Twin images: one kept by us, one by QEMU, through the same operations; QEMU judges both.

After each step the guest bytes that it touched are compared; now and then, and at the end,
everything: what both hold, what both say is allocated, and ``qemu-img check`` of ours.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyvirtio
from pyvirtio import Disk, PyvirtioError
from pyvirtio.qcow2 import Qcow2Disk

from .features import WEIGHTS, Features, Meetings
from .maps import changes, our_map, qemu_map, states
from .qemu import (
    PeerError,
    QemuIo,
    qemu_check,
    qemu_create,
    qemu_img,
    qemu_img_json,
)
from .twin_bitmaps import TwinBitmaps
from .workload import first_difference, runs

SECTOR = 512
MAX_LENGTH = 1 << 19
MAX_SNAPSHOTS = 3
_NO_FLUSH = {"cache.no-flush": "on"}


class Mismatch(AssertionError):
    """We and QEMU do not agree."""


class Twins:
    """The two images, open: ours with us, the other with a long-lived qemu-io."""

    def __init__(self, folder: Path, features: Features, *, seed: int) -> None:
        self.features = features
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.story: list[str] = [f"{features}, seed {seed}"]
        self.ours, self.theirs = folder / "ours.qcow2", folder / "theirs.qcow2"
        self.names: list[str] = []
        self.bitmaps = TwinBitmaps(self)
        self._number = 0
        cluster = features.cluster_size
        self.largest = max(24 * cluster, 300 * SECTOR)
        self.size = self.largest // 2 // SECTOR * SECTOR
        if self.chance.random() < 0.5:
            self.size -= SECTOR  # it does not end with a cluster
        options = features.options()
        options |= self._make_backing(folder)
        ours = dict(options)
        for name in ("extended_l2", "lazy_refcounts"):
            if getattr(features, name):
                ours[name] = True
                options[name] = "on"
        pyvirtio.create_disk(self.ours, self.size, format="qcow2", **ours).close()
        qemu_create(self.theirs, self.size, **options)
        self._open()

    def _make_backing(self, folder: Path) -> dict[str, Any]:
        kind = self.features.backing
        if kind == "none":
            return {}
        length = {"shorter": self.size // 3, "longer": self.largest, "chain": self.size * 2 // 3}
        raw = folder / "base.raw"
        # No zeroes and no holes: what QEMU says of them is the file's matter, not the format's.
        sectors = length[kind] // SECTOR
        raw.write_bytes(b"".join(bytes([1 + i % 255]) * SECTOR for i in range(sectors)))
        if kind != "chain":
            return {"backing_file": raw.name, "backing_fmt": "raw"}
        middle = folder / "middle.qcow2"
        qemu_create(middle, self.size // 2 // SECTOR * SECTOR, backing_file=raw.name,
                    backing_fmt="raw", cluster_size=4096)  # fmt: skip
        with QemuIo(middle) as qemu:
            qemu.write(0, self.size // 4, 0xAA)
            if self.size >= 1 << 15:
                qemu.write_zeroes(8192, 4096)
        return {"backing_file": middle.name, "backing_fmt": "qcow2"}

    # -- open and closed -------------------------------------------------------------------------

    def _open(self) -> None:
        disk = pyvirtio.open_disk(self.ours, cache="unsafe")
        assert isinstance(disk, Qcow2Disk)
        self.disk = disk
        self.qemu = self.qemu_io()

    def qemu_io(self) -> QemuIo:
        return QemuIo(self.theirs, discard="unmap", **_NO_FLUSH)

    def close(self) -> None:
        """Close both."""
        self.disk.close()
        self.qemu.close()

    def _closed(self, work: Callable[[], None]) -> None:
        """Do something while neither is open."""
        self.close()
        try:
            work()
        finally:
            self._open()

    # -- steps -----------------------------------------------------------------------------------

    def step(self) -> None:
        """One operation, of whatever kind, by both."""
        kind = self.chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if kind in ("write", "zeroes", "unmap", "discard"):
            self._request(kind)
        elif kind == "bitmap":
            self.bitmaps.step()
        else:
            getattr(self, f"_{kind}")()

    def both(
        self, kind: str, text: str, us: Callable[[], object], qemu: Callable[[], object]
    ) -> bool:
        """Have both do it; True if they did, False if both refused."""
        self.story.append(f"{kind} {text}")
        self.done[kind] += 1
        refusals = []
        for side in (us, qemu):
            try:
                side()
                refusals.append(None)
            except (PyvirtioError, PeerError, ValueError, KeyError) as error:
                refusals.append(error)
        if (refusals[0] is None) != (refusals[1] is None):
            self.fail(f"one refuses: we say {refusals[0]!r}, QEMU says {refusals[1]!r}")
        return refusals[0] is None

    def _where(self) -> tuple[int, int]:
        chance, size, cluster = self.chance, self.disk.size, self.features.cluster_size
        offset = chance.randrange(size // SECTOR) * SECTOR
        length = chance.randint(1, max(1, min(4 * cluster, MAX_LENGTH) // SECTOR)) * SECTOR
        how = chance.random()
        if how < 0.5:
            offset -= offset % cluster
            length = -(-length // cluster) * cluster
        elif how < 0.6:  # not even sectors
            offset += chance.randrange(SECTOR)
            length = max(1, length - chance.randrange(SECTOR))
        return offset, min(length, size - offset)

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        cluster, end = self.features.cluster_size, offset + length
        offset -= offset % cluster
        return offset, min(self.disk.size, end + -end % cluster) - offset

    def _without_parts_of_compressed(self, offset: int, length: int) -> tuple[int, int]:
        """The range, wider where it begins or ends inside a compressed cluster of subclusters."""
        if not self.features.extended_l2:
            return offset, length
        cluster, end = self.features.cluster_size, offset + length
        if self.disk.block_status(offset, 1).compressed:
            offset -= offset % cluster
        if self.disk.block_status(end - 1, 1).compressed:
            end = min(self.disk.size, end + -end % cluster)
        return offset, end - offset

    def _request(self, kind: str) -> None:
        offset, length = self._where()
        value = self.chance.randint(1, 255)
        disk, qemu = self.disk, self.qemu
        if kind == "write":
            self.both(
                kind,
                f"{offset} {length} {value}",
                lambda: disk.write(offset, bytes([value]) * length),
                lambda: qemu.write(offset, length, value),
            )
        elif kind == "discard":
            if self.bitmaps.names:
                offset, length = self._whole_clusters(offset, length)
            self.both(
                kind,
                f"{offset} {length}",
                lambda: disk.discard(offset, length),
                lambda: qemu.discard(offset, length),
            )
        else:
            unmap = kind == "unmap"
            offset, length = self._without_parts_of_compressed(offset, length)
            self.both(
                kind,
                f"{offset} {length}",
                lambda: disk.write_zeroes(offset, length, unmap=unmap),
                lambda: qemu.write_zeroes(offset, length, unmap=unmap),
            )
        self._compare_part(offset, length)

    def _compressed(self) -> None:
        """Compressed writes to clusters that neither has yet (QEMU refuses others)."""
        cluster = self.features.cluster_size
        free = [
            offset
            for offset in range(0, self.disk.size - cluster + 1, cluster)
            if not _stored(self.disk, offset, cluster)
        ]
        if not free:
            self._request("write")
            return
        offset = self.chance.choice(free)
        value = self.chance.randint(1, 255)
        command = f"write -c -P {value} {offset} {cluster}"
        if type(self.disk)._write_compressed is Disk._write_compressed:
            self.story.append(command)
            self.done["compressed"] += 1

            def by_qemu() -> None:
                for path in (self.ours, self.theirs):
                    with QemuIo(path, **_NO_FLUSH) as qemu:
                        qemu.command(command)

            self._closed(by_qemu)
        else:
            self.qemu.close()
            self.qemu = self.qemu_io()
            self.both(
                "compressed",
                command,
                lambda: self.disk.write_compressed(offset, [bytes([value]) * cluster]),
                lambda: self.qemu.command(command),
            )
        self._compare_part(offset, cluster)

    def _grow(self) -> None:
        old = self.disk.size
        below = self.disk.backing
        if self.features.compat == "0.10" and below is not None and below.size > old:
            return
        size = min(self.largest, old + self.chance.randint(1, old // 2 // SECTOR) * SECTOR)
        if self.both(
            "grow",
            str(size),
            lambda: self.disk.truncate(size),
            lambda: self.qemu.command(f"truncate {size}"),
        ):
            start = max(0, old - self.features.cluster_size)
            self._compare_part(start, min(size - start, 2 * MAX_LENGTH))

    def _shrink(self) -> None:
        old = self.disk.size
        cluster = self.features.cluster_size
        size = self.chance.randint(old // 2 // cluster, old // cluster) * cluster
        if not size:
            return
        self.both(
            "shrink",
            str(size),
            lambda: self.disk.truncate(size, shrink=True),
            lambda: self.qemu.command(f"truncate {size}"),
        )
        if self.disk.size < self.largest // 4:
            self._grow()

    def _snapshot(self) -> None:
        if len(self.names) == MAX_SNAPSHOTS:
            self._delete()
            return
        self._number += 1
        name = f"s{self._number}"
        if self._snapshot_step("snapshot", "-c", name, lambda: self.disk.snapshots.create(name)):
            self.names.append(name)

    def _apply(self) -> None:
        if not self.names:
            self._snapshot()
            return
        if self.chance.random() < 0.7:
            self.bitmaps.remove_all()
        name = self.chance.choice(self.names)
        if self._snapshot_step("apply", "-a", name, lambda: self.disk.snapshots.apply(name)):
            self.compare()

    def _delete(self) -> None:
        if not self.names:
            self._snapshot()
            return
        name = self.chance.choice(self.names)
        if self._snapshot_step("delete", "-d", name, lambda: self.disk.snapshots.delete(name)):
            self.names.remove(name)

    def _snapshot_step(self, kind: str, option: str, name: str, us: Callable[[], object]) -> bool:
        def by_qemu() -> None:
            self.qemu.close()
            try:
                image = f"driver=qcow2,file.filename={self.theirs},cache.no-flush=on"
                qemu_img("snapshot", option, name, "--image-opts", image)
            finally:
                self.qemu = self.qemu_io()

        if self.features.refcount_bits >= 8:
            return self.both(kind, name, us, by_qemu)
        self.close()
        before = [path.read_bytes() for path in (self.ours, self.theirs)]
        self._open()
        try:
            done = self.both(kind, name, us, by_qemu)
        except Mismatch:
            done = False
        if not done:
            self.story.append("  (refused, and taken back)")
            self.close()
            for path, contents in zip((self.ours, self.theirs), before, strict=True):
                path.write_bytes(contents)
            self._open()
        return done

    def _reopen(self) -> None:
        self.story.append("reopen")
        self.done["reopen"] += 1
        self._closed(lambda: None)

    # -- comparing -------------------------------------------------------------------------------

    def fail(self, what: str) -> None:
        raise Mismatch(what + "\n  after " + "\n        ".join(self.story))

    def _compare_part(self, offset: int, length: int) -> None:
        """The bytes of some clusters, as we read ours and as QEMU reads its own."""
        cluster = self.features.cluster_size
        start = offset // cluster * cluster
        end = min(self.disk.size, -(-(offset + length) // cluster) * cluster)
        start, end = max(start, offset - MAX_LENGTH), min(end, offset + length + MAX_LENGTH)
        for at, size, value in runs(self.disk.read(start, end - start)):
            try:
                self.qemu.verify(start + at, size, value)
            except PeerError as error:
                self.fail(f"we read {size} bytes of {value:#x} at {start + at}, QEMU: {error}")

    def compare(self) -> None:
        """Everything that both hold, and where they say it is."""
        self.disk.flush()
        self.qemu.flush()
        done = qemu_img(
            "compare", "-U", "-f", "qcow2", "-F", "qcow2", self.ours, self.theirs, check=False
        )
        if done.returncode:
            self.fail(f"qemu-img compare: {done.stdout} {done.stderr}")
        ours = qemu_map(self.ours)
        theirs = qemu_map(self.theirs)
        said = our_map(self.disk)
        if said != ours:
            self.fail(f"of our image we say (-), qemu-img map (+):\n{changes(said, ours)}")
        self.bitmaps.compare()
        mine, its = states(ours), states(theirs)
        if mine != its:
            self.fail(f"qemu-img map of ours (-), of QEMU's (+):\n{changes(mine, its)}")

    def finish(self) -> None:
        """Compare all of it, snapshots too, close, and have qemu-img check ours."""
        self.compare()
        held = self.bitmaps.compare()
        self._closed(lambda: self.bitmaps.compare_stored(held))
        if self.chance.random() < 0.5:
            self.bitmaps.remove_all()
        for name in list(self.names):
            self._snapshot_step("apply", "-a", name, lambda n=name: self.disk.snapshots.apply(n))
            self.compare()
        found = self.disk.check()
        if not found.clean:
            self.fail(f"our check finds {found}")
        self.close()
        listed = [
            [(s["id"], s["name"]) for s in qemu_img_json("info", path).get("snapshots", [])]
            for path in (self.ours, self.theirs)
        ]
        if listed[0] != listed[1]:
            self.fail(f"snapshots {listed[0]}, with QEMU {listed[1]}")
        try:
            qemu_check(self.ours)
        except AssertionError as error:
            self.fail(str(error))
        with (
            pyvirtio.open_disk(self.ours, read_only=True) as ours,
            pyvirtio.open_disk(self.theirs, read_only=True) as theirs,
        ):
            difference = first_difference(ours.read(0, ours.size), theirs.read(0, theirs.size))
            if difference:
                self.fail(f"we read our image and QEMU's: {difference}")
            said, its = our_map(theirs), qemu_map(self.theirs)
            if said != its:
                self.fail(f"of QEMU's image we say (-), qemu-img map (+):\n{changes(said, its)}")


def _stored(disk: Disk, offset: int, length: int) -> bool:
    return any(extent.allocated and not extent.depth for extent in disk.extents(offset, length))


def run_sequence(
    folder: Path, *, seed: int, steps: int, meetings: Meetings, every: int = 52
) -> None:
    """One pair of twins through ``steps`` operations; everything is compared after each ``every``
    of them. Raises Mismatch."""
    chance = random.Random(seed)
    chosen = Features.choose(chance)
    twins = Twins(folder, chosen, seed=seed)
    try:
        for number in range(1, steps + 1):
            twins.step()
            if number % every == 0:
                twins.compare()
        twins.finish()
    except BaseException:
        twins.close()
        raise
    finally:
        meetings.operations += twins.done.total()
        meetings.add({*chosen.labels, *twins.done})
