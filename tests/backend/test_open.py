"""open_disk and create_disk: names, probing, chains, policies, and failures that cost nothing."""

import errno
import os
import warnings
from itertools import pairwise

import pytest

from pyvirtio import (
    BackendError,
    FileDisk,
    ImageError,
    InUseError,
    MemoryDisk,
    RawDisk,
    UnsupportedError,
    create_disk,
    open_disk,
)
from pyvirtio.backend import blockdev

pytestmark = pytest.mark.usefixtures("toy")


def image(path, backing="", kind=""):
    """A toy image; its contents are 4096 bytes of its name."""
    head = b"TOY!" + backing.encode() + b"\0" + kind.encode() + b"\0"
    path.write_bytes(head.ljust(512, b"\0") + path.name.encode()[:1] * 4096)
    return path


# -- names and formats -----------------------------------------------------------------------------


def test_the_format_is_probed(tmp_path):
    image(tmp_path / "a")
    for name in (tmp_path / "a", str(tmp_path / "a"), f"file:{tmp_path / 'a'}"):
        with open_disk(name) as disk:
            assert disk.format_name == "toy"
            assert disk.read(0, 1) == b"a"


def test_the_format_can_be_given(tmp_path):
    image(tmp_path / "a")
    with open_disk(tmp_path / "a", format="raw") as disk:
        assert disk.read(0, 4) == b"TOY!"
    with pytest.raises(ValueError, match="Unknown driver 'nope'"):
        open_disk(tmp_path / "a", format="nope")


def test_options_reach_the_format(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 512 + b"y" * 512)
    with open_disk(tmp_path / "a", format="raw", offset=512, size=512) as disk:
        assert disk.read(0, 512) == b"y" * 512


@pytest.mark.parametrize("name", ["foo://host/x", "foo:bar"])
def test_other_protocols_are_refused_by_name(name):
    with pytest.raises(UnsupportedError, match=f"Unknown protocol '{name.split(':')[0]}'"):
        open_disk(name)


def test_a_path_object_is_no_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "foo:bar")
    open_disk(tmp_path.joinpath("foo:bar").relative_to(tmp_path)).close()
    open_disk("./foo:bar").close()


def test_a_disk_can_be_the_file():
    file = MemoryDisk(bytearray(b"TOY!".ljust(512, b"\0") + b"m" * 4096))
    with open_disk(file) as disk:
        assert disk.read(0, 1) == b"m"
    assert file.closed


def test_a_failure_closes_the_file_it_opened_and_no_other(tmp_path):
    image(tmp_path / "a", "none")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError):
        open_disk(tmp_path / "a")
    assert len(os.listdir("/proc/self/fd")) == before
    with FileDisk(tmp_path / "a") as file:
        with pytest.raises(BackendError):
            open_disk(file)
        assert not file.closed


def test_raw_by_guess_warns_and_is_guarded(tmp_path):
    (tmp_path / "a").write_bytes(bytes(4096))
    with pytest.warns(UserWarning, match="Image format was not specified for '.*a' and probing"):
        disk = open_disk(tmp_path / "a")
    with disk, pytest.raises(BackendError) as caught:
        disk.write(0, b"TOY!")
    assert caught.value.errno == errno.EPERM
    with open_disk(tmp_path / "a", format="raw") as disk:
        disk.write(0, b"TOY!")


def test_raw_by_guess_does_not_warn_when_read_only(tmp_path):
    (tmp_path / "a").write_bytes(bytes(4096))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_disk(tmp_path / "a", read_only=True).close()


# -- chains ----------------------------------------------------------------------------------------


