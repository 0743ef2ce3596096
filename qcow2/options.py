"""Runtime options: how an image is used while it is open (QEMU's ``qcow2`` block driver options).

They are keyword arguments of :func:`pyvirtio.open_disk`, under QEMU's names with ``_`` for ``-``
and ``.`` (``overlap_check_template``). Values may be Python's or the texts that QEMU takes
(``"on"``, ``"1M"``). What QEMU refuses is refused with a ValueError in QEMU's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..backend.options import Options
from . import layout
from .geometry import Geometry
from .overlap import TEMPLATES, Section

__all__ = ["CacheSizes", "RuntimeOptions"]

_DEFAULT_L2_CACHE = 32 << 20  # QEMU on Linux
_DEFAULT_REFCOUNT_CACHE = 4 << 20
_DEFAULT_SLICE = 4096
_MIN_REFCOUNT_CLUSTERS = 4  # QEMU
_MAX_REFCOUNT_CACHE = 1 << 30
"""More is never of use: it holds the refcounts of terabytes at the smallest cluster size."""
_MAX_TABLES = 0x7FFF_FFFF  # QEMU

_SECTION_OPTIONS = {
    "main_header": Section.MAIN_HEADER,
    "active_l1": Section.ACTIVE_L1,
    "active_l2": Section.ACTIVE_L2,
    "refcount_table": Section.REFCOUNT_TABLE,
    "refcount_block": Section.REFCOUNT_BLOCK,
    "snapshot_table": Section.SNAPSHOT_TABLE,
    "inactive_l1": Section.INACTIVE_L1,
    "inactive_l2": Section.INACTIVE_L2,
    "bitmap_directory": Section.BITMAP_DIRECTORY,
}


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """How much memory the caches may take, in bytes; it is used only as far as it fills."""

    l2: int = _DEFAULT_L2_CACHE
    refcount: int = _DEFAULT_REFCOUNT_CACHE
    l2_entry: int = _DEFAULT_SLICE
    """Bytes of an L2 table that are read and written at once, at most a cluster."""


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """The options of one open image, checked."""

    lazy_refcounts: bool
    """Refcounts are brought to the file when it is closed; until then it is marked dirty."""
    pass_discard_request: bool
    """Clusters freed by a discard are discarded in the file below."""
    pass_discard_snapshot: bool
    """So are those freed with a snapshot,"""
    pass_discard_other: bool
    """and those freed for other reasons."""
    discard_no_unref: bool
    """A discard keeps the clusters allocated, so that the image does not fragment."""
    overlap_check: Section
    """The structures that writes must not hit."""
    caches: CacheSizes
    cache_clean_interval: int
    """Seconds after which unused cache entries are dropped; 0: never."""

    @classmethod
    def parse(
        cls,
        given: Mapping[str, Any],
        geometry: Geometry,
        *,
        size: int,
        lazy_refcounts: bool,
        discards: bool,
    ) -> RuntimeOptions:
        """The options from keyword arguments; ``lazy_refcounts`` is what the image says,
        ``discards`` whether the file below was opened to hear of discards, ``size`` the disk's.

        Raises ValueError for what is unknown, wrong, or contradicts itself.
        """
        values = Options(given)
        lazy = values.boolean("lazy-refcounts", lazy_refcounts)
        if lazy and geometry.version < 3:
            raise ValueError(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
            )
        no_unref = values.boolean("discard-no-unref", False)
        if no_unref and geometry.version < 3:
            raise ValueError("discard-no-unref is only supported since qcow2 version 3")
        interval = values.number("cache-clean-interval", 0)
        if interval > 0xFFFF_FFFF:
            raise ValueError("Cache clean interval too big")
        options = cls(
            caches=_cache_sizes(values, geometry, size),
            cache_clean_interval=interval,
            overlap_check=_sections(values),
            lazy_refcounts=lazy,
            pass_discard_request=values.boolean("pass-discard-request", discards),
            pass_discard_snapshot=values.boolean("pass-discard-snapshot", True),
            pass_discard_other=values.boolean("pass-discard-other", False),
            discard_no_unref=no_unref,
        )
        for name in values.left:
            raise ValueError(f"Block format 'qcow2' does not support the option '{name}'")
        return options


def _sections(values: Options) -> Section:
    """``overlap-check``, as a template and section by section."""
    short, template = values.take("overlap-check"), values.take("overlap-check.template")
    if short is not None and template is not None and short != template:
        raise ValueError(
            f"Conflicting values for qcow2 options 'overlap-check' ('{short}') and "
            f"'overlap-check.template' ('{template}')"
        )
    name = short if short is not None else template if template is not None else "cached"
    if name not in TEMPLATES:
        raise ValueError(
            f"Unsupported value '{name}' for qcow2 option 'overlap-check'. Allowed are any of the "
            "following: none, constant, cached, all"
        )
    sections = TEMPLATES[name]
    for option, section in _SECTION_OPTIONS.items():
        if values.boolean(f"overlap-check.{option.replace('_', '-')}", bool(sections & section)):
            sections |= section
        else:
            sections &= ~section
    return sections


def _cache_sizes(values: Options, geometry: Geometry, size: int) -> CacheSizes:
    """Share the memory as QEMU's ``read_cache_sizes`` does."""
    cluster_size = geometry.cluster_size
    # What the L2 tables of the whole disk take.
    tables = geometry.l1_entries(size)
    all_l2 = tables * cluster_size
    min_refcount = _MIN_REFCOUNT_CLUSTERS * cluster_size
    both = values.size("cache-size")
    l2, refcount = values.size("l2-cache-size"), values.size("refcount-cache-size")
    entry = values.size("l2-cache-entry-size")
    if both is not None:
        if l2 is not None and refcount is not None:
            raise ValueError(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            )
        if l2 is not None and l2 > both:
            raise ValueError("l2-cache-size may not exceed cache-size")
        if refcount is not None and refcount > both:
            raise ValueError("refcount-cache-size may not exceed cache-size")
        if l2 is not None:
            refcount = both - min(l2, all_l2)
        elif refcount is not None:
            l2 = both - refcount
        elif both >= all_l2 + min_refcount:
            l2, refcount = all_l2, both - all_l2
        else:
            refcount = min(both, min_refcount)
            l2 = both - refcount
    if entry is None:
        entry = min(cluster_size, _DEFAULT_SLICE)
    least = 1 << layout.MIN_CLUSTER_BITS
    if not least <= entry <= cluster_size or entry & (entry - 1):
        raise ValueError(
            f"L2 cache entry size must be a power of two between {least} and the cluster size "
            f"({cluster_size})"
        )
    l2 = _DEFAULT_L2_CACHE if l2 is None else l2
    refcount = _DEFAULT_REFCOUNT_CACHE if refcount is None else refcount
    # QEMU limits the L2 cache to what the disk needs before it looks.
    if min(l2, all_l2) // entry > _MAX_TABLES:
        raise ValueError("L2 cache size too big")
    if refcount // cluster_size > _MAX_TABLES:
        raise ValueError("Refcount cache size too big")
    # The disk may grow, and its snapshots have tables, too: the default is always granted.
    l2 = min(l2, max(all_l2, _DEFAULT_L2_CACHE))
    return CacheSizes(l2, min(refcount, _MAX_REFCOUNT_CACHE), entry)
