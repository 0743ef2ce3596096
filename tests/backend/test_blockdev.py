"""Graphs of block drivers: names, options, children, and QEMU's words for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import Disk
from pyvirtio.backend.blockdev import Context, Graph, open_node
from pyvirtio.backend.options import parse_json, parse_keyval, parse_size
from pyvirtio.errors import message_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images: ``a.qcow2`` with data, ``o.qcow2`` on top of it; and zeroes in ``b.raw``."""
    monkeypatch.chdir(tmp_path)
    with pyvirtio.create_disk("a.qcow2", 1 << 20) as disk:
        disk.write(0, b"a" * 4096)
    pyvirtio.create_disk("o.qcow2", 1 << 20, backing_file="a.qcow2", backing_fmt="qcow2").close()
    (tmp_path / "b.raw").write_bytes(bytes(1 << 20))
    return tmp_path


def open_with(text: str, **context: Any) -> Disk:
    return open_node(Context(Graph(warn=lambda message: None), **context), None, parse_keyval(text))


def open_named(name: str, **context: Any) -> Disk:
    return open_node(Context(Graph(warn=lambda message: None), **context), name, {})


def test_a_doubled_comma_is_one_in_a_value() -> None:
    assert parse_keyval("a=1,,2,b=,c=x=y") == {"a": "1,2", "b": "", "c": "x=y"}


def test_a_switch_is_on_and_with_no_before_it_off() -> None:
    heard: list[str] = []
    assert parse_keyval("foo,nobar", warn=heard.append) == {"foo": "on", "bar": "off"}
    assert heard[1].splitlines() == [
        "short-form boolean option 'nobar' deprecated",
        "Please use bar=off instead",
    ]


def test_json_is_flattened_and_may_have_single_quotes() -> None:
    assert parse_json("{'a': {'b': [1, {'c': \"it's\"}]}, 'd': null}") == {
        "a.b.0": 1,
        "a.b.1.c": "it's",
        "d": None,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("512", 512), ("1k", 1024), ("1.5M", 3 << 19), ("0x10", 16), ("1.", 1), ("0.25M", 1 << 18)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "x", "1.5", ".5k", "-1", "1kk", "0x1.8k", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size|part of a byte"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("driver=qcow2,foo=1,file.filename=a.qcow2",
         "Block format 'qcow2' does not support the option 'foo'"),
        ("driver=qcow2,file.foo=1,file.filename=a.qcow2",
         "Block protocol 'file' doesn't support the option 'foo'"),
        ("driver=foo", "Unknown driver 'foo'"),
        ("file.filename=nope", "Could not open 'nope': No such file or directory"),
        ("driver=qcow2,file=x", "Cannot find device='x' nor node-name='x'"),
        ("driver=file", "The 'file' block driver requires a file name"),
        ("driver=raw", 'A block device must be specified for "file"'),
        ("", "Must specify either driver or file"),
        ("driver=qcow2,file.filename=a.qcow2,discard=x", "Invalid discard option"),
        ("driver=qcow2,file.filename=a.qcow2,node-name=1x", "Invalid node-name: '1x'"),
        ("driver=qcow2,file.filename=a.qcow2,read-only=x",
         "Parameter 'read-only' expects 'on' or 'off'"),
        ("driver=qcow2,file.filename=a.qcow2,force-share=on",
         "force-share=on can only be used with read-only images"),
        ("driver=raw,backing.file.filename=b.raw,file.filename=b.raw",
         "Driver doesn't support backing files"),
        ("driver=qcow2,file.filename=a.qcow2,for_check=on",
         "Block format 'qcow2' does not support the option 'for_check'"),
        ("driver=blkdebug,image.filename=a.qcow2,align=3", "Cannot meet constraints with align 3"),
        ("driver=quorum", "Number of provided children must be 1 or more"),
        ("driver=luks,file.filename=b.raw", "Parameter 'key-secret' is required for cipher"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_qemus_words(folder: Path, options: str, message: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        open_with(options)
    assert message_of(caught.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json:[]", "Invalid JSON object given"),
        ("json:{", "Could not parse the JSON options: JSON parse error, premature EOI"),
        ("null-co://x", "The only allowed filename for this driver is 'null-co://'"),
        ("blkdebug:x", "blkdebug requires both config file and image path"),
        ("blkdebug:nope:a.qcow2", "Could not read blkdebug config file: No such file or directory"),
        ("foo:b.raw", "Unknown protocol 'foo'"),
    ],
)
def test_wrong_names_are_refused_in_qemus_words(folder: Path, name: str, message: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        open_named(name)
    assert message_of(caught.value) == message


@pytest.mark.parametrize(
    "name",
    [
        "a.qcow2",
        "file:a.qcow2",
        "blkdebug::a.qcow2",
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}',
        'json:{"file.filename":"a.qcow2"}',
    ],
)
def test_names_that_lead_to_an_image(folder: Path, name: str) -> None:
    with open_named(name) as disk:
        assert disk.format_name == "qcow2"
        assert disk.read(0, 4) == b"aaaa"


def test_an_image_may_name_its_backing_file_as_json(folder: Path) -> None:
    name = 'json:{"driver":"qcow2","file":{"driver":"blkdebug","image.filename":"a.qcow2"}}'
    pyvirtio.create_disk("j.qcow2", 1 << 20, backing_file=name, backing_fmt="qcow2").close()
    with pyvirtio.open_disk("j.qcow2") as disk:
        assert disk.backing is not None
        assert disk.backing.children["file"].format_name == "blkdebug"
        assert disk.read(0, 4) == b"aaaa"


def test_backing_options_replace_the_backing_file(folder: Path) -> None:
    options = "driver=qcow2,file.filename=o.qcow2,backing.driver=raw,backing.file.filename=b.raw"
    with open_with(options) as disk:
        assert disk.read(0, 4) == bytes(4)
    with open_with("driver=qcow2,file.filename=o.qcow2,backing.driver=raw") as disk:
        assert disk.read(0, 4) == b"QFI\xfb"


def test_a_backing_file_of_null_reads_as_zeroes(folder: Path) -> None:
    with open_named('json:{"driver":"qcow2","file.filename":"o.qcow2","backing":null}') as disk:
        assert disk.backing is None
        assert disk.read(0, 4) == bytes(4)


def test_a_failure_closes_every_node(folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="does not support the option 'foo'"):
            open_with("driver=qcow2,file.filename=o.qcow2,backing.foo=1,foo=1")
    open_named("o.qcow2").close()  # nothing is locked


def test_node_names_must_differ(folder: Path) -> None:
    with pytest.raises(ValueError, match="Duplicate nodes with node-name='n'"):
        open_with("driver=raw,node-name=n,file.driver=null-co,file.node-name=n")


def test_zeroes_are_detected(folder: Path) -> None:
    options = "driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap,discard=unmap"
    with open_with(options) as disk:
        disk.write(0, bytes(1 << 16))
        assert disk.block_status(0, 1 << 16).zero


def test_discards_are_ignored_unless_asked_for(folder: Path) -> None:
    with open_with("driver=qcow2,file.filename=a.qcow2") as disk:
        disk.discard(0, 1 << 16)
        assert disk.read(0, 4) == b"aaaa"
    with open_with("driver=qcow2,file.filename=a.qcow2,discard=unmap") as disk:
        disk.discard(0, 1 << 16)
        assert disk.read(0, 4) == bytes(4)