def test_relative_names_are_relative_to_the_image(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    image(tmp_path / "base")
    image(tmp_path / "sub" / "middle", "../base")
    image(tmp_path / "top", "sub/middle")
    monkeypatch.chdir("/")
    with open_disk(tmp_path / "top") as disk:
        base = disk.backing.backing
        assert base.read(0, 1) == b"b"
        assert os.path.samefile(base.filename, tmp_path / "base")


def test_backing_files_are_read_only_and_the_image_is_not(tmp_path):
    image(tmp_path / "base")
    image(tmp_path / "top", "base")
    with open_disk(tmp_path / "top") as disk:
        assert not disk.read_only
        assert disk.backing.read_only
        with open_disk(tmp_path / "base", read_only=True):
            pass


def test_the_format_named_in_the_image_is_used(tmp_path):
    image(tmp_path / "base")
    image(tmp_path / "top", "base", "raw")
    with open_disk(tmp_path / "top") as disk:
        assert type(disk.backing) is RawDisk


@pytest.mark.parametrize("read_only", [False, True])
def test_a_data_file_is_a_bare_growable_file_opened_like_the_image(
    tmp_path, monkeypatch, read_only
):
    monkeypatch.chdir(tmp_path)  # its name is not relative to the image, in QEMU
    (tmp_path / "data").write_bytes(b"TOY!")
    image(tmp_path / "top", "data=data")
    with open_disk(tmp_path / "top", read_only=read_only) as disk:
        data = disk.children["data-file"]
        assert type(data) is FileDisk
        assert data.growable
        assert data.read_only is read_only


def test_a_data_file_that_is_missing_is_reported(tmp_path):
    image(tmp_path / "top", "data=none")
    with pytest.raises(BackendError, match=r"\] Could not open '.*none'"):
        open_disk(tmp_path / "top")


def test_a_backing_file_that_cannot_be_opened_is_reported_as_qemu_does(tmp_path):
    image(tmp_path / "top", "none")
    name = tmp_path / "none"
    with pytest.raises(BackendError) as caught:
        open_disk(tmp_path / "top")
    assert caught.value.strerror == (
        f"Could not open backing file: Could not open '{name}': No such file or directory"
    )
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [("x", "nope", "Unknown driver 'nope'"), ("foo://h/x", "", "Unknown protocol 'foo'")],
)
def test_what_an_image_asks_for_in_vain_is_named(tmp_path, name, kind, text):
    image(tmp_path / "x")
    image(tmp_path / "top", name, kind)
    with pytest.raises(UnsupportedError, match=f"Could not open backing file: {text}"):
        open_disk(tmp_path / "top")


def test_a_backing_file_in_use_is_reported(tmp_path):
    image(tmp_path / "base")
    image(tmp_path / "top", "base")
    with (
        open_disk(tmp_path / "base"),
        pytest.raises(
            InUseError, match='Could not open backing file: Failed to get shared "write"'
        ),
    ):
        open_disk(tmp_path / "top")


@pytest.mark.parametrize("names", [["top"], ["./a", "b", "top"]])
@pytest.mark.parametrize("read_only", [False, True])
def test_loops_are_found(tmp_path, names, read_only):
    image(tmp_path / "top", names[0])
    for name, below in pairwise(names):
        image(tmp_path / name, below)
    with pytest.raises(ImageError, match="loop"):
        open_disk(tmp_path / "top", read_only=read_only)


def test_loops_through_other_names_of_a_file_are_found(tmp_path):
    image(tmp_path / "top", "link")
    os.symlink("top", tmp_path / "link")
    with pytest.raises(ImageError, match="loop"):
        open_disk(tmp_path / "top", read_only=True)


def test_chains_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(blockdev, "MAX_CHAIN", 20)
    for i in range(21):
        image(tmp_path / str(i), str(i - 1) if i else "")
    with pytest.raises(ImageError, match="longer than 20 files"):
        open_disk(tmp_path / "20")
    open_disk(tmp_path / "19").close()


def test_a_chain_that_python_cannot_follow_is_an_image_error(tmp_path, monkeypatch):
    monkeypatch.setattr(blockdev, "MAX_CHAIN", 1000)
    for i in range(400):
        image(tmp_path / str(i), str(i - 1) if i else "")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match="too long"):
        open_disk(tmp_path / "399")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_relative_name_in_an_image_without_a_name_is_refused():
    file = MemoryDisk(bytearray(b"TOY!base".ljust(4608, b"\0")))
    with pytest.raises(ImageError, match="Cannot resolve the relative file name 'base'"):
        open_disk(file)


# -- policy ----------------------------------------------------------------------------------------


