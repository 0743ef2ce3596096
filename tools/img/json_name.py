"""The ``json:`` names of disks that no file name describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...backend.options import parse_json, parse_keyval, subset
from ..qjson import compact
from .opening import Source

if TYPE_CHECKING:
    from ...backend.disk import Disk

__all__ = ["json_name"]


def json_name(disk: Disk, source: Source) -> str:
    """All that was said to open ``disk``, with what was found out: the drivers of its nodes."""
    options: Mapping[str, Any] = {}
    if source.image_opts:
        options = parse_keyval(source.name, implied="file", warn=lambda _: None)
    elif source.name.startswith("json:"):
        options = parse_json(source.name.removeprefix("json:"))
    return "json:" + compact(_described(disk, dict(options)))


def _described(disk: Disk, options: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = {"driver": disk.format_name}
    for name, child in disk.children.items():
        given = subset(options, f"{name}.")
        if name == "backing":
            continue
        described = _described(child, given)
        if name.startswith("children."):
            node.setdefault("children", []).append(described)
        else:
            node[name] = described
    if not disk.children and disk.filename:
        node["filename"] = disk.filename
    if disk.format_name == "qcow2":  # nothing else changes what an image's contents are
        node |= disk.strong_options
    else:
        node |= {name: value for name, value in options.items() if name not in _COMMON | {*node}}
    return node


_COMMON = {
    *("node-name", "read-only", "auto-read-only", "cache.direct", "cache.no-flush", "force-share"),
    *("discard", "detect-zeroes", "file", "image", "raw", "filename", "x-image"),
}
"""Options that say how a node is used, and other ways to say what its children are."""
