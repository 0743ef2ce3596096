"""blkdebug: rules, states, limits, and requests that wait."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio import BackendError, Limits, MemoryDisk
from pyvirtio.backend.blkdebug import BlkdebugDisk
from pyvirtio.backend.blkdebug_rules import make_rule, read_config


def disk_with(*rules: dict[str, object], **options: object) -> BlkdebugDisk:
    made = [make_rule(str(rule.pop("kind", "inject-error")), dict(rule)) for rule in rules]
    return BlkdebugDisk(MemoryDisk(1 << 20), made, **options)  # type: ignore[arg-type]


def test_an_error_is_injected_into_the_sector_it_is_for() -> None:
    disk = disk_with({"event": "none", "sector": 3, "errno": errno.ENOSPC})
    disk.read(0, 1024)
    with pytest.raises(BackendError) as caught:
        disk.read(1024, 1024)
    assert caught.value.errno == errno.ENOSPC


def test_an_error_is_injected_into_the_kind_of_request_it_is_for() -> None:
    disk = disk_with({"event": "none", "iotype": "write"})
    disk.read(0, 512)
    with pytest.raises(BackendError):
        disk.write(0, bytes(512))


def test_once_is_once() -> None:
    disk = disk_with({"event": "none", "once": True})
    with pytest.raises(BackendError):
        disk.read(0, 512)
    disk.read(0, 512)


def test_a_rule_waits_for_its_event_and_its_state() -> None:
    disk = disk_with(
        {"kind": "set-state", "event": "l2_load", "new_state": 2},
        {"event": "write_aio", "state": 2},
    )
    disk.debug_event("write_aio")
    disk.write(0, bytes(512))
    disk.debug_event("l2_load")
    disk.debug_event("write_aio")
    with pytest.raises(BackendError):
        disk.write(0, bytes(512))


def test_a_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text('# rules\n[inject-error]\nevent = "read_aio"\nerrno = "28"\n\n[set-state]\n')
    assert list(read_config(str(path))) == [
        ("inject-error", {"event": "read_aio", "errno": "28"}),
        ("set-state", {}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[inject-error]\nfoo = "1"\n', "Invalid parameter 'foo'"),
        ("[foo]\n", "There is no option group 'foo'"),
        ('event = "x"\n', "no group defined"),
    ],
)
def test_a_wrong_configuration_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rules"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_config(str(path)))


def test_limits_are_kept() -> None:
    class Watching(MemoryDisk):
        seen: list[tuple[int, int]] = []  # noqa: RUF012

        def _writev(self, offset: int, views: list[memoryview], length: int) -> None:
            self.seen.append((offset, length))
            super()._writev(offset, views, length)

    below = Watching(1 << 20)
    below.seen.clear()
    disk = BlkdebugDisk(below, limits=Limits(request_alignment=4096, max_transfer=8192))
    disk.write(100, b"x" * 20000)
    assert below.seen == [(0, 8192), (8192, 8192), (16384, 4096)]
    assert disk.read(99, 20002) == b"\0" + b"x" * 20000 + b"\0"


def test_a_request_waits_at_a_breakpoint_until_it_is_resumed(tmp_path: Path) -> None:
    heard: list[str] = []
    pyvirtio.create_disk(tmp_path / "a.qcow2", 1 << 20).close()
    with pyvirtio.open_disk(f"blkdebug::{tmp_path}/a.qcow2") as disk:
        node = disk.children["file"]
        assert isinstance(node, BlkdebugDisk)
        node.rules.report = heard.append
        node.rules.add_breakpoint("write_aio", "A")
        thread = threading.Thread(target=disk.write, args=(0, b"x" * 512))
        thread.start()
        node.rules.wait_suspended("A")
        assert node.rules.is_suspended("A")
        node.rules.resume("A")
        thread.join(60)
        assert disk.read(0, 512) == b"x" * 512
    assert heard == ["blkdebug: Suspended request 'A'", "blkdebug: Resuming request 'A'"]


def test_what_is_not_suspended_cannot_be_resumed() -> None:
    rules = disk_with().rules
    for action in (rules.resume, rules.remove_breakpoint):
        with pytest.raises(KeyError):
            action("A")
    with pytest.raises(KeyError):
        rules.add_breakpoint("foo", "A")
    rules.add_breakpoint("read_aio", "A")
    rules.remove_breakpoint("A")
    rules.happen("read_aio")


@pytest.mark.parametrize("event", ["l2_load", "cluster_alloc", "write_aio"])
def test_the_qcow2_driver_announces_its_steps(tmp_path: Path, event: str) -> None:
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, 1 << 20) as disk:
        disk.write(0, b"x" * 512)
    name = (
        f'json:{{"driver":"qcow2","file":{{"driver":"blkdebug","image.filename":"{path}",'
        f'"inject-error":[{{"event":"{event}","once":true}}]}}}}'
    )
    with pyvirtio.open_disk(name) as disk, pytest.raises(BackendError):
        disk.write(1 << 19, b"y" * 512)
    with pyvirtio.open_disk(path) as disk:
        assert not disk.check().corruptions  # type: ignore[attr-defined]


def test_discards_are_cut_where_the_best_size_begins() -> None:
    seen: list[tuple[int, int]] = []

    class Watching(MemoryDisk):
        def _discard(self, offset: int, length: int) -> None:
            seen.append((offset, length))

    disk = BlkdebugDisk(Watching(1 << 20), discard_sizes=(3000, 6000))
    disk.discard(1000, 20000)
    assert seen == [(1000, 2000), (3000, 6000), (9000, 6000), (15000, 6000)]
