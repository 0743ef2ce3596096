"""The conformance suite accuses QEMU's vhost-user-blk of nothing but what is true of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.peers import requires

pytestmark = requires("qemu-storage-daemon")
RULES = ("BF-29", "VQ-S-08", "VQ-S-12", "VQ-S-33", "VQ-S-38", "BLK-72", "BLK-106", "BLK-107")
TRUE = {"BLK-108"}
"""What it breaks, as docs/conformance.md explains; a later QEMU may not."""


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    """Where a raw disk is exported."""
    image, path = tmp_path / "disk.raw", tmp_path / "qemu.sock"
    image.write_bytes(bytes(1 << 20))
    export = f"vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={path},writable=on"
    process = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image}"),
            *("--export", export),
        ]
    )
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield path
    process.terminate()
    process.wait(60)


def test_qemu_storage_daemon(socket: Path, tmp_path: Path) -> None:
    chosen = [word for rule in (*RULES, *TRUE) for word in ("--requirement", rule)]
    prefix = tmp_path / "matrix"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--pyargs", "pyvirtio.virtio.conformance", "--device", f"vhost-user:{socket}"),
            *("--matrix", str(prefix), *chosen),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = json.loads(Path(f"{prefix}.json").read_text())["requirements"]
    results = {row["id"]: row["result"] for row in rows}
    assert {rule: results[rule] for rule in RULES} == dict.fromkeys(RULES, "pass"), done.stdout
    assert {rule for rule in results if results[rule] == "fail"} <= TRUE
