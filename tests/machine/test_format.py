"""docs/vmstate.md describes the stream to the byte: here is a reader that knows the page alone.

It takes the image through QEMU's own tools where they are there. Nothing of the library's code for
streams is used to read.
"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import Machine, MachineSnapshots
from support.peers import requires
from support.qemu import QemuIo, qemu_img, qemu_img_json

PAGE = 4096


class Document:
    """The tables of the page, followed line by line over ``data``."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.sections: dict[str, tuple[int, bytes]] = {}
        """Version and payload, by name."""
        start = self.at
        assert self.take(8) == bytes.fromhex("93707976 6D73740A")
        assert self.number(4) == 1
        self.checksum_of(start)
        while (tag := self.take(4)) == b"SECT":
            start = self.at - 4
            length, version, size = self.number(2), self.number(4), self.number(8)
            assert 1 <= length <= 255
            name = self.take(length).decode()
            self.checksum_of(start)
            start = self.at
            payload = self.take(size)
            self.checksum_of(start)
            assert name not in self.sections
            self.sections[name] = version, payload
        assert tag == b"ENDS"
        start = self.at - 4
        assert self.number(4) == len(self.sections)
        length = self.number(8)
        self.checksum_of(start)
        assert length == self.at

    def take(self, length: int) -> bytes:
        assert self.at + length <= len(self.data)
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def checksum_of(self, start: int) -> None:
        """The checksum that is next is that of all from ``start`` on."""
        covered = self.data[start : self.at]
        assert self.number(4) == zlib.crc32(covered)

    @property
    def ancestors(self) -> list[bytes]:
        """The snapshot's UUID, and those it came from."""
        assert next(iter(self.sections)) == "lineage"
        version, payload = self.sections["lineage"]
        assert version == 1
        uuids = [payload[:16], *(payload[at : at + 16] for at in range(17, len(payload), 16))]
        assert payload[16] == len(uuids) - 1 <= 32
        assert len(payload) == 17 + 16 * payload[16]
        return uuids

    def ram(self, name: str, cluster: int) -> bytes:
        """The bytes of a RAM, at its fixed place or inside the stream."""
        version, payload = self.sections[f"ram/{name}"]
        size, page = struct.unpack_from("<QI", payload)
        assert page == PAGE
        pages = -(-size // page)
        if version == 2:
            (position,) = struct.unpack_from("<Q", payload, 12)
            assert position % cluster == 0
            assert position >= self.at
            found = self.data[position : position + size]
            sums = struct.unpack_from(f"<{pages}I", payload, 20)
            assert len(payload) == 20 + 4 * pages
            for number, checksum in enumerate(sums):
                assert zlib.crc32(found[number * page :][:page]) == checksum
            return found
        assert version == 1
        bitmap, found, at = payload[12:], b"", 12 + -(-pages // 8)
        for number in range(pages):
            length = min(page, size - number * page)
            if bitmap[number // 8] >> number % 8 & 1:
                found += payload[at : at + length]
                at += length
            else:
                found += bytes(length)
        assert at == len(payload)
        return found


class Part:
    """One value of every kind."""

    state_version = 7

    def save_state(self, stream: Any) -> None:
        stream.u8(1)
        stream.u16(0x203)
        stream.u32(0x4050607)
        stream.u64(0x8090A0B0C0D0E0F)
        stream.flag(True)
        stream.data(b"bytes")
        stream.text("ü")

    def load_state(self, stream: Any) -> Any:
        raise NotImplementedError


VALUES = (
    bytes([1, 3, 2, 7, 6, 5, 4, 0xF, 0xE, 0xD, 0xC, 0xB, 0xA, 9, 8, 1])
    + b"\5\0\0\0bytes"
    + b"\2\0\0\0\xc3\xbc"
)


def vm_state(peer: QemuIo, size: int) -> bytes:
    """The VM state of an image, as qemu-io shows it."""
    shown = peer.command(f"read -b -v 0 {-(-size // 512) * 512}")
    dump = re.findall(r"^[0-9a-f]{8}:  ((?:[0-9a-f]{2} )+)", shown, re.M)
    return bytes.fromhex("".join(dump))[:size]


@requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("cluster_size", [PAGE, 65536])
def test_a_snapshot_in_an_image_is_what_the_page_says(tmp_path: Path, cluster_size: int) -> None:
    path = tmp_path / "machine.qcow2"
    main, small = bytearray(b"m" * (20 * PAGE + 5)), bytearray(b"s" * 100)
    main[8 * PAGE : 12 * PAGE] = bytes(4 * PAGE)
    with pyvirtio.create_disk(path, 1 << 20, cluster_size=cluster_size) as disk:
        machine = Machine({"part": Part()}, {"main": main, "small": small})
        snapshots = MachineSnapshots(machine, [disk])
        snapshots.savevm("one")
        main[5 * PAGE] = small[3] = 1
        snapshots.savevm("two")
    lineages = []
    for name in ("one", "two"):
        qemu_img("snapshot", "-a", name, path)
        (size,) = [
            one["vm-state-size"]
            for one in qemu_img_json("info", path)["snapshots"]
            if one["name"] == name
        ]
        with QemuIo(path) as peer:
            found = Document(vm_state(peer, size))
        assert list(found.sections) == ["lineage", "component/part", "ram/main", "ram/small"]
        assert found.sections["component/part"] == (7, VALUES)
        if name == "two":
            assert found.ram("main", cluster_size) == main
            assert found.ram("small", cluster_size) == small
        last = struct.unpack_from("<Q", found.sections["ram/small"][1], 12)[0]
        assert size == last + len(small)
        assert not any(found.data[found.at : found.data.index(b"m" * 100)])
        lineages.append(found.ancestors)
    assert lineages[1] == [lineages[1][0], *lineages[0]]


def test_a_stream_of_its_own_is_what_the_page_says() -> None:
    ram = bytearray(b"r" * (11 * PAGE + 5))
    ram[2 * PAGE : 9 * PAGE] = bytes(7 * PAGE)
    target = pyvirtio.MemoryDisk(growable=True)
    length = Machine({"part": Part()}, {"main": ram}).save(target)
    found = Document(target.read(0, length))
    assert found.at == length
    assert list(found.sections) == ["component/part", "ram/main"]
    assert found.sections["component/part"] == (7, VALUES)
    assert found.ram("main", 1) == ram
