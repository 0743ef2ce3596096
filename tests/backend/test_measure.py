"""measure: the numbers of qemu-img measure."""

from __future__ import annotations

import json
import random

import pytest

import pyvirtio
from pyvirtio import measure
from support.chains import Chain
from support.peers import requires
from support.qemu import qemu_img


def qemu_measure(*arguments):
    return json.loads(qemu_img("measure", "--output=json", *arguments).stdout)


def as_qemu(found):
    shown = {"required": found.required, "fully-allocated": found.fully_allocated}
    if found.bitmaps is not None:
        shown["bitmaps"] = found.bitmaps
    return shown


CASES = [
    {},
    {"cluster_size": 512},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 2 << 20, "refcount_bits": 64},
    {"extended_l2": True, "cluster_size": 131072},
    {"compat": "0.10"},
    {"preallocation": "full"},
]


def written(options):
    return ",".join(f"{name}={str(value).replace('True', 'on')}" for name, value in options.items())


@requires("qemu-img")
@pytest.mark.parametrize("options", CASES)
def test_an_empty_image_is_measured_as_qemu_does(options):
    chance = random.Random(str(options))
    for size in (0, 512, 1 << 20, 10 << 30, chance.randrange(1 << 40) // 512 * 512):
        arguments = ["-O", "qcow2", "--size", size]
        if options:
            arguments += ["-o", written(options)]
        if size * 8 // (options.get("cluster_size", 65536) ** 2 // 8) > 32 << 20:
            with pytest.raises(ValueError, match="too large"):
                measure(size, **options)
            continue
        assert as_qemu(measure(size, **options)) == qemu_measure(*arguments)


@requires("qemu-img")
@pytest.mark.parametrize("options", CASES)
def test_a_chain_is_measured_as_qemu_does(tmp_path, options):
    chain = Chain(tmp_path)
    arguments = ["-O", "qcow2", "-f", "qcow2", *(("-o", written(options)) if options else ())]
    with chain.open(read_only=True) as disk:
        assert as_qemu(measure(disk, **options)) == qemu_measure(*arguments, chain.top)


@requires("qemu-img")
def test_an_overlay_to_be_is_measured_as_qemu_does(tmp_path):
    chain = Chain(tmp_path)
    with chain.open(read_only=True) as disk:
        found = measure(disk, backing_file="base", backing_fmt="raw")
    options = "backing_file=base,backing_fmt=raw"
    expected = qemu_measure("-O", "qcow2", "-f", "qcow2", "-o", options, chain.top)
    assert as_qemu(found) == expected


@requires("qemu-img")
def test_raw_is_measured_as_qemu_does(tmp_path):
    chain = Chain(tmp_path)
    with chain.open(read_only=True) as disk:
        found = measure(disk, format="raw")
    assert as_qemu(found) == qemu_measure("-O", "raw", "-f", "qcow2", chain.top)


def test_a_converted_image_is_as_large_as_measured(tmp_path):
    chain = Chain(tmp_path)
    target = tmp_path / "copy"
    with chain.open(read_only=True) as disk:
        found = measure(disk)
        with pyvirtio.create_disk(target, disk.size) as copy:
            pyvirtio.convert(disk, copy, target_is_new=True)
    assert target.stat().st_size <= found.required


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="cannot have"):
        measure(-1)
