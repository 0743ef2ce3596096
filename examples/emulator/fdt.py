"""The flattened device tree: how the board tells a guest what is where (Devicetree spec 0.4, 5)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

__all__ = ["LEVEL_HIGH", "Node", "flatten", "wide"]

LEVEL_HIGH = 4
"""How an interrupt is signalled, for controllers that want to be told."""

_BEGIN, _END_NODE, _PROPERTY, _END = 1, 2, 3, 9
_MAGIC, _VERSION, _COMPATIBLE = 0xD00DFEED, 17, 16

Value = bytes | str | int | bool | Sequence[str] | Sequence[int]


class Node:
    """A node: ``node["name"] = value`` sets a property, :meth:`add` makes a child.

    A string or a list of strings becomes strings, an integer or a list of integers 32-bit cells,
    True an empty property.
    """

    def __init__(self, name: str = "", **properties: Value) -> None:
        self.name = name
        self.properties: dict[str, bytes] = {}
        self.children: list[Node] = []
        for key, value in properties.items():
            self[key.replace("_", "-")] = value

    def __setitem__(self, name: str, value: Value) -> None:
        self.properties[name] = _encode(value)

    def add(self, name: str, **properties: Value) -> Node:
        """A new child. Underscores in keyword names stand for hyphens."""
        child = Node(name, **properties)
        self.children.append(child)
        return child


def wide(*numbers: int) -> list[int]:
    """64-bit numbers as pairs of cells."""
    return [cell for number in numbers for cell in (number >> 32, number & 0xFFFFFFFF)]


def _encode(value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode() + b"\0"
    if isinstance(value, bool):
        return b""
    if isinstance(value, int):
        return struct.pack(">I", value)
    return b"".join(map(_encode, value))


def flatten(root: Node) -> bytes:
    """The tree as the blob that guests are given."""
    strings = bytearray()
    places: dict[str, int] = {}
    structure = bytearray()

    def put(data: bytes) -> None:
        structure.extend(data + bytes(-len(data) % 4))

    def walk(node: Node) -> None:
        put(struct.pack(">I", _BEGIN) + node.name.encode() + b"\0")
        for name, value in node.properties.items():
            if name not in places:
                places[name] = len(strings)
                strings.extend(name.encode() + b"\0")
            put(struct.pack(">III", _PROPERTY, len(value), places[name]) + value)
        for child in node.children:
            walk(child)
        put(struct.pack(">I", _END_NODE))

    walk(root)
    put(struct.pack(">I", _END))
    reservations = bytes(16)
    start = 40 + len(reservations)
    total = start + len(structure) + len(strings)
    header = struct.pack(
        ">10I",
        _MAGIC,
        total,
        start,
        start + len(structure),
        40,
        _VERSION,
        _COMPATIBLE,
        0,
        len(strings),
        len(structure),
    )
    return header + reservations + bytes(structure) + bytes(strings)
