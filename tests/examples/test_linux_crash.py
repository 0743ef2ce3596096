"""Power cuts under Debian's Linux: what fsync has promised is there, and the image is sound.

The run is recorded below the qcow2 driver. Each cut makes an image of what may be on the host's
disk at that moment (see ``support.crash``), and the guest boots from that. ``PYVIRTIO_LINUX_CUTS``
is how many.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import pyvirtio

pytest.importorskip("unicorn", reason="the example emulator needs unicorn")

from examples.emulator.guest import LinuxGuest
from examples.emulator.linux import find_linux
from examples.emulator.packages import PackageError
from examples.emulator.rootfs import find_root, make_overlay
from support.crash import power_cuts
from support.filters import RecordingDisk
from support.peers import find_program
from support.workload import dangerous

CUTS = int(os.environ.get("PYVIRTIO_LINUX_CUTS", "3"))
ROUNDS = 5
SEED = 4


@dataclass
class Recording:
    """A run of the guest, as the host's disk saw it."""

    disk: RecordingDisk
    start: bytes
    first: int
    """The first event with the work under way."""

    def stable(self, position: int) -> int:
        """How many rounds the guest had called stable by then."""
        return sum(event.kind == "mark" for event in self.disk.log[:position])


@pytest.fixture(scope="module", autouse=True)
def linux():
    try:
        find_linux()
        find_root()
    except PackageError as error:
        pytest.skip(f"no Linux: {error}")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    overlay = make_overlay(tmp_path_factory.mktemp("recorded") / "overlay.qcow2")
    start = overlay.read_bytes()
    recorder = RecordingDisk(pyvirtio.FileDisk(overlay, growable=True))
    said = bytearray()

    def listen(data: bytes) -> None:
        said.extend(data)
        if said.endswith(b" is stable"):
            recorder.mark(len(said))

    base = str(find_root())
    with pyvirtio.open_disk(recorder, format="qcow2", backing=lambda reference: base) as disk:
        guest = LinuxGuest([disk], echo=listen)
        first = len(recorder.log)
        guest.run(f"workload cut {ROUNDS}")
        guest.cut_power()
        end = len(recorder.log)
    del recorder.log[end:]  # closing the disk flushes, as a power cut does not
    return Recording(recorder, start, first)


@pytest.mark.parametrize("number", range(CUTS))
def test_power_cut(recording: Recording, tmp_path: Path, number: int) -> None:
    log = recording.disk.log
    positions = random.Random(SEED).sample(range(recording.first, len(log) + 1), k=max(CUTS, 3))
    position = positions[number]
    # The same seed and kind of cut for a number, whatever the others are.
    *_, image = power_cuts(log, recording.start, [position] * (number % 4 + 1), seed=number)
    overlay = tmp_path / "overlay.qcow2"
    # Beside the recording's folder, so that the relative name of the base holds.
    overlay.write_bytes(image.data)
    _assert_sound(overlay, image.story)
    _assert_recovers(overlay, "cut", recording.stable(position))


def test_killed_emulator_loses_nothing_stable(tmp_path: Path) -> None:
    overlay = make_overlay(tmp_path / "overlay.qcow2")
    script = tmp_path / "script"
    script.write_text('expect "guest# "\nline workload killed 9\nexpect "round 9 is stable"\n')
    command = [sys.executable, "-m", "examples.emulator", "linux", "--disk", str(overlay)]
    with subprocess.Popen(
        [*command, "--script", str(script)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    ) as process:
        said = b""
        while b"round 3 is stable" not in said and (more := process.stdout.read1()):
            said += more
        process.kill()
    assert b"round 3 is stable" in said
    _assert_sound(overlay, "killed")
    _assert_recovers(overlay, "killed", 3)


def _assert_sound(overlay: Path, story: str) -> None:
    with pyvirtio.open_disk(overlay, read_only=True) as disk:
        found = disk.check()
    assert not found.check_errors, story
    assert not dangerous(found), f"{story}: {found.messages[:5]}"
    if shutil.which("qemu-img"):
        repaired = overlay.with_name("repaired.qcow2")
        shutil.copyfile(overlay, repaired)
        command = ["qemu-img", "check", "-q", "-f", "qcow2", str(repaired)]
        subprocess.run([*command, "-r", "all"], check=True, capture_output=True)
        subprocess.run(command, check=True, capture_output=True)


def _assert_recovers(overlay: Path, name: str, rounds: int) -> None:
    with pyvirtio.open_disk(overlay) as disk:
        guest = LinuxGuest([disk])
        log = guest.run("dmesg")
        assert "EXT4-fs (vda): recovery complete" in log
        assert not re.search("EXT4-fs (error|warning)|I/O error", log)
        if rounds:
            assert f"{name} is verified" in guest.run(f"verify {name} {rounds}")
        guest.power_off()
    _assert_clean(overlay)


def _assert_clean(overlay: Path) -> None:
    """e2fsck finds nothing to repair."""
    e2fsck = find_program("e2fsck")
    if e2fsck is None:
        return
    raw = overlay.with_name("seen.raw")
    with (
        pyvirtio.open_disk(overlay, read_only=True) as disk,
        raw.open("wb") as file,
    ):
        file.truncate(disk.size)
        offset = 0
        for extent in disk.extents():
            if not extent.zero:
                file.seek(offset)
                file.write(disk.read(offset, extent.length))
            offset += extent.length
    done = subprocess.run([e2fsck, "-f", "-n", str(raw)], capture_output=True, text=True)
    raw.unlink()
    assert done.returncode == 0, done.stdout