def test_the_policy_sees_who_names_what(tmp_path):
    image(tmp_path / "base")
    image(tmp_path / "middle", "base", "toy")
    image(tmp_path / "top", "middle")
    seen = []

    def policy(reference):
        seen.append(reference)
        return tmp_path / reference.name

    open_disk(tmp_path / "top", backing=policy).close()
    first, second = seen
    assert (first.name, first.format, first.role, first.depth) == ("middle", None, "backing", 1)
    assert first.parent == str(tmp_path / "top")
    assert (second.name, second.format, second.depth) == ("base", "toy", 2)
    assert second.parent == str(tmp_path / "middle")


def test_a_policy_can_refuse_so_that_no_file_is_touched(tmp_path, monkeypatch):
    image(tmp_path / "top", "/etc/passwd")
    file = FileDisk(tmp_path / "top")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("a file was opened"))
    monkeypatch.setattr(os, "stat", lambda *_: pytest.fail("a file was looked at"))
    with open_disk(file, backing=lambda reference: None) as disk:
        assert disk.backing is None


def test_a_policy_can_give_a_disk(tmp_path):
    image(tmp_path / "top", "anything")
    given = MemoryDisk(4096)
    with open_disk(tmp_path / "top", backing=lambda reference: given) as disk:
        assert disk.backing is given
    assert given.closed


def test_a_policys_own_error_is_left_as_it_is(tmp_path):
    image(tmp_path / "top", "base")

    def policy(reference):
        raise PermissionError("no files today")

    with pytest.raises(PermissionError, match=r"^no files today"):
        open_disk(tmp_path / "top", backing=policy)


# -- creating --------------------------------------------------------------------------------------


def test_create_returns_the_open_disk(tmp_path):
    with create_disk(tmp_path / "new", 1000, format="raw") as disk:
        assert disk.size == 1024
        disk.write(1000, b"abc")
    assert os.path.getsize(tmp_path / "new") == 1024


def test_create_in_a_growable_disk():
    file = MemoryDisk(growable=True)
    with create_disk(file, 4096, format="toy"):
        assert file.read(0, 4) == b"TOY!"


def test_create_replaces_what_was_there_and_keeps_its_mode(tmp_path):
    path = image(tmp_path / "old")
    path.chmod(0o640)
    os.symlink("old", tmp_path / "link")
    with create_disk(tmp_path / "link", 8192, format="raw") as disk:
        assert disk.read(0, 4) == bytes(4)
        assert disk.filename == str(tmp_path / "link")
        with pytest.raises(InUseError):
            open_disk(path, format="raw")
    assert (tmp_path / "link").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link", "old"]


def test_create_overwrites_a_file_with_several_names(tmp_path):
    path = image(tmp_path / "old")
    os.link(path, tmp_path / "other")
    create_disk(path, 512, format="raw").close()
    assert (tmp_path / "other").read_bytes() == bytes(512)


@pytest.mark.parametrize("options", [{"fail": True}, {"backing_file": "none"}, {"nonsense": 1}])
def test_a_failed_creation_leaves_the_old_file_or_none(tmp_path, options):
    old = image(tmp_path / "old").read_bytes()
    for name in ("old", "new"):
        with pytest.raises((ValueError, TypeError, BackendError)):
            create_disk(tmp_path / name, 4096, format="toy", **options)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == old
    open_disk(tmp_path / "old").close()


def test_create_does_not_touch_a_file_in_use(tmp_path):
    old = image(tmp_path / "old").read_bytes()
    with open_disk(tmp_path / "old", read_only=True), pytest.raises(InUseError):
        create_disk(tmp_path / "old", 4096, format="raw")
    assert (tmp_path / "old").read_bytes() == old


def test_create_in_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(BackendError, match=r"Could not create .*No such file or directory"):
        create_disk(tmp_path / "none" / "disk", 4096, format="raw")


def test_the_file_of_a_failed_image_is_closed_at_once(tmp_path):
    """Though whoever keeps the error keeps all that led to it."""
    image(tmp_path / "a", "none")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError) as caught:
        open_disk(tmp_path / "a")
    assert len(os.listdir("/proc/self/fd")) == before
    assert caught.value
