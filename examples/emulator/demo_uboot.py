"""``make demo-uboot``: a small guest uses a qcow2 disk, and others bear witness.

U-Boot, as Debian builds it, boots on the example board from nothing but its own binary. It reads a
file from a qcow2 overlay, writes another, and powers down. An internal snapshot is taken before it
writes and gone back to afterwards. What the image then holds is read by other people's tools.
"""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import pyvirtio

from . import second_reader
from .board import Board
from .firmware import CACHE, find_u_boot, packages
from .packages import PackageError
from .rootfs import copy_disk
from .script import ScriptError, Session
from .steps import DemoError, Steps, file_hash

__all__ = ["Demo", "main"]

PROMPT = "\n=> "
DISK_SIZE = 64 << 20
SNAPSHOT = "before-writing"
LOADED_AT, WRITTEN_FROM = 0x8400_0000, 0x8600_0000


class Demo(Steps):
    """The steps, each a method; they are meant to be taken in their order.

    ``folder`` gets the images. ``quiet`` leaves out everything that is printed.
    """

    def __init__(self, folder: Path, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self.folder = folder
        self.base = folder / "base.qcow2"
        self.overlay = folder / "overlay.qcow2"
        self.nonce = secrets.token_hex(16)
        """What the guest is told to write: 32 characters, new in every run."""
        self.book = b"".join(b"line %07d of a file in the base image\n" % n for n in range(40_000))
        self._base_hash = ""
        self._mtools: Path | None = None
        self._qemu_img = shutil.which("qemu-img")

    # -- tools of other people ---------------------------------------------------------------

    def find_tools(self) -> Path:
        """U-Boot and mtools, from this machine or from Debian's packages; U-Boot's path."""
        self.title("Programs of other people")
        u_boot = find_u_boot()
        self.tell(f"U-Boot: {u_boot} ({u_boot.stat().st_size} bytes, unmodified)")
        if shutil.which("mtools") is None:
            self._mtools = packages().get("mtools") / "usr/bin/mtools"
        self.tell(f"mtools, for the FAT file system: {self._mtools or shutil.which('mtools')}")
        self.tell(f"qemu-img: {self._qemu_img or 'none; a second qcow2 reader stands in for it'}")
        return u_boot

    def _mtool(self, verb: str, image: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [str(self._mtools or "mtools"), "-c", verb, "-i", str(image), *arguments]
        # The image stands for a whole disk of its own; mtools need not find its geometry plausible.
        environment = {"MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": "/dev/null", "LC_ALL": "C.UTF-8"}
        return subprocess.run(
            command, capture_output=True, check=False, stdin=subprocess.DEVNULL, env=environment
        )

    def _must(self, done: subprocess.CompletedProcess[bytes]) -> bytes:
        if done.returncode:
            raise DemoError(f"{done.args}: {done.stderr.decode(errors='replace')}")
        return done.stdout

    # -- the images --------------------------------------------------------------------------

    def make_images(self) -> None:
        """A base with a file system and a file in it, and an empty overlay on it."""
        self.title("A qcow2 base image with a FAT file system and a file in it")
        self.folder.mkdir(parents=True, exist_ok=True)
        raw, book = self.folder / "base.raw", self.folder / "book.txt"
        for old in (self.base, self.overlay, raw):
            old.unlink(missing_ok=True)
        book.write_bytes(self.book)
        with raw.open("wb") as file:
            file.truncate(DISK_SIZE)
        self._must(self._mtool("mformat", raw, "-F", "::"))
        self._must(self._mtool("mcopy", raw, str(book), "::book.txt"))
        pyvirtio.create_disk(self.base, DISK_SIZE, format="qcow2").close()
        with (
            pyvirtio.open_disk(raw, format="raw", read_only=True) as source,
            pyvirtio.open_disk(self.base, format="qcow2") as target,
        ):
            copied = copy_disk(source, target)
        raw.unlink()
        self._base_hash = file_hash(self.base)
        self.tell(f"{self.base}: {DISK_SIZE >> 20} MiB, {copied >> 10} KiB of it written")
        self.tell(f"sha256 {self._base_hash[:32]}...")
        self.title("An overlay on it")
        pyvirtio.create_disk(
            self.overlay,
            DISK_SIZE,
            format="qcow2",
            backing_file=self.base.name,
            backing_fmt="qcow2",
        ).close()
        self.tell(f"{self.overlay}: {self.overlay.stat().st_size >> 10} KiB, backed by the base")

    # -- the guest ---------------------------------------------------------------------------

    def boot(self, u_boot: Path, disk: pyvirtio.Disk) -> tuple[Board, Session]:
        """U-Boot at its prompt, with ``disk`` in the first slot."""
        started = time.monotonic()
        session = Session(self.echo)
        board = Board(session.send_out, disks=[disk])
        session.connect(board)
        board.start(board.load(u_boot))
        session.expect("stop autoboot")
        session.send("\r")
        session.expect(PROMPT)
        wall, guest = time.monotonic() - started, board.clock.now() / 1e7
        self.tell(f"at its prompt after {wall:.1f} s ({guest:.2f} s of guest time)")
        return board, session

    def read_in_guest(self, session: Session) -> None:
        """The guest finds the disk, lists and loads the file, and sums it up."""
        self.title("The guest reads")
        session.command("virtio scan", PROMPT)
        listing = session.command("ls virtio 0", PROMPT)
        size = len(self.book)
        self.check(f"{size}   book.txt" in listing, f"the guest sees book.txt, {size} bytes")
        loaded = session.command(f"load virtio 0 {LOADED_AT:x} book.txt", PROMPT)
        self.check(f"{size} bytes read" in loaded, f"the guest loads {size} bytes")
        summed = session.command(f"crc32 {LOADED_AT:x} {size:x}", PROMPT)
        found = re.search(r"==> ([0-9a-f]{8})", summed)
        wanted = f"{zlib.crc32(self.book):08x}"
        self.check(found is not None and found[1] == wanted, f"CRC-32 in the guest is {wanted}")

    def snapshot(self, disk: pyvirtio.Disk) -> None:
        """An internal snapshot, while the guest waits at its prompt."""
        self.title(f'An internal snapshot, "{SNAPSHOT}", while the guest waits')
        disk.snapshots.create(SNAPSHOT)
        names = [entry.name for entry in disk.snapshots]
        self.check(names == [SNAPSHOT], f"the image lists {names}")

    def write_in_guest(self, session: Session) -> None:
        """The guest writes the nonce of this run into a new file, and powers down."""
        self.title(f"The guest writes {self.nonce} into nonce.txt and powers down")
        data = self.nonce.encode()
        for start in range(0, len(data), 4):
            word = int.from_bytes(data[start : start + 4], "little")
            session.command(f"mw.l {WRITTEN_FROM + start:x} {word:08x}", PROMPT)
        said = session.command(
            f"fatwrite virtio 0 {WRITTEN_FROM:x} nonce.txt {len(data):x}", PROMPT
        )
        self.check(f"{len(data)} bytes written" in said, "the guest says that it has written")
        listing = session.command("ls virtio 0", PROMPT)
        self.check(f"{len(data)}   nonce.txt" in listing, "the guest lists nonce.txt")
        session.send("poweroff\r")
        session.wait_for_power_off()
        self.check(True, "the guest has powered the board off")

    # -- the witnesses -----------------------------------------------------------------------

    def files_seen_from_host(self) -> tuple[bytes | None, bytes | None]:
        """``nonce.txt`` and ``book.txt`` as other people's tools find them in the overlay."""
        raw = self.folder / "seen.raw"
        if self._qemu_img is not None:
            command = [self._qemu_img, "convert", "-f", "qcow2", "-O", "raw", str(self.overlay)]
            self._must(subprocess.run([*command, str(raw)], capture_output=True, check=False))
        else:
            second_reader.convert(self.overlay, raw)
        try:
            found = [self._mtool("mtype", raw, f"::{name}") for name in ("nonce.txt", "book.txt")]
        finally:
            raw.unlink()
        nonce, book = (None if one.returncode else one.stdout for one in found)
        return nonce, book

    def witness(self, *, written: bool) -> None:
        """The host's view of the overlay, after the writing or after going back."""
        reader = "qemu-img convert" if self._qemu_img else "the second reader"
        self.title(f"Seen from the host, by {reader} and mtools")
        nonce, book = self.files_seen_from_host()
        if written:
            self.check(nonce == self.nonce.encode(), f"nonce.txt holds {self.nonce}")
        else:
            self.check(nonce is None, "nonce.txt is gone")
        self.check(book == self.book, f"book.txt is whole, all {len(self.book)} bytes")

    def go_back(self) -> None:
        """Back to the snapshot."""
        self.title(f'Back to the snapshot "{SNAPSHOT}"')
        with pyvirtio.open_disk(self.overlay, format="qcow2") as disk:
            disk.snapshots.apply(SNAPSHOT)
        self.tell("done")

    def check_images(self) -> None:
        """The images are sound, and the base is what it was."""
        self.title("The images")
        now = file_hash(self.base)
        self.check(now == self._base_hash, f"the base is untouched: sha256 {now[:32]}...")
        for image in (self.base, self.overlay):
            with pyvirtio.open_disk(image, format="qcow2", read_only=True) as disk:
                result = disk.check()
            faults = (result.check_errors, result.corruptions, result.leaks)
            self.check(faults == (0, 0, 0), f"{image.name}: no corruption, no leak")
            if self._qemu_img is not None:
                command = [self._qemu_img, "check", "-f", "qcow2", str(image)]
                said = self._must(subprocess.run(command, capture_output=True, check=False))
                text = said.decode().splitlines()[0]
                self.check("No errors" in text, f"qemu-img check {image.name}: {text}")

    def run(self) -> None:
        """All of it. Raises DemoError, or what the parts raise, where something is wrong."""
        u_boot = self.find_tools()
        self.make_images()
        with pyvirtio.open_disk(self.overlay, format="qcow2") as disk:
            self.title("U-Boot on a RISC-V board in Python, the overlay in its virtio-mmio slot")
            board, session = self.boot(u_boot, disk)
            self.read_in_guest(session)
            self.snapshot(disk)
            self.write_in_guest(session)
            board.close()
        self.witness(written=True)
        self.check_images()
        self.go_back()
        self.witness(written=False)
        self.title("The guest again, on the disk that has gone back")
        with pyvirtio.open_disk(self.overlay, format="qcow2") as disk:
            board, session = self.boot(u_boot, disk)
            session.command("virtio scan", PROMPT)
            listing = session.command("ls virtio 0", PROMPT)
            self.check("book.txt" in listing, "the guest sees book.txt")
            self.check("nonce.txt" not in listing, "the guest sees no nonce.txt")
            board.close()
        self.check_images()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the process's exit status."""
    if arguments if arguments is not None else sys.argv[1:]:
        print(__doc__)
        return 2
    started = time.monotonic()
    demo = Demo(CACHE.with_name("demo-uboot"))
    try:
        demo.run()
    except (DemoError, ScriptError, PackageError, OSError, pyvirtio.PyvirtioError) as error:
        print(f"\ndemo-uboot: {error}", file=sys.stderr)
        return 1
    print(f"\nAll is as it should be. ({time.monotonic() - started:.1f} s; images: {demo.folder})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
