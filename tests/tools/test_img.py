"""pyvirtio-img: as qemu-img where that is there to ask, and what it has beyond it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.tools.getopt import Option, UsageError, parse
from pyvirtio.tools.qjson import pretty
from pyvirtio.tools.sizes import parse_size
from support.img_twins import command_line, compare, make_images, run_both
from support.peers import requires

MAIN = "import sys; from pyvirtio.tools.img import main; sys.argv[0] = '{}'; sys.exit(main())"


def img(*words: object, name: str = "qemu-img", cwd: Path | None = None) -> tuple[int, str, str]:
    command = [sys.executable, "-c", MAIN.format(name), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    with pyvirtio.create_disk(path, 4 << 20) as disk:
        disk.write(0, b"x" * 100_000)
        disk.snapshots.create("one")
        disk.write(65536, b"y" * 1000)
    return path


# -- command lines ---------------------------------------------------------------------------------

OPTIONS = (
    Option(("-q",)),
    Option(("-f", "--format"), "fmt"),
    Option(("--force-share", "-U")),
    Option(("--output",), "ofmt"),
)


@pytest.mark.parametrize(
    ("words", "found", "operands"),
    [
        (["a", "-qf", "raw", "b"], [("-q", ""), ("-f", "raw")], ["a", "b"]),
        (["-fraw", "--", "-q"], [("-f", "raw")], ["-q"]),
        (["--out=json", "--form", "x"], [("--output", "json"), ("-f", "x")], []),
        (["-U", "-"], [("--force-share", "")], ["-"]),
    ],
)
def test_options_are_found_anywhere(words, found, operands):
    assert parse(words, OPTIONS) == (found, operands)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-x"], "unrecognized option '-x'"),
        (["--fo"], "unrecognized option '--fo'"),
        (["-f"], "missing argument for option '-f'"),
        (["--output"], "missing argument for option '--output'"),
        (["--force-share=on"], "unrecognized option '--force-share=on'"),
    ],
)
def test_wrong_options_are_told(words, message):
    with pytest.raises(UsageError, match=message):
        parse(words, OPTIONS)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("1k", 1024), ("0x10", 16), ("1.5M", 3 << 19), (" 7G", 7 << 30)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1x", "-1", "1.5", "1e3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"size|byte"):
        parse_size(text)


def test_json_escapes_what_is_not_ascii():
    assert pretty({"name": 'ä"\n\U0001f600', "list": []}) == (
        '{\n    "name": "\\u00E4\\"\\n\\uD83D\\uDE00",\n    "list": [\n    ]\n}'
    )


# -- the program -----------------------------------------------------------------------------------


def test_it_speaks_under_the_name_it_was_started_by(tmp_path):
    for name in ("qemu-img", "pyvirtio-img"):
        status, _, errors = img("info", "none", name=f"/some/{name}", cwd=tmp_path)
        text = "Could not open 'none': Could not open 'none': No such file or directory"
        assert (status, errors) == (1, f"{name}: {text}\n")


def test_the_version_needs_no_more_than_the_start():
    code = (
        "import sys; before = set(sys.modules); from pyvirtio.tools.img import main\n"
        "sys.argv = ['qemu-img', '--version']; main()\n"
        "print(*sorted(name for name in set(sys.modules) - before if '.' not in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, loaded = done.stdout.splitlines()
    assert version.startswith("qemu-img version 7.2")
    heavy = {"argparse", "rich", "cffi", "cryptography", "typing", "inspect", "subprocess"}
    assert not heavy & set(loaded.split()) - set(sys.builtin_module_names)


def test_a_reader_that_has_gone_is_no_error(image):
    command = [sys.executable, "-c", MAIN.format("qemu-img"), "info", str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "words",
    [
        ["info", "."],
        ["check", "/dev/null"],
        ["create", "-f", "qcow2", "/nonexistent/x", "1M"],
        ["convert", "image.qcow2", "/dev/full"],
        ["map", "json:{"],
        ["info", "json:{'driver': 'qcow2'}"],
        ["info", "--image-opts", "driver=qcow2,file.filename=image.qcow2,nonsense=1"],
        ["snapshot", "-c", "x" * 300, "/dev/null"],
        ["explain", "image.qcow2", "99G"],
        ["show", "/etc/hostname"],
        ["dump", "/etc/hostname"],
        ["bench", "-c", "9", "-s", "0", "image.qcow2"],
        ["dd", "if=image.qcow2", "of=image.qcow2"],
        ["measure", "--size", "9E", "-O", "qcow2"],
        ["rebase", "-b", "image.qcow2", "-F", "qcow2", "image.qcow2"],
        ["commit", "image.qcow2"],
        ["compare", "image.qcow2", "."],
    ],
)
def test_no_traceback_reaches_a_user(image, words):
    _, _, errors = img(*words, cwd=image.parent)
    assert "Traceback" not in errors
    with pyvirtio.open_disk(image) as disk:
        assert disk.check().clean


def test_damaged_images_are_told_of_without_a_traceback(image):
    good = image.read_bytes()
    chance = random.Random(5)
    for _ in range(3):
        bad = bytearray(good)
        for _ in range(12):
            bad[chance.randrange(min(len(bad), 400_000))] = chance.randrange(256)
        image.write_bytes(bad)
        for command in ("check", "show", "dump"):
            assert "Traceback" not in img(command, image)[2]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_copy_that_is_cut_short_leaves_a_valid_image(tmp_path, number):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(64 << 20))
    words = ["convert", "-r", "40M", "-f", "raw", "-O", "qcow2", str(source), str(target)]
    command = [sys.executable, "-c", MAIN.format("qemu-img"), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not target.exists() or target.stat().st_size < 4 << 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -number
    with pyvirtio.open_disk(target, format="qcow2") as disk:
        assert not disk.check().corruptions


# -- beside qemu-img -------------------------------------------------------------------------------


@requires("qemu-img", "qemu-io")
def test_random_commands_do_what_qemu_does(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    make_images(images, 1)
    for seed in range(100, 112):
        words = command_line(random.Random(seed))
        assert compare(*run_both(images, words)) == [], f"seed {seed}: {words}"


# -- beyond qemu-img -------------------------------------------------------------------------------


def test_explain_tells_every_step(image):
    status, output, _ = img("explain", "--output=json", image, "65540")
    assert status == 0
    steps = json.loads(output)[0]["steps"]
    tables = ["L1 table", "L2 table", "host file", "refcount table", "refcount"]
    assert [step["what"] for step in steps] == tables
    with pyvirtio.open_disk(image, read_only=True) as disk:
        assert steps[2]["at"] == disk.block_status(65540, 1).host_offset


def test_explain_finds_the_way_back_from_the_host(image):
    with pyvirtio.open_disk(image, read_only=True) as disk:
        host = disk.block_status(65540, 1).host_offset
    status, output, _ = img("explain", "--host", image, str(host))
    assert status == 0
    assert "data of the disk at guest offset 0x10000\n" in output


def test_explain_ends_where_nothing_is_stored(image):
    assert img("explain", image, "3M")[1].endswith("    disk: in no layer: zeroes\n")


def test_diff_finds_what_was_written_since_a_snapshot(image):
    status, output, _ = img("diff", "-l", "one", image, "--output=json")
    assert status == 1
    assert json.loads(output) == [{"start": 65536, "length": 1024}]
    assert img("diff", image, image)[:2] == (0, "Nothing differs.\n")


def test_dump_counts_every_cluster(image):
    facts = json.loads(img("dump", image)[1])
    assert sum(facts["clusters"].values()) * facts["cluster-size"] == image.stat().st_size
    assert facts["snapshots"][0]["name"] == "one"
    assert not facts["problems"]


def test_dump_has_every_entry_and_refcount(image):
    with pyvirtio.open_disk(image) as disk:
        disk.bitmaps.add("b")
        host = disk.block_status(65540, 1).host_offset & -65536
    facts = json.loads(img("dump", "--json", image)[1])
    (table,) = facts["tables"]
    assert table["entries"]["1"] == [host | 1 << 63]
    assert [bitmap["name"] for bitmap in facts["bitmaps"]] == ["b"]
    counted = sum(
        run[1] * run[2] for block in facts["refcount-blocks"] for run in block["refcounts"]
    )
    shared = [run for block in facts["refcount-blocks"] for run in block["refcounts"] if run[2] > 1]
    more = sum(count * (value - 1) for _, count, value in shared)
    assert counted - more == -(-image.stat().st_size // 65536)
    assert shared


def test_progress_of_diff_does_not_get_into_its_output(image):
    _, output, errors = img("diff", "-p", "-l", "one", image, "--output=json")
    assert json.loads(output) == [{"start": 65536, "length": 1024}]
    assert "(100.00/100%)" in errors


def test_show_finds_a_leak(image):
    with image.open("r+b") as file:
        clusters = image.stat().st_size >> 16
        file.truncate((clusters + 1) << 16)
        file.seek(2 * 65536 + 2 * clusters)
        file.write(b"\0\1")
    status, output, _ = img("show", image)
    assert status == 0
    assert "leaked                   1" in output


def test_the_page_needs_nothing_else(image, tmp_path):
    page = tmp_path / "page.html"
    assert img("show", f"--html={page}", image)[0] == 0
    text = page.read_text()
    assert "image.qcow2" in text
    assert "http://" not in text
    assert "https://" not in text


def test_verify_chain_names_what_is_missing(image, tmp_path):
    overlay = tmp_path / "overlay.qcow2"
    pyvirtio.create_disk(overlay, 4 << 20, backing_file="image.qcow2", backing_fmt="qcow2").close()
    assert img("verify-chain", overlay)[0] == 0
    image.unlink()
    status, output, _ = img("verify-chain", overlay)
    assert status == 2
    assert "No such file or directory" in output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell):
    assert "verify-chain" in img("completion", shell)[1]


def test_the_manual_has_every_option():
    assert "\\-\\-backing\\-chain" in img("man", "info")[1]


# -- names of what has none ------------------------------------------------------------------------


def test_a_disk_that_no_file_name_describes_has_a_json_name(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(65536))
    for name in ("a.qcow2", "b.qcow2"):
        img("create", "-fqcow2", "-Fraw", "-bbase.raw", tmp_path / name)
    path = tmp_path / "a.qcow2"
    rule = f"driver=qcow2,file.driver=blkdebug,file.image.filename={path},file.align=512"
    _, output, _ = img("info", "--output=json", "--image-opts", rule)
    facts = json.loads(output)
    assert json.loads(facts["filename"].removeprefix("json:")) == {
        "driver": "qcow2",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": str(path)},
            "align": "512",
        },
    }
    assert facts["full-backing-filename"] == str(base)
    words = "driver=qcow2,file.driver=quorum,file.vote-threshold=1"
    files = [f"file.children.{i}.filename={tmp_path / name}.qcow2" for i, name in enumerate("ab")]
    files += [f"file.children.{i}.driver=file" for i in range(2)]
    status, output, _ = img("info", "--image-opts", ",".join([words, *files]))
    assert status == 0
    assert "image: json:{" in output
    assert "backing file: base.raw (cannot determine actual path)" in output
