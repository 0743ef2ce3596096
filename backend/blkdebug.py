"""The filter ``blkdebug``: errors, limits and breakpoints at will, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import UnsupportedError
from .blkdebug_rules import Rule, Rules, make_rule, read_config, rules_from_options
from .buffers import split
from .disk import Disk, DiskInfo, Extent, Limits
from .filter import AlignedFilter
from .node import Node, Role
from .registry import Driver

__all__ = ["DRIVER", "BlkdebugDisk", "debug_node"]

_INT_MAX = 0x7FFF_FFFF


class BlkdebugDisk(AlignedFilter):
    """Lets requests to the disk below fail, or wait, as its rules say.

    ``limits`` are what it pretends to like: unlike other disks it sees to it that the disk below
    meets no request outside of them.
    """

    format_name = "blkdebug"
    child_name = "image"

    def __init__(
        self,
        below: Disk,
        rules: list[Rule] | None = None,
        *,
        limits: Limits | None = None,
        max_write_zeroes: int = 0,
        discard_sizes: tuple[int, int] = (0, 0),
        name: str | None = None,
    ) -> None:
        super().__init__(below, limits=limits)
        self.rules = Rules(list(rules or []))
        self._max_transfer = self.limits.max_transfer
        self._max_write_zeroes = max_write_zeroes
        self._discard_sizes = discard_sizes
        self._name = name
        self.flush_due = False
        """A write was tried since the last flush: else there is nothing to flush, or to fail."""

    @property
    def filename(self) -> str | None:
        """A file name that says the same, if there is one."""
        return self._name

    def debug_event(self, name: str) -> None:
        """Acted on; the disk below does not hear of it."""
        self.rules.happen(name)

    def _read_aligned(self, offset: int, views: list[memoryview], length: int) -> None:
        step = self._max_transfer or length
        for done in range(0, length, step):
            part = min(step, length - done)
            self.rules.check(offset + done, part, "read")
            super()._read_aligned(offset + done, split(views, done, part), part)

    def _write_aligned(self, offset: int, views: list[memoryview], length: int) -> None:
        self.flush_due = True
        self.rules.happen("pwritev")
        step = self._max_transfer or length
        for done in range(0, length, step):
            part = min(step, length - done)
            self.rules.check(offset + done, part, "write")
            super()._write_aligned(offset + done, split(views, done, part), part)
        self.rules.happen("pwritev_done")

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if length < self._align:
            raise UnsupportedError("blkdebug: less than its alignment", feature="zeroes")
        self.flush_due = True
        self.rules.happen("pwritev_zero")
        for at, part in _pieces(offset, length, 0, self._max_write_zeroes):
            self.rules.check(at, part, "write-zeroes")
            super()._write_zeroes(at, part, unmap)
        self.rules.happen("pwritev_done")

    def _discard(self, offset: int, length: int) -> None:
        self.flush_due = True
        for at, part in _pieces(offset, length, *self._discard_sizes):
            self.rules.check(at, part, "discard")
            super()._discard(at, part)

    def _flush(self) -> None:
        if self.flush_due:
            self.rules.check(0, 0, "flush")
            super()._flush()
            self.flush_due = False

    def _truncate(self, size: int, preallocation: str) -> None:
        self.flush_due = True
        super()._truncate(size, preallocation)

    def _block_status(self, offset: int, length: int) -> Extent:
        self.rules.check(offset, length, "block-status")
        extent = super()._block_status(offset, length)
        if self._align == 1:
            return extent
        return _aligned_extent(self, extent, offset, length)

    def info(self) -> DiskInfo:
        """Facts about the disk; QEMU does not count the space below a protocol."""
        return replace(super().info(), actual_size=None)

    def _close(self) -> None:
        self.rules.resume_all()
        super()._close()


def _pieces(offset: int, length: int, best: int, largest: int) -> Iterator[tuple[int, int]]:
    """A range cut where its offset is a multiple of ``best``, and then after each ``largest``
    bytes; 0 is no limit."""
    end = offset + length
    head = -offset % best if best else 0
    if 0 < head < length:
        yield offset, head
        offset += head
    step = largest or max(1, length)
    for at in range(offset, end, step):
        yield at, min(step, end - at)


def _aligned_extent(disk: BlkdebugDisk, first: Extent, offset: int, length: int) -> Extent:
    """Runs shorter than the alignment show as one: data if any of them is."""
    align = disk.limits.request_alignment
    wanted = min(length, align - offset % align)
    run = first.length
    if run >= wanted:
        end = offset + run
        whole = end if end == disk.size else end // align * align
        return replace(first, length=max(whole - offset, wanted))
    while run < wanted:
        below = disk.below.block_status(offset + run, wanted - run)
        first = replace(
            first,
            data=first.data or below.data,
            zero=first.zero and below.zero,
            allocated=first.allocated or below.allocated,
            host_offset=None,
        )
        run += below.length
    return replace(first, length=wanted)


def debug_node(disk: Disk) -> BlkdebugDisk | None:
    """The blkdebug below a disk that breakpoints are set in; None if there is none."""
    while not isinstance(disk, BlkdebugDisk):
        children = disk.children
        below = children.get("file") or children.get("image") or children.get("raw")
        if below is None:
            return None
        disk = below
    return disk


# -- opening ---------------------------------------------------------------------------------------


def _parse_filename(name: str, options: dict[str, Any]) -> None:
    rest = name.removeprefix("blkdebug:")
    if rest == name:
        options["x-image"] = name
        return
    config, colon, image = rest.partition(":")
    if not colon:
        raise ValueError("blkdebug requires both config file and image path")
    if config:
        options["config"] = config
    options["x-image"] = image


_NAMED = {"config", "x-image", "image", "image.driver", "image.filename"}
"""What a file name can say."""


def _open(node: Node) -> Disk:
    options = node.options
    named = not options.left.keys() - _NAMED
    config = options.text("config")
    rules = [] if config is None else [make_rule(*group) for group in read_config(config)]
    rules += rules_from_options(options)
    below = node.required("image", Role.FILTERED, filename=options.text("x-image"))
    limits, max_write_zeroes, discard_sizes = _limits(node, below)
    for group in ("take-child-perms", "unshare-child-perms"):
        for value in options.group(f"{group}.").values():
            if value not in ("consistent-read", "write", "write-unchanged", "resize"):
                raise ValueError(f"Parameter 'null' does not accept value '{value}'")
    name = f"blkdebug:{config or ''}:{below.filename}" if named and below.filename else None
    return BlkdebugDisk(
        below,
        rules,
        limits=limits,
        max_write_zeroes=max_write_zeroes,
        discard_sizes=discard_sizes,
        name=name,
    )


def _limits(node: Node, below: Disk) -> tuple[Limits, int, tuple[int, int]]:
    """What the disk likes, the largest write of zeroes, and the best and the largest discard."""
    options = node.options
    own = options.size("align") or 0
    if own and (own >= _INT_MAX or own & (own - 1)):
        raise ValueError(f"Cannot meet constraints with align {own}")
    align = max(own, below.limits.request_alignment)
    values: dict[str, int] = {}
    for name, unit in (
        ("max-transfer", align),
        ("opt-write-zero", align),
        ("max-write-zero", 0),
        ("opt-discard", align),
        ("max-discard", 0),
    ):
        unit = unit or max(values[name.replace("max", "opt")], align)
        value = values[name] = options.size(name) or 0
        if value and (value >= _INT_MAX or value % unit):
            raise ValueError(f"Cannot meet constraints with {name} {value}")
    limits = replace(
        below.limits,
        request_alignment=align,
        write_zeroes_alignment=max(values["opt-write-zero"], align),
        discard_alignment=align,  # smaller parts than the best ones are handed on, too
        max_transfer=values["max-transfer"] or below.limits.max_transfer,
    )
    return (
        limits,
        values["max-write-zero"],
        (values["opt-discard"], values["max-discard"]),
    )


DRIVER = Driver("blkdebug", _open, protocol=True, parse_filename=_parse_filename)
