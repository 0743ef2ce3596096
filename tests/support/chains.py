"""Backing chains with something of everything in them, for the operations on whole disks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyvirtio
from pyvirtio import Disk

KIB = 1024


def words(seed: int, length: int) -> bytes:
    """Data that compress to about a fifth; they repeat after some 70 kB."""
    chance = random.Random(seed)
    vocabulary = [chance.randbytes(7) for _ in range(16)]
    once = b"".join(chance.choices(vocabulary, k=min(length // 7 + 1, 10_007)))
    return (once * (length // len(once) + 1))[:length]


class Chain:
    """base (raw) <- mid (qcow2) <- top (qcow2) in one folder, and what each of them reads as."""

    def __init__(self, folder: Path, *, seed: int = 1, **options: Any) -> None:
        self.folder = folder
        self.base, self.mid, self.top = (folder / name for name in ("base", "mid", "top"))
        self.contents: dict[str, bytearray] = {}
        chance = random.Random(seed)
        sizes = {name: chance.randrange(512, 1024) * KIB for name in ("base", "mid", "top")}
        model = bytearray(sizes["base"])
        for _ in range(4):
            at = chance.randrange(0, sizes["base"] - 64 * KIB, 4096)
            model[at : at + 40 * KIB] = words(at, 40 * KIB)
        self.base.write_bytes(bytes(model))
        with open(self.base, "r+b") as file:  # with holes
            file.truncate(0)
            for at in range(0, len(model), 4096):
                if any(model[at : at + 4096]):
                    file.seek(at)
                    file.write(model[at : at + 4096])
            file.truncate(len(model))
        self.contents["base"] = model
        for below, format, name in (("base", "raw", "mid"), ("mid", "qcow2", "top")):
            path = folder / name
            with pyvirtio.create_disk(
                path, sizes[name], backing_file=below, backing_fmt=format, **options
            ) as disk:
                model = bytearray(self.contents[below][: sizes[name]].ljust(sizes[name], b"\0"))
                self._fill(disk, model, chance)
            self.contents[name] = model

    def _fill(self, disk: Disk, model: bytearray, chance: random.Random) -> None:
        cluster = disk.info().cluster_size
        assert cluster is not None
        for kind in ("write", "write", "zero", "unmap", "compressed", "discard", "write"):
            at = chance.randrange(0, len(model) - 64 * KIB, 512)
            length = chance.randrange(512, 64 * KIB, 512)
            if kind in ("compressed", "discard"):
                at -= at % cluster
                length = max(cluster, length - length % cluster)
            if at + length > len(model):
                continue
            data = words(at, length) if kind in ("write", "compressed") else bytes(length)
            if kind == "write":
                disk.write(at, data)
            elif kind == "compressed":
                disk.write_compressed(at, [data])
            elif kind == "discard" and disk.info().specific["compat"] != "0.10":
                disk.discard(at, length)
            else:
                disk.write_zeroes(at, length, unmap=kind == "unmap")
            model[at : at + length] = data

    def open(self, name: str = "top", **options: Any) -> Disk:
        """The image of that name, with what is below it."""
        return pyvirtio.open_disk(self.folder / name, format="qcow2", **options)
