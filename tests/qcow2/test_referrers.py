"""What refers to a host cluster: as much as its refcount says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import pyvirtio
from pyvirtio.backend.file import FileDisk
from pyvirtio.qcow2.referrers import explain_host

SIZE = 8 << 20


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 4096},
        {"cluster_size": 512, "refcount_bits": 8},
        {"cluster_size": 16384, "extended_l2": True},
        {"cluster_size": 65536, "refcount_bits": 64},
    ],
    ids=str,
)
def test_as_many_refer_to_a_cluster_as_its_refcount_says(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source = random.Random(1)
    path = tmp_path / "a.qcow2"
    with pyvirtio.create_disk(path, SIZE, **options) as disk:
        cluster = options["cluster_size"]
        for round in range(4):
            for _ in range(12):
                place = source.randrange(SIZE // cluster) * cluster
                disk.write(place, source.randbytes(cluster // 2))
            place = source.randrange(SIZE // cluster // 2) * cluster
            if disk.block_status(place, cluster).allocated:
                disk.write_zeroes(place, cluster)
            else:
                disk.write_compressed(
                    place, [source.randbytes(cluster // 4) + bytes(cluster * 3 // 4)]
                )
            if round == 2:
                disk.bitmaps.add("b")
                with disk.vmstate.writer() as stream:
                    stream.write(b"state" * 1000)
            disk.snapshots.create(f"s{round}")
        assert disk.check().clean
    with FileDisk(path, read_only=True) as file:
        compared = 0
        for offset in range(0, file.size, cluster):
            table, *rest = explain_host(file, offset)
            assert table.what == "refcount table"
            count, *referrers = rest
            assert count.what == "refcount"
            if not count.raw:
                assert [step.meaning for step in referrers] == ["nothing refers to this cluster"]
                continue
            assert len(referrers) == count.raw, (offset, referrers)
            compared += count.raw > 1
            for step in referrers:
                if step.raw is not None:
                    assert step.at is not None
                    assert int.from_bytes(file.read(step.at, 8)) == step.raw
        assert compared
