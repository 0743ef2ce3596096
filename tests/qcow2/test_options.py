"""Runtime options: what QEMU takes is taken, what it refuses is refused in its words."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.backend.disk import Disk
from pyvirtio.qcow2 import cleaner
from pyvirtio.qcow2.cache import TableCache
from pyvirtio.qcow2.cleaner import CacheCleaner
from pyvirtio.qcow2.geometry import Geometry
from pyvirtio.qcow2.layout import ClusterKind
from pyvirtio.qcow2.options import RuntimeOptions
from pyvirtio.qcow2.overlap import TEMPLATES, Section

CLUSTER = 65536
TIB = 1 << 40


def parse(
    *,
    version: int = 3,
    cluster_bits: int = 16,
    size: int = TIB,
    lazy: bool = False,
    discards: bool = True,
    **options: object,
) -> RuntimeOptions:
    return RuntimeOptions.parse(
        options,
        Geometry(version, cluster_bits, 4),
        size=size,
        lazy_refcounts=lazy,
        discards=discards,
    )


# -- defaults --------------------------------------------------------------------------------------


def test_defaults_are_qemus() -> None:
    options = parse()
    assert not options.lazy_refcounts
    assert options.pass_discard_request
    assert options.pass_discard_snapshot
    assert not options.pass_discard_other
    assert not options.discard_no_unref
    assert options.overlap_check == TEMPLATES["cached"]
    assert options.caches.l2 == 32 << 20


def test_discards_are_passed_on_only_if_the_file_hears_of_them() -> None:
    assert not parse(discards=False).pass_discard_request
    assert parse(discards=False, pass_discard_request="on").pass_discard_request
    assert not parse(pass_discard_request="off").pass_discard_request


def test_lazy_refcounts_come_from_the_image_unless_said_otherwise() -> None:
    assert parse(lazy=True).lazy_refcounts
    assert not parse(lazy=True, lazy_refcounts=False).lazy_refcounts
    assert parse(lazy_refcounts="on").lazy_refcounts


def test_qemus_spelling_of_names_is_taken() -> None:
    options = parse(**{"overlap-check.active-l1": "off", "l2-cache-entry-size": "8k"})
    assert not options.overlap_check & Section.ACTIVE_L1
    assert options.caches.l2_entry == 8192


# -- what is refused -------------------------------------------------------------------------------

ALL_SIZES = {"cache_size": "4M", "l2_cache_size": "2M", "refcount_cache_size": "2M"}

REFUSED = [
    (
        ALL_SIZES,
        "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
    ),
    ({"cache_size": "1M", "l2_cache_size": "2M"}, "l2-cache-size may not exceed cache-size"),
    (
        {"cache_size": "1M", "refcount_cache_size": "2M"},
        "refcount-cache-size may not exceed cache-size",
    ),
    (
        {"l2_cache_entry_size": 4097},
        "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
    ),
    (
        {"l2_cache_entry_size": "128k"},
        "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
    ),
    ({"refcount_cache_size": 1 << 62}, "Refcount cache size too big"),
    ({"cache_clean_interval": 1 << 32}, "Cache clean interval too big"),
    (
        {"overlap_check": "constant", "overlap_check_template": "all"},
        "Conflicting values for qcow2 options 'overlap-check' ('constant') and "
        "'overlap-check.template' ('all')",
    ),
    (
        {"overlap_check": "blub"},
        "Unsupported value 'blub' for qcow2 option 'overlap-check'. Allowed are any of the "
        "following: none, constant, cached, all",
    ),
    ({"lazy_refcounts": "blub"}, "Parameter 'lazy-refcounts' expects 'on' or 'off'"),
    (
        {"overlap_check_main_header": "blub"},
        "Parameter 'overlap-check.main-header' expects 'on' or 'off'",
    ),
    ({"cache_clean_interval": "soon"}, "Parameter 'cache-clean-interval' expects a number"),
]


def messages(options: dict[str, object]) -> str:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # the text is the point
        parse(**options)
    return str(refusal.value)


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_wrong_values_are_refused(options: dict[str, object], message: str) -> None:
    assert messages(options) == message


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_qemu_refuses_the_same_in_the_same_words(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    path = tmp_path / "image.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", path, str(TIB)], check=True, capture_output=True
    )
    section = "overlap_check_"
    text = ",".join(
        f"{name.replace(section, 'overlap-check.').replace('_', '-')}={value}"
        for name, value in options.items()
    )
    done = subprocess.run(
        ["qemu-io", "-c", f"open -o {text} {path}"], capture_output=True, text=True
    )
    assert message in done.stderr + done.stdout


def test_unknown_options_are_refused() -> None:
    assert (
        messages({"l3_cache": 1}) == "Block format 'qcow2' does not support the option 'l3_cache'"
    )


def test_negative_size_is_refused() -> None:
    assert "expects a non-negative number below 2^64" in messages({"cache_size": -1})


def test_lazy_refcounts_need_version_3() -> None:
    with pytest.raises(ValueError, match=r"at least qemu 1\.1 compatibility level"):
        parse(version=2, lazy_refcounts=True)


def test_discard_no_unref_needs_version_3() -> None:
    with pytest.raises(ValueError, match="only supported since qcow2 version 3"):
        parse(version=2, discard_no_unref=True)


def test_wrong_option_leaves_the_file_closed_and_unlocked(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    pyvirtio.create_disk(path, 1 << 20).close()
    with pytest.raises(ValueError, match="does not support"):
        pyvirtio.open_disk(path, format="qcow2", nonsense=True)
    pyvirtio.open_disk(path).close()


# -- caches ----------------------------------------------------------------------------------------


def test_cache_size_is_shared_as_qemu_shares_it() -> None:
    # 1 TiB with clusters of 64 KiB has 128 MiB of L2 tables.
    assert parse(cache_size="256M").caches.l2 == 128 << 20
    assert parse(cache_size="256M").caches.refcount == 128 << 20
    assert parse(cache_size="1M").caches.refcount == 4 * CLUSTER
    assert parse(cache_size="1M").caches.l2 == (1 << 20) - 4 * CLUSTER
    assert parse(cache_size="3M", l2_cache_size="2M").caches.refcount == 1 << 20
    assert parse(cache_size="3M", refcount_cache_size="1M").caches.l2 == 2 << 20


def test_cache_takes_no_more_than_the_disk_can_use() -> None:
    assert parse(size=1 << 20, l2_cache_size=1 << 50).caches.l2 <= 32 << 20


@pytest.mark.parametrize("entry", [512, 4096, 65536])
def test_every_slice_size_reads_what_was_written(tmp_path: Path, entry: int) -> None:
    path = tmp_path / "image.qcow2"
    pyvirtio.create_disk(path, 64 << 20).close()
    sizes = {"l2_cache_entry_size": entry, "l2_cache_size": entry, "refcount_cache_size": 0}
    with pyvirtio.open_disk(path, **sizes) as disk:
        for i in range(0, 1024, 7):
            disk.write(i * CLUSTER, bytes([i % 251 + 1]) * 100)
        assert all(
            disk.read(i * CLUSTER, 100) == bytes([i % 251 + 1]) * 100 for i in range(0, 1024, 7)
        )
        assert disk.check().clean


def cached(disk: Disk) -> TableCache:
    cache: TableCache = disk._metadata.tables.cache
    return cache


def test_cleaning_drops_what_was_not_used_since_the_last_time(tmp_path: Path) -> None:
    with pyvirtio.create_disk(tmp_path / "image.qcow2", 4 << 30) as disk:
        disk.write(0, b"a" * CLUSTER)
        disk.write(2 << 30, b"b" * CLUSTER)
        disk.flush()
        broom = CacheCleaner(disk._metadata, 0)
        broom.clean()
        disk.read(0, 1)
        assert len(cached(disk).index) == 2
        broom.clean()
        assert len(cached(disk).index) == 1
        assert disk.read(0, 1) + disk.read(2 << 30, 1) == b"ab"


def test_cleaning_keeps_what_is_not_in_the_file(tmp_path: Path) -> None:
    with pyvirtio.create_disk(tmp_path / "image.qcow2", 4 << 30) as disk:
        disk.write(0, b"a" * CLUSTER)
        broom = CacheCleaner(disk._metadata, 0)
        broom.clean()
        broom.clean()
        assert cached(disk).dirty
        assert disk.read(0, 1) == b"a"


def test_cleaning_gives_the_memory_back(tmp_path: Path) -> None:
    with pyvirtio.create_disk(tmp_path / "image.qcow2", 4 << 30) as disk:
        disk.write(0, b"a" * CLUSTER)
        disk.flush()
        cache = cached(disk)
        (slot,) = cache.index.values()
        assert any(cache.slice(slot))
        broom = CacheCleaner(disk._metadata, 0)
        broom.clean()
        broom.clean()
        assert not any(cache.slice(slot))  # an anonymous page that was given back is zeroes


def test_small_slices_are_given_back_by_whole_pages(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    with pyvirtio.create_disk(path, 1 << 20, cluster_size=512) as disk:
        for i in range(0, 1 << 20, 512):
            disk.write(i, bytes([i // 512 % 251 + 1]) * 512)
        disk.flush()
        broom = CacheCleaner(disk._metadata, 0)
        for _ in range(3):
            broom.clean()
            disk.read(0, 512)
        assert all(disk.read(i, 1) == bytes([i // 512 % 251 + 1]) for i in range(0, 1 << 20, 512))


def test_interval_makes_a_thread_clean(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    pyvirtio.create_disk(path, 64 << 20).close()
    with pyvirtio.open_disk(path, cache_clean_interval=1) as disk:
        disk.write(0, b"a" * CLUSTER)
        disk.flush()
        while cached(disk).index:  # ends with the second cleaning
            time.sleep(0.05)
        assert disk.read(0, 1) == b"a"
    for thread in threading.enumerate():
        if thread.name == "qcow2 cache cleaner":
            thread.join(60)
            assert not thread.is_alive()


def test_a_thread_that_is_gone_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the child of a fork, which has no threads of its parent."""
    gone = threading.Thread(target=lambda: None)
    gone.start()
    gone.join()
    monkeypatch.setattr(cleaner, "_thread", gone)
    path = tmp_path / "image.qcow2"
    pyvirtio.create_disk(path, 64 << 20).close()
    with pyvirtio.open_disk(path, cache_clean_interval=60):
        assert cleaner._thread is not None
        thread = cleaner._thread
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


