"""``make demo``: Debian's Linux boots from a qcow2 disk, and others bear witness.

The kernel is Debian's own, with its own drivers for virtio and ext4. Every device of the board
that it runs on is Python. It boots from an overlay, works on files and a database, and shuts down;
a snapshot is taken; it boots again and ruins its file system; the snapshot is gone back to; it
boots once more and finds everything whole. What the image holds in between is read on the host, by
other people's tools.
"""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyvirtio

from . import second_reader
from .firmware import CACHE
from .guest import LinuxGuest
from .linux import find_linux
from .packages import PackageError
from .rootfs import find_root, find_tool, make_overlay
from .script import ScriptError
from .steps import DemoError, Steps, file_hash

__all__ = ["Demo", "main"]

SNAPSHOT = "all-is-well"
ROUNDS = 4
LITTER = 16 << 20


class Demo(Steps):
    """The steps, each a method; they are meant to be taken in their order.

    ``folder`` gets the overlay. ``quiet`` leaves out everything that is printed.
    """

    def __init__(self, folder: Path, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self.folder = folder
        self.overlay = folder / "overlay.qcow2"
        self.nonce = secrets.token_hex(16)
        """What the guest is told to write: 32 characters, new in every run."""
        self._base = Path()
        self._base_hash = ""
        self._qemu_img = shutil.which("qemu-img")

    def shown(self, line: str) -> str:
        """Without the answers and questions between the shell and LinuxGuest."""
        return re.sub(r'\x1b\[6n|; echo "=\$\?="|^=\d+=$', "", line)

    def find_parts(self) -> None:
        """Everything that comes from Debian, downloaded only in the first run."""
        self.title("Debian's parts (the first time, about 120 MB are downloaded)")
        linux = find_linux()
        size = linux.kernel.stat().st_size
        self.tell(f"Linux {linux.version}, {size >> 20} MiB, unmodified: {linux.kernel}")
        self._base = find_root()
        self._base_hash = file_hash(self._base)
        self.tell(f"root file system, ext4 in qcow2: {self._base}")
        find_tool("debugfs")
        self.tell(f"qemu-img: {self._qemu_img or 'none; a second qcow2 reader stands in for it'}")

    def make_overlay(self) -> None:
        """An empty overlay on the base image."""
        self.title("A qcow2 overlay on it")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.overlay.unlink(missing_ok=True)
        make_overlay(self.overlay)
        self.tell(f"{self.overlay}: {self.overlay.stat().st_size >> 10} KiB")

    # -- the guest -----------------------------------------------------------------------------

    def boot(self, disk: pyvirtio.Disk) -> LinuxGuest:
        """Linux at its shell, with ``disk`` as /dev/vda."""
        started = time.monotonic()
        guest = LinuxGuest([disk], echo=self.echo)
        wall, ticks = time.monotonic() - started, guest.board.clock.now() / 1e7
        self.tell(f"at its shell after {wall:.1f} s ({ticks:.2f} s of guest time)")
        root = guest.run("grep ' / ' /proc/mounts")
        self.check("/dev/vda / ext4 rw" in root, "its root file system is /dev/vda")
        troubles = [line for line in guest.warnings() if "vda" in line or "virtio_blk" in line]
        self.check(not troubles, "the kernel has nothing to complain of about the disk")
        return guest

    def work(self, guest: LinuxGuest, disk: pyvirtio.Disk) -> None:
        """Files, checksums, a history of commits, a database; and space given back."""
        self.title("The guest works: files, commits and a database, each with fsync")
        guest.run(f"workload work {ROUNDS}")
        self.check("is verified" in guest.run(f"verify work {ROUNDS}"), "the guest verifies it")
        guest.run(f"echo {self.nonce} > nonce && sync nonce")
        self.title("The guest fills its disk with litter, removes it, and runs fstrim")
        before = _stored(disk)
        # Copies, as random numbers by an emulated processor would be most of the demo's time.
        more = f"cat /usr/bin/busybox >>litter && [ $(stat -c %s litter) -lt {LITTER} ]"
        guest.run(f"while {more}; do true; done; sync")
        littered = _stored(disk)
        self.check(littered - before >= LITTER, f"the overlay holds {littered >> 20} MiB of data")
        guest.run("rm litter && sync && fstrim -v /")
        after = _stored(disk)
        # Not to the byte: the clusters at the litter's edges hold other things, too.
        self.check(after - before < LITTER // 8, f"now it holds {after >> 20} MiB again")
        self.check(not guest.warnings(), "no warning in the kernel's log")

    def shut_down(self, guest: LinuxGuest) -> None:
        """An orderly end."""
        guest.power_off()
        self.check(True, "the guest has powered the board off")

    def run_first(self) -> None:
        """Boot, work, shut down."""
        self.title("Linux on a RISC-V board in Python, the overlay in its virtio-mmio slot")
        with pyvirtio.open_disk(self.overlay, format="qcow2") as disk:
            guest = self.boot(disk)
            self.work(guest, disk)
            self.shut_down(guest)

    def run_to_ruin(self) -> None:
        """Boot, and break the file system on purpose."""
        self.title("Linux again; it breaks its file system on purpose")
        with pyvirtio.open_disk(self.overlay, format="qcow2") as disk:
            guest = self.boot(disk)
            guest.run("cp /usr/bin/busybox /tmp/busybox")
            guest.run(
                "dd if=/dev/zero of=/dev/vda bs=1M count=40 oflag=direct conv=fsync 2>/dev/null"
            )
            guest.run("/tmp/busybox sha256sum /root/work/book.db; false", fails=True)
            guest.cut_power()
            self.tell("the first 40 MiB are zeroes; the power is cut")

    def run_last(self) -> None:
        """Boot, and find everything."""
        self.title("Linux once more, on the disk that has gone back")
        with pyvirtio.open_disk(self.overlay, format="qcow2") as disk:
            guest = self.boot(disk)
            self.check("is verified" in guest.run(f"verify work {ROUNDS}"), "the work is all there")
            self.check(self.nonce in guest.run("cat nonce"), f"nonce holds {self.nonce}")
            self.shut_down(guest)

    # -- the host ------------------------------------------------------------------------------

    def snapshot(self) -> None:
        """An internal snapshot of the disk."""
        self.title(f'An internal snapshot, "{SNAPSHOT}"')
        with pyvirtio.open_disk(self.overlay, format="qcow2") as disk:
            disk.snapshots.create(SNAPSHOT)
            names = [entry.name for entry in disk.snapshots]
        self.check(names == [SNAPSHOT], f"the image lists {names}")

    def go_back(self) -> None:
        """Back to the snapshot."""
        self.title(f'Back to the snapshot "{SNAPSHOT}"')
        with pyvirtio.open_disk(self.overlay, format="qcow2") as disk:
            disk.snapshots.apply(SNAPSHOT)
        self.tell("done")

    def witness(self, *, whole: bool) -> None:
        """The host's view of the overlay: e2fsck, and the nonce as debugfs reads it."""
        reader = "qemu-img convert" if self._qemu_img else "the second reader"
        self.title(f"Seen from the host, by {reader}, e2fsck and debugfs")
        raw = self.folder / "seen.raw"
        try:
            self._export(raw)
            fsck = _run([find_tool("e2fsck"), "-f", "-n", str(raw)])
            nonce = _run([find_tool("debugfs"), "-R", "cat /root/nonce", str(raw)])
        finally:
            raw.unlink(missing_ok=True)
        found = nonce.stdout.strip() == self.nonce.encode()
        if whole:
            last = fsck.stdout.decode(errors="replace").strip().splitlines()[-1:]
            self.check(fsck.returncode == 0, f"e2fsck: {' '.join(last)}")
            self.check(found, f"/root/nonce holds {self.nonce}")
        else:
            self.check(fsck.returncode != 0, "e2fsck finds a ruin")
            self.check(not found, "the nonce is not to be found")

    def _export(self, raw: Path) -> None:
        if self._qemu_img is None:
            second_reader.convert(self.overlay, raw)
            return
        command = [self._qemu_img, "convert", "-f", "qcow2", "-O", "raw"]
        done = _run([*command, str(self.overlay), str(raw)])
        if done.returncode:
            raise DemoError(f"qemu-img convert: {done.stderr.decode(errors='replace')}")

    def check_images(self) -> None:
        """The images are sound, and the base is what it was."""
        self.title("The images")
        self.check(file_hash(self._base) == self._base_hash, "the base is untouched, to the bit")
        for image in (self._base, self.overlay):
            with pyvirtio.open_disk(image, format="qcow2", read_only=True) as disk:
                result = disk.check()
            faults = (result.check_errors, result.corruptions, result.leaks)
            self.check(faults == (0, 0, 0), f"{image.name}: no corruption, no leak")
            if self._qemu_img is not None:
                done = _run([self._qemu_img, "check", "-f", "qcow2", str(image)])
                text = (done.stdout + done.stderr).decode(errors="replace").splitlines()[0]
                self.check(done.returncode == 0, f"qemu-img check {image.name}: {text}")

    def run(self) -> None:
        """All of it. Raises DemoError, or what the parts raise, where something is wrong."""
        self.find_parts()
        self.make_overlay()
        self.run_first()
        self.witness(whole=True)
        self.snapshot()
        self.run_to_ruin()
        self.witness(whole=False)
        self.go_back()
        self.witness(whole=True)
        self.run_last()
        self.check_images()


def _stored(disk: pyvirtio.Disk) -> int:
    """Bytes of data in the disk's own layer."""
    return sum(extent.length for extent in disk.extents() if extent.data and not extent.depth)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the process's exit status."""
    if arguments if arguments is not None else sys.argv[1:]:
        print(__doc__)
        return 2
    started = time.monotonic()
    demo = Demo(CACHE.with_name("demo"))
    try:
        demo.run()
    except (DemoError, ScriptError, OSError, pyvirtio.PyvirtioError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except PackageError as error:
        print(f"\ndemo: {error}\n(make demo-uboot needs less from Debian)", file=sys.stderr)
        return 1
    print(f"\nAll is as it should be. ({time.monotonic() - started:.1f} s; images: {demo.folder})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
