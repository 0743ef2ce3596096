"""``pyvirtio-serve``: its command line, and a server from its start to its end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import pyvirtio
from pyvirtio.errors import InUseError
from pyvirtio.virtio.driver import BlockDriver, DriverError, Link, SharedRam, VhostUserFrontEnd
from pyvirtio.virtio.driver.vhost_user import connect
from pyvirtio.virtio.vhost_user.layout import Request
from support.vmm import Server

PROGRAM = (sys.executable, "-m", "pyvirtio.tools.serve")


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    pyvirtio.create_disk(path, 1 << 20).close()
    return path


def test_version_is_told_without_loading_anything_else() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--version']\n"
        "from pyvirtio.tools.serve import main; main()\n"
        "print(*(name for name in sys.modules if name.startswith('pyvirtio.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, modules = done.stdout.splitlines()
    assert version.endswith(pyvirtio.__version__)
    assert not {name for name in modules.split() if ".virtio" in name or ".qcow2" in name}


def test_capabilities_are_printed_as_qemu_wants_them() -> None:
    done = serve("vhost-user-blk", "--print-capabilities")
    assert json.loads(done.stdout)["type"] == "block"


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["vhost-user-blk"], ["vhost-user-blk", "--socket", "x"]],
)
def test_a_wrong_command_line_ends_with_status_2(arguments: list[str]) -> None:
    done = serve(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage" in done.stderr


def test_an_image_that_is_not_there_ends_with_a_message(tmp_path: Path) -> None:
    done = serve("vhost-user-blk", "--socket", str(tmp_path / "s"), str(tmp_path / "none"))
    assert done.returncode == 1
    assert "No such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_is_served_and_flushed_at_the_end(image: Path, tmp_path: Path) -> None:
    ram = SharedRam(1 << 20)
    with (
        Server(image, tmp_path, "--queues", "2", "--packed") as server,
        VhostUserFrontEnd.connect(server.socket, ram) as front,
    ):
        driver = BlockDriver(front, ram.memory, ram.arena(), wait=front.wait)
        driver.start()
        assert front.num_queues == 2
        driver.write(3, b"x" * 512)
        assert server.end() == 0
        assert not server.socket.exists()
    with pyvirtio.open_disk(image) as disk:
        assert disk.read(3 * 512, 512) == b"x" * 512


def test_nothing_that_was_done_is_lost_with_a_server_that_is_killed(
    image: Path, tmp_path: Path
) -> None:
    ram = SharedRam(1 << 20)
    with Server(image, tmp_path, "--packed") as server:
        with VhostUserFrontEnd.connect(server.socket, ram) as front:
            driver = BlockDriver(front, ram.memory, ram.arena(), wait=front.wait)
            driver.start()
            for round in range(5):
                driver.write(200 * round, b"x" * 512)  # in a new cluster, and not flushed
                if round % 3 == 0:
                    server.kill()
                    front.reconnect(server.socket)
                assert driver.read(200 * round, 1) == b"x" * 512
        assert server.end() == 0


def test_a_monitor_takes_no_files_place(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    arguments = ("--socket", str(tmp_path / "s"), "--monitor", str(image), str(image))
    done = serve("vhost-user-blk", *arguments)
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert image.read_bytes() == before
    assert not (tmp_path / "s").exists()


def is_free(image: Path) -> bool:
    """Nobody holds the image."""
    try:
        pyvirtio.open_disk(image).close()
    except InUseError:
        return False
    return True


def test_an_image_that_may_move_is_held_while_its_queues_run(image: Path, tmp_path: Path) -> None:
    ram = SharedRam(1 << 20)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        Server(image, tmp_path / "one", "--migration") as one,
        Server(image, tmp_path / "two", "--migration") as two,
    ):
        assert is_free(image)
        with VhostUserFrontEnd.connect(one.socket, ram) as front:
            driver = BlockDriver(front, ram.memory, ram.arena(), wait=front.wait)
            driver.start()
            driver.write(1000, b"x" * 512)  # in a new cluster, and not flushed
            assert not is_free(image)
            one.command("block_resize", size=2 << 20)
            with pytest.raises(RuntimeError, match="not held"):
                two.command("block_resize", size=3 << 20)
            front.stop_queue(front.vrings[0])
            assert is_free(image)
            front.reconnect(two.socket)  # it goes on there
            assert driver.read(1000, 1) == b"x" * 512
            assert driver.capacity == (2 << 20) // 512
            assert not is_free(image)
        assert two.end() == 0
        assert one.end() == 0


def test_queues_are_not_started_while_another_server_holds_the_image(
    image: Path, tmp_path: Path
) -> None:
    ram = SharedRam(1 << 20)
    with Server(image, tmp_path, "--migration") as server, pyvirtio.open_disk(image):
        with VhostUserFrontEnd.connect(server.socket, ram) as front:
            driver = BlockDriver(front, ram.memory, ram.arena(), wait=front.wait)
            with pytest.raises(DriverError, match="refuses message 12"):
                driver.start()
            assert driver.capacity == (1 << 20) // 512
        assert server.end() == 0


def test_the_monitor_resizes_the_disk_and_refuses_nonsense(image: Path, tmp_path: Path) -> None:
    with Server(image, tmp_path) as server:
        server.command("block_resize", size=2 << 20)
        assert server.command("query-block")[0]["inserted"]["image"]["virtual-size"] == 2 << 20
        with pytest.raises(RuntimeError, match="'size'"):
            server.command("block_resize", size="big")
        with pytest.raises(RuntimeError, match="not been found"):
            server.command("device_add")
        server.command("quit")
        assert server.wait() == 0


def test_a_read_only_server_changes_nothing(image: Path, tmp_path: Path) -> None:
    image.chmod(0o400)
    before = image.read_bytes()
    with Server(image, tmp_path, "--read-only") as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.socket))
        assert server.end() == 0
    assert image.read_bytes() == before


def test_a_connected_descriptor_and_a_passed_listener_are_served(
    image: Path, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [*PROGRAM, "vhost-user-blk", "--fd", str(theirs.fileno()), str(image)],
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    link = Link(ours)
    assert link.ask_u64(Request.GET_FEATURES)
    link.close()  # with its only front-end, the server ends
    assert process.wait(60) == 0
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "listens.sock"))
        listener.listen()
        process = subprocess.Popen(
            [*PROGRAM, "vhost-user-blk", "--fd", str(listener.fileno()), str(image)],
            pass_fds=[listener.fileno()],
        )
        for _ in range(2):  # one front-end after the other
            link = connect(tmp_path / "listens.sock")
            assert link.ask_u64(Request.GET_FEATURES)
            link.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "passed.sock"))
        listener.listen()
        code = (
            f"import os, sys; os.dup2({listener.fileno()}, 3); os.environ['LISTEN_FDS'] = '1'\n"
            "os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, *PROGRAM, "vhost-user-blk", str(image)],
            pass_fds=[listener.fileno()],
        )
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_path / "passed.sock"))
        link = Link(client)
        assert link.ask_u64(Request.GET_FEATURES)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        link.close()
