"""A Linux guest moves from one QEMU to another while its disk, ours over vhost-user, is in use.

Each QEMU has a server of its own; both have the same image, and the second gets it when the first
lets go. With ``PYVIRTIO_GUESTS`` only (``make interop-vhost``): QEMU 7.2 without KVM may itself
lose what a guest writes while it moves, see :mod:`support.vmm`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

import pyvirtio
from pyvirtio.errors import InUseError
from support.peers import requires
from support.qemu import qemu_img
from support.vmm import Server, Vmm, vhost_user_disk
from support.x86_guest import TOOLS as T
from support.x86_guest import Guest, fio

pytestmark = [
    requires("qemu-system-x86_64", "qemu-img", "mke2fs", "apt-get"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the guest's programs are amd64"),
]
MIB = 1 << 20
SIZE = 64 * MIB
LONG = bool(os.environ.get("PYVIRTIO_GUESTS"))


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    pyvirtio.create_disk(base, SIZE).close()
    pyvirtio.create_disk(path, SIZE, backing_file=base.name, backing_fmt="qcow2").close()
    yield path
    for image in (base, path):
        assert qemu_img("check", image).returncode == 0


class Hosts:
    """Hosts that a guest moves between, each with QEMU and a server on ``image``."""

    def __init__(self, guest: Guest, image: Path, *, packed: bool, cpus: int) -> None:
        self._guest, self._image, self._packed, self._cpus = guest, image, packed, cpus
        self._stack = ExitStack()
        self._count = 0
        self.server, self.vmm = self._start()
        self.vmm.boot()

    def _start(self, incoming: Path | None = None) -> tuple[Server, Vmm]:
        folder = self._image.with_name(f"host{self._count}")
        folder.mkdir()
        self._count += 1
        options = ("--migration", "--packed", "--queues", str(self._cpus))
        server = self._stack.enter_context(Server(self._image, folder, *options))
        vmm = Vmm(
            self._guest,
            vhost_user_disk(server, packed=self._packed, queues=self._cpus),
            cpus=self._cpus,
            monitor=folder / "qemu.sock",
            incoming=incoming,
        )
        return server, self._stack.enter_context(vmm)

    def move(self, meanwhile: Callable[[], object]) -> None:
        """Move the guest. ``meanwhile`` is done on the old host when all memory was copied once:
        what changes from then on has to be copied again."""
        server, vmm = self._start(self._image.with_name(f"way{self._count}"))
        self.vmm.start_migration(vmm)
        meanwhile()
        self.vmm.finish_migration()
        vmm.commands = self.vmm.commands
        self.vmm.kill()
        assert self.server.end() == 0
        self.server, self.vmm = server, vmm

    def begin_to_move(self) -> None:
        """Move the guest, and think better of it."""
        server, vmm = self._start(self._image.with_name(f"way{self._count}"))
        self.vmm.start_migration(vmm)
        self.vmm.command("migrate_cancel")
        vmm.kill()
        assert server.end() == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def moves(guest: Guest, overlay: Path, *, packed: bool, cpus: int, times: int) -> None:
    """A guest that writes and verifies all the while, and reads a file while its memory is copied:
    what the device puts into its memory then must be there afterwards. One that moves often
    begins to move before, too, and stays."""
    with Hosts(guest, overlay, packed=packed, cpus=cpus) as hosts:
        run = lambda command: hosts.vmm.run(command)  # noqa: E731
        run(f"{T}/mke2fs -q -F -t ext4 /disk && mount /disk /mnt && cd /mnt")
        run("dd if=/dev/urandom of=kept bs=64k count=64 && sha1sum kept > /tmp/sums && sync")
        work = fio("checked", MIB).replace("checked", "checked$number")
        for _ in range(times):
            run("echo 3 > /proc/sys/vm/drop_caches; rm -f /tmp/stop checked*")
            run("dd if=/dev/zero of=/tmp/fill bs=1M count=100 && rm /tmp/fill")  # it is forgotten
            run(
                "(number=0; while [ ! -e /tmp/stop ]; do number=$((number + 1)); "
                f"{work} || exit 1; done) & worker=$!"
            )
            if times > 1:
                hosts.begin_to_move()
            hosts.move(lambda: run("cat kept > /dev/null"))
            with pytest.raises(InUseError):
                pyvirtio.open_disk(overlay)
            run("sha1sum -c /tmp/sums")
            run("touch /tmp/stop && wait $worker")
        run("sync; echo 3 > /proc/sys/vm/drop_caches; sha1sum -c /tmp/sums")
        run(f"cd / && umount /mnt && {T}/e2fsck -f -n /disk")
        hosts.vmm.power_off()
        assert hosts.server.end() == 0


if LONG:

    def test_a_guest_moves_with_what_its_disk_put_into_its_memory(
        guest: Guest, overlay: Path
    ) -> None:
        moves(guest, overlay, packed=False, cpus=1, times=1)

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_guest_moves_there_and_back_again(guest: Guest, overlay: Path, packed: bool) -> None:
        moves(guest, overlay, packed=packed, cpus=2, times=3)
