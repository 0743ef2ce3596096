"""Key slots changed by ``amend``, with QEMU's options and QEMU's refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio import PassphraseError
from pyvirtio.qcow2 import Qcow2Disk
from support.encrypted import PASSPHRASE, blank, described, open_blank, peer_io, run_peer
from support.images import as_qcow2, new_image
from support.peers import requires
from support.qemu import PeerError

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"encrypt_new_secret": "new"}, "Parameter 'state' is missing"),
    ({"encrypt_keyslot": 1}, "Parameter 'state' is missing"),
    (
        {"encrypt_state": "foo", "encrypt_new_secret": "new"},
        "Parameter 'state' does not accept value 'foo'",
    ),
    ({"encrypt_state": "active"}, "'new-secret' is required to activate a keyslot"),
    (
        {
            "encrypt_state": "active",
            "encrypt_new_secret": "new",
            "encrypt_old_secret": PASSPHRASE,
        },
        "'old-secret' must not be given when activating keyslots",
    ),
    (
        {"encrypt_state": "active", "encrypt_new_secret": "new", "encrypt_keyslot": 0},
        "Refusing to overwrite active keyslot 0 - please erase it first",
    ),
    (
        {"encrypt_state": "active", "encrypt_new_secret": "new", "encrypt_keyslot": 8},
        "Invalid keyslot 8 specified, must be between 0 and 7",
    ),
    (
        {"encrypt_state": "inactive", "encrypt_new_secret": "new"},
        "'new-secret' must not be given when erasing keyslots",
    ),
    (
        {
            "encrypt_state": "inactive",
            "encrypt_old_secret": PASSPHRASE,
            "encrypt_iter_time": 5,
        },
        "'iter-time' must not be given when erasing keyslots",
    ),
    (
        {"encrypt_state": "inactive"},
        "To erase keyslot(s), either explicit keyslot index or the password currently contained "
        "in them must be given",
    ),
    (
        {"encrypt_state": "inactive", "encrypt_keyslot": 0},
        "Attempt to erase the only active keyslot 0 which will erase all the data in the image "
        "irreversibly - refusing operation",
    ),
    (
        {"encrypt_state": "inactive", "encrypt_old_secret": PASSPHRASE},
        "All the active keyslots match the (old) password that was given and erasing them will "
        "erase all the data in the image irreversibly - refusing operation",
    ),
    (
        {"encrypt_state": "inactive", "encrypt_keyslot": 3},
        "Given keyslot 3 is already erased (inactive)",
    ),
    (
        {"encrypt_state": "inactive", "encrypt_old_secret": "new"},
        "No keyslots match given (old) password for erase operation",
    ),
]


def luks() -> Qcow2Disk:
    return as_qcow2(open_blank("luks"))


def opens_with(disk: Qcow2Disk, passphrase: str) -> bool:
    disk.flush()
    file = pyvirtio.MemoryDisk(growable=True)
    below = disk.children["file"]
    file.write(0, below.read(0, below.size))
    try:
        pyvirtio.open_disk(file, passphrase=passphrase).close()
    except PassphraseError:
        return False
    return True


def peer_amend(path: Path, method: str, options: dict[str, Any], *more: str) -> None:
    """The same by qemu-img."""
    secrets = {"new": "sec1", PASSPHRASE: "sec0"}
    named = []
    for name, value in options.items():
        option = name.replace("encrypt_", "encrypt.").replace("_", "-")
        named.append(f"{option}={secrets.get(value, value)}")
    arguments = ["--image-opts", described(path, method), "-o", ",".join(named)]
    run_peer("qemu-img", "amend", *more, *arguments, sec1="new")


def test_a_passphrase_is_added_and_the_old_one_erased() -> None:
    disk = luks()
    disk.amend(encrypt_state="active", encrypt_new_secret="new", encrypt_iter_time=1)
    assert opens_with(disk, "new")
    assert opens_with(disk, PASSPHRASE)
    disk.amend(encrypt_state="inactive", encrypt_old_secret=PASSPHRASE)
    assert opens_with(disk, "new")
    assert not opens_with(disk, PASSPHRASE)


def test_the_slot_is_the_one_named() -> None:
    disk = luks()
    disk.amend(
        encrypt_state="active", encrypt_new_secret="new", encrypt_keyslot=5, encrypt_iter_time=1
    )
    slots = disk.info().specific["encrypt"]["slots"]
    assert [slot["active"] for slot in slots] == [True] + 4 * [False] + [True, False, False]
    disk.amend(encrypt_state="inactive", encrypt_keyslot=0)
    assert not opens_with(disk, PASSPHRASE)


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_what_qemu_refuses_is_refused_in_its_words(options: dict[str, Any], message: str) -> None:
    disk = luks()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        disk.amend(**options)
    assert opens_with(disk, PASSPHRASE)
    assert not opens_with(disk, "new")


@requires("qemu-img")
def test_qemu_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(blank("luks"))
    for options, message in REFUSALS:
        with pytest.raises(PeerError) as caught:
            peer_amend(path, "luks", options)
        assert message in str(caught.value)


def test_only_by_force_is_the_last_one_erased() -> None:
    disk = luks()
    disk.amend(encrypt_state="inactive", encrypt_keyslot=0, force=True)
    assert not opens_with(disk, PASSPHRASE)
    disk.amend(  # the key is still in memory
        encrypt_state="active", encrypt_new_secret="new", encrypt_iter_time=1
    )
    assert opens_with(disk, "new")


def test_only_by_force_is_an_active_one_replaced() -> None:
    disk = luks()
    disk.amend(
        encrypt_state="active",
        encrypt_new_secret="new",
        encrypt_keyslot=0,
        encrypt_iter_time=1,
        force=True,
    )
    assert opens_with(disk, "new")
    assert not opens_with(disk, PASSPHRASE)


def test_images_without_luks_have_no_key_slots() -> None:
    with pytest.raises(ValueError, match=r"^Can't amend encryption options - encryption not pre"):
        new_image()[1].amend(encrypt_state="active", encrypt_new_secret="new")
    with pytest.raises(ValueError, match=r"^Only LUKS encryption options can be amended$"):
        as_qcow2(open_blank("aes")).amend(encrypt_state="active", encrypt_new_secret="new")


def test_options_of_creation_are_not_amended() -> None:
    with pytest.raises(ValueError, match="only supported for image creation"):
        luks().amend(encrypt_cipher_alg="aes-128")


def test_a_refused_passphrase_keeps_all_else() -> None:
    disk = luks()
    with pytest.raises(ValueError, match="already erased"):
        disk.amend(encrypt_state="inactive", encrypt_keyslot=2, refcount_bits=32)
    assert disk.info().specific["refcount-bits"] == 16


@requires("qemu-img", "qemu-io")
def test_qemu_opens_what_we_amended_and_we_what_it_did(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(blank("luks"))
    with pyvirtio.open_disk(path, passphrase=PASSPHRASE) as disk:
        disk.write(0, b"x" * 512)
        as_qcow2(disk).amend(encrypt_state="active", encrypt_new_secret="new", encrypt_iter_time=1)
    options = {"encrypt_state": "inactive", "encrypt_old_secret": PASSPHRASE}
    peer_amend(path, "luks", options)
    with pytest.raises(PassphraseError):
        pyvirtio.open_disk(path, passphrase=PASSPHRASE)
    with pyvirtio.open_disk(path, passphrase="new") as disk:
        assert disk.read(0, 512) == b"x" * 512
    peer_io(path, "luks", "read -P 120 0 512", sec0="new")