# -- discards --------------------------------------------------------------------------------------


def test_discard_no_unref_keeps_the_clusters(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    pyvirtio.create_disk(path, 64 << 20).close()
    with pyvirtio.open_disk(path, discard_no_unref=True) as disk:
        disk.write(0, b"a" * (4 * CLUSTER))
        end = disk.check().image_end_offset
        disk.discard(CLUSTER, 2 * CLUSTER)
        disk.flush()
        kind, host, _ = disk._metadata.tables.map(CLUSTER, CLUSTER)
        assert kind is ClusterKind.ZERO_ALLOCATED
        assert disk.read(0, 4 * CLUSTER) == b"a" * CLUSTER + bytes(2 * CLUSTER) + b"a" * CLUSTER
        disk.write(CLUSTER, b"b" * CLUSTER)
        assert disk._metadata.tables.map(CLUSTER, CLUSTER)[1] == host
        result = disk.check()
        assert result.clean
        assert result.image_end_offset == end


def test_discard_no_unref_drops_what_a_snapshot_shares(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    pyvirtio.create_disk(path, 64 << 20).close()
    with pyvirtio.open_disk(path, discard_no_unref=True) as disk:
        disk.write(0, b"a" * CLUSTER)
        disk.snapshots.create("s")
        disk.discard(0, CLUSTER)
        assert disk.read(0, 3) == b"\0\0\0"
        assert disk.check().clean
        disk.snapshots.apply("s")
        assert disk.read(0, 3) == b"aaa"


@pytest.mark.parametrize("passed", [True, False])
def test_discard_request_reaches_the_file_if_it_is_to(tmp_path: Path, passed: bool) -> None:
    path = tmp_path / "image.qcow2"
    pyvirtio.create_disk(path, 64 << 20).close()
    with pyvirtio.open_disk(path, pass_discard_request=passed) as disk:
        disk.write(0, b"a" * CLUSTER)
        disk.flush()
        _, host, _ = disk._metadata.tables.map(0, CLUSTER)
        disk.discard(0, CLUSTER)
        disk.flush()
        file = disk.children["file"]
        assert (file.read(host, 3) == b"\0\0\0") == passed


def test_cleaning_drops_unused_refcounts_too(tmp_path: Path) -> None:
    with pyvirtio.create_disk(tmp_path / "image.qcow2", 4 << 30) as disk:
        disk.write(0, b"a" * CLUSTER)
        disk.flush()
        refcounts: TableCache = disk._metadata.refcounts.cache
        assert refcounts.index
        broom = CacheCleaner(disk._metadata, 0)
        broom.clean()
        broom.clean()
        assert not refcounts.index
